# make demo | test | lint, each from nothing but Python: they set up a virtual environment first.
# VENV=… uses another one, which may exist already.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.texp-ready

.PHONY: demo test lint clean

demo: $(READY)
	$(BIN)/texp demo

test: $(READY)
	$(BIN)/pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch is installed by its exact version, and only where none is there: a range could fetch gigabytes.
$(READY): setup.py pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install "torch==2.13.0"
	$(BIN)/pip install "setuptools>=70.1"
	$(BIN)/pip install --no-build-isolation -e ".[demo,test]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info

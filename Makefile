# make demo | paper | test | integration | lint, each from nothing but Python: they set up a virtual environment first.
# VENV=… uses another one, which may exist already; TEXP_NATIVE and TEXP_CUDA as in README.
# make matrix: whether the C++ core can be built for every torch; make sanitize: it under sanitizers.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export TEXP_NATIVE ?= auto
export TEXP_CUDA ?= auto
export PATH := $(abspath $(BIN)):$(PATH)

ifneq ($(words $(VENV)),1)
$(error VENV must name one folder, without spaces; got '$(VENV)')
endif

# When this checkout was last set up for the environment. What it was told to build is not part of that: the core is
# built again when it is needed for something else, whatever that is (texp/native/build.py).
READY := .ready-$(subst /,-,$(VENV))

.PHONY: demo paper test integration lint matrix sanitize clean

demo: $(READY)
	$(BIN)/texp demo

# The paper's experiments on digits: minutes on two cores. It goes on from checkpoints in build/paper; `rm -r build/paper`
# starts again.
PAPER_RESULTS := benchmarks/paper/results
paper: $(READY)
	$(BIN)/python -m benchmarks.paper all --out build/paper
	mkdir -p $(PAPER_RESULTS)
	cp build/paper/*.png build/paper/*.csv $(PAPER_RESULTS)

# Several processes, since most tests are of one thread.
PROCESSES ?= auto
test: $(READY)
	$(BIN)/pytest -n $(PROCESSES) --maxprocesses 4

# texp.SGD in the frameworks that it is used in, at the versions of README's table; some 300 MB to download.
integration: $(READY)
	$(BIN)/pip install "torch==2.13.0" -e ".[integration]" --no-build-isolation
	$(BIN)/pytest tests/integration

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Each torch that the C++ core is for, from the headers of its wheel: make matrix TORCH="2.6.0 2.14.1" takes two of them,
# WHEELS=… keeps them elsewhere (about 500 MB each; downloading one takes up to 2 GB more for a while). It needs a C++
# compiler, binutils and the headers of Python, but no environment, and takes a minute or two besides the downloads.
TORCH ?= 2.6.0 2.7.1 2.8.0 2.9.1 2.10.0 2.11.0 2.12.0 2.13.0 2.14.1
WHEELS ?= build/wheels
matrix:
	$(PYTHON) -m benchmarks.matrix --cache $(WHEELS) $(TORCH)

# torch and Triton are installed by their exact versions, and only where there are none: a range, like that of the package
# itself, would fetch the newest. A torch for GPUs has brought a Triton that fits.
$(READY): setup.py pyproject.toml Makefile
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch; assert torch.__version__ >= (2, 6)" 2>/dev/null || $(BIN)/pip install "torch==2.13.0"
	$(BIN)/python -c "import sys; sys.platform == 'linux' and __import__('triton')" 2>/dev/null || $(BIN)/pip install "triton==3.6.0"
	$(BIN)/pip install "setuptools>=77" ninja
	TEXP_NATIVE=auto TEXP_CUDA=auto $(BIN)/pip install --no-build-isolation -e ".[demo,test]"
	touch $@

clean:
	rm -rf .venv .ready* build dist *.egg-info texp/_native

# The C++ core under AddressSanitizer and UndefinedBehaviorSanitizer, without Triton, whose interpreter is slow. Leaks are
# not looked for: Python has its own.
SANITIZED_TESTS := $(addprefix tests/,$(addsuffix .py,backends/test_core backends/test_rows step/test_host step/test_edits \
	step/test_cache test_refusals test_optimizer test_sparse test_amp test_state_dicts))
sanitize: export TEXP_NATIVE = 1
sanitize: export TEXP_SANITIZE = address,undefined
sanitize: $(READY)
	$(BIN)/python setup.py -q build_ext --inplace
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	$(BIN)/pytest -q -m "not slow" -k "not triton" $(SANITIZED_TESTS)

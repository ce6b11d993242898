"""What is installed, and that the README says what is."""

import importlib.metadata
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import texp
from texp.cli import run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_version_and_changelog():
    assert importlib.metadata.version("texp") == texp.__version__
    assert re.search(rf"^## {re.escape(texp.__version__)}", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_kernels_are_part_of_texp_alone():
    """There is another package `kernels` on PyPI: the name stays free."""
    assert importlib.util.find_spec("texp.kernels") is not None
    assert importlib.metadata.distribution("texp").read_text("top_level.txt").split() == ["texp"]
    done = subprocess.run([sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True)
    assert "is imported as texp.kernels, not as kernels" in done.stderr


@pytest.mark.slow
def test_a_wheel_holds_both_packages(tmp_path):
    for folder in ("texp", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("texp-*.whl")
    names = subprocess.run([sys.executable, "-m", "zipfile", "-l", wheel], capture_output=True, text=True).stdout
    assert "texp/kernels/__init__.py" in names
    assert "texp/optimizer.py" in names
    assert not re.search(r"^kernels/", names, re.MULTILINE)


def test_theory_imports_nothing_but_the_standard_library():
    code = "import sys, runpy; runpy.run_path('texp/theory.py'); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


class TestReadme:
    def test_its_python_runs(self):
        assert blocks("python")
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), {})

    def test_every_command_is_run(self, tmp_path, monkeypatch):
        """Commands of texp are run here; `make` targets by CI; the rest by the Makefile, word for word."""
        monkeypatch.chdir(tmp_path)
        ci, makefile = (ROOT / ".ci" / "run").read_text(), (ROOT / "Makefile").read_text()
        commands = [line for block in blocks("sh") for line in block.splitlines() if line]
        assert commands
        for command in commands:
            program, *arguments = shlex.split(command, comments=True)
            plain = command.split("#")[0].strip()
            if program == "texp" and arguments != ["demo"]:
                assert run(arguments) == 0
            elif program == "make":
                assert plain.split(" VENV=")[0] in ci
            else:
                assert plain in makefile.replace("$(BIN)/", "")

    def test_its_files_exist(self):
        """What it links to and what its map of the repository names."""
        links = re.findall(r"\]\(([^)#:]+)\)", README)
        paths = re.findall(r"^    (\S+/|\S+\.\w+)  ", README, re.MULTILINE)
        assert links
        assert paths
        for path in (*links, *paths):
            assert (ROOT / path).exists(), path

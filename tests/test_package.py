"""What is installed, and that the README says what is."""

import ast
import csv
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import texp
from texp.cli import run
from texp.shapes import MODELS

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


def copy_of_the_sources(to: Path) -> Path:
    for folder in ("csrc", "texp", "kernels"):
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / file, to)
    return to


@pytest.mark.slow
@pytest.mark.parametrize("native", ["0", "1"])
def test_installed_elsewhere(tmp_path, native):
    """Not editable, run from another folder: with and without the C++ core, and `kernels` stays free."""
    if native == "1" and shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    sources, site = copy_of_the_sources(tmp_path / "sources"), tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", site, sources]
    subprocess.run(command, env={**os.environ, "TEXP_NATIVE": native}, check=True, capture_output=True)
    assert not (site / "kernels").exists()
    code = (
        "import torch, texp, texp.kernels; p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3); "
        "texp.SGD([p], lr=0.5).step(); print(texp.__file__, p.sum().item(), texp.backends.available()['cpu'])"
    )
    # -S: without the .pth files of this environment, in which texp may be installed as editable.
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{sysconfig.get_path('purelib')}"}
    environment.pop("TEXP_NATIVE", None)
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd="/", env=environment, capture_output=True, text=True
    )
    file, total, reason = done.stdout.split(maxsplit=2)
    assert file == str(site / "texp" / "__init__.py")
    assert total == "1.5"
    assert ("ok" if native == "1" else "is not part of this installation") in reason


@pytest.mark.parametrize(
    ("environment", "code", "message"),
    [
        ({"TEXP_NATIVE": "yes"}, 1, "TEXP_NATIVE must be auto, 1 or 0, got 'yes'"),
        ({"TEXP_NATIVE": "1", "CXX": "no-such-compiler"}, 1, "asks for the C++ core, but there is no C++ compiler"),
        ({"TEXP_NATIVE": "auto", "CXX": "no-such-compiler"}, 0, "installing without the C++ core: there is no C++"),
    ],
    ids=["unknown", "required", "auto"],
)
def test_a_build_that_cannot_have_the_core(tmp_path, environment, code, message):
    sources = copy_of_the_sources(tmp_path / "sources")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build")],
        cwd=sources,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert message in done.stderr


def test_theory_imports_nothing_but_the_standard_library():
    tree = ast.parse((ROOT / "texp" / "theory.py").read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"math", "collections.abc", "typing"}


# Of the table of speed: what its columns show of the records, and rows that do not begin with the name of the model.
SPEED_COLUMNS = (
    ("torch fused", "median_us"),
    ("texp cpu", "median_us"),
    ("texp cpu", "speedup_over_torch_fused"),
    ("texp cpu exponential", "speedup_over_torch_fused"),
)
OTHER_LABELS = {
    "465 parameter groups of one tiny tensor": "465 tiny groups",
    "one tensor of 50 M": "one of 50 M",
}


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

    def test_its_table_of_speed_is_that_of_the_records(self):
        """Every figure is one of the CSV, rounded to the digits that it has."""
        with (ROOT / "benchmarks" / "results" / "cpu" / "step_time.csv").open() as file:
            records = {(record["model"], record["candidate"]): record for record in csv.DictReader(file)}
        table = README.split("\n## Speed\n")[1].split("\n## ")[0]
        models = set()
        for label, *cells in re.findall(r"^\| (\w.*?) \| (\d.*?) \| (\d.*?) \| (\d.*?) \| (\d.*?) \|$", table, re.M):
            model = next(name for name in MODELS if OTHER_LABELS.get(label, label).startswith(name))
            models.add(model)
            for cell, (candidate, field) in zip(cells, SPEED_COLUMNS, strict=True):
                number, _, unit = cell.replace(",", "").partition(" ")
                recorded = float(records[model, candidate][field]) / {"ms": 1000, "µs": 1, "": 1}[unit]
                half_a_digit = 0.5 * 10.0 ** -len(number.partition(".")[2])
                assert abs(float(number) - recorded) <= half_a_digit * (1 + 1e-9), (label, cell, recorded)
        assert models == set(MODELS)

    def test_its_files_exist(self):
        """What it links to and what its map of the repository names."""
        links = re.findall(r"\]\(([^)#:]+)\)", README)
        paths = re.findall(r"^    (\S+/|\S+\.\w+)  ", README, re.MULTILINE)
        assert links
        assert paths
        for path in (*links, *paths):
            assert (ROOT / path).exists(), path

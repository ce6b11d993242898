"""benchmarks/gpu_check.sh without a GPU: what it would run on a machine that has one, and what it refuses."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_package import ROOT, copy_of_the_sources, environment
from texp import backends
from texp.native import build

SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"

# Of a machine with a GPU, as far as the script can tell: nothing runs, and what timeout is asked to run is noted.
PROGRAMS = {
    "timeout": 'printf "%s\\0" "$2" "plugins $PYTEST_DISABLE_PLUGIN_AUTOLOAD" "$@" END >>"$NOTES"',
    "nproc": 'test -z "$OMP_NUM_THREADS" && echo "$CORES"',
    "compute-sanitizer": "exit 1",
    "python": r"""
case "$2" in
*find_spec*) shift 2; for name; do case " $ABSENT " in *" $name "*) exit 1 ;; esac; done ;;
*available*) printf 'cuda\tok\ntriton\tok\n' ;;
esac
""",
}


WITHOUT = {"TEXP_PREBUILT": ""}


class Machine:
    def __init__(self, folder: Path) -> None:
        (folder / "bin").mkdir()
        for name, body in PROGRAMS.items():
            (folder / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
            (folder / "bin" / name).chmod(0o755)
        self.folder = folder

    def runs(self, cores: int = 16, absent: str = "", **changes: str) -> list[tuple[int, str, list[str]]]:
        """The limit of every stage in seconds, whether pytest is to load plugins by itself, and the command."""
        path = os.pathsep.join((str(self.folder / "bin"), os.environ["PATH"]))
        changes |= {"PATH": path, "PYTHON": "python", "NOTES": str(self.folder / "notes"), "OMP_NUM_THREADS": "1"}
        changes |= {"CORES": str(cores), "ABSENT": absent, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": ""}
        command = ["bash", SCRIPT, self.folder / "out"]
        done = subprocess.run(command, env=environment(**WITHOUT | changes), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        asked = [call.split("\0") for call in (self.folder / "notes").read_text().split("\0END\0")[:-1]]
        return [(int(limit), plugins, command) for limit, plugins, _, _, *command in asked]

    def stages(self) -> list[list[str]]:
        return [line.split("\t") for line in (self.folder / "out" / "stages.txt").read_text().splitlines()]


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def test_it_takes_less_than_eight_minutes(machine):
    limits = [limit for limit, _, _ in machine.runs()]
    assert len(limits) == len(machine.stages()) == 7
    assert sum(limits) < 8 * 60


@pytest.mark.parametrize(
    ("cores", "absent", "parallel"),
    [
        (16, "", ["-p", "xdist.plugin", "-n", "10"]),
        (4, "", ["-p", "xdist.plugin", "-n", "4"]),
        (1, "", []),
        (16, "xdist", []),
    ],
)
def test_how_many_processes_test(machine, cores, absent, parallel):
    _, plugins, command = next(run for run in machine.runs(cores, absent) if "pytest" in run[2])
    assert plugins == "plugins 1"
    assert command[:6] == ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    assert command[6 : command.index("-m", 3)] == parallel


def test_a_core_that_was_brought_along(machine):
    """It is not asked here what it is worth: see below."""
    commands = [command for _, _, command in machine.runs(TEXP_PREBUILT="made/torch-2.13.0-cuda-0123/_C.so")]
    assert not any("setup.py" in command for command in commands)
    assert machine.stages()[0] == ["build", "prebuilt", "0", "torch-2.13.0-cuda-0123"]
    assert any("setup.py" in command for _, _, command in machine.runs())


def check(script: Path, out: Path, **changes: str) -> str:
    """What it says on stderr where it refuses to begin."""
    changes = WITHOUT | {"PYTHON": sys.executable} | changes
    done = subprocess.run(["bash", script, out], env=environment(**changes), capture_output=True, text=True)
    assert done.returncode == 2
    return done.stderr


def test_it_needs_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert check(SCRIPT, tmp_path).startswith("gpu_check.sh needs a GPU that torch can use, but ")


ARCHS = "72"  # so that the name of the core is that of no other


@pytest.mark.parametrize(
    ("folder", "file", "why"),
    [
        (
            None,
            "_C.cpython-399-x86_64-linux-gnu.so",
            "it is for another Python: for this one it would be called {}",
        ),
        ("torch-2.13.0-cuda-0123", None, "it is of other sources, for another torch or other TEXP_CUDA_ARCHS: its "),
        (None, None, "it does not load: "),
    ],
    ids=["another Python", "other sources", "no library"],
)
def test_a_core_that_it_cannot_use(tmp_path, monkeypatch, folder, file, why):
    """It says so at once, in one line, before it looks for a GPU."""
    monkeypatch.setenv("TEXP_CUDA_ARCHS", ARCHS)
    name = build.core_name(True)
    core = tmp_path / (folder or name) / (file or build.CORE_FILE)
    core.parent.mkdir()
    core.write_text("no library")
    said = check(SCRIPT, tmp_path / "out", TEXP_PREBUILT=str(core), TEXP_CUDA_ARCHS=ARCHS)
    assert said.startswith(f"gpu_check.sh cannot use {core}: {why.format(build.CORE_FILE)}")
    assert said.count("\n") == 1
    assert not (build.PACKAGE / build.CORES / name).exists()


def test_a_core_that_is_not_there(tmp_path):
    said = check(SCRIPT, tmp_path / "out", TEXP_PREBUILT=str(tmp_path / build.CORE_FILE))
    assert said == f"gpu_check.sh cannot use {tmp_path / build.CORE_FILE}: there is no such file\n"


def test_it_puts_a_core_where_texp_looks_for_it(tmp_path, monkeypatch):
    """Under the name for these TEXP_CUDA_ARCHS; a path that is not absolute is one from where it was called."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, on which all of it would run")
    if backends.core() is None:
        pytest.skip(backends.available()["cpu"])
    sources = copy_of_the_sources(tmp_path / "sources")
    monkeypatch.setenv("TEXP_CUDA_ARCHS", ARCHS)
    name = build.core_name(True)
    (tmp_path / name).mkdir()
    core = shutil.copy(backends.core().__file__, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    given = os.path.relpath(core, tmp_path)
    said = check(
        sources / "benchmarks" / "gpu_check.sh", tmp_path / "out", TEXP_PREBUILT=given, TEXP_CUDA_ARCHS=ARCHS
    )
    assert said.startswith("gpu_check.sh needs a GPU")
    (found,) = (sources / "texp" / build.CORES / name).iterdir()
    assert found.read_bytes() == Path(core).read_bytes()
    assert found.name == build.CORE_FILE

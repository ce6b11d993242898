"""The core on its first use: built once for all, rebuilt for another torch, and done without where it cannot be had.

What a compiler takes most of the time for is left out: one in its place logs that it was called and, when it is to
link, hands out the core of this environment. tests/test_package.py has the first use with a real one.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

import texp
from tests.test_package import copy_of_the_sources, environment

CORE = texp.native.core()
needs_core = pytest.mark.skipif(CORE is None, reason="there is no C++ core to stand for what a compiler makes")

REAL_COMPILER = shutil.which("c++") or "/none"

COMPILER = f"""#!{sys.executable} -S
import os, shutil, sys, time
arguments = sys.argv[1:]
if "-o" not in arguments:  # a question of torch's
    os.execv({REAL_COMPILER!r}, ["c++", *arguments])
with open({{log!r}}, "a") as log:
    print("compile" if "-c" in arguments else "link", file=log)
while os.path.exists({{hangs!r}}):
    time.sleep(0.1)
if os.path.exists({{too_old!r}}):
    sys.exit("In a file\\nc++: error: unrecognized command line option '-std=c++20'\\nc++: error: another")
made = arguments[arguments.index("-o") + 1]
open(made, "w") if "-c" in arguments else shutil.copy({{core!r}}, made)
"""

# Takes a step, and prints what a test asks of it.
STEP = """
import json, sys, warnings
import torch
torch.__version__ += sys.argv[1]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import texp
    for _ in range(2):
        p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        p.grad = torch.ones_like(p)
        texp.SGD([p], lr=0.25, weight_decay=1).step()
core = texp.native.core()
print(json.dumps({
    "stepped": p.tolist(),
    "core": core and core.__file__,
    "warnings": [str(w.message) for w in caught],
    "available": texp.backends.available()["cpu"],
}))
"""


class Place(NamedTuple):
    """An installation without a core, an empty cache and a compiler, in a folder of their own."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> "Place":
        copy_of_the_sources(folder / "sources")
        place = cls(folder)
        place.write_compiler("c++")
        return place

    def write_compiler(self, name: str) -> Path:
        switches = {name: str(self.folder / name) for name in ("log", "hangs", "too_old")}
        path = self.folder / name
        path.write_text(COMPILER.format(core=CORE and CORE.__file__, **switches))
        path.chmod(0o755)
        return path

    def turn(self, switch: str, on: bool) -> None:
        """`hangs` or `too_old`, of the compiler."""
        path = self.folder / switch
        path.touch() if on else path.unlink()

    @property
    def calls(self) -> list[str]:
        log = self.folder / "log"
        return sorted(log.read_text().split()) if log.exists() else []

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def start(self, *command: str, **changes: str) -> subprocess.Popen:
        changes = {
            "CXX": str(self.folder / "c++"), "TEXP_CUDA": "0", "TORCH_EXTENSIONS_DIR": str(self.cache)
        } | changes  # fmt: skip
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=self.folder / "sources",
            env=environment(**changes),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def step(self, version: str = "", **changes: str) -> tuple[dict, str]:
        """What STEP prints, and stderr; version: added to torch's."""
        return told(self.start("-c", STEP, version, **changes))


def told(process: subprocess.Popen) -> tuple[dict, str]:
    out, err = process.communicate()
    assert process.returncode == 0, err
    found = json.loads(out)
    assert found["stepped"] == [0.5] * 3
    return found, err


BUILDING = re.compile(r"^texp: building the C\+\+ core for torch .* and Python .*, once: about .*$", re.MULTILINE)
ONE_BUILD = ["compile", "compile", "link"]


@pytest.fixture
def place(tmp_path) -> Place:
    return Place.make(tmp_path)


@needs_core
def test_processes_that_start_at_once_build_once(place):
    processes = [place.start("-c", STEP, "") for _ in range(8)]
    found, errors = zip(*map(told, processes), strict=True)
    assert place.calls == ONE_BUILD
    assert sum(len(BUILDING.findall(error)) for error in errors) == 1
    (core,) = {run["core"] for run in found}
    assert Path(core).is_relative_to(place.cache / "texp")
    assert {run["available"] for run in found} == {"ok"}
    assert not any(run["warnings"] for run in found)

    later, said = place.step()
    assert (later["core"], said) == (core, "")
    assert place.calls == ONE_BUILD


@needs_core
def test_another_torch_gets_a_core_of_its_own(place):
    cores = {version: place.step(version)[0]["core"] for version in ("", "+another")}
    assert len(set(cores.values())) == 2
    assert place.calls == sorted(2 * ONE_BUILD)
    assert {version: place.step(version)[0]["core"] for version in cores} == cores
    assert place.calls == sorted(2 * ONE_BUILD)


@needs_core
def test_a_killed_build_leaves_nothing_that_a_later_one_trips_over(place):
    place.turn("hangs", True)
    process = place.start("-c", STEP, "")
    while "compile" not in place.calls:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (folder,) = (place.cache / "texp").iterdir()
    assert len(list(folder.glob("building-*"))) == 1
    assert not list(folder.glob("_C*"))

    place.turn("hangs", False)
    found, said = place.step()
    assert BUILDING.search(said)
    assert not found["warnings"]
    assert found["core"] == str(next(folder.glob("_C*")))
    assert not list(folder.glob("building-*"))


INTERRUPTIONS = {
    "the compiler is killed": "print('c++: fatal error: Killed signal terminated program cc1plus'); sys.exit(1)",
    "the disk is full": "print('as: error: writing a.o: No space left on device'); sys.exit(1)",
    # All hear of Ctrl-C, but the process that trains does something else with it.
    "SIGINT": "import signal; os.killpg(0, signal.SIGINT); time.sleep(10)",
}


@needs_core
@pytest.mark.parametrize("case", INTERRUPTIONS)
def test_what_only_interrupts_a_build_is_not_remembered(place, case):
    interrupted = place.folder / "interrupted-c++"
    question = f"if '-o' not in sys.argv: os.execv({REAL_COMPILER!r}, ['c++', *sys.argv[1:]])"
    interrupted.write_text(f"#!{sys.executable} -S\nimport os, sys, time\n{question}\n{INTERRUPTIONS[case]}\n")
    interrupted.chmod(0o755)
    code = f"import signal; signal.signal(signal.SIGINT, lambda *signal: None)\n{STEP}"
    for _ in range(2):
        found, said = told(place.start("-c", code, "", CXX=str(interrupted)))
        assert found["core"] is None
        assert len(found["warnings"]) == 1
        assert BUILDING.search(said)


@needs_core
def test_a_core_that_does_not_load_is_built_again(place):
    core = Path(place.step()[0]["core"])
    core.write_bytes(b"not a library")
    found, said = place.step()
    assert found["core"] == str(core)
    assert BUILDING.search(said)
    assert place.calls == sorted(2 * ONE_BUILD)


def test_a_compiler_that_is_too_old(place):
    """It is tried once, and again when `texp build` asks for it, or when there is another."""
    place.turn("too_old", True)
    why = "compiling it failed: c++: error: unrecognized command line option '-std=c++20' (all of it: "
    for attempt in (1, 2):
        found, said = place.step()
        assert len(found["warnings"]) == 1
        assert found["warnings"][0].startswith(f"texp goes on without its C++ core: {why}{place.cache}")
        assert found["available"].startswith(f"there is no C++ core: {why}")
        assert found["core"] is None
        assert bool(BUILDING.search(said)) == (attempt == 1)
        assert set(place.calls) == {"compile"}
        assert len(place.calls) <= 2  # at once; the first to fail may stop the other
    before = len(place.calls)
    ahead = place.start("-m", "texp", "build")
    _, said = ahead.communicate()
    assert ahead.returncode == 1
    assert f"texp: the C++ core cannot be built: {why}" in said
    assert len(place.calls) > before

    if CORE is not None:
        place.turn("too_old", False)
        found, _ = place.step(CXX=str(place.write_compiler("another c++").rename(place.folder / "another-c++")))
        assert not found["warnings"]
        assert found["core"] is not None


UNUSABLE = {
    "no compiler": ({"CXX": "no-such-compiler"}, "there is no C++ compiler 'no-such-compiler'"),
    "no folder can be made": (
        {"TORCH_EXTENSIONS_DIR": "setup.py"},
        "setup.py/texp cannot be used (Not a directory); ",
    ),
    "a read-only folder": ({"TORCH_EXTENSIONS_DIR": "/proc/self"}, "/proc/self/texp cannot be used ("),
    # As in the folder of another user, there is no asking whether a file is there.
    "a folder that cannot be looked into": (
        {"TORCH_EXTENSIONS_DIR": "x" * 300},
        f"{'x' * 300}/texp cannot be used (File name too long); ",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_without_a_core_there_is_one_warning_and_the_steps_are_right(place, case):
    changes, why = UNUSABLE[case]
    found, said = place.step(**changes)
    (warning,) = found["warnings"]
    assert warning.startswith(f"texp goes on without its C++ core: {why}")
    assert found["core"] is None
    assert not place.calls
    assert said == ""
    assert found["available"].startswith("there is no C++ core: ")


@pytest.mark.parametrize("variable", ["TEXP_NATIVE", "TEXP_CUDA"])
def test_what_is_insisted_on_is_an_error_where_it_is_missing(place, variable):
    process = place.start("-c", STEP, "", CXX="no-such-compiler", **{variable: "1"})
    _, said = process.communicate()
    assert process.returncode == 1
    part = {"TEXP_NATIVE": "the C++ core", "TEXP_CUDA": "the CUDA kernel"}[variable]
    why = f"{variable}=1 asks for {part}, but there is no C++ compiler 'no-such-compiler'"
    assert f"MissingError: {why}" in said
    command = ("-m", "texp", "bench", "--models", "ResNet-32", "--seconds", "0")
    process = place.start(*command, CXX="no-such-compiler", **{variable: "1"})
    assert process.communicate()[1] == f"texp: {why}\n"
    assert process.returncode == 1


def test_threads_that_start_at_once_warn_once(place):
    code = """
import threading, torch, texp
make = lambda: texp.SGD([torch.nn.Parameter(torch.ones(3))])
threads = [threading.Thread(target=make) for _ in range(8)]
for thread in threads: thread.start()
"""
    _, said = place.start("-W", "always", "-c", code, CXX="no-such-compiler").communicate()
    assert said.count("texp goes on without its C++ core") == 1


@needs_core
def test_odd_entries_of_the_path(place):
    """Python skips those that are no strings, and so does the process that builds."""
    found, _ = told(place.start("-c", f"import pathlib, sys; sys.path[:0] = [pathlib.Path('/')]\n{STEP}", ""))
    assert found["core"] is not None
    assert not found["warnings"]


@needs_core
def test_a_folder_whose_name_is_no_text(place):
    """torch cannot compile there; this is no error."""
    found, _ = place.step(TORCH_EXTENSIONS_DIR=f"{place.cache}-" + os.fsdecode(b"\xff"))
    assert len(found["warnings"]) == 1


@needs_core
def test_a_package_behind_a_link(place):
    """The sources, and the Triton kernels, are beside what it points to."""
    site = place.folder / "site"
    site.mkdir()
    (site / "texp").symlink_to(place.folder / "sources" / "texp")
    code = f"import os, sys; os.chdir('/'); sys.path[0] = {str(site)!r}\n{STEP}"
    code += "\ntexp.backends.triton.import_kernels()"
    found, _ = told(place.start("-c", code, "", TRITON_INTERPRET="1"))
    assert found["core"] is not None


@needs_core
def test_setuptools_is_left_to_the_process_that_builds(place):
    """It takes the place of distutils when it is imported, and warns where there is one already."""
    found, _ = told(place.start("-c", f"import sys; sys.modules['setuptools'] = None\n{STEP}", ""))
    assert found["core"] is not None


@needs_core
def test_the_gpus_that_an_installation_names_need_not_be_named_again(place):
    """Unless others are named, an installed core is taken, for whatever GPUs it is."""
    cuda = place.folder / "cuda"
    (cuda / "bin").mkdir(parents=True)
    (cuda / "libcudart_static.a").touch()
    nvcc = cuda / "bin" / "nvcc"
    nvcc.write_text(
        f"#!{sys.executable} -S\nimport sys\nprint('#$ LIBRARIES= \"-L{cuda}\"', file=sys.stderr)\n"
        "if '-o' in sys.argv: open(sys.argv[sys.argv.index('-o') + 1], 'w')\n"
    )
    nvcc.chmod(0o755)
    ahead = place.start("-m", "texp", "build", TEXP_CUDA="1", TEXP_CUDA_ARCHS="80;90a", CUDA_HOME=str(cuda))
    printed, said = ahead.communicate()
    assert ahead.returncode == 0, said
    for archs, core in (("", printed.strip()), ("80;90a", printed.strip()), ("90a", None)):
        found, _ = place.step(CXX="no-such-compiler", CUDA_HOME="/none", TEXP_CUDA="auto", TEXP_CUDA_ARCHS=archs)
        assert found["core"] == core


@needs_core
def test_a_core_that_an_earlier_import_of_texp_has_loaded(place):
    """As in a notebook that imports anew what was changed."""
    anew = "for name in [name for name in sys.modules if name.startswith('texp') and name != 'texp._C']:"
    process = place.start("-c", f"{STEP}\n{anew} del sys.modules[name]\nimport texp\ntexp.backends.available()", "")
    assert told(process)[0]["core"] is not None


def test_nothing_is_built_where_it_is_turned_off(place):
    found, said = place.step(TEXP_NATIVE="0")
    assert (found["core"], found["warnings"], said, place.calls) == (None, [], "", [])
    assert found["available"] == "there is no C++ core: TEXP_NATIVE=0 in the environment turns it off"


def test_a_setting_that_there_is_not(place):
    process = place.start("-c", STEP, "", TEXP_NATIVE="yes")
    assert "SettingError: TEXP_NATIVE must be auto, 1 or 0, got 'yes'" in process.communicate()[1]


@needs_core
@pytest.mark.parametrize("writable", [True, False])
def test_building_ahead(place, writable):
    """Where texp is installed, if that can be written to: all users of an image find it there."""
    package = place.folder / "sources" / "texp"
    if not writable:
        if os.geteuid() == 0:
            module = package / "native" / "__init__.py"
            module.write_text(module.read_text().replace("os.access(build.PACKAGE, os.W_OK)", "False"))
            # root may write everywhere
        else:
            package.chmod(0o555)
    root = package / "_native" if writable else place.cache / "texp"
    for building in (True, False):
        process = place.start("-m", "texp", "build")
        printed, said = process.communicate()
        assert process.returncode == 0, said
        assert Path(printed.strip()).is_relative_to(root)
        assert bool(BUILDING.search(said)) == building
    found, said = place.step()
    assert found["core"] == printed.strip()
    assert place.calls == ONE_BUILD
    package.chmod(0o755)


def test_the_state_before_the_first_use(place):
    code = "import texp; print(texp.backends.available()['cpu'])"
    out, _ = place.start("-c", code).communicate()
    assert out.startswith("there is no C++ core: it is not built yet: the first use does it, or `texp build` (about ")
    assert not place.calls

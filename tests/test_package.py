"""What is installed, and that README and CONTRIBUTING say what is."""

import csv
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import texp
from benchmarks import large_batch, large_batch_report
from texp.cli.app import run

ROOT = Path(__file__).parent.parent
README, CONTRIBUTING = ((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
DOCS = f"{README}\n{CONTRIBUTING}"
FILES = ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "pyproject.toml")
FILES += ("setup.py",)

WHERE = {"device", "processor", "amp", "torch", "texp"}  # columns of large_batch.csv that are no numbers
# What README says, and what test_a_fresh_install runs.
INSTALL, NOT_ISOLATED = "pip install .", "pip install --no-build-isolation ."


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)


def commands() -> set[str]:
    """Of both, in their blocks and in their prose."""
    prose = " ".join(re.sub(r"^```.*?^```$", "", DOCS, flags=re.MULTILINE | re.DOTALL).split())
    return {
        *(line for block in blocks("sh") for line in block.splitlines() if line),
        *re.findall(r"`((?:texp|make|pip|pytest)(?: [^`]+)?)`", prose),
    }


def test_version_and_changelog():
    assert importlib.metadata.version("texp") == texp.__version__
    assert re.search(rf"^## {re.escape(texp.__version__)}", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_kernels_are_part_of_texp_alone():
    """There is another package `kernels` on PyPI: the name stays free; in a checkout, see test_kernels_name.py."""
    assert importlib.util.find_spec("texp.kernels") is not None
    assert importlib.metadata.distribution("texp").read_text("top_level.txt").split() == ["texp"]


def copy_of_the_sources(to: Path) -> Path:
    to.mkdir()
    for folder in ("csrc", "texp", "kernels", "tests", "benchmarks", "findings", ".ci"):
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__", "_native"))
    for file in FILES:
        shutil.copy(ROOT / file, to)
    return to


def environment(**changes: str) -> dict[str, str]:
    """This one without what may lead a new process to this checkout or to another build."""
    without = ("PYTHONPATH", "TRITON_INTERPRET", *(name for name in os.environ if name.startswith("TEXP_")))
    return {key: value for key, value in os.environ.items() if key not in without} | changes


STEP = """
import sys, torch
torch.__version__ += sys.argv[1]
import texp
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
texp.SGD([p], lr=0.5).step()
core = texp.native.core()
print(texp.__file__, p.sum().item(), core and core.__file__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["isolated", "not isolated", "left out"])
def test_a_fresh_install(tmp_path, how):
    """In a new environment, not editable, run from another folder, as README says or with what it says besides."""
    if how != "left out" and shutil.which(os.environ.get("CXX") or "c++") is None:
        pytest.skip("no C++ compiler")
    sources, env = copy_of_the_sources(tmp_path / "sources"), tmp_path / "env"
    venv.create(env, symlinks=True)
    python = env / "bin" / "python"
    site = next(env.glob("lib/python*/site-packages"))
    # The libraries of this environment, but not its .pth files: texp may be installed here as editable.
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    cache = tmp_path / "cache"

    def run_in(folder: Path, *command: str | Path, **changes: str) -> subprocess.CompletedProcess:
        changes = {"CXX": os.environ.get("CXX", ""), "TEXP_CUDA": "0", "TORCH_EXTENSIONS_DIR": str(cache)} | changes
        done = subprocess.run(command, cwd=folder, env=environment(**changes), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def step(version: str = "") -> tuple[str | None, bool]:
        """The folder of the core that takes a step, and whether it is built first; version: added to torch's."""
        done = run_in(tmp_path, python, "-c", STEP, version)
        file, total, core = done.stdout.split()
        assert file == str(site / "texp" / "__init__.py")
        assert total == "1.5"
        return None if core == "None" else str(Path(core).parent), "texp: building the C++ core for" in done.stderr

    if how == "isolated":
        try:
            run_in(sources, python, "-m", *shlex.split(INSTALL), "--no-deps")
        except AssertionError as error:
            if "No matching distribution found for setuptools" in str(error):
                pytest.skip("pip finds no index, which it needs to build in isolation")
            raise
    else:
        native = {"left out": "0", "not isolated": "1"}[how]
        install = [python, "-m", *shlex.split(NOT_ISOLATED), "--no-deps", "--no-index"]
        run_in(sources, *install, TEXP_NATIVE=native)

    core, built = step()
    assert built == (how == "isolated")
    assert step() == (core, False)
    if how == "left out":
        assert core is None
        expected = "there is no C++ core: TEXP_NATIVE=0 left it out when texp was installed"
    else:
        assert core.startswith(str(cache / "texp" if how == "isolated" else site / "texp" / "_native"))
        of_another_torch, built = step("+another")
        assert built
        assert of_another_torch.startswith(str(cache / "texp"))
        assert step("+another") == (of_another_torch, False)
        assert step() == (core, False)
        expected = "ok"
    info = run_in(tmp_path, env / "bin" / "texp", "info").stdout
    assert re.search(rf"backend cpu\s+│ {re.escape(expected)} ", info)

    # -S leaves out others.pth: what is importable is what was installed.
    alone, command = environment(PYTHONPATH=str(site)), [python, "-S", "-c", "import kernels"]
    done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True)
    assert "No module named 'kernels'" in done.stderr


NO_TORCH = (
    {"PYTHONPATH": "no_torch"},
    "torch cannot be imported: no torch here",
)
NO_COMPILER = ({"CXX": "no-such-compiler"}, "there is no C++ compiler 'no-such-compiler'")
COMPILING = ({"CXX": shutil.which("false")}, "compiling it failed: ")


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
@pytest.mark.parametrize(
    ("native", "changes", "reason"),
    [
        ("0", {}, "TEXP_NATIVE=0 left it out"),
        ("auto", *NO_TORCH),
        ("auto", *NO_COMPILER),
        ("auto", *COMPILING),
        ("1", *COMPILING),
    ],
    ids=["off", "no torch", "no compiler", "compiling fails", "compiling fails, required"],
)
def test_a_build_without_the_core(tmp_path, editable, native, changes, reason):
    """It says why there is none; what is asked for or fails is remembered."""
    sources, lib = copy_of_the_sources(tmp_path / "sources"), tmp_path / "lib"
    package = (sources if editable else lib) / "texp"
    if not editable:
        (of_before := package / "_native" / "torch-0" / "_C.so").parent.mkdir(parents=True)
        of_before.touch()
    (sources / "no_torch").mkdir()
    (sources / "no_torch" / "torch.py").write_text("raise ModuleNotFoundError('no torch here')")
    command = ["editable_wheel", "--dist-dir", str(tmp_path)] if editable else ["build", "--build-lib", str(lib)]
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *command],
        cwd=sources,
        env=environment(TEXP_NATIVE=native, TEXP_CUDA="0", **changes),
        capture_output=True,
        text=True,
    )
    assert done.returncode == (native == "1"), done.stderr
    announced = "TEXP_NATIVE=1 asks for the C++ core, but" if native == "1" else "installing without the C++ core:"
    assert (f"{announced} {reason}" in done.stderr) == (native != "0")
    cores = package / "_native"
    assert not list(cores.rglob("_C.*"))
    if native != "1":
        assert (cores / "left_out.txt").read_text() == ("TEXP_NATIVE\n" if native == "0" else "") + "TEXP_CUDA\n"
    failures = [json.loads(path.read_text())["why"] for path in cores.rglob("failed.json")]
    assert [why.startswith(reason) for why in failures] == ([True] if changes == COMPILING[0] else [])
    shutil.rmtree(sources / "no_torch")

    done = subprocess.run(
        [sys.executable, "-c", "import texp; print(texp.backends.available()['cpu'])"],
        cwd=package.parent,
        env=environment(TORCH_EXTENSIONS_DIR=str(tmp_path), **changes),
        capture_output=True,
        text=True,
        check=True,
    )
    later = {"TEXP_NATIVE=0 left it out": " when texp was installed"}.get(reason, "")
    expected = "it is not built yet" if changes == NO_TORCH[0] else reason + later
    assert done.stdout.startswith(f"there is no C++ core: {expected}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"TEXP_NATIVE": "yes"}, "TEXP_NATIVE must be auto, 1 or 0, got 'yes'"),
        ({"TEXP_NATIVE": "1", **NO_COMPILER[0]}, f"TEXP_NATIVE=1 asks for the C++ core, but {NO_COMPILER[1]}"),
    ],
    ids=["unknown", "no compiler, required"],
)
def test_a_build_that_is_refused(tmp_path, changes, message):
    sources = copy_of_the_sources(tmp_path / "sources")
    command = [sys.executable, "setup.py", "-q", "build"]
    done = subprocess.run(command, cwd=sources, env=environment(**changes), capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr


def test_the_source_distribution(tmp_path):
    """It holds all that its tests read; these insist on the C++ core where TEXP_NATIVE=1 does."""
    sources = copy_of_the_sources(tmp_path / "sources")
    expected = {path.relative_to(sources) for path in sources.rglob("*") if path.is_file()}
    (sources / "texp" / "_native").mkdir()
    (sources / "texp" / "_native" / "left_out.txt").write_text("of an earlier installation")
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=sources, env=environment(TEXP_NATIVE="0"), check=True, capture_output=True)
    archive = tmp_path / f"texp-{texp.__version__}.tar.gz"
    # Not by Python, whose versions want different arguments.
    subprocess.run(["tar", "-xzf", str(archive), "-C", str(tmp_path)], check=True)
    unpacked = tmp_path / f"texp-{texp.__version__}"
    found = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    assert {path for path in found if "egg-info" not in path.parts[0]} - expected == {
        Path("PKG-INFO"),
        Path("setup.cfg"),
    }
    assert expected <= found

    command = [sys.executable, "-m", "pytest", "-q", "tests/test_package.py", "-k", "version or files_exist"]
    for changes, code in (({"TEXP_NATIVE": "0"}, 0), ({"TEXP_NATIVE": "1"}, pytest.ExitCode.USAGE_ERROR)):
        changes |= {"TORCH_EXTENSIONS_DIR": str(tmp_path), **NO_COMPILER[0]}
        done = subprocess.run(command, cwd=unpacked, env=environment(**changes), capture_output=True, text=True)
        assert done.returncode == code, done.stdout
    assert f"TEXP_NATIVE=1 asks for the C++ core, but {NO_COMPILER[1]}" in done.stderr


class TestTheDocs:
    def test_its_python_runs(self):
        assert blocks("python")
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), {})

    def test_every_command_is_run(self, tmp_path, monkeypatch):
        """Those of texp and of a benchmark here, shortened; `make` targets by CI; the rest by the Makefile or
        test_a_fresh_install."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "benchmarks" / "results" / "cpu").mkdir(parents=True)
        quick = {"demo": ["--epochs", "4"], "bench": ["--models", "161 tiny tensors", "--seconds", "0"]}
        recipes = (ROOT / "Makefile").read_text().replace("$(BIN)/", "").splitlines()
        by_ci = [re.sub(r'^(\w+=("[^"]*"|\S+) )+', "", line) for line in (ROOT / ".ci/run").read_text().splitlines()]
        assert {"texp info", "make demo", "make sanitize", INSTALL, NOT_ISOLATED, "pytest"} <= commands()
        turned_off = os.environ.get("TEXP_NATIVE") == "0"
        for command in commands():
            program, *arguments = shlex.split(command)
            if program == "texp":
                code = 1 if arguments == ["build"] and turned_off else 0
                assert run([*arguments, *quick.get(arguments[0], [])]) == code
            elif arguments[:2] == ["-m", "benchmarks.large_batch"]:
                assert large_batch.run([*arguments[2:], "--epochs", "1", "--warmup", "0"]) == 0
            elif program == "make":
                assert command in by_ci
            else:
                in_recipes = any(f" {command} " in f" {line.strip()} " for line in recipes)
                assert command in (INSTALL, NOT_ISOLATED) or in_recipes, command

    def test_what_it_says_of_eps_is_that_of_the_records(self, tmp_path, monkeypatch, capsys):
        """And the script still makes them; what training amplifies may differ between machines."""
        path = ROOT / "benchmarks" / "results" / "default_eps.csv"
        records = {record.pop("model"): record for record in csv.DictReader(path.read_text().splitlines())}
        columns = zip(*(map(float, list(record.values())[:3]) for record in records.values()), strict=True)
        doubled, default, tiny = columns
        assert f"outputs of {len(records)} small models moved by at most {max(doubled):.1e} (relative)" in README
        gpt = default[list(records).index("GPT")]
        losses = (
            f"at most {max(default):.2g} ({gpt:.1e} for a GPT), and with an eps of 1e-30 by at most {max(tiny):.1e}"
        )
        assert losses in " ".join(README.split())
        spec = importlib.util.spec_from_file_location("default_eps", ROOT / "benchmarks" / "default_eps.py")
        script = importlib.util.module_from_spec(spec)
        monkeypatch.setattr(sys, "path", list(sys.path))
        spec.loader.exec_module(script)
        monkeypatch.setattr(script, "CASES", {"VGG": script.CASES["VGG"]})
        script.main(str(tmp_path / "eps.csv"))
        (made,) = csv.DictReader((tmp_path / "eps.csv").read_text().splitlines())
        made.pop("model")
        assert float(made["outputs_at_twice_the_weights"]) == pytest.approx(doubled[0], rel=0.05)
        assert made["halvings"] == records["VGG"]["halvings"]

    def test_what_it_says_of_large_batches_is_that_of_the_records(self):
        """Each figure is rounded, differences up."""
        path = ROOT / "benchmarks" / "results" / "large_batch.csv"
        rows = [
            {name: value if name == "optimizer" else float(value) for name, value in row.items() if name not in WHERE}
            for row in csv.DictReader(path.read_text().splitlines())
        ]
        texp_, torch_ = (
            [run for run in large_batch_report.summaries(rows) if run["optimizer"] == name]
            for name in ("texp", "torch")
        )

        def largest(field: str) -> float:
            return max(abs(a[field] - b[field]) for a, b in zip(texp_, torch_, strict=True))

        def shares(runs: list[dict]) -> list[str]:
            found = [run["optimizer_share"] for run in runs]
            return [f"{share:.1%}".replace("%", " %") for share in (min(found), max(found))]

        said = f"within {math.ceil(largest('train_loss') * 1e4) / 1e4} of each other in the loss and "
        said += f"{math.ceil(largest('test_accuracy') * 1e3) / 10} % in the accuracy; of a training step "
        said += f"texp takes {' to '.join(shares(texp_))}, torch {' to '.join(shares(torch_))}."
        assert said in " ".join(README.split())

    def test_its_files_exist(self):
        """What it links to and what its map of the repository names."""
        links = re.findall(r"\]\(([^)#:]+)\)", DOCS)
        paths = re.findall(r"^    (\S+/|\S+\.\w+)  ", README, re.MULTILINE)
        prose = re.findall(r"(?<![\w/])(?:texp|csrc|kernels|tests|benchmarks)/[\w/]+\.\w+", CONTRIBUTING)
        assert links
        assert paths
        assert prose
        for path in (*links, *paths, *prose):
            assert (ROOT / path).exists(), path

    def test_their_maps_name_every_room_and_every_module(self):
        """README those of texp/ and its rooms, CONTRIBUTING what is in each room."""
        of_readme = set(re.findall(r"(?:^    texp/|[:;] )(\w+(?:/|\.py))(?=[ :])", README, re.MULTILINE))
        modules = {path.name for path in (ROOT / "texp").glob("[!_]*.py")}
        rooms = {f"{path.parent.name}/" for path in (ROOT / "texp").glob("*/__init__.py")}
        assert modules | rooms <= of_readme
        for line in re.findall(r"^    (\w+/\w+\.py.*)$", CONTRIBUTING, re.MULTILINE):
            room, _, rest = line.partition("/")
            named = set(re.findall(r"\b\w+\.py\b", rest))
            assert all((ROOT / "texp" / room / name).exists() for name in named), line
        for room in rooms:
            lines = " ".join(re.findall(rf"^    {room}(.*)$", CONTRIBUTING, re.MULTILINE))
            inside = {path.name for path in (ROOT / "texp" / room).glob("[!_]*.py")}
            assert inside <= set(re.findall(r"\b\w+\.py\b", lines)), room

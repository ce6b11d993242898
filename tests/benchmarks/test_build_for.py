"""benchmarks/build_for.sh and `make matrix`: the core for another torch and Python. Nothing is downloaded."""

import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from benchmarks import build_for
from benchmarks.build_for import LIBRARIES, BuildError, Python, Torch
from tests.test_package import ROOT, environment
from texp.native import build

SCRIPT = ROOT / "benchmarks" / "build_for.sh"
INCLUDE = Path(sysconfig.get_path("include"))
INSTALLED = Path(torch.__file__).parent  # torch's headers and libraries, as a wheel has them

COMPILER = shutil.which("c++")
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="for Linux alone"),
    pytest.mark.skipif(
        not (COMPILER and shutil.which("nm") and (INCLUDE / "Python.h").exists()),
        reason="needs c++, binutils and the headers of Python",
    ),
]


def run(*arguments: str | Path, **changes: str) -> subprocess.CompletedProcess:
    changes = {"PYTHON": sys.executable, "TEXP_CUDA": "0"} | changes
    command = ["bash", SCRIPT, *arguments]
    return subprocess.run(command, env=environment(**changes), capture_output=True, text=True)


def library(to: Path, source: str, *flags: str | Path) -> Path:
    command = [COMPILER, "-shared", "-fPIC", "-x", "c++", "-", "-o", to, *flags]
    subprocess.run(command, input=source, text=True, check=True)
    return to


ERROR = "namespace c10 { struct Error { Error(std::string); }; Error::Error(std::string) {} }\n"
PYBIND11 = 'extern "C" const char shared[] = "__pybind11_internals_{}__";\n'
V4, V11 = "v4_gcc_libstdcpp_cxxabi1011", "v11_system_libstdcpp_gxx_abi_1xxx_use_cxx11_abi_1"


def tiny_torch(folder: Path, abi: int = 1, pybind11: str = V11) -> Path:
    """A folder that looks like torch's, whose libraries hold next to nothing."""
    (folder / "include").mkdir(parents=True)
    (folder / "lib").mkdir()
    (folder / "version.py").write_text("__all__ = ['git_version']\n__version__ = '2.0.0+tiny'\ngit_version = 'abc'\n")
    source = f"#include <string>\n{ERROR}{PYBIND11.format(pybind11)}"
    for name in LIBRARIES:
        library(folder / "lib" / f"lib{name}.so", source, f"-D_GLIBCXX_USE_CXX11_ABI={abi}")
    return folder


@pytest.mark.parametrize("with_cuda", [False, True])
def test_the_name_is_that_by_which_texp_looks_for_it(with_cuda):
    """It says which torch, which ABI and which Python, so these are found out rightly from the files."""
    python, of = Python.of(INCLUDE), Torch.of(INSTALLED)
    assert build_for.core_name(of, python, with_cuda) == build.core_name(with_cuda)
    assert python.core_file == build.CORE_FILE
    assert build_for.compiler()[0] == build.compiler()


@pytest.mark.slow
def test_a_core_is_made_and_loads(tmp_path):
    done = run(tmp_path / "out", INSTALLED)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path == tmp_path / "out" / build.core_name(False) / build.CORE_FILE
    assert "build_for.sh: the machine must have GLIBC 2." in done.stderr
    code = f"""
import torch
from pathlib import Path
from texp import native
core = native._import(Path({str(path)!r}))
p = torch.ones(3)
core.apply((0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.5, 0.0, 0.0), [(p, torch.ones(3), None)])  # SGD with lr=0.5
print(core.with_cuda, p.tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout == "False [0.5, 0.5, 0.5]\n", done.stderr


def test_another_python(tmp_path):
    """One without the global interpreter lock, of which there is no more than what its headers say."""
    source = "#define PY_MAJOR_VERSION 3\n#define PY_MINOR_VERSION 15\n#define Py_GIL_DISABLED 1\n"
    (tmp_path / "Python.h").write_text(source)
    python = Python.of(tmp_path)
    assert (python.version, python.tag) == ("3.15", "315t")
    assert python.core_file.startswith("_C.cpython-315t-")
    assert python.core_file.endswith(build.CORE_FILE.partition("-")[2].partition("-")[2])


@pytest.mark.parametrize("abi", [0, 1])
def test_the_abi_of_its_strings_is_seen_in_its_symbols(tmp_path, abi):
    of = Torch.of(tiny_torch(tmp_path, abi))
    assert (of.version, of.git_version, of.cxx11_abi) == ("2.0.0+tiny", "abc", bool(abi))
    assert f"-D_GLIBCXX_USE_CXX11_ABI={abi}" in of.flags()


def test_its_pybind11_is_told_which_compiler_torch_was_built_with(tmp_path):
    defined = {
        '-DPYBIND11_COMPILER_TYPE="_gcc"',
        '-DPYBIND11_STDLIB="_libstdcpp"',
        '-DPYBIND11_BUILD_ABI="_cxxabi1011"',
    }
    assert defined <= set(Torch.of(tiny_torch(tmp_path / "old", pybind11=V4)).flags())
    assert "PYBIND11" not in str(Torch.of(tiny_torch(tmp_path / "new")).flags())


class TestWhetherItWouldLoad:
    USES = """
#include <string>
namespace c10 { struct Error { Error(std::string); }; }
void use() { c10::Error(std::string()); }
"""

    def check(self, tmp_path, source: str, *flags: str) -> None:
        of = Torch.of(tiny_torch(tmp_path / "torch"))
        build_for.check(library(tmp_path / "core.so", source, *flags), of)

    def test_it_does(self, tmp_path):
        source = (
            f'{self.USES}{PYBIND11.format(V11)}extern "C" void PyErr_Clear(); void clear() {{ PyErr_Clear(); }}\n'
        )
        self.check(tmp_path, source)

    def test_a_symbol_is_missing(self, tmp_path):
        source = (
            f"{self.USES}{PYBIND11.format(V11)}namespace at {{ void nothing(int); void call() {{ nothing(1); }} }}\n"
        )
        with pytest.raises(
            BuildError, match=r"torch 2\.0\.0\+tiny does not define at::nothing\(int\), which the core "
        ):
            self.check(tmp_path, source)

    def test_of_the_other_abi(self, tmp_path):
        with pytest.raises(BuildError, match=r"does not define c10::Error::Error\(std::basic_string<"):
            self.check(tmp_path, f"{self.USES}{PYBIND11.format(V11)}", "-D_GLIBCXX_USE_CXX11_ABI=0")

    def test_another_pybind11(self, tmp_path):
        with pytest.raises(BuildError, match="the core could not see the errors of torch "):
            self.check(tmp_path, f"{self.USES}{PYBIND11.format(V4)}")


def test_what_the_machine_must_have(tmp_path):
    source = """
__asm__(".symver old, memcpy@GLIBC_2.2.5");
extern "C" void* old(void*, const void*, unsigned long);
extern "C" void* memcpy(void*, const void*, unsigned long);
void copies(void* a, void* b, unsigned long n) { old(a, b, n); memcpy(a, b, n); }
"""
    if "x86_64" not in build.CORE_FILE:
        pytest.skip("the versions are those of x86-64")
    core = library(tmp_path / "core.so", source, "-O0", "-fno-builtin", "-nostartfiles")
    assert build_for.requirements(core) == "GLIBC 2.14"  # not 2.2.5, which is greater as text


@pytest.mark.parametrize(
    ("arguments", "changes", "why"),
    [
        (
            ["2.11"],
            {"TEXP_CUDA": "1", "CUDA_HOME": "/nowhere"},
            "there is no nvcc in CUDA_HOME=/nowhere; TEXP_CUDA=0 ",
        ),
        (["2.11"], {"TEXP_CUDA": "yes"}, "TEXP_CUDA must be auto, 1 or 0, got 'yes'"),
        (["2.11"], {"TEXP_CUDA": "1", "TEXP_CUDA_ARCHS": "9.0"}, "TEXP_CUDA_ARCHS must be like "),
        (["2.11", "/nowhere"], {}, "there is no Python.h in /nowhere; "),
        (["newest"], {}, "TORCH must be a version, as in 2.11.0, or a folder that holds one, got 'newest'"),
        (["/"], {}, "/ is no folder of torch: it has no version.py"),
        (["2.11"], {"CXX": "no-such-compiler"}, "there is no C++ compiler 'no-such-compiler'"),
    ],
    ids=["no nvcc", "part", "architectures", "no headers", "no version", "no torch", "no compiler"],
)
def test_what_it_refuses(tmp_path, arguments, changes, why):
    done = run(tmp_path / "out", *arguments, **changes)
    assert done.returncode == 1
    assert done.stderr.startswith(f"build_for.sh: {why}")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


FAKE_PIP = """
import sys, zipfile
from pathlib import Path
with open(Path(__file__).parent / "asked", "a") as file:
    print(*sys.argv[1:], file=file)
if sys.argv[-1] != "torch==2.11.0":
    sys.exit("WARNING: nothing\\nERROR: No matching distribution found for " + sys.argv[-1])
to = Path(sys.argv[sys.argv.index("--dest") + 1])
with zipfile.ZipFile(to / "torch-2.11.0-cp315-cp315t-linux.whl", "w") as wheel:
    for name in "include/a/b.h version.py lib/libtorch_cuda.so nn/init.py".split() + LIBRARIES.split():
        wheel.writestr("torch/" + name, "")
    wheel.writestr("torch-2.11.0.dist-info/METADATA", "")
"""


class TestTheWheel:
    @pytest.fixture
    def python(self, tmp_path, monkeypatch) -> Python:
        """Under it a pip that makes the wheel itself."""
        libraries = [f"lib/lib{name}.so" for name in LIBRARIES]
        (tmp_path / "pip.py").write_text(FAKE_PIP.replace("LIBRARIES", repr(" ".join(libraries))))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return Python(tmp_path, "3.15", "315t")

    def test_is_downloaded_once_and_unpacked_in_part(self, tmp_path, python):
        said: list[str] = []
        for _ in range(2):
            folder = build_for.unpacked("2.11.0", python, tmp_path / "cache", said.append)
        assert said == ["downloading torch 2.11.0 for Python 3.15"]
        (asked,) = (tmp_path / "asked").read_text().splitlines()
        assert " --implementation cp --python-version 3.15 --abi cp315t --platform manylinux_2_28_" in asked
        found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert found == {"include/a/b.h", "version.py", *(f"lib/lib{name}.so" for name in LIBRARIES)}
        assert list((tmp_path / "cache").iterdir()) == [folder.parent]  # the wheel is gone

    def test_there_is_none(self, tmp_path, python):
        why = "for Python 3.15: ERROR: No matching distribution found for torch==2.99.0"
        with pytest.raises(BuildError, match=f"^pip cannot download torch 2.99.0 {why}$"):
            build_for.unpacked("2.99.0", python, tmp_path / "cache", lambda what: None)
        assert list((tmp_path / "cache").iterdir()) == []


@pytest.fixture
def compiler(tmp_path) -> Path:
    """One that compiles nothing, and finds an error in what it is to compile with the headers in a folder `bad`."""
    path = tmp_path / "c++"
    path.write_text(
        f"""#!/bin/sh
case "$*" in
*"-E -P"*) exec {COMPILER} "$@" ;;
*/bad/*) printf 'In file included\\na.h:1:2: error: no such thing\\nb.h:1: error: another\\n'; exit 1 ;;
esac
for made; do :; done
cp {tmp_path}/torch/lib/libtorch_python.so "$made"
"""
    )
    path.chmod(0o755)
    tiny_torch(tmp_path / "torch")
    return path


def test_the_kernel_is_compiled_and_linked(tmp_path, compiler):
    """For the GPUs that are named; as it is in texp/native/build.py, which is asked for the flags."""
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(f'#!/bin/sh\nif [ "$1" = --dryrun ]; then echo \'#$ LIBRARIES=  "-L{tmp_path}"\' >&2; fi\n')
    nvcc.chmod(0o755)
    (tmp_path / "libcudart_static.a").touch()
    changes = {"TEXP_CUDA": "1", "TEXP_CUDA_ARCHS": "72", "CUDA_HOME": str(tmp_path), "CXX": f"{compiler} -v"}
    done = run(tmp_path / "out", tmp_path / "torch", **changes)
    assert done.returncode == 0, done.stderr
    made = Path(done.stdout.strip())
    *compiled, link = (made.parent / "build.log").read_text().splitlines()
    *cpp, kernel = sorted(compiled, key=lambda command: command.startswith(str(nvcc)))
    assert kernel.startswith(f"{nvcc} {shlex.join(build.CUDA_FLAGS)} '-gencode=arch=compute_72,code=[sm_72]' ")
    assert sorted(command.split()[-3] for command in cpp) == sorted(
        str(build.SOURCES / name) for name in build.CPP_SOURCES
    )
    for command in cpp:
        assert command.startswith(f"{compiler} -v {shlex.join(build.FLAGS)} ")
        assert {f"-D{build.WITH_CUDA}", "-DNDEBUG", f"-I{tmp_path}/torch/include", f"-I{INCLUDE}"} <= {
            *command.split()
        }
    assert link.startswith(f"{compiler} -v -shared {shlex.join(build.OPENMP)}")
    assert f"/cuda_kernels.o {tmp_path}/libcudart_static.a " in link
    assert f" -L{tmp_path}/torch/lib -lc10 -ltorch -ltorch_cpu -ltorch_python -lrt " in link


class TestTheMatrix:
    @pytest.fixture
    def make(self, tmp_path, compiler):
        shutil.copytree(tmp_path / "torch", tmp_path / "bad" / "torch")

        def make(*names: str) -> subprocess.CompletedProcess:
            torches = " ".join(str(tmp_path / name) for name in names)
            command = ["make", "matrix", f"TORCH={torches}", f"PYTHON={shlex.quote(sys.executable)}"]
            env = environment(CXX=str(compiler), VENV="no-environment", MAKEFLAGS="")
            return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)

        return make

    def test_all_are_built(self, tmp_path, make):
        done = make("torch", "torch")
        assert done.returncode == 0, done.stderr
        assert re.findall(r"^torch (\S+) +\d+ s  ok$", done.stdout, re.MULTILINE) == [str(tmp_path / "torch")] * 2

    def test_one_is_not(self, tmp_path, make):
        tiny_torch(tmp_path / "other", pybind11=V4)  # than what this compiler makes
        done = make("torch", "bad/torch", "other", "nowhere")
        assert done.returncode == 2
        # A make within another, as that which runs these tests, says a word of its own before and after.
        good, bad, other, nowhere = re.findall("^torch .*$", done.stdout, re.MULTILINE)
        assert good.endswith(" s  ok")
        assert bad.startswith(f"torch {tmp_path}/bad/torch ")
        assert bad.endswith(" s  compiling it failed: a.h:1:2: error: no such thing")
        assert "  the core could not see the errors of torch 2.0.0+tiny: __pybind11_internals_v11_" in other
        assert " s  TORCH must be a version, " in nowhere

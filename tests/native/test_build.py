"""How the core is compiled: its name, its settings, and what is told of a compiler that fails."""

import re
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from texp.native import build

# What compilers say, and which of its lines is the first error.
ERRORS = {
    "g++": (2, """[1/2] c++ -Werror -c csrc/bindings.cpp
In file included from a.h:1,
a.h:4:10: fatal error: ATen/MemoryOverlap.h: No such file
compilation terminated.
ninja: build stopped"""),
    "several": (1, "a.h:1:2: warning: unused error\nb.h:3:4: error: first\nc.h:5:6: error: second"),
    "option": (0, "c++: error: unrecognized command-line option '-std=c++20'\nRuntimeError: Error"),
    "clang": (0, "x.cpp:1:1: error: unknown type name 'concept'\n1 error generated."),
    "memory": (0, "c++: fatal error: Killed signal terminated program cc1plus\nend"),
    "nvcc": (0, "nvcc fatal : Unsupported gpu architecture 'compute_100'\n"),
    "MSVC": (0, "x.cpp(3): error C2065: 'x': undeclared identifier\nend"),
    "linker": (0, "/usr/bin/ld: cannot find -lc10: No such file\ncollect2: error: ld returned 1"),
    "symbol": (0, "bindings.o: undefined reference to `f'\ncollect2: error: ld returned 1"),
    "no compiler's": (2, "Traceback:\n\nModuleNotFoundError: No module named 'setuptools'\n\n"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_the_first_error_is_told(case):
    line, output = ERRORS[case]
    assert build.first_error(output) == output.splitlines()[line]


def test_an_error_is_told_in_short():
    """In one line, without the folder of the sources; where there is no line at all, with none."""
    assert build.first_error(f"{build.SOURCES}/math/row.h:1:  error:\tno\n") == "csrc/math/row.h:1: error: no"
    assert build.first_error(" \n") == ""


class TestTheNameOfACore:
    def test_can_be_read(self):
        abi = sysconfig.get_config_var("EXT_SUFFIX").strip(".").partition(".")[0]
        assert re.fullmatch(rf"torch-{re.escape(torch.__version__)}-{abi}-[0-9a-f]{{12}}", build.core_name(False))
        assert f"-{abi}-cuda-" in build.core_name(True)

    CHANGES = {
        "torch": (torch, "__version__", "2.99.0"),
        "torch's sources": (torch.version, "git_version", "another"),
        "torch's ABI": (torch, "compiled_with_cxx11_abi", lambda: None),
        "Python": (build, "CORE_FILE", "_C.cpython-399-x86_64-linux-gnu.so"),
        "flags": (build, "FLAGS", ["-O0"]),
    }

    @pytest.mark.parametrize("what", CHANGES)
    def test_depends_on(self, monkeypatch, what):
        name = build.core_name(False)
        monkeypatch.setattr(*self.CHANGES[what])
        assert build.core_name(False) != name

    @pytest.mark.parametrize("variable", ["TEXP_SANITIZE", "TEXP_CUDA_ARCHS"])
    def test_depends_on_the_environment(self, monkeypatch, variable):
        monkeypatch.delenv(variable, raising=False)
        name = build.core_name(True)
        monkeypatch.setenv(variable, "89" if variable == "TEXP_CUDA_ARCHS" else "thread")
        assert build.core_name(True) != name

    def test_depends_on_the_sources(self, monkeypatch, tmp_path):
        shutil.copytree(build.SOURCES, tmp_path / "csrc")
        name = build.core_name(False)
        monkeypatch.setattr(build, "SOURCES", tmp_path / "csrc")
        assert build.core_name(False) == name
        with (tmp_path / "csrc" / "math" / "row.h").open("a") as file:
            file.write(" ")
        assert build.core_name(False) != name


@pytest.mark.parametrize(
    ("environment", "told", "expected"),
    [
        ({}, [], "auto"),
        ({"TEXP_CUDA": ""}, [], "auto"),
        ({}, ["TEXP_CUDA"], "0"),
        ({"TEXP_CUDA": "auto"}, ["TEXP_CUDA"], "auto"),
        ({"TEXP_CUDA": "1"}, ["TEXP_CUDA"], "1"),
        ({"TEXP_CUDA": "0"}, [], "0"),
        ({}, ["TEXP_NATIVE"], "auto"),
    ],
)
def test_a_setting(monkeypatch, tmp_path, environment, told, expected):
    """The environment has the last word; what the installation was told holds otherwise."""
    monkeypatch.delenv("TEXP_CUDA", raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(build, "PACKAGE", tmp_path)
    build.write_left_out(tmp_path, ["of before"])
    build.write_left_out(tmp_path, told)
    assert build.left_out() == told
    assert build.setting("TEXP_CUDA") == expected


ARCHS = {
    "all known": ("", "80 90 100 120", ["80,sm_80", "90a,sm_90a", "100,sm_100,compute_100"]),
    "CUDA 12.4": ("", "80 86 90", ["80,sm_80", "90a,sm_90a,compute_90a"]),
    "nvcc does not say": ("", "", ["80,sm_80", "90a,sm_90a", "100,sm_100,compute_100"]),
    "asked for": ("75;120+PTX", "80", ["75,sm_75", "120,sm_120,compute_120"]),
}


@pytest.mark.parametrize("case", ARCHS)
def test_architectures(monkeypatch, tmp_path, case):
    asked, known, expected = ARCHS[case]
    monkeypatch.setenv("TEXP_CUDA_ARCHS", asked)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!{sys.executable} -S\nprint(*('compute_' + n for n in {known.split()}), sep='\\n')\n")
    nvcc.chmod(0o755)
    flags = build._arch_flags(str(nvcc))
    assert [re.sub(r"-gencode=arch=compute_|code=|[\[\]]", "", flag) for flag in flags] == expected


def test_it_imports_nothing_before_it_compiles():
    """setup.py reads it where there is no torch."""
    imports = re.findall(r"^(?:import|from) (\w+)", Path(build.__file__).read_text(), re.MULTILINE)
    assert set(imports) <= sys.stdlib_module_names
    assert "hashlib" in imports

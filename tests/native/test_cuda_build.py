"""The CUDA kernel without a GPU: how it is built or left out, and what nvcc makes of it."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import texp
from tests.test_package import ROOT, copy_of_the_sources, environment
from texp import backends, native
from texp.native import build

try:
    NVCC, NO_NVCC = build.toolkit()[0], ""
except build.BuildError as error:
    NVCC, NO_NVCC = "", str(error)


def fake_nvcc(home: Path, says: str) -> str:
    """A CUDA_HOME whose nvcc has a runtime, but compiles nothing."""
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\nif [ "$1" = --dryrun ]; then echo \'#$ LIBRARIES=  "-L{home}"\' >&2; else {says}; exit 1; fi\n'
    )
    nvcc.chmod(0o755)
    return str(home)


WITHOUT_NVCC = ({"CUDA_HOME": "/nowhere"}, "there is no nvcc in CUDA_HOME=/nowhere")
ASKED = "TEXP_CUDA=1 asks for the CUDA kernel, but"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"TEXP_CUDA": "yes"}, "TEXP_CUDA must be auto, 1 or 0, got 'yes'"),
        ({"TEXP_CUDA_ARCHS": "8.0"}, "TEXP_CUDA_ARCHS must be like 80;90a;100+PTX, got '8.0'"),
        ({"TEXP_CUDA": "1", **WITHOUT_NVCC[0]}, f"{ASKED} {WITHOUT_NVCC[1]}"),
        (
            {"TEXP_CUDA": "1", "TEXP_NATIVE": "0"},
            f"{ASKED} there is no C++ core to call it: TEXP_NATIVE=0 left it out",
        ),
        ({"TEXP_CUDA": "1", "CUDA_HOME": "no runtime"}, "/bin/nvcc comes without libcudart_static.a"),
        ({"TEXP_CUDA": "1", "CUDA_HOME": "no program"}, "/bin/nvcc does not run: Exec format error"),
        ({"TEXP_CUDA": "1", "CUDA_HOME": "fails"}, f"{ASKED} compiling it failed: nvcc fatal : so it is"),
    ],
    ids=["unknown", "architectures", "no nvcc", "no core", "no runtime", "no program", "compiling fails"],
)
def test_a_build_that_is_refused(tmp_path, changes, message):
    sources = copy_of_the_sources(tmp_path / "sources")
    for name in ("no runtime", "no program", "fails"):
        fake_nvcc(tmp_path / name, "echo first; echo 'nvcc fatal : so it is'; echo last")
    (tmp_path / "fails" / "libcudart_static.a").touch()
    (tmp_path / "no program" / "bin" / "nvcc").write_bytes(b"\x7fELF")
    home = changes.get("CUDA_HOME", "/")
    changes = changes | {"CUDA_HOME": home if home.startswith("/") else str(tmp_path / home)}
    command = [sys.executable, "setup.py", "-q", "build"]
    done = subprocess.run(command, cwd=sources, env=environment(**changes), capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"TEXP_CUDA": "0"}, "TEXP_CUDA=0 left it out when texp was installed"),
        WITHOUT_NVCC,
        ({"CUDA_HOME": "fails"}, "compiling it failed: nvcc fatal : so it is (all of it: "),
    ],
    ids=["off", "no nvcc", "compiling fails"],
)
@pytest.mark.slow
def test_a_core_without_it(tmp_path, changes, reason):
    """What is said when it is installed is said later, too, and nothing is tried again."""
    if backends.core() is None:
        pytest.skip(backends.available()["cpu"])
    sources, lib = copy_of_the_sources(tmp_path / "sources"), tmp_path / "lib"
    home = fake_nvcc(tmp_path / "fails", "echo 'nvcc fatal : so it is'")
    (tmp_path / "fails" / "libcudart_static.a").touch()
    changes = {key: home if value == "fails" else value for key, value in changes.items()}
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(lib)]
    done = subprocess.run(command, cwd=sources, env=environment(**changes), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    announced = f"texp: installing without the CUDA kernel: {reason.partition(' (all')[0]}"
    assert (announced in done.stderr) == ("TEXP_CUDA" not in changes)
    code = "from texp import backends; backends.core(); print(backends.available())"
    changes = {"TORCH_EXTENSIONS_DIR": str(tmp_path)} | ({} if "TEXP_CUDA" in changes else changes)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=lib, env=environment(**changes), check=True, capture_output=True, text=True
    )
    reasons = ast.literal_eval(done.stdout)
    assert reasons["cpu"] == "ok"
    assert reasons["cuda"].startswith(f"the CUDA kernel was not built: {reason}")
    assert done.stderr == ""


def loaded(monkeypatch, core: SimpleNamespace | None) -> None:
    """Makes this look as if that core had been loaded."""
    stand_ins = {"load": lambda may_build: core, "core": lambda: core, "why_missing": lambda variable: "so it was"}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(native, name, stand_in)


def devices(count: int, error: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(with_cuda=True, cuda_devices=lambda: (count, error))


class TestTheReason:
    """Why backend="cuda" cannot be used."""

    @pytest.fixture(autouse=True)
    def _afresh(self):
        backends.cuda.devices.cache_clear()
        yield
        backends.cuda.devices.cache_clear()

    CASES = {
        "not built": (SimpleNamespace(with_cuda=False), True, "the CUDA kernel was not built: so it was"),
        "no driver": (devices(-1, "no driver"), True, "the CUDA kernel was built, but no device: no driver"),
        "no device": (devices(0), True, "the CUDA kernel was built, but no device: CUDA sees none"),
        "torch": (devices(1), False, "the CUDA kernel was built, but torch .* was not: it has no CUDA tensors"),
        "ROCm": (devices(1), True, "torch .* is built for ROCm, whose GPUs the Triton kernels serve"),
    }  # fmt: skip

    @pytest.mark.parametrize("case", CASES)
    def test_of_a_core(self, monkeypatch, case):
        core, torch_has_cuda, message = self.CASES[case]
        loaded(monkeypatch, core)
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: torch_has_cuda)
        monkeypatch.setattr(torch.version, "hip", "6.4" if case == "ROCm" else None)
        with pytest.raises(RuntimeError, match=f"backend='cuda' was requested, but {message}"):
            backends.kernels("cuda")

    def test_without_the_core(self, monkeypatch):
        loaded(monkeypatch, None)
        assert backends.available()["cuda"] == "there is no C++ core: so it was"

    @pytest.mark.parametrize("backend", [None, "cpu", "reference"])
    def test_is_not_looked_for_by_other_backends(self, monkeypatch, backend):
        """To ask CUDA is slow, and forked processes could no longer use it."""
        if backend == "cpu" and backends.core() is None:
            pytest.skip(backends.available()["cpu"])
        monkeypatch.setattr(backends.cuda, "devices", lambda: pytest.fail("CUDA was asked"))
        texp.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1, backend=backend)


@pytest.mark.nvcc
def test_the_core_links_it():
    core = backends.core()
    if core is None:
        pytest.skip(backends.available()["cpu"])
    if not core.with_cuda:
        reason = native.why_missing("TEXP_CUDA")
        assert os.environ.get("TEXP_CUDA") != "1"
        assert "compiling it failed" not in reason
        pytest.skip(reason)
    count, error = core.cuda_devices()
    assert (count >= 0) == (error is None)


KERNELS = [("apply_kernel", False), ("apply_kernel", True), ("reduce_kernel", False), ("sum_kernel", False)]
KERNELS += [("norm_kernel", False), ("advance_kernel", False)]
"""Each compiled for two sizes of table; True: for any mix of dtypes."""


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """For each architecture the machine code and what ptxas says of it."""
    if not NVCC:
        pytest.skip(NO_NVCC)
    made = {}
    for arch in ("sm_80", "sm_90a", "sm_100"):
        cubin = tmp_path_factory.mktemp("cubins") / f"{arch}.cubin"
        command = [
            NVCC,
            *build.CUDA_FLAGS,
            "-cubin",
            f"-arch={arch}",
            "-Xptxas",
            "-v",
            "csrc/cuda/kernels.cu",
            "-o",
            str(cubin),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr
        made[arch] = cubin, done.stderr
    return made


@pytest.fixture(scope="session")
def instructions(compiled) -> dict[tuple[str, str, bool], list[list[str]]]:
    """The operations that touch memory, as in LDG.E.128, for each architecture and kernel with each size of table."""
    found = importlib.util.find_spec("triton")
    folders = [os.environ.get("PATH", os.defpath)]
    folders += [f"{folder}/backends/nvidia/bin" for folder in (found.submodule_search_locations if found else ())]
    tools = [["nvdisasm", "-c"], ["cuobjdump", "-sass"]]
    commands = [[shutil.which(tool, path=path), option] for path in folders for tool, option in tools]
    command = next((command for command in commands if command[0]), None)
    if command is None:
        pytest.skip("there is no nvdisasm and no cuobjdump in PATH or in the package triton")
    made = {}
    for arch, (cubin, _) in compiled.items():
        done = subprocess.run([*command, str(cubin)], capture_output=True, text=True)
        if "Cannot decode architecture" in done.stderr:
            pytest.skip(f"{command[0]} is too old for {arch}")
        assert done.returncode == 0, done.stderr
        _, *parts = re.split(r"^\s*(?://-+ \.text\.|Function : )(\S+).*$", done.stdout, flags=re.MULTILINE)
        for name, code in zip(parts[::2], parts[1::2], strict=True):
            if kernel := re.search("[a-z]+_kernel", name):
                of_mixes = "_kernelILb1" in name
                found = re.findall(r"\b(?:LD|ST)[GL]?(?:\.[A-Z0-9_]+)*\b(?= )", code)
                made.setdefault((arch, kernel[0], of_mixes), []).append(found)
    assert {key[1:] for key in made} == set(KERNELS)
    assert all(len(of_sizes) == 2 for of_sizes in made.values())
    return made


@pytest.mark.nvcc
class TestTheMachineCode:
    """A table copied out of the kernel's arguments would be a stack frame, and loads and stores of local memory."""

    def test_registers_and_stack(self, compiled):
        """Six blocks of 256 threads with 40 registers fit on an SM; `advance` is a small launch and may use more."""
        for arch, (_, said) in compiled.items():
            assert set(re.findall(r"(\d+) bytes (?:stack frame|spill)", said)) == {"0"}, arch
            kernels = re.findall(r"Compiling entry function '(\S+)' .*?Used (\d+) registers", said, re.DOTALL)
            assert len(kernels) == 2 * len(KERNELS)
            for name, registers in kernels:
                assert int(registers) <= (128 if "advance_kernel" in name else 40), (arch, name)

    def test_memory_is_global(self, instructions):
        for key, of_sizes in instructions.items():
            for used in of_sizes:
                assert {name.split(".")[0] for name in used} == {"LDG", "STG"}, key

    def test_nothing_is_evicted_first(self, instructions):
        for key, of_sizes in instructions.items():
            assert not any("EF" in name.split(".") for used in of_sizes for name in used), key

    def test_float32_moves_16_bytes_at_once(self, instructions):
        """p, g and b are loaded, all before one of them is needed, and p and b stored."""
        for key, of_sizes in instructions.items():
            for used in of_sizes:
                moves = " ".join(f"{name.split('.')[0]}.{name.split('.')[-1]}" for name in used)
                if key[1:] == ("apply_kernel", False):
                    assert "LDG.128 LDG.128 LDG.128 STG.128 STG.128" in moves, key
                elif key[1] == "reduce_kernel":
                    assert "LDG.128 LDG.128 LDG.128 LDG.128" in moves, key

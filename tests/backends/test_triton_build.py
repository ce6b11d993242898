"""The Triton kernels without a GPU: what Triton compiles for one when they are launched, and what becomes of it."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.backends.tables import launch, layout, rows_of, tensor_entry
from texp import backends
from texp.theory import Row

ROOT = Path(__file__).parents[2]
MISSING = backends.triton.missing()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

NVIDIA, AMD = {"sm_80": 80, "sm_90": 90, "sm_100": 100}, {"gfx942": "gfx942"}

SHORT = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
CLASSES = [  # of parameter, gradient and buffer
    ("fp32", "fp32", "fp32"), ("fp64", "fp64", "fp64"), ("bf16", "bf16", "bf16"), ("bf16", "bf16", "fp32"),
    ("fp16", "fp16", "fp16"), ("fp16", "fp16", "fp32"),
    ("bf16", "fp32", "fp32"), ("bf16", "fp32", "bf16"), ("fp32", "bf16", "fp32"), ("fp32", "fp16", "bf16"),
    ("fp16", "fp64", "fp32"), ("fp64", "bf16", "fp16"),
]  # fmt: skip


def launch_all(launcher) -> None:
    """One tensor of each class: its row applied, given and from the device, clipped by both norms, too, with trust
    ratios and without, and its squares summed up.
    """
    given, tensors = [], []
    for dtypes in CLASSES:
        p, g, b = (torch.zeros(5000, dtype=SHORT[name]) for name in dtypes)
        tensors += [p, g, b]
        given.append(tensor_entry(p, g, b))
    launcher.apply("cpu", 1, b"".join(given), rows_of([Row()]))
    state = SimpleNamespace(
        scales=torch.zeros(1, 4, dtype=torch.float64),
        momentum_initialized=torch.zeros(16, dtype=torch.uint8),
        norm=torch.zeros(1, dtype=torch.float64),
    )
    limits = ((x, reduction, x > 1) for x in (1.0, 2.0) for reduction in (layout.GRAD_SQUARES, layout.GRAD_MAX))
    for clip, has_trust in product((None, *limits), (False, True)):
        tables = b"".join(given), bytes(layout.GroupEntry()), bytes(24 * len(given))
        launcher.step_on_device(1, *tables, state, None, None, False, clip, has_trust)
    launcher.reduce("cpu", b"".join(given))


REDUCTIONS = {layout.SQUARES: "", layout.GRAD_SQUARES: "of gradients", layout.GRAD_MAX: "of gradients, max"}


class Loaded:
    """In place of a kernel on a GPU that is not there."""

    function = packed_metadata = None

    def __getitem__(self, grid):
        return self.run

    def run(self, *arguments) -> None:
        assert all(isinstance(x, int) for x in arguments[-4:])  # addresses: tensors cost more


def compile_all(backend: str, arch: int | str, folder: str) -> None:
    """Compiles what a launcher compiles for a GPU that is not there, leaves the machine code in `folder` and prints
    what it is; for NVIDIA's also the PTX. Called in a process of its own, where Triton does not interpret kernels.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    target = GPUTarget(backend, arch, 32 if backend == "cuda" else 64)
    gpu = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target
    )
    triton.runtime.driver.set_active(gpu)
    code, run = {}, JITFunction.run

    def compile_(kernel, *arguments, grid, warmup, **options):
        binary = run(kernel, *arguments, grid=grid, warmup=True, **options)
        given = dict(zip(kernel.arg_names, arguments, strict=True))
        constants = {param.name: given[param.name] for param in kernel.params if param.is_constexpr}
        types = [x.name for x in constants.values() if isinstance(x, triton.language.dtype)]
        path = Path(folder) / f"{len(code)}.{'cubin' if backend == 'cuda' else 'hsaco'}"
        path.write_bytes(binary.asm[path.suffix[1:]])
        if backend == "cuda":
            path.with_suffix(".ptx").write_text(binary.asm["ptx"])
        name = [kernel.fn.__name__, *types, *["on device"] * constants.get("ON_DEVICE", False)]
        if how := REDUCTIONS[constants.get("REDUCTION", layout.SQUARES)]:
            name += [how, *map(str, [constants["TILE"]] if "TILE" in constants else [])]
        name = " ".join(name)
        assert name not in code  # nothing is compiled twice
        code[name] = {
            "path": str(path),
            "elements": constants.get("TILE", 0) // (32 * binary.metadata.num_warps),
            "constants": list(constants),
            "assumed": sorted({name for values in binary.src.attrs.values() for name, _ in values}),
            "options": options,
            "fused": binary.metadata.enable_fp_fusion,
        }
        return Loaded()

    JITFunction.run = compile_
    launch_all(launch().Launcher())
    print(json.dumps(code))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, dict]:
    """For each architecture what `compile_all` prints; they are compiled side by side."""
    running = {}
    for backend, archs in (("cuda", NVIDIA), ("hip", AMD)):
        for name, arch in archs.items():
            folder = tmp_path_factory.mktemp(name)
            env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
            env["TRITON_CACHE_DIR"] = str(folder / "cache")
            called = f"compile_all({backend!r}, {arch!r}, {str(folder)!r})"
            command = [sys.executable, "-c", f"from tests.backends.test_triton_build import compile_all; {called}"]
            running[name] = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
    said = {name: process.communicate() for name, process in running.items()}
    for name, process in running.items():
        assert process.returncode == 0, (name, said[name][1])
    return {name: json.loads(printed) for name, (printed, _) in said.items()}


def tool(name: str) -> str:
    triton = importlib.util.find_spec("triton").submodule_search_locations
    folders = [f"{folder}/backends/nvidia/bin" for folder in triton]
    found = shutil.which(name, path=os.pathsep.join([*folders, os.environ.get("PATH", os.defpath)]))
    if found is None:
        pytest.skip(f"there is no {name} in the package triton or in PATH")
    return found


def said_by(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def resources(compiled) -> dict[tuple[str, str], dict[str, int]]:
    """For each architecture and kernel REG, STACK and LOCAL: registers, and bytes."""
    cuobjdump, made = tool("cuobjdump"), {}
    for arch in NVIDIA:
        for name, kernel in compiled[arch].items():
            said = said_by(cuobjdump, "-res-usage", kernel["path"])
            made[arch, name] = {key: int(x) for key, x in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
            assert len(made[arch, name]) == 3
    return made


@pytest.fixture(scope="module")
def instructions(compiled) -> dict[tuple[str, str], list[str]]:
    """For each architecture and kernel the operations that touch memory, as in LDG.E.128."""
    nvdisasm, made = tool("nvdisasm"), {}
    for arch in NVIDIA:
        for name, kernel in compiled[arch].items():
            said = said_by(nvdisasm, "-c", kernel["path"])
            made[arch, name] = re.findall(r"\b(?:LD|ST)[A-Z]*(?:\.[A-Z0-9_]+)*\b(?= )", said)
    return made


STEPS = [f"apply {' '.join(dtypes)}{how}" for dtypes in CLASSES for how in ("", " on device")]
CLIPPING = [REDUCTIONS[layout.GRAD_SQUARES], REDUCTIONS[layout.GRAD_MAX]]
SUMS = sorted({f"reduce {p} {g}" for p, g, _ in CLASSES})
SUMS += sorted({f"reduce {x[1]} {x[1]} {how} {1024 if 'fp64' in x else 2048}" for x in CLASSES for how in CLIPPING})
CONSTANTS = {
    "apply": ["P", "G", "B", "TILE", "ON_DEVICE"], "advance": ["BLOCK"],
    "reduce": ["P", "G", "TILE", "REDUCTION"], "add": ["BLOCK", "REDUCTION"], "norm": ["BLOCK", "REDUCTION"],
}  # fmt: skip


@pytest.mark.parametrize("arch", [*NVIDIA, *AMD])
def test_every_kernel_compiles(compiled, arch):
    clipping = [f"{kernel} {how}" for kernel in ("add", "norm") for how in CLIPPING]
    assert sorted(compiled[arch]) == sorted(["add", "advance", *clipping, *STEPS, *SUMS])
    for kernel in compiled[arch].values():
        assert Path(kernel["path"]).read_bytes().startswith(b"\x7fELF")


@pytest.mark.parametrize("arch", [*NVIDIA, *AMD])
def test_a_kernel_serves_all_rows_sizes_and_addresses(compiled, arch):
    """Constants are types, the size of a tile, where a row comes from, what is summed up. Of what is not constant
    nothing is assumed: on AMD's GPUs, that a table has less than 2 GiB."""
    for name, kernel in compiled[arch].items():
        assert kernel["constants"] == CONSTANTS[name.split()[0]], name
        assert kernel["assumed"] == (["tt.pointer_range"] if arch in AMD else []), name


@pytest.mark.parametrize("arch", [*NVIDIA, *AMD])
def test_it_is_said_of_every_kernel_how_it_is_compiled(compiled, arch):
    """Triton's own choice changes: from 3.10 on it fuses no products and sums."""
    for name, kernel in compiled[arch].items():
        fused = name.startswith("apply")
        assert {"num_warps": 8, "enable_fp_fusion": fused}.items() <= kernel["options"].items(), name
        assert kernel["fused"] == fused, name


@dataclass
class Load:
    """An instruction of PTX that loads from global memory, in the inline assembly that Triton writes for it."""

    statement: str
    lost: set[str]  # registers that it reads, and that the same assembly has overwritten before


def loads_of(ptx: str) -> list[Load]:
    """All loads from global memory, which have to be in inline assembly.

    Triton sets the result to what a masked load leaves there, and then loads. It does not tell LLVM that it writes
    the one before it has read the other, so that LLVM may put both into one register: what is loaded is then what
    lies at address 0. LLVM does so where the result is as wide as an address that nothing else needs.
    """
    loads = []
    for assembly in re.findall(r"// begin inline asm\n(.*?)// end inline asm", ptx, re.DOTALL):
        written: set[str] = set()
        for statement in map(str.strip, assembly.splitlines()):
            parts = re.fullmatch(r"(@!?%\w+ +)?([a-z][\w.:]*)\s+(\{[^}]*\}|%\w+)\s*,(.*);", statement)
            if parts is None:
                continue
            predicate, operation, result, operands = parts.groups()
            read = set(re.findall(r"%\w+", f"{predicate} {operands}"))
            if operation.startswith("ld.global"):
                loads.append(Load(statement, read & written))
            written.update(re.findall(r"%\w+", result))
    assert len(loads) == len(re.findall(r"\bld\.global", ptx))
    return loads


def inline(*statements: str) -> str:
    return "\n".join(["\tadd.s64 %rd2, %rd2, 8;", "\t// begin inline asm", *statements, "\t// end inline asm", ""])


PTX = {
    "scalar": (["mov.u64 %rd1, 0x0;", "ld.global.b64 { %rd1 }, [ %rd2 + 0 ];"], set()),
    "scalar, lost": (["mov.u64 %rd1, 0x0;", "ld.global.b64 { %rd1 }, [ %rd1 + 0 ];"], {"%rd1"}),
    "of another width": (["mov.u32 %r1, 0x0;", "ld.global.b32 { %r1 }, [ %rd1 + 0 ];"], set()),
    "nothing is set": (["ld.global.b64 { %rd1 }, [ %rd1 + 0 ];"], set()),
    "with lines of the source": (
        [".loc 1 9 5, inlined_at 1 2 3 // step.py:9:5", "\tmov.u64 %rd1, %rd7;", ".loc 1 9 5", "",
         "\t@%p1 ld.global.L1::evict_first.b64 { %rd1 }, [ %rd1 + 8 ];"], {"%rd1"},
    ),
    "vector": (
        ["mov.u64 %rd1, 0x0;", "mov.u64 %rd3, 0x0;", "@!%p2 ld.global.v2.b64 { %rd1, %rd3 }, [ %rd2 + 0 ];"], set()
    ),
    "vector, lost": (
        ["mov.u64 %rd1, 0x0;", "mov.u64 %rd3, 0x0;", "@!%p2 ld.global.v2.b64 { %rd1, %rd3 }, [ %rd3 + 0 ];"], {"%rd3"}
    ),
    "policy, lost": (
        ["mov.u64 %rd1, %rd9;", "ld.global.L2::cache_hint.b64 { %rd1 }, [ %rd2 + 0 ], %rd1;"], {"%rd1"}
    ),
    "predicate, lost": (["mov.pred %p1, %p2;", "@%p1 ld.global.b32 { %r1 }, [ %rd2 + 0 ];"], {"%p1"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PTX)
def test_how_a_lost_register_is_found(name):
    statements, lost = PTX[name]
    whole = ["mov.u64 %rd2, 0x0;", "ld.global.b64 { %rd2 }, [ %rd4 + 0 ];"]
    loads = loads_of(inline(*whole) + inline(*statements))
    assert [load.lost for load in loads] == [set(), lost]
    assert loads[1].statement == statements[-1].strip()


def test_a_load_outside_of_inline_assembly_is_not_overlooked():
    with pytest.raises(AssertionError):
        loads_of(inline(*PTX["scalar"][0]) + "\tld.global.b64 %rd1, [%rd1];\n")


@pytest.mark.parametrize("arch", NVIDIA)
def test_no_load_has_lost_its_address(compiled, arch):
    for name, kernel in compiled[arch].items():
        loads = loads_of(Path(kernel["path"]).with_suffix(".ptx").read_text())
        assert loads, name
        assert [load.statement for load in loads if load.lost] == [], name


class TestTheMachineCode:
    """Of NVIDIA's GPUs."""

    def test_registers_and_stack(self, resources):
        """With 64 registers, 4 programs of 256 threads run on a multiprocessor at once. Of `advance` there is one
        program for a group, it may have more."""
        for (arch, name), used in resources.items():
            assert (used["STACK"], used["LOCAL"]) == (0, 0), (arch, name)
            assert used["REG"] <= (128 if name == "advance" else 64), (arch, name)

    def test_memory_is_global(self, instructions):
        """Neither local nor generic. Arguments are constants (LDC); shared memory is where sums meet, and where what
        is loaded and what is stored are spread over the threads in different ways."""
        for (arch, name), used in instructions.items():
            allowed = {"LDG", "STG", "LDC", "LDCU"}
            if name != "advance":
                allowed |= {"LDS", "STS", "LDSM", "STSM"}
            assert {operation.split(".")[0] for operation in used} <= allowed, (arch, name)

    @pytest.mark.parametrize("name", [*STEPS, *SUMS])
    def test_at_least_16_bytes_move_at_once(self, compiled, instructions, name):
        """Of p, g and b, that is all of a thread's elements: where all are aligned, in the first copy of the loop. Of
        those of 2 bytes, where the arithmetic is in float64, a thread has 8 bytes."""
        kernel, *types = re.sub(" (on device|of .*)", "", name).split()
        types = types[1:] if "of gradients" in name else types
        for arch in NVIDIA:
            moved = {"LDG": 0, "STG": 0}
            for operation in instructions[arch, name]:
                family, *modifiers = operation.split(".")
                for width in {"128", "256"}.intersection(modifiers):
                    moved[family] = moved.get(family, 0) + int(width) // 8
            elements = compiled[arch][name]["elements"]
            assert elements > 0
            read = [elements * SHORT[x].itemsize for x in types]
            written = [read[0], read[2]] if kernel == "apply" else []
            assert moved["LDG"] >= sum(size for size in read if size >= 16), arch
            assert moved["STG"] >= sum(size for size in written if size >= 16), arch

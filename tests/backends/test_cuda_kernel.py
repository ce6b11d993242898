"""csrc/cuda/kernels.cu, compiled for the host with a stand-in for CUDA (cuda_on_host): what it computes, and where
it writes. The same source is compiled by nvcc in test_cuda_build.py, and run on a GPU by tests marked `gpu`."""

import ctypes
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

import texp
from tests.conftest import same_bits
from texp import theory
from texp.backends import Kernels
from texp.backends.reference import Entry
from texp.step.groups import scale_of
from texp.theory import Hyperparameters, Row, Scale

ROOT = Path(__file__).parents[2]
COMPILER = (os.environ.get("CXX") or "c++").split()[0]
core = texp.backends.core()
pytestmark = [
    pytest.mark.skipif(core is None, reason=f"without the C++ core: {texp.backends.available()['cpu']}"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"there is no C++ compiler {COMPILER!r}"),
]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # in the order of texp::Dtype
FIXED, STEPPING, IDLE, STATISTIC = range(4)
BUFFERED, FRESH = 16, 32
TILE = 4096
POISON = -7.0


class CTensor(ctypes.Structure):
    _fields_ = (
        ("p", ctypes.c_void_p),
        ("g", ctypes.c_void_p),  # or the power of a statistic, as a float64
        ("b", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("slot", ctypes.c_int32),
        ("source", ctypes.c_uint16),
        ("kind", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
    )


class CGroup(ctypes.Structure):
    _fields_ = (
        ("numbers", ctypes.c_double * 4),  # or pointers
        ("state", ctypes.c_void_p),
        ("where", ctypes.c_uint8 * 4),
        ("nesterov", ctypes.c_bool),
        ("maximize", ctypes.c_bool),
        ("scale_invariant", ctypes.c_bool),
        ("unbuffered", ctypes.c_bool),
        ("ends", ctypes.c_bool),
    )


class CState(ctypes.Structure):
    _fields_ = (
        ("P", ctypes.c_double),
        ("kappa", ctypes.c_double),
        ("exponent", ctypes.c_int64),
        ("started", ctypes.c_int64),
    )


class CDevice(ctypes.Structure):
    _fields_ = (
        ("grad_scale", ctypes.c_void_p),
        ("found_inf", ctypes.c_void_p),
        ("started", ctypes.c_void_p),
        ("ticket", ctypes.c_void_p),
    )


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    library = tmp_path_factory.mktemp("cuda") / "kernels.so"
    # Without -ffp-contract=off, the compiler would fuse what nvcc is told not to.
    command = [COMPILER, "-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-pthread"]
    command += [f"-I{ROOT / 'tests' / 'backends' / 'cuda_on_host'}", f"-I{ROOT / 'csrc'}", "-x", "c++"]
    subprocess.run([*command, str(ROOT / "csrc" / "cuda" / "kernels.cu"), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.texp_cuda_step.restype = loaded.texp_cuda_load.restype = ctypes.c_char_p
    loaded.texp_cuda_step.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64) + (
        ctypes.c_void_p,
    ) * 3
    yield loaded
    assert loaded.misaligned_so_far() == 0


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def ctensor(entry: Entry, source: int, kind: int = FIXED, slot: int = 0) -> CTensor:
    p, g, b = entry
    of_p, of_g, of_b = (DTYPES.index((p if x is None else x).dtype) for x in entry)
    dtypes = of_p | of_b << 2 | of_g << 6
    return CTensor(pointer(p), pointer(g), pointer(b), p.numel(), slot, source, kind, dtypes)


def apply(kernel, entries: list[tuple[Row, Entry]]) -> int:
    """Returns how many launches it took."""
    rows = list(dict.fromkeys(row for row, _ in entries))
    before = kernel.launches_so_far()
    error = kernel.texp_cuda_step(
        0,
        None,
        (CTensor * len(entries))(*(ctensor(entry, rows.index(row)) for row, entry in entries)),
        len(entries),
        (ctypes.c_double * (10 * len(rows)))(*(x for row in rows for x in row)),
        None,
        None,
    )
    assert error is None
    return kernel.launches_so_far() - before


@pytest.mark.parametrize("current", [0, 1, 2])
@pytest.mark.parametrize("device", [0, 1])
def test_it_launches_on_the_device_of_the_tensors(kernel, current, device):
    """And leaves the device current that was."""
    kernel.cudaSetDevice(current)
    try:
        row, tensor = (ctypes.c_double * 10)(*Row()), ctensor(Entry(torch.ones(3)), 0)
        assert kernel.texp_cuda_step(device, None, ctypes.byref(tensor), 1, row, None, None) is None
        assert kernel.launched_on() == device
        assert kernel.current_device() == current
        assert kernel.texp_cuda_load(device) is None
        assert kernel.current_device() == current
    finally:
        kernel.cudaSetDevice(0)


HYPERS = [
    Hyperparameters(0.1),
    Hyperparameters(0.1, 0.9, 0.0, 0.1),
    Hyperparameters(0.1, 0.9, 0.25, 0.1, maximize=True),
    Hyperparameters(0.1, 0.9, 0.0, 0.1, nesterov=True),
    Hyperparameters(0.1, 0.9, 0.0, 0.1, scale_invariant=True),
    Hyperparameters(0.1, 0.9, 0.0, 0.1, nesterov=True, scale_invariant=True),
    Hyperparameters(0.9, 0.0, 0.0, 0.9, scale_invariant=True),
]


def rows_of(hyper: Hyperparameters) -> tuple[Row, Row, Row]:
    """Running, first, and idle: with P above 1, so that the exponential ones pass 2 or do not."""
    scale = Scale(1.9, 3, 0.1) if hyper.scale_invariant else Scale()
    step = theory.advance(scale, hyper, grad_scale=8.0)
    return step.running, step.first, step.idle


SIZES = [0, 1, 3, 4, 5, 255, 1023, 1024, 1025, TILE - 1, TILE, TILE + 1, 2 * TILE + 7]


@pytest.mark.parametrize("hyper", HYPERS, ids=str)
def test_it_has_the_bits_of_the_cpu(kernel, hyper):
    """Every dtype, with and without gradient and buffer, aligned or not, in one launch, between poisoned elements."""
    usual = [
        (dtype, dtype, b_dtype)
        for dtype in DTYPES
        for b_dtype in (dtype, torch.float32 if dtype != torch.float64 else None, None)
    ]
    assert check_bits(kernel, hyper, SIZES, usual) == 1


@pytest.mark.parametrize("hyper", HYPERS[-3:], ids=str)
def test_any_mix_of_dtypes_has_them_too(kernel, hyper):
    """Those among them that the usual kernel takes go the same way as the others."""
    check_bits(kernel, hyper, [0, 1, 3, 5, 1023, 1025, TILE + 1], list(product(DTYPES, DTYPES, [*DTYPES, None])))


def check_bits(kernel, hyper: Hyperparameters, sizes: list[int], mixes: list[tuple]) -> int:
    """Returns how many launches it took. mixes: dtypes of p, g and b, or None where there is no buffer."""
    generator = torch.Generator().manual_seed(0)
    entries, twins = [], []

    def make(size: int, dtype: torch.dtype, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
        storage = torch.full((size + 32,), POISON, dtype=dtype)
        inside = storage[16 + offset :][:size]
        inside.copy_(torch.randn(size, generator=generator))
        return inside, storage

    for i, size in enumerate(sizes):
        for p_dtype, g_dtype, b_dtype in mixes:
            offsets = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (3, 3, 3)][i % 5]
            (p, p_storage), (g, g_storage) = make(size, p_dtype, offsets[0]), make(size, g_dtype, offsets[1])
            b, b_storage = (None, None) if b_dtype is None else make(size, b_dtype, offsets[2])
            row = rows_of(hyper)[(i + len(entries)) % 3]
            g = g if (i + len(entries)) % 3 != 2 else None  # idle rows are for tensors without one
            entries.append((row, Entry(p, g, b)))
            twins.append(
                (Entry(*(x if x is None else x.clone() for x in (p, g, b))), p_storage, b_storage, g_storage)
            )
    launches = apply(kernel, entries)
    for (row, (p, g, b)), (twin, p_storage, b_storage, g_storage) in zip(entries, twins, strict=True):
        core.apply(row, [twin])
        assert same_bits(p, twin.param)
        assert b is None or same_bits(b, twin.buf)
        assert g is None or same_bits(g, twin.grad)
        for inside, storage in ((p, p_storage), (b, b_storage), (g, g_storage)):
            if inside is not None:
                inside.fill_(POISON)
                assert (storage == POISON).all()
    return launches


def test_more_tensors_and_rows_than_fit_one_launch(kernel):
    generator = torch.Generator().manual_seed(0)
    entries = []
    for i in range(1500):
        row = Row(a_g=1.0, c_u=1.0, e=0.5 + i // 5)  # 300 of them
        entries.append((row, Entry(torch.randn(3, generator=generator), torch.randn(3, generator=generator))))
    expected = [entry.param - row.e * entry.grad for row, entry in entries]
    assert 2 <= apply(kernel, entries) <= 4
    for (_, entry), q in zip(entries, expected, strict=True):
        assert torch.allclose(entry.param, q)


@pytest.mark.parametrize("sizes", [[0], [0, 0, 5], [5, 0], [0, TILE, 0, 1, 0]], ids=str)
def test_empty_tensors(kernel, sizes):
    entries = [(Row(c_g=1.0, e=-1.0), Entry(torch.zeros(size), torch.ones(size))) for size in sizes]
    assert apply(kernel, entries) == 1
    assert all((entry.param == 1).all() for _, entry in entries)


@dataclass
class OnDevice:
    """The host side of groups whose scales are on the device, in Python; hyperparameters are read by pointer."""

    kernel: ctypes.CDLL
    groups: list[dict]  # params, bufs, stats, hyper
    states: ctypes.Array = field(init=False)

    def __post_init__(self):
        self.states = (CState * len(self.groups))(*(CState(1.0, 0.0, 0, 0) for _ in self.groups))
        self.started = torch.zeros(sum(len(group["params"]) for group in self.groups), dtype=torch.uint8)
        self.ticket = torch.zeros(1, dtype=torch.int32)
        self.buffered = set()  # slots for which the host has made a buffer

    def step(self, grads: list[list[torch.Tensor | None]], grad_scale: float, found_inf: bool) -> int:
        tensors, groups, slot, made = [], [], 0, set()
        self.kept = []
        for index, (group, gs) in enumerate(zip(self.groups, grads, strict=True)):
            hyper = group["hyper"]
            numbers = (hyper.lr, hyper.momentum, hyper.dampening, hyper.weight_decay)
            where = [index % 3] * 4  # host, float32, float64
            if index % 3:
                self.kept += [torch.tensor(x, dtype=(torch.float32, torch.float64)[index % 3 - 1]) for x in numbers]
                pointers = (ctypes.c_int64 * 4)(*(x.data_ptr() for x in self.kept[-4:]))
                numbers = (ctypes.c_double * 4).from_buffer(pointers)
            slots = range(slot, slot + len(group["params"]))
            flags = (hyper.nesterov, hyper.maximize, hyper.scale_invariant, self.buffered.isdisjoint(slots), False)
            state = ctypes.addressof(self.states[index])
            groups.append(CGroup((ctypes.c_double * 4)(*numbers), state, (ctypes.c_uint8 * 4)(*where), *flags))
            for p, b, g in zip(group["params"], group["bufs"], gs, strict=True):
                fresh = slot not in self.buffered and g is not None and hyper.momentum != 0
                has_buf = fresh or slot in self.buffered
                tensors.append(
                    ctensor(Entry(p, g, b if has_buf else None), index, IDLE if g is None else STEPPING, slot)
                )
                tensors[-1].bits |= has_buf * BUFFERED + fresh * FRESH
                if has_buf:
                    made.add(slot)
                slot += 1
            for stat, power in group["stats"]:
                tensors.append(ctensor(Entry(stat), index, STATISTIC))
                tensors[-1].g = ctypes.c_int64.from_buffer(ctypes.c_double(power)).value
        scale, inf = torch.tensor(grad_scale), torch.tensor(float(found_inf))
        device = CDevice(scale.data_ptr(), inf.data_ptr(), self.started.data_ptr(), self.ticket.data_ptr())
        before = self.kernel.launches_so_far()
        error = self.kernel.texp_cuda_step(
            0,
            None,
            (CTensor * len(tensors))(*tensors),
            len(tensors),
            None,
            (CGroup * len(groups))(*groups),
            ctypes.byref(device),
        )
        assert error is None
        assert self.ticket.item() == 0
        self.buffered |= made
        return self.kernel.launches_so_far() - before


@pytest.mark.parametrize(
    ("copies", "tensors"),
    [
        pytest.param(1, 1, id="one launch"),
        pytest.param(40, 1, id="many groups, several launches"),
        pytest.param(1, 90, id="groups over several launches"),
    ],
)
def test_scales_on_the_device_are_those_of_the_cpu(kernel, copies, tensors):
    """Over a schedule with overflows, late and missing gradients, bit for bit."""
    hypers = [
        Hyperparameters(0.5, 0.75, 0.25, 0.5, scale_invariant=True),
        Hyperparameters(0.5, 0.75, 0.25, 0.5),
        Hyperparameters(0.5, 0.75, 0.0, 0.5, nesterov=True, scale_invariant=True),
        Hyperparameters(0.5, 0.0, 0.0, 0.5),
        Hyperparameters(0.5, 0.0, 0.0, 0.5, scale_invariant=True, maximize=True),
    ] * copies
    torch.manual_seed(0)
    shapes = [(5,), (2, 3), (0,), (7,)] * tensors
    groups = [
        {
            "params": [torch.randn(shape) for shape in shapes],
            "bufs": [torch.full(shape, POISON) for shape in shapes],  # not to be touched before a first step
            "stats": [(torch.ones(3), 1.0), (torch.ones(3, dtype=torch.float64), 2.0)]
            if hyper.scale_invariant
            else [],
            "hyper": hyper,
        }
        for hyper in hypers
    ]
    of_twins = [[stat.clone() for stat, _ in group["stats"]] for group in groups]
    twins = [
        {
            "params": [torch.nn.Parameter(p.clone()) for p in group["params"]],
            "norm_stats": list(zip(stats, [power for _, power in group["stats"]], strict=True)),
            **group["hyper"]._asdict(),
        }
        for group, stats in zip(groups, of_twins, strict=True)
    ]
    optimizer = texp.SGD(twins, backend="cpu")
    device = OnDevice(kernel, groups)
    for t in range(6 if copies * tensors > 1 else 14):
        found_inf = t in (0, 3)
        for i, group in enumerate(groups):
            lr = 0.5 if t < 5 else 0.25
            changes = {"lr": lr}
            if t == 4:  # momentum comes late to some
                changes |= {"momentum": 0.75, "dampening": 0.0 if group["hyper"].nesterov else 0.25}
            group["hyper"] = group["hyper"]._replace(**changes)
            optimizer.param_groups[i].update(changes)
        # One tensor comes late, another misses a gradient.
        missing = [(j % 4 == 3 and t < 2) or (j % 4 == 0 and t == 2) for j in range(len(shapes))]
        grads = [
            [None if absent else torch.randn(shape) for shape, absent in zip(shapes, missing, strict=True)]
            for _ in hypers
        ]
        assert (device.step(grads, 2.0, found_inf) == 1) == (copies * tensors == 1)
        if not found_inf:
            for group, gs in zip(optimizer.param_groups, grads, strict=True):
                for p, g in zip(group["params"], gs, strict=True):
                    p.grad = g
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
            optimizer.step()
        for group, twin, state in zip(groups, optimizer.param_groups, device.states, strict=True):
            assert (state.P, state.kappa, state.exponent) == (
                twin.get("scale", 1.0),
                twin.get("carried_decay", 0.0),
                twin.get("scale_exponent", 0),
            )
            for p, b, q in zip(group["params"], group["bufs"], twin["params"], strict=True):
                assert same_bits(p, q.detach())
                buf = optimizer.state[q].get("momentum_buffer") if q in optimizer.state else None
                assert (b == POISON).all() if buf is None else same_bits(b, buf)
        for group, stats in zip(groups, of_twins, strict=True):
            for (stat, _), other in zip(group["stats"], stats, strict=True):
                assert same_bits(stat, other)


class Launcher:
    """Takes the place of the launches: as csrc/launch.h, but of the kernel that was compiled for the host."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel
        self.ticket = torch.zeros(1, dtype=torch.int32)

    def step(self, device: str, tensors: bytearray, rows: bytearray) -> None:
        self._launch(tensors, (ctypes.c_char * len(rows)).from_buffer(rows), None, None)

    def step_on_device(self, tensors, groups, started, grad_scale, found_inf, *, capturing, capturable) -> None:
        on_device = CDevice(pointer(grad_scale), pointer(found_inf), pointer(started), pointer(self.ticket))
        self._launch(tensors, None, (ctypes.c_char * len(groups)).from_buffer(groups), ctypes.byref(on_device))

    def _launch(self, tensors: bytearray, *arguments) -> None:
        table = (ctypes.c_char * len(tensors)).from_buffer(tensors)
        count = len(tensors) // ctypes.sizeof(CTensor)
        assert self.kernel.texp_cuda_step(0, None, table, count, *arguments) is None


ARGUMENTS = {
    "plain": {"lr": 0.1, "weight_decay": 0.1},
    "heavy ball": {"lr": 0.1, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.1},
    "exponential": {"lr": 0.1, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.1, "scale_invariant": True},
    "exponential nesterov": {
        "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "scale_invariant": True,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "of_grads"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_whole_steps_with_and_without_a_scaler(kernel, name, dtype, of_grads):
    """Some skipped, the first among them; late and missing gradients, momentum that comes late, norm_stats, several
    groups: the bits of the CPU, which decides on the host what the kernel decides by itself."""
    if of_grads != dtype and not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch keeps gradients in the dtype of their parameters")
    runs = []
    for launcher in (None, Launcher(kernel)):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((5, 3), (), (0,), (4097,), (7,))]
        for p in params if of_grads != dtype else ():
            p.grad_dtype = of_grads
        stat = torch.ones(3)
        groups = [{"params": params[:3], "norm_stats": [(stat, 2)]}, {"params": params[3:], "lr": 0.05}]
        optimizer = texp.SGD(groups, backend="cpu", **ARGUMENTS[name])
        if launcher is not None:
            optimizer._kernels = Kernels(core, cpu=launcher.step, scale_on="cpu", launcher=launcher)
        for t in range(14):
            torch.manual_seed(100 + t)
            for i, p in enumerate(params):
                p.grad = None if (i, t) in ((1, 0), (1, 1), (0, 4), (4, 6)) else torch.randn(p.shape).to(of_grads)
            if t == 8 and not ARGUMENTS[name].get("nesterov"):
                optimizer.param_groups[1]["momentum"] = 0.5
            scaled = t % 5 < 4
            optimizer.grad_scale = torch.tensor(4.0) if scaled else None
            optimizer.found_inf = torch.tensor(float(t in (0, 3, 7))) if scaled else None
            optimizer.step()
            assert optimizer.step_was_skipped == (scaled and t in (0, 3, 7))
        saved = optimizer.state_dict()
        bufs = [values["momentum_buffer"] for values in saved["state"].values()]
        runs.append((params + bufs + [stat], list(map(scale_of, optimizer.param_groups))))
    (expected, scales), (actual, scales_on_device) = runs
    assert scales == scales_on_device
    assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True))

"""csrc/cuda/kernels.cu, compiled for the host with a stand-in for CUDA (cuda_on_host, beside this): what it computes,
and where it writes. The same source is compiled by nvcc in test_cuda_build.py, and run on a GPU by tests marked
`gpu`."""

import ctypes
import math
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import texp
from tests.backends.tables import DTYPES, address, layout, rows_of, tensor_entry
from tests.conftest import relative_error, same_bits
from tests.test_theory import hypers
from texp import theory
from texp.backends import Kernels
from texp.backends.reference import Entry
from texp.step.groups import scale_of
from texp.theory import Hyperparameters, Row, Scale, Trust

ROOT = Path(__file__).parents[2]
COMPILER = (os.environ.get("CXX") or "c++").split()[0]
core = texp.backends.core()
pytestmark = [
    pytest.mark.skipif(core is None, reason=f"without the C++ core: {texp.backends.available()['cpu']}"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"there is no C++ compiler {COMPILER!r}"),
]

TILE = 2048  # of apply; of float32 it is half of that
REDUCE_TILE = 8192
POISON = -7.0


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    library = tmp_path_factory.mktemp("cuda") / "kernels.so"
    # Without -ffp-contract=off, the compiler would fuse what nvcc is told not to.
    command = [COMPILER, "-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-pthread"]
    command += [f"-I{ROOT / 'tests' / 'backends' / 'cuda_on_host'}", f"-I{ROOT / 'csrc'}", "-x", "c++"]
    subprocess.run([*command, str(ROOT / "csrc" / "cuda" / "kernels.cu"), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    pointer, n, kind = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint8
    for name, arguments in {
        "apply": (pointer, n, pointer, pointer, pointer),
        "advance": (pointer, n, pointer, n, pointer),
        "reduce": (pointer, n, kind, pointer, pointer),
        "norm": (pointer, pointer, n, kind, pointer, pointer, pointer),
        "load": (),
    }.items():
        function = getattr(loaded, f"texp_cuda_{name}")
        function.restype = ctypes.c_char_p
        function.argtypes = (ctypes.c_int, pointer, *arguments) if arguments else (ctypes.c_int,)
    loaded.texp_cuda_reduce_workspace.restype = n
    loaded.texp_cuda_reduce_workspace.argtypes = (pointer, n)
    yield loaded
    assert loaded.misaligned_so_far() == 0


class Launcher:
    """Takes the place of the launches: gives tables, as the host side makes them, to the kernels compiled for the
    host."""

    capturable = True

    def __init__(self, kernel) -> None:
        self.kernel = kernel

    def apply(self, device: str, version: int, tensors: bytes, rows: bytes) -> None:
        n, table = self._table(layout.TensorEntry, tensors)
        self._check(self.kernel.texp_cuda_apply(0, None, table, n, self._table(layout.Row, rows)[1], None, None))

    def step_on_device(
        self,
        version: int,
        tensors: bytes,
        groups: bytes,
        requests: bytes,
        state,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        capturing: bool,
        clip: tuple[float, int, bool] | None,
        has_trust: bool,
    ) -> None:
        n, table = self._table(layout.TensorEntry, tensors)
        n_groups, of_groups = self._table(layout.GroupEntry, groups)
        n_requests, of_requests = self._table(layout.RowRequest, requests)
        assert n == n_requests
        self.rows, self.skip = torch.full((n, 10), POISON, dtype=torch.float64), torch.tensor([-1], dtype=torch.int32)
        step = layout.DeviceStep(
            grad_scale=address(grad_scale),
            found_inf=address(found_inf),
            momentum_initialized=address(state.momentum_initialized),
            rows=address(self.rows),
            skip=address(self.skip),
        )
        if clip is not None:
            step.max_norm, reduction, step.skips_nonfinite = clip
            sums = self.reduce("cpu", tensors, reduction)
            state.norm.fill_(self.norm(groups, requests, sums, reduction, grad_scale))
            step.norm = address(state.norm)
        if has_trust:
            sums = self.reduce("cpu", tensors)
            step.sums = address(sums)
        self._check(self.kernel.texp_cuda_advance(0, None, of_groups, n_groups, of_requests, n, ctypes.byref(step)))
        arguments = (table, n, None, address(self.rows), address(self.skip))
        self._check(self.kernel.texp_cuda_apply(0, None, *arguments))

    def reduce(self, device: str, tensors: bytes, reduction: int = layout.SQUARES) -> Tensor:
        n, table = self._table(layout.TensorEntry, tensors)
        used = self.kernel.texp_cuda_reduce_workspace(table, n)
        workspace, sums = (torch.full((size + 1,), POISON, dtype=torch.float64) for size in (used, 2 * n))
        to = sums.data_ptr(), workspace.data_ptr()
        self._check(self.kernel.texp_cuda_reduce(0, None, table, n, reduction, *to))
        assert workspace[-1] == sums[-1] == POISON
        assert reduction == layout.SQUARES or (workspace[:-1:2] == POISON).all()
        return sums[:-1].view(n, 2)

    def norm(
        self, groups: bytes, requests: bytes, sums: Tensor, reduction: int, grad_scale: Tensor | None = None
    ) -> float:
        groups = self._table(layout.GroupEntry, groups)[1]
        n, requests = self._table(layout.RowRequest, requests)
        norm = torch.full((2,), POISON, dtype=torch.float64)
        arguments = (reduction, address(sums), address(grad_scale), norm.data_ptr())
        self._check(self.kernel.texp_cuda_norm(0, None, groups, requests, n, *arguments))
        assert norm[1] == POISON
        return norm[0].item()

    @staticmethod
    def _table(struct: type, of: bytes) -> tuple[int, ctypes.Array]:
        n = len(of) // ctypes.sizeof(struct)
        return n, (struct * n).from_buffer_copy(of)

    @staticmethod
    def _check(error: bytes | None) -> None:
        assert error is None


HYPERS = [
    Hyperparameters(0.1),
    Hyperparameters(0.1, 0.9, 0.0, 0.1),
    Hyperparameters(0.1, 0.9, 0.25, 0.1, maximize=True),
    Hyperparameters(0.1, 0.9, 0.0, 0.1, nesterov=True),
    Hyperparameters(0.1, 0.9, 0.0, 0.1, scale_invariant=True),
    Hyperparameters(0.1, 0.9, 0.0, 0.1, nesterov=True, scale_invariant=True),
    Hyperparameters(0.9, 0.0, 0.0, 0.9, scale_invariant=True),
]


def rows_of_step(hyper: Hyperparameters) -> tuple[Row, Row, Row]:
    """Running, first, and idle: with P above 1, so that the exponential ones pass 2 or do not."""
    scale = Scale(1.9, 3, 0.1) if hyper.scale_invariant else Scale()
    step = theory.advance(scale, hyper, grad_scale=8.0)
    return step.running, step.first, step.idle


def poisoned(size: int, dtype: torch.dtype, offset: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Normal numbers in the middle of a poisoned storage, aligned or not, and that storage."""
    storage = torch.full((size + 32,), POISON, dtype=dtype)
    inside = storage[16 + offset :][:size]
    inside.copy_(torch.randn(size, generator=generator))
    return inside, storage


OFFSETS = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (3, 3, 3)]  # of p, g and b
SIZES = [0, 1, 3, 4, 5, 255, TILE // 2 - 1, TILE // 2, TILE // 2 + 1, TILE - 1, TILE, TILE + 1, 2 * TILE + 7]


class TestApply:
    @staticmethod
    def apply(kernel, entries: list[tuple[Row, Entry]], in_device_memory: bool = False, skip: int = 0) -> int:
        """Returns how many launches it took."""
        before = kernel.launches_so_far()
        if in_device_memory:  # a row for each tensor, as `advance` leaves them
            tensors = [tensor_entry(*entry, i) for i, (_, entry) in enumerate(entries)]
            rows = torch.tensor([row for row, _ in entries], dtype=torch.float64)
            flag = torch.tensor([skip], dtype=torch.int32)
            table = b"".join(tensors)
            arguments = (table, len(tensors), None, rows.data_ptr(), flag.data_ptr())
            assert kernel.texp_cuda_apply(0, None, *arguments) is None
        else:
            rows = list(dict.fromkeys(row for row, _ in entries))
            tensors = [tensor_entry(*entry, rows.index(row)) for row, entry in entries]
            Launcher(kernel).apply("cpu", 0, b"".join(tensors), rows_of(rows))
        return kernel.launches_so_far() - before

    @pytest.mark.parametrize("in_device_memory", [False, True])
    @pytest.mark.parametrize("hyper", HYPERS, ids=str)
    def test_it_has_the_bits_of_the_cpu(self, kernel, hyper, in_device_memory):
        """Every dtype, with and without gradient and buffer, aligned or not, in one launch, between poisoned ones."""
        usual = [
            (dtype, dtype, b_dtype)
            for dtype in DTYPES
            for b_dtype in (dtype, torch.float32 if dtype != torch.float64 else None, None)
        ]
        assert self.check_bits(kernel, hyper, SIZES, usual, in_device_memory) == 1

    @pytest.mark.parametrize("in_device_memory", [False, True])
    @pytest.mark.parametrize("hyper", HYPERS[-3:], ids=str)
    def test_any_mix_of_dtypes_has_them_too(self, kernel, hyper, in_device_memory):
        """Those among them that the usual kernel takes go the same way as the others."""
        mixes = list(product(DTYPES, DTYPES, [*DTYPES, None]))
        self.check_bits(kernel, hyper, [0, 1, 3, 5, 1023, 1025, TILE + 1], mixes, in_device_memory)

    def check_bits(
        self, kernel, hyper: Hyperparameters, sizes: list[int], mixes: list[tuple], in_device_memory: bool
    ) -> int:
        """Returns how many launches it took. mixes: dtypes of p, g and b, or None where there is no buffer."""
        generator = torch.Generator().manual_seed(0)
        entries, twins = [], []
        for i, size in enumerate(sizes):
            for p_dtype, g_dtype, b_dtype in mixes:
                of_p, of_g, of_b = OFFSETS[i % 5]
                p, p_storage = poisoned(size, p_dtype, of_p, generator)
                g, g_storage = poisoned(size, g_dtype, of_g, generator)
                b, b_storage = (None, None) if b_dtype is None else poisoned(size, b_dtype, of_b, generator)
                row = rows_of_step(hyper)[(i + len(entries)) % 3]
                g = g if (i + len(entries)) % 3 != 2 else None  # idle rows are for tensors without one
                entries.append((row, Entry(p, g, b)))
                twins.append(
                    (Entry(*(x if x is None else x.clone() for x in (p, g, b))), p_storage, b_storage, g_storage)
                )
        launches = self.apply(kernel, entries, in_device_memory)
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

    @pytest.mark.parametrize("in_device_memory", [False, True])
    def test_more_tensors_and_rows_than_fit_one_launch(self, kernel, in_device_memory):
        generator = torch.Generator().manual_seed(0)
        entries = []
        for i in range(1500):
            row = Row(a_g=1.0, c_u=1.0, e=0.5 + i // 5)  # 300 of them
            entries.append((row, Entry(torch.randn(3, generator=generator), torch.randn(3, generator=generator))))
        expected = [entry.param - row.e * entry.grad for row, entry in entries]
        assert 2 <= self.apply(kernel, entries, in_device_memory) <= 4
        for (_, entry), q in zip(entries, expected, strict=True):
            assert torch.allclose(entry.param, q)

    @pytest.mark.parametrize("in_device_memory", [False, True])
    @pytest.mark.parametrize("sizes", [[], [0], [0, 0, 5], [5, 0], [0, TILE, 0, 1, 0]], ids=str)
    def test_empty_tensors(self, kernel, sizes, in_device_memory):
        """Where there is nothing to do, nothing is launched."""
        entries = [(Row(c_g=1.0, e=-1.0), Entry(torch.zeros(size), torch.ones(size))) for size in sizes]
        assert self.apply(kernel, entries, in_device_memory) == any(sizes)
        assert all((entry.param == 1).all() for _, entry in entries)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # and a buffer of float32: usual, and not
    def test_a_skipped_step_changes_nothing(self, kernel, dtype):
        entry = Entry(torch.ones(5), torch.ones(5, dtype=dtype), torch.ones(5))
        row = Row(s_p=2.0, r_u=3.0, a_b=1.0)
        self.apply(kernel, [(row, entry)], in_device_memory=True, skip=1)
        assert (entry.param == 1).all()
        assert (entry.buf == 1).all()
        self.apply(kernel, [(row, entry)], in_device_memory=True)
        assert (entry.param == 2).all()
        assert (entry.buf == 3).all()

    @pytest.mark.parametrize(("version", "dependent"), [(80, 0), (89, 0), (90, 1), (120, 1)])
    def test_a_dependent_launch_is_the_first_after_advance(self, kernel, version, dependent):
        """Of several launches the others follow it; those with rows of the host never are, nor any of code that was
        compiled for less than 9.0, which does not wait, whatever the device is.
        """
        kernel.compile_for(version)
        kernel.texp_cuda_load(0)
        try:
            entries = [(Row(c_g=1.0, e=-1.0), Entry(torch.zeros(3), torch.ones(3))) for _ in range(1000)]
            before = kernel.dependent_launches_so_far()
            self.apply(kernel, entries)
            assert kernel.dependent_launches_so_far() == before
            assert self.apply(kernel, entries, in_device_memory=True) > 1
            assert kernel.dependent_launches_so_far() == before + dependent
            assert all((entry.param == 2).all() for _, entry in entries)
        finally:
            kernel.compile_for(80)
            kernel.texp_cuda_load(0)


@pytest.mark.parametrize("current", [0, 1, 2])
@pytest.mark.parametrize("device", [0, 1])
def test_launches_are_on_the_device_of_the_tensors(kernel, current, device):
    """And leave the device current that was."""
    p, scale, request = torch.ones(3), layout.DeviceScale(1.0), bytes(layout.RowRequest())
    tensor, group = tensor_entry(p), layout.GroupEntry(scale=ctypes.addressof(scale))
    skip, sums = torch.zeros(1, dtype=torch.int32), torch.zeros(5, dtype=torch.float64)
    step = layout.DeviceStep(skip=address(skip))
    kernel.cudaSetDevice(current)
    try:
        for function, *arguments in (
            (kernel.texp_cuda_apply, tensor, 1, rows_of([Row()]), None, None),
            (kernel.texp_cuda_advance, ctypes.byref(group), 1, None, 0, ctypes.byref(step)),
            (kernel.texp_cuda_reduce, tensor, 1, layout.SQUARES, address(sums), address(sums) + 16),
            (
                kernel.texp_cuda_norm,
                bytes(group),
                request,
                1,
                layout.GRAD_MAX,
                address(sums),
                None,
                address(sums) + 32,
            ),
        ):
            assert function(device, None, *arguments) is None
            assert kernel.launched_on() == device
            assert kernel.current_device() == current
        assert kernel.texp_cuda_load(device) is None
        assert kernel.current_device() == current
    finally:
        kernel.cudaSetDevice(0)
    assert sums.tolist() == [3, 0, 3, 0, 0]
    assert scale.P == 1


@dataclass
class Group:
    """A group as `advance` sees it, and what theory says of its step."""

    hyper: Hyperparameters
    scale: Scale
    momentum_initialized: bool = False  # of any tensor
    without_buffers: bool = False
    numbers_in: tuple[int, int, int, int] = (0, 0, 0, 0)
    tensors: list[tuple] = field(default_factory=list)  # kind, power, has_buffer, newly_allocated, initialized

    @property
    def first(self) -> bool:
        return self.without_buffers or not self.momentum_initialized

    def row(self, step: theory.Step, kind: int, power: float, has_buffer: bool, new: bool, initialized: bool) -> Row:
        empty = has_buffer and (new or not initialized)
        if kind == layout.STATISTIC:
            return step.norm_stat(power)
        if kind == layout.IDLE:
            return step.idle._replace(a_p=0.0) if empty else step.idle
        return step.first if self.hyper.momentum != 0 and empty else step.running

    def is_initialized_after(self, kind: int, power: float, has_buffer: bool, new: bool, initialized: bool) -> bool:
        return initialized or (kind == layout.STEP and has_buffer and self.hyper.momentum != 0)


def sums_of_squares(n: int) -> Tensor:
    """All different but for some that are 0 or not finite."""
    sums = 4 * torch.rand(2 * n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    sums[::7], sums[::45], sums[::47] = 0.0, math.inf, math.nan
    return sums.view(n, 2)


class TestAdvance:
    @staticmethod
    def advance(
        kernel,
        groups: list[Group],
        grad_scale: float | None = None,
        found_inf: float | None = None,
        norm: float | None = None,
        max_norm: float = 1.0,
        skips_nonfinite: bool = False,
    ) -> int:
        """Compares all that is written with theory, bit for bit. Returns how many launches it took."""
        scales = (layout.DeviceScale * len(groups))()
        entries, requests, kept = [], [], []
        for scale, group in zip(scales, groups, strict=True):
            P, exponent, kappa = group.scale
            scale.P, scale.kappa, scale.exponent = P, kappa, exponent
            scale.momentum_initialized = group.momentum_initialized
            entry = layout.GroupEntry(scale=ctypes.addressof(scale), begin=len(requests))
            for i, (name, place) in enumerate(zip(group.hyper._fields, group.numbers_in, strict=False)):
                value = getattr(group.hyper, name)
                getattr(entry, "in")[i] = place
                if place == layout.HOST:
                    getattr(entry, name).value = value
                else:
                    dtype = torch.float32 if place == layout.FLOAT32 else torch.float64
                    kept.append(torch.tensor(value, dtype=dtype))
                    getattr(entry, name).at = kept[-1].data_ptr()
                    group.hyper = group.hyper._replace(**{name: kept[-1].item()})
            for name in ("nesterov", "maximize", "scale_invariant"):
                setattr(entry, name, getattr(group.hyper, name))
            entry.without_buffers = group.without_buffers
            if (trust := group.hyper.trust) is not None:
                entry.trust = layout.Trust(trust.coeff, trust.eps, True, trust.clips, trust.always_adapts)
            for kind, power, has_buffer, new, _ in group.tensors:
                requests.append(layout.RowRequest(power, len(entries), len(requests), kind, has_buffer, new))
            entry.end = len(requests)
            entries.append(entry)
        initialized = torch.tensor([x[-1] for group in groups for x in group.tensors] + [True]).to(torch.uint8)
        rows = torch.full((len(requests) + 1, 10), POISON, dtype=torch.float64)
        skip = torch.tensor([-1], dtype=torch.int32)
        of_step = {"grad_scale": grad_scale, "found_inf": found_inf}
        of_step = {name: None if x is None else torch.tensor(x) for name, x in of_step.items()}
        of_step["norm"] = None if norm is None else torch.tensor(norm, dtype=torch.float64)
        sums = sums_of_squares(len(requests)) if any(group.hyper.trust for group in groups) else None
        of_step |= {"momentum_initialized": initialized, "rows": rows, "skip": skip, "sums": sums}
        addresses = {name: address(x) for name, x in of_step.items()}
        step = layout.DeviceStep(max_norm=max_norm, skips_nonfinite=skips_nonfinite, **addresses)
        before, scales_before, initialized_before = kernel.launches_so_far(), bytes(scales), initialized.clone()
        error = kernel.texp_cuda_advance(
            0,
            None,
            b"".join(entries),
            len(entries),
            b"".join(requests),
            len(requests),
            ctypes.byref(step),
        )
        assert error is None
        launches = kernel.launches_so_far() - before
        skipped = bool(found_inf) or (norm is not None and skips_nonfinite and not math.isfinite(norm))
        assert skip.item() == (skipped if groups else -1)
        if skipped or not groups:
            assert (rows == POISON).all()
            assert bytes(scales) == scales_before
            assert torch.equal(initialized, initialized_before)
            return launches
        grad_scale = grad_scale or 1.0
        if norm is not None:
            grad_scale /= min(1.0, max_norm / (norm + 1e-6)) if math.isfinite(norm) else math.nan
        expected, expected_initialized = [], []
        for scale, group in zip(scales, groups, strict=True):
            of_group = theory.advance(group.scale, group.hyper, first=group.first, grad_scale=grad_scale)
            for x in group.tensors:
                row, trust = group.row(of_group, *x), group.hyper.trust
                if trust is not None and x[0] == layout.STEP:
                    p_norm, g_norm = map(math.sqrt, sums[len(expected)].tolist())
                    of_norms = p_norm, g_norm / abs(grad_scale)
                    row = row.with_ratio(trust.ratio(group.hyper.lr, group.hyper.weight_decay, *of_norms))
                expected.append(row)
            expected_initialized += [group.is_initialized_after(*x) for x in group.tensors]
            assert Scale(scale.P, scale.exponent, scale.kappa) == of_group.scale
            assert scale.momentum_initialized == (not group.first or group.hyper.momentum != 0)
        expected.append(Row(*[POISON] * 10))
        numpy.testing.assert_array_equal(rows, expected)
        assert initialized.tolist() == [*expected_initialized, True]
        return launches

    ALL = list(product(range(3), [1.0, 2.0, 3.0], *[[False, True]] * 3))  # tensors of every sort

    @settings(max_examples=60)
    @given(
        hyper=hypers,
        P=st.floats(1, 2, exclude_max=True),
        exponent=st.integers(-5, 5000),
        kappa=st.floats(0, 100, allow_subnormal=False),
        momentum_initialized=st.booleans(),
        without_buffers=st.booleans(),
        numbers_in=st.tuples(*[st.integers(0, 2)] * 4),
        grad_scale=st.sampled_from([None, 1.0, 2.0**16, -3.0]),
        found_inf=st.sampled_from([None, 0.0, 0.0, 1.0, math.nan]),
        norm=st.sampled_from([None, 0.0, 0.75, 3.0, 1e300, math.inf, math.nan]),
        max_norm=st.sampled_from([1.0, 0.1, math.inf]),
        skips_nonfinite=st.booleans(),
    )
    def test_it_has_the_bits_of_theory(
        self,
        kernel,
        hyper,
        P,
        exponent,
        kappa,
        momentum_initialized,
        without_buffers,
        numbers_in,
        grad_scale,
        found_inf,
        norm,
        max_norm,
        skips_nonfinite,
    ):
        group = Group(hyper, Scale(P, exponent, kappa), momentum_initialized, without_buffers, numbers_in, self.ALL)
        clipping = norm, max_norm, skips_nonfinite
        assert self.advance(kernel, [group], grad_scale, found_inf, *clipping) == 1

    @settings(max_examples=60)
    @given(
        hyper=hypers,
        trust=st.builds(
            Trust,
            coeff=st.sampled_from([0.0, 1e-3, 0.5]),
            eps=st.sampled_from([0.0, 1e-8, 1.0]),
            clips=st.booleans(),
            always_adapts=st.booleans(),
        ),
        momentum_initialized=st.booleans(),
        numbers_in=st.tuples(*[st.integers(0, 2)] * 4),
        grad_scale=st.sampled_from([None, 2.0**16, -3.0]),
        norm=st.sampled_from([None, 0.75, 3.0, 1e300, math.nan]),
    )
    def test_rows_times_trust_ratios(self, kernel, hyper, trust, momentum_initialized, numbers_in, grad_scale, norm):
        """Beside a group without them, after which its tensors stand."""
        hyper = hyper._replace(scale_invariant=False, trust=trust)
        group = Group(hyper, Scale(), momentum_initialized, numbers_in=numbers_in, tensors=self.ALL)
        other = Group(HYPERS[-2], Scale(1.9, 3, 0.1), tensors=self.ALL)
        assert self.advance(kernel, [other, group], grad_scale, None, norm) == 1

    @pytest.mark.parametrize("skips_nonfinite", [False, True])
    @pytest.mark.parametrize("norm", [0.5, 4.0, math.inf, math.nan])
    def test_a_norm_clips_or_skips_the_step(self, kernel, norm, skips_nonfinite):
        group = Group(HYPERS[-2], Scale(1.9, 3, 0.1), momentum_initialized=True, tensors=self.ALL)
        self.advance(kernel, [group], 8.0, 0.0, norm, 1.5, skips_nonfinite)

    @pytest.mark.parametrize(
        ("sizes", "launches"),
        [
            ([], 0),
            ([0], 1),
            ([0, 0, 3, 0], 1),
            ([1, 3000, 0, 2], 3),
            ([2000, 2000, 2000], 5),
            ([0] * 1500, 4),
            ([1] * 465, 2),
        ],
        ids=lambda x: str(x)[:20],
    )
    @pytest.mark.parametrize(("found_inf", "norm"), [(0.0, 4.0), (1.0, 4.0), (0.0, math.inf)])
    def test_any_number_of_groups_and_tensors(self, kernel, sizes, launches, found_inf, norm):
        """A group over several launches advances once, and all of its rows are those of the same step."""
        trusts = [
            Trust(0.02, always_adapts=True) if i % 2 == 0 and not of.scale_invariant else None
            for i, of in enumerate(HYPERS)
        ]
        groups = [
            Group(
                HYPERS[i % len(HYPERS)]._replace(lr=0.1 + i / 1024, trust=trusts[i % len(HYPERS)]),
                Scale(1 + i / 2048, i, 0.25) if HYPERS[i % len(HYPERS)].scale_invariant else Scale(),
                momentum_initialized=i % 2 == 1,
                tensors=[self.ALL[j % len(self.ALL)] for j in range(size)],
            )
            for i, size in enumerate(sizes)
        ]
        assert self.advance(kernel, groups, 2.0, found_inf, norm, skips_nonfinite=True) == launches


class TestReduce:
    """Sums of squares, and the largest gradients."""

    SIZES = [0, 1, 3, 7, 8, 255, 1023, 1025, REDUCE_TILE - 1, REDUCE_TILE, REDUCE_TILE + 1, 3 * REDUCE_TILE + 5]

    def test_every_dtype_and_size(self, kernel):
        """Between poisoned elements, aligned or not."""
        generator = torch.Generator().manual_seed(0)
        entries = []
        for i, (size, p_dtype) in enumerate(product(self.SIZES, DTYPES)):
            g_dtype = DTYPES[(i + i // 4) % 4]  # each with each
            of_p, of_g, _ = OFFSETS[i % 5]
            (p, _), (g, _) = poisoned(size, p_dtype, of_p, generator), poisoned(size, g_dtype, of_g, generator)
            entries.append(Entry(p, g if i % 3 else None))
        self.check(kernel, entries, launches=2)

    def test_more_tensors_than_fit_one_launch(self, kernel):
        generator = torch.Generator().manual_seed(0)
        make = lambda i: torch.randn(i % 5, generator=generator)  # noqa: E731
        self.check(kernel, [Entry(make(i), make(i)) for i in range(760)], launches=4)

    @pytest.mark.parametrize("sizes", [[], [0], [0, 3, 0]], ids=str)
    def test_empty_tensors(self, kernel, sizes):
        """Their sums are 0, and where there is nothing to write nothing is launched."""
        self.check(kernel, [Entry(torch.ones(size)) for size in sizes], launches=len(sizes) and 1 + any(sizes))

    def test_products_are_in_float64(self, kernel):
        p, g = torch.full((300,), 1e30), torch.full((300,), 1e-30)
        assert p.square().isinf().all()
        assert (g.square() == 0).all()
        self.check(kernel, [Entry(p, g)], launches=2)

    def test_infinite_gradients_are_seen(self, kernel):
        for value in (math.inf, -math.inf, math.nan):
            g = torch.ones(5000)
            g[4321] = value
            (of_p, of_g), *_ = Launcher(kernel).reduce("cpu", tensor_entry(g, g))
            assert not math.isfinite(of_p)
            assert not math.isfinite(of_g)

    @pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_the_largest_gradient_is_nan_where_one_is(self, kernel, dtype, value):
        """Wherever that is: in any thread, before others and after them, in any tile; infinite ones beside it too."""
        tensors, kept = [], []
        generator = torch.Generator().manual_seed(0)
        for size, offset in product((1, 5, 1031, 2 * REDUCE_TILE + 3), (0, 1)):
            for at in {0, size // 2, size - 1}:
                g, _ = poisoned(size, dtype, offset, generator)
                g[size // 3] = -math.inf
                g[at] = value
                kept.append(g)
                tensors.append(tensor_entry(g, g))
        largest = Launcher(kernel).reduce("cpu", b"".join(tensors), layout.GRAD_MAX)[:, 1]
        numpy.testing.assert_array_equal(largest, [math.nan if math.isnan(value) else math.inf] * len(kept))

    @pytest.mark.parametrize("value", [-9.0, math.nan])
    def test_the_largest_of_many_tiles(self, kernel, value):
        """More of them than a block has threads."""
        g = torch.ones(260 * REDUCE_TILE, dtype=torch.bfloat16)
        g[3] = g[256 * REDUCE_TILE + 4] = 2.0
        g[REDUCE_TILE * 258] = value
        largest = Launcher(kernel).reduce("cpu", tensor_entry(g, g), layout.GRAD_MAX)[0, 1]
        numpy.testing.assert_array_equal(largest, abs(value))

    def check(self, kernel, entries: list[Entry], launches: int) -> None:
        """Against exact sums; and a tensor's bits do not depend on what else is in the launch, nor on whether p is
        read."""
        launcher, before = Launcher(kernel), kernel.launches_so_far()
        tensors = [tensor_entry(*entry) for entry in entries]
        sums, of_grads, largest = (
            launcher.reduce("cpu", b"".join(tensors), reduction)
            for reduction in (layout.SQUARES, layout.GRAD_SQUARES, layout.GRAD_MAX)
        )
        assert kernel.launches_so_far() - before == 3 * launches
        assert (of_grads[:, 0] == POISON).all()
        assert (largest[:, 0] == POISON).all()
        assert torch.equal(of_grads[:, 1], sums[:, 1])
        grads = [None if entry.grad is None else entry.grad.double().numpy() for entry in entries]
        assert largest[:, 1].tolist() == [0.0 if g is None else numpy.abs(g).max(initial=0.0) for g in grads]
        for (p, g, _), actual in zip(entries, sums.tolist(), strict=True):
            for x, of_x in zip((p, g), actual, strict=True):
                exact = 0.0 if x is None else math.fsum(value * value for value in x.double().tolist())
                # Each square passes at most 33 sums in its thread and 30 in its block, and 31 more over tiles.
                assert abs(of_x - exact) <= 100 * 2**-53 * exact
        for i in {0, len(tensors) // 2, len(tensors) - 1} if tensors else ():
            alone = launcher.reduce("cpu", b"".join(tensors[i : i + 1]))
            assert same_bits(alone[0], sums[i])


@pytest.mark.parametrize("reduction", [layout.GRAD_SQUARES, layout.GRAD_MAX])
class TestNorm:
    """Of all gradients at θ."""

    @staticmethod
    def norm(
        kernel, reduction: int, groups: list[tuple[float, list]], sums: Tensor, grad_scale: float | None
    ) -> float:
        """groups: P, and the tensors, of which only the number counts."""
        scales = (layout.DeviceScale * len(groups))(*(layout.DeviceScale(P, math.nan) for P, _ in groups))
        entries = [bytes(layout.GroupEntry(scale=ctypes.addressof(scale))) for scale in scales]
        requests = [bytes(layout.RowRequest(group=i)) for i, (_, tensors) in enumerate(groups) for _ in tensors]
        of_grads = None if grad_scale is None else torch.tensor(grad_scale)
        return Launcher(kernel).norm(b"".join(entries), b"".join(requests), sums, reduction, of_grads)

    @staticmethod
    def expected(reduction: int, groups: list[tuple[float, list[float]]], grad_scale: float | None) -> float:
        if reduction == layout.GRAD_MAX:
            norm = max((P * largest for P, of_group in groups for largest in of_group), default=0.0)
        else:
            norm = math.sqrt(math.fsum(P * P * squares for P, of_group in groups for squares in of_group))
        return norm / (grad_scale or 1.0)

    @pytest.mark.parametrize("grad_scale", [None, 1024.0, 3.0])
    def test_of_gradients(self, kernel, reduction, grad_scale):
        """Of several groups, dtypes and sizes, some tensors without one."""
        generator = torch.Generator().manual_seed(0)
        groups, tensors, kept = [], [], []
        for i, P in enumerate((1.0, 1.75, 1.0 + 2**-30, 1.9)):
            grads = [poisoned(size, DTYPES[i], size % 2, generator)[0] for size in (0, 1, 7, 300, REDUCE_TILE + 1)]
            for g in (*grads, None):
                kept.append(torch.ones(3))
                tensors.append(tensor_entry(kept[-1] if g is None else g, g))
            groups.append((P, [*grads, None]))
        sums = Launcher(kernel).reduce("cpu", b"".join(tensors), reduction)
        actual = self.norm(kernel, reduction, groups, sums, grad_scale)
        of_all = [numpy.abs(P * g.double().numpy()) for P, grads in groups for g in grads if g is not None]
        of_all = numpy.concatenate(of_all)
        largest = reduction == layout.GRAD_MAX
        expected = (of_all.max() if largest else math.sqrt(math.fsum(of_all**2))) / (grad_scale or 1.0)
        # Of the squares of a tensor TestReduce says the bound, 100 roundings; there are 50 more below, 3 here.
        assert abs(actual - expected) <= (0 if largest else 80 * 2**-53 * expected)

    @pytest.mark.parametrize(
        ("n", "launches"), [(0, 1), (1, 1), (255, 1), (257, 1), (508, 1), (509, 1), (4091, 1), (4092, 2), (9000, 3)]
    )
    @pytest.mark.parametrize("grad_scale", [None, 3.0])
    def test_any_number_of_tensors(self, kernel, reduction, n, launches, grad_scale):
        sums = torch.rand(n, 2, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        sums[:, 0] = math.nan  # not read
        of_grads = sums[:, 1].tolist()
        groups = [(1 + i / 128, of_grads[i * 100 : (i + 1) * 100]) for i in range(n // 100 + 1)]
        before = kernel.launches_so_far()
        actual = self.norm(kernel, reduction, groups, sums, grad_scale)
        assert kernel.launches_so_far() - before == launches
        expected = self.expected(reduction, groups, grad_scale)
        # Each summand passes 2 products, 16 sums in its thread, 30 in its block and 2 over launches: the root halves
        # that.
        assert abs(actual - expected) <= (0 if reduction == layout.GRAD_MAX else 30 * 2**-53 * expected)
        assert self.norm(kernel, reduction, groups, sums, grad_scale) == actual

    @pytest.mark.parametrize("value", [math.inf, math.nan])
    @pytest.mark.parametrize("at", [0, 17, 300, 4090, 4091, 8999])
    def test_what_is_not_finite_stays(self, kernel, reduction, at, value):
        """Whichever launch sees it."""
        sums = torch.ones(9000, 2, dtype=torch.float64)
        sums[at, 1] = value
        actual = self.norm(kernel, reduction, [(1.5, range(9000))], sums, 2.0)
        numpy.testing.assert_array_equal(actual, value)


@dataclass
class OnDevice:
    """The host side of groups whose scales are on the device, in Python."""

    kernel: ctypes.CDLL
    groups: list[dict]  # params, bufs, stats, hyper
    scales: ctypes.Array = field(init=False)

    def __post_init__(self):
        self.scales = (layout.DeviceScale * len(self.groups))(*(layout.DeviceScale(1.0) for _ in self.groups))
        slots = sum(len(group["params"]) for group in self.groups)
        self.momentum_initialized = torch.zeros(slots, dtype=torch.uint8)
        self.buffered = set()  # slots for which the host has made a buffer

    def step(self, grads: list[list[Tensor | None]], grad_scale: float, found_inf: bool) -> int:
        tensors, groups, requests, slot, made = [], [], [], 0, set()
        for index, (group, gs) in enumerate(zip(self.groups, grads, strict=True)):
            hyper = group["hyper"]
            numbers = [layout.Number(value) for value in hyper[:4]]
            slots = range(slot, slot + len(group["params"]))
            begin = len(requests)
            for p, b, g in zip(group["params"], group["bufs"], gs, strict=True):
                new = slot not in self.buffered and g is not None and hyper.momentum != 0
                has_buffer = new or slot in self.buffered
                tensors.append(tensor_entry(p, g, b if has_buffer else None, len(tensors)))
                kind = layout.IDLE if g is None else layout.STEP
                requests.append(layout.RowRequest(0.0, index, slot, kind, has_buffer, new))
                if has_buffer:
                    made.add(slot)
                slot += 1
            for stat, power in group["stats"]:
                tensors.append(tensor_entry(stat, row=len(tensors)))
                requests.append(layout.RowRequest(power, index, 0, layout.STATISTIC))
            flags = (hyper.nesterov, hyper.maximize, hyper.scale_invariant, self.buffered.isdisjoint(slots))
            where = (ctypes.addressof(self.scales[index]), begin, len(requests), (ctypes.c_uint8 * 4)())
            groups.append(layout.GroupEntry(*numbers, *where, *flags))
        before = self.kernel.launches_so_far()
        state = SimpleNamespace(momentum_initialized=self.momentum_initialized)
        Launcher(self.kernel).step_on_device(
            0,
            b"".join(tensors),
            b"".join(groups),
            b"".join(requests),
            state,
            torch.tensor(grad_scale),
            torch.tensor(float(found_inf)),
            False,
            None,
            False,
        )
        self.buffered |= made
        return self.kernel.launches_so_far() - before


@pytest.mark.parametrize(
    ("copies", "tensors"),
    [
        pytest.param(1, 1, id="two launches"),
        pytest.param(40, 1, id="many groups, several launches"),
        pytest.param(1, 90, id="groups over several launches"),
    ],
)
def test_steps_on_the_device_are_those_of_the_cpu(kernel, copies, tensors):
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
            "bufs": [torch.zeros(shape) for shape in shapes],  # which they are to stay before a first step
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
            "params": [nn.Parameter(p.clone()) for p in group["params"]],
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
            changes = {"lr": 0.5 if t < 5 else 0.25}
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
        assert (device.step(grads, 2.0, found_inf) == 2) == (copies * tensors == 1)
        if not found_inf:
            for group, gs in zip(optimizer.param_groups, grads, strict=True):
                for p, g in zip(group["params"], gs, strict=True):
                    p.grad = g
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
            optimizer.step()
        for group, twin, scale in zip(groups, optimizer.param_groups, device.scales, strict=True):
            assert (scale.P, scale.kappa, scale.exponent) == (
                twin.get("scale", 1.0),
                twin.get("carried_decay", 0.0),
                twin.get("scale_exponent", 0),
            )
            for p, b, q in zip(group["params"], group["bufs"], twin["params"], strict=True):
                assert same_bits(p, q.detach())
                buf = optimizer.state[q].get("momentum_buffer") if q in optimizer.state else None
                assert (b == 0).all() if buf is None else same_bits(b, buf)
        for group, stats in zip(groups, of_twins, strict=True):
            for (stat, _), other in zip(group["stats"], stats, strict=True):
                assert same_bits(stat, other)


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
            optimizer._use(Kernels(core, cpu=launcher, scale_on="cpu", launcher=launcher))
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


CLIPS = [{"max_norm": 200.0}, {"max_norm": 8.0, "norm_type": math.inf}]


class TestStepsThatNeedSums:
    """Whole optimizers against the reference, in float64. Sums of 8,200 squares in another order differ by 1e-14 at
    most, norms by half of that. A step rounds a few times besides, and there are 6 of them."""

    @staticmethod
    def run(make, launcher: Launcher | None) -> tuple[list[Tensor], list[Scale], list[float]]:
        """Weights and buffers, scales, and the norms of the steps that were taken."""
        generator = torch.Generator().manual_seed(0)
        normal = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
        params = [nn.Parameter(normal(shape)) for shape in ((5, 3), (), (0,), (REDUCE_TILE + 8,), (7,), (2, 3))]
        params[4].data.zero_()
        optimizer, norms = make(params, "reference" if launcher is None else "cpu"), []
        if launcher is not None:
            optimizer._use(Kernels(core, cpu=launcher, scale_on="cpu", launcher=launcher))
        clips = optimizer.max_norm is not None
        for t in range(6):
            for i, p in enumerate(params):
                grad = normal(p.shape) * 4.0 ** (t % 3) * ((i, t) != (3, 2))
                p.grad = None if (i, t) in ((1, 0), (0, 3), (5, 4)) else grad
            if t == 1 and clips:
                params[0].grad[0, 0] = math.nan
            scaled = t in (2, 4, 5)
            optimizer.grad_scale = torch.tensor(3.0) if scaled else None
            optimizer.found_inf = torch.tensor(float(t == 4)) if scaled else None
            optimizer.step()
            assert optimizer.step_was_skipped == (t == 4 or (t == 1 and clips))
            if clips and not optimizer.step_was_skipped:
                norms.append(optimizer.grad_norm.item())
        assert not clips or min(norms) < optimizer.max_norm < max(norms)
        bufs = [values["momentum_buffer"] for values in optimizer.state_dict()["state"].values()]
        return params + bufs, list(map(scale_of, optimizer.param_groups)), norms

    def check(self, kernel, make) -> None:
        (expected, *theirs), (actual, *ours) = (self.run(make, launcher) for launcher in (None, Launcher(kernel)))
        (scales, norms), (scales_on_device, norms_on_device) = theirs, ours
        assert scales_on_device == scales
        assert norms_on_device == pytest.approx(norms, rel=1e-13)
        for a, b in zip(actual, expected, strict=True):
            assert b.isfinite().all()
            assert relative_error(a, b) < 1e-13

    @pytest.mark.parametrize("clip", CLIPS, ids=str)
    @pytest.mark.parametrize("name", ARGUMENTS)
    def test_of_sgd(self, kernel, name, clip):
        """Clipped, in exponential and ordinary groups."""

        def make(params: list[Tensor], backend: str) -> texp.SGD:
            groups = [
                {"params": params[:3]},
                {"params": params[3:], "lr": 0.05, "weight_decay": 0.2, "scale_invariant": False},
            ]
            return texp.SGD(groups, backend=backend, skip_nonfinite=True, **clip, **ARGUMENTS[name])

        self.check(kernel, make)

    @pytest.mark.parametrize("clip", [{}, *CLIPS], ids=str)
    @pytest.mark.parametrize(
        "options",
        [
            {"trust_clip": True},
            {"momentum": 0.9, "dampening": 0.25},
            {"momentum": 0.9, "nesterov": True, "always_adapt": True, "maximize": True},
            {"momentum": 0.9, "trust_clip": True, "always_adapt": True},
        ],
        ids=str,
    )
    def test_of_lars(self, kernel, options, clip):
        """One group without decay, and one with other arguments."""

        def make(params: list[Tensor], backend: str) -> texp.LARS:
            groups = [
                {"params": params[:2]},
                {"params": params[2:5], "lr": 0.1, "trust_coeff": 0.3, "eps": 2.0},
                {"params": params[5:], "weight_decay": 0.0},
            ]
            arguments = {"lr": 0.5, "weight_decay": 0.5, "trust_coeff": 0.1, **options, **clip}
            return texp.LARS(groups, backend=backend, skip_nonfinite=bool(clip), **arguments)

        self.check(kernel, make)

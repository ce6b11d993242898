"""The Triton backend where Triton's interpreter takes its steps: its kernels, launches and uploads."""

import math
import subprocess
import sys
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import texp
from tests.backends.tables import DTYPES, launch, layout, rows_of, tensor_entry
from tests.backends.test_core import ROWS, SIZES, applied, poisoned
from tests.backends.test_reduce import bound, exact
from tests.conftest import INTERPRETED, relative_error, same_bits
from tests.states import assert_unchanged, snapshot
from tests.test_package import environment
from tests.test_theory import hypers
from texp import backends, theory
from texp.backends import reference
from texp.backends.reference import Entry
from texp.theory import KEEP, Row, Scale

REASON = backends.available()["triton"]
if REASON == backends.OK and not INTERPRETED:
    REASON = "Triton's interpreter is not asked for: TRITON_INTERPRET=1"
interpreter = pytest.mark.skipif(REASON != backends.OK, reason=REASON)


def apply(entries: list[Entry], rows: list[int], table: list[Row]) -> None:
    """Applies to each entry the row of that index."""
    tensors = b"".join(tensor_entry(*entry, row) for entry, row in zip(entries, rows, strict=True))
    launch().Launcher().apply("cpu", 1, tensors, rows_of(table))


@interpreter
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("wide_buf", [False, True], ids=["own buf", "wide buf"])
def test_every_element_is_written_once_and_no_other(wide_buf, name, offset):
    """All dtypes in one step, aligned or not, with and without gradient and buffer, larger than a tile; of whole
    numbers, so that nothing is rounded."""
    entries, checks = [], []
    for dtype in DTYPES:
        wide = torch.promote_types(dtype, torch.float32) if wide_buf else dtype
        for size in (*SIZES[::3], 8193):
            start = (torch.arange(size) % 50 * 2).double()
            for with_grad, with_buf in ((True, True), (size % 2 == 0, False), (False, True)):
                p, p_storage = poisoned(start, dtype, offset)
                b, b_storage = poisoned(start + 2, wide, offset)
                g = torch.full((size + offset,), 4.0, dtype=dtype)[offset:]
                entries.append(Entry(p, g if with_grad else None, b if with_buf else None))
                p_next, b_next = applied(ROWS[name], start, 4.0 * with_grad, start + 2 if with_buf else 0.0)
                checks += [(p, p_storage, p_next), (b, b_storage, b_next if with_buf else start + 2)]
    apply(entries, [1] * len(entries), [KEEP, ROWS[name]])
    for inside, storage, expected in checks:
        assert torch.equal(inside.double(), expected)
        inside.fill_(-7.0)
        assert (storage == -7.0).all()


@interpreter
@pytest.mark.parametrize("offset", [0, 1])
def test_every_mix_of_dtypes_gives_what_the_reference_gives(offset):
    """All 64 of them in one step, whose tensors have two rows by turns; of whole numbers, so that nothing is rounded.
    Statistics, which have neither gradient nor buffer, are among them, and tensors without elements."""
    rows = [ROWS["all terms"], Row(s_p=2.0)]
    entries = []
    for mix, size in product(product(DTYPES, repeat=3), (0, 37)):
        p, g, b = ((torch.arange(size + offset) % 7 * 2 + k).to(dtype)[offset:] for k, dtype in enumerate(mix))
        entries += [Entry(p, g, b), Entry(p.clone()[offset:])]
    expected = [Entry(*(None if x is None else x.clone() for x in entry)) for entry in entries]
    apply(entries, [i % 2 for i in range(len(entries))], rows)
    for k, row in enumerate(rows):
        reference.apply(row, expected[k::2])
    for actual, wanted in zip(entries, expected, strict=True):
        assert torch.equal(actual.param, wanted.param)
        assert actual.buf is None or torch.equal(actual.buf, wanted.buf)


@interpreter
def test_a_launcher_sums_up_whatever_it_is_given():
    """Nothing too; of tables that have the same shape as those before."""
    launcher, p = launch().Launcher(), torch.ones(3)
    for k in (1.0, 2.0):
        assert launcher.reduce("cpu", tensor_entry(p, torch.full((3,), k))).tolist() == [[3.0, 3.0 * k**2]]
    assert launcher.reduce("cpu", b"").shape == (0, 2)


GRADS_ALONE = [layout.GRAD_SQUARES, layout.GRAD_MAX]
of_grads_alone = pytest.mark.parametrize("reduction", GRADS_ALONE, ids=["squares", "max"])


@interpreter
@of_grads_alone
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reductions_of_gradients_alone(monkeypatch, dtype, offset, reduction):
    """Without reading p, which lies at an address that nobody may read; of sizes that fill no tile and several, of
    more tiles than are put together at once."""
    monkeypatch.setattr(launch(), "_BLOCK", 2)
    generator = torch.Generator().manual_seed(0)
    sizes = (0, 1, 15, 16, 17, 8193, 41_000)
    grads = [torch.randn(size + offset, generator=generator).to(dtype)[offset:] for size in sizes]
    rows = [layout.TensorEntry.from_buffer_copy(tensor_entry(g, g)) for g in grads]
    rows.append(layout.TensorEntry.from_buffer_copy(tensor_entry(grads[-1])))
    for row in rows:
        row.p = 8
    *found, without = launch().Launcher().reduce("cpu", b"".join(rows), reduction)[:, 1].tolist()
    assert without == 0
    for x, g in zip(found, grads, strict=True):
        if reduction == layout.GRAD_MAX:
            assert x == (g.double().abs().max().item() if g.numel() else 0)
        else:
            assert abs(x - exact(g)) <= bound(g)


@interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("at", [0, 8191, 8192, 20_000])
def test_what_is_not_finite_shows_in_a_maximum(at, sign, dtype):
    """NaN whatever else there is, in any tile, with any sign; infinity above all numbers."""
    launcher, g = launch().Launcher(), torch.full((20_001,), -torch.finfo(dtype).max, dtype=dtype)

    def largest() -> float:
        return launcher.reduce("cpu", tensor_entry(g, g), layout.GRAD_MAX)[0, 1].item()

    assert largest() == torch.finfo(dtype).max
    g[at] = sign * math.inf
    assert largest() == math.inf
    g[5] = math.inf
    g[at] = math.copysign(math.nan, sign)
    assert math.isnan(largest())


class Advanced:
    """What a step on the device makes of one group, of one element a tensor.

    lr: in device memory, in place of that of hyper. weight, grad: of all tensors or of each, grad if not 0.
    """

    # What a tensor is and has: kind, has_buffer, newly_allocated.
    TENSORS = {
        "running": (layout.STEP, True, False), "starting": (layout.STEP, True, True),
        "without buffer": (layout.STEP, False, False), "idle": (layout.IDLE, True, False),
        "idle before its first step": (layout.IDLE, True, False), "idle, without buffer": (layout.IDLE, False, False),
        "late": (layout.STEP, True, False),
    }  # fmt: skip
    INITIALIZED = [1, 0, 0, 1, 0, 0, 0]
    POWERS = (1.0, 2.0, 0.5, -3.0, 0.0)

    def __init__(
        self, scale: Scale, hyper, initialized: bool, without_buffers: bool, grad_scale=None, found_inf=None, lr=None,
        grad=0.0, clip=None, weight=1.0,
    ):  # fmt: skip
        self.scales = torch.tensor([[scale.P, scale.kappa, 0, 0]], dtype=torch.float64)
        self.scales.view(torch.int64)[0, 2:] = torch.tensor([scale.exponent, initialized])
        self.momentum_initialized = torch.tensor(self.INITIALIZED, dtype=torch.uint8)
        count = len(self.TENSORS) + len(self.POWERS)
        self.p, self.g = (torch.tensor(x, dtype=torch.float64).expand(count).clone() for x in (weight, grad))
        requests = [layout.RowRequest(0, 0, slot, *request) for slot, request in enumerate(self.TENSORS.values())]
        requests += [layout.RowRequest(power, 0, -1, layout.STATISTIC) for power in self.POWERS]
        where = self.scales.data_ptr(), 0, len(requests), (0, 0, 0, 0)
        group = layout.GroupEntry(*map(layout.Number, hyper[:4]), *where, *hyper[4:7], without_buffers)
        if hyper.trust is not None:
            coeff, eps, *flags = hyper.trust
            group.trust = layout.Trust(coeff, eps, True, *flags)
        if lr is not None:
            group.lr.at = lr.data_ptr()
            getattr(group, "in")[0] = layout.FLOAT32 if lr.dtype == torch.float32 else layout.FLOAT64
        self.norm = torch.full((1,), -1.0, dtype=torch.float64)
        tensors = b"".join(tensor_entry(x, g if grad else None) for x, g in zip(self.p, self.g, strict=True))
        self.tables = tensors, bytes(group), b"".join(requests)
        self.given = (
            None if grad_scale is None else torch.tensor([grad_scale]),
            None if found_inf is None else torch.tensor([found_inf]),
        )
        self.launcher, self.clip, self.hyper = launch().Launcher(), clip, hyper
        self.step()
        (step,) = self.launcher._steps.values()
        reduces, norms, (advance,), _ = step._last.launches
        has_trust, maxima = hyper.trust is not None, clip is not None and clip[1] == layout.GRAD_MAX
        reductions = has_trust + maxima if has_trust else clip is not None
        assert (len(reduces), len(norms)) == (2 * reductions, clip is not None)
        self.rows, self.skip, _, self.sums = advance.tensors[2:]

    def step(self, capturing: bool = False) -> None:
        has_trust = self.hyper.trust is not None
        self.launcher.step_on_device(1, *self.tables, self, *self.given, capturing, self.clip, has_trust)

    def divided_by(self) -> float:
        """What gradients are."""
        scale = 1.0 if self.given[0] is None else self.given[0].item()
        return scale if self.clip is None else scale / theory.clip_factor(self.norm.item(), self.clip[0])

    def ratio(self, p_squares: float, g_squares: float) -> float:
        g_norm = math.sqrt(g_squares) / abs(self.divided_by())
        return self.hyper.trust.ratio(self.hyper.lr, self.hyper.weight_decay, math.sqrt(p_squares), g_norm)

    def scale(self) -> Scale:
        return Scale(self.scales[0, 0].item(), int(self.scales.view(torch.int64)[0, 2]), self.scales[0, 1].item())


@interpreter
@given(
    hyper=hypers,
    P=st.floats(1, 2, exclude_max=True),
    exponent=st.integers(-5, 5000),
    kappa=st.floats(0, 100, allow_subnormal=False),
    initialized=st.booleans(),
    without_buffers=st.booleans(),
    grad_scale=st.sampled_from([None, 1.0, 2.0**16, 3.0]),
    at_once=st.sampled_from([4, 256]),
)
def test_the_rows_on_the_device_have_the_bits_of_theory(
    hyper, P, exponent, kappa, initialized, without_buffers, grad_scale, at_once
):
    """But for statistics with powers other than 1 and 2, by exp and log: within a few ulp.

    at_once: rows that are computed at once, in several rounds or in one.
    """
    scale = Scale(P, exponent, kappa)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch(), "_BLOCK", at_once)
        of = Advanced(scale, hyper, initialized, without_buffers, grad_scale)
    first = without_buffers or not initialized
    step = theory.advance(scale, hyper, first=first, grad_scale=1.0 if grad_scale is None else grad_scale)
    zero_buffer = step.idle._replace(a_p=0.0)  # which stays so
    rows = [step.running, step.first, step.running, step.idle, zero_buffer, step.idle, step.first]
    assert of.rows[: len(rows)].tolist() == [list(row) for row in rows]
    rows += map(step.norm_stat, of.POWERS)
    for row, power, expected in zip(
        of.rows.tolist()[-len(of.POWERS) :], of.POWERS, rows[-len(of.POWERS) :], strict=True
    ):
        assert row == list(expected) or (power not in (1, 2) and row == pytest.approx(expected, rel=4e-15))
    assert of.scale() == step.scale
    momentum = hyper.momentum != 0
    assert of.momentum_initialized.tolist() == [1, momentum, 0, 1, 0, 0, momentum]
    assert of.scales.view(torch.int64)[0, 3] == ((initialized and not without_buffers) or momentum)
    assert of.skip == 0
    # Each tensor, a weight of 1 without a gradient, has been given its row.
    expected = [applied(Row(*row), 1.0, 0.0, 0.0)[0] for row in of.rows.tolist()]
    assert of.p.tolist() == pytest.approx(expected, rel=1e-15)


CLIPS = [None, *((0.7, reduction, False) for reduction in GRADS_ALONE)]
trusts = st.builds(
    theory.Trust,
    coeff=st.sampled_from([0.0, 1e-3, 0.7]),
    eps=st.sampled_from([0.0, 1e-8, 0.3]),
    clips=st.booleans(),
    always_adapts=st.booleans(),
)
ELEMENTS = len(Advanced.TENSORS) + len(Advanced.POWERS)
ORDINARY = {
    "weight": [7.0] * ELEMENTS, "grad": [-0.3] * ELEMENTS, "odd": 1.0, "lr_in": None, "initialized": True,
    "scale_and_clip": (-3.0, None), "at_once": 256,
}  # fmt: skip
elements = st.lists(st.sampled_from([0.0, 1e-3, -0.3, 7.0]), min_size=ELEMENTS, max_size=ELEMENTS)


@interpreter
@settings(max_examples=40)
@given(
    hyper=hypers,
    trust=trusts,
    weight=elements,
    grad=elements,
    odd=st.sampled_from([1.0, 1.0, 1.0, math.inf, math.nan]),
    lr_in=st.sampled_from([None, torch.float32, torch.float64]),
    initialized=st.booleans(),
    scale_and_clip=st.sampled_from([(-3.0, None), *product([None, 2.0**16, 3.0], CLIPS)]),
    at_once=st.sampled_from([4, 256]),
)
@example(hyper=theory.Hyperparameters(0.1, 0.9, weight_decay=0.1), trust=theory.Trust(0.7), **ORDINARY)
@example(hyper=theory.Hyperparameters(0.0, weight_decay=0.1), trust=theory.Trust(0.0, clips=True), **ORDINARY)
def test_rows_with_trust_ratios_have_the_bits_of_theory(
    hyper, trust, weight, grad, odd, lr_in, initialized, scale_and_clip, at_once
):
    """Of tensors that have gradients; other rows are those that they would be without.

    odd: of the last of these tensors the weight and the gradient. lr_in: the dtype of a LR in device memory.
    """
    weight[6] = grad[6] = odd
    lr = None if lr_in is None else torch.tensor(hyper.lr, dtype=lr_in)
    hyper = hyper._replace(lr=hyper.lr if lr is None else lr.item(), scale_invariant=False, trust=trust)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch(), "_BLOCK", at_once)
        scale, clip = scale_and_clip
        of = Advanced(Scale(), hyper, initialized, False, scale, lr=lr, grad=grad, clip=clip, weight=weight)
    squares = torch.tensor([weight, grad], dtype=torch.float64).T.square()
    assert torch.allclose(of.sums, squares, rtol=0, atol=0, equal_nan=True)
    step = theory.advance(Scale(), hyper, first=not initialized, grad_scale=of.divided_by())
    rows = [step.running, step.first, step.running, *[step.idle] * 3, step.first]
    for i in (0, 1, 2, 6):
        rows[i] = rows[i].with_ratio(of.ratio(*squares[i].tolist()))
    rows += map(step.norm_stat, of.POWERS)
    assert torch.allclose(of.rows, torch.tensor(rows, dtype=torch.float64), rtol=0, atol=0, equal_nan=True)


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(value=st.floats(allow_nan=False, allow_infinity=False))
@example(value=0.1)  # the lower half, taken by itself, would be negative
@example(value=-0.1)
@example(value=5e-324)  # nothing but a lower half
@example(value=-5e-324)
@example(value=sys.float_info.max)
@example(value=-sys.float_info.max)
def test_a_number_on_the_device_keeps_its_bits(dtype, value):
    """The row of an ordinary step without momentum holds its LR as it is."""
    most = torch.finfo(dtype).max
    lr = torch.tensor(min(max(value, -most), most), dtype=dtype)
    of = Advanced(Scale(), theory.Hyperparameters(0.0, 0.0, 0.0, 0.0), False, False, lr=lr)
    assert same_bits(of.rows[0, 7], lr.double())


@interpreter
@pytest.mark.parametrize("found_inf", [1.0, math.inf, math.nan])
def test_an_overflow_changes_nothing(found_inf):
    hyper = theory.Hyperparameters(0.1, 0.9, 0.0, 0.1, scale_invariant=True)
    of = Advanced(Scale(1.5, 3, 0.25), hyper, True, False, found_inf=found_inf)
    assert of.scale() == Scale(1.5, 3, 0.25)
    assert of.skip == 1
    assert of.momentum_initialized.tolist() == of.INITIALIZED
    assert (of.p == 1).all()
    of.rows.fill_(math.nan)
    of.launcher.step_on_device(1, *of.tables, of, None, torch.tensor([found_inf]), False)
    assert of.rows.isnan().all()
    of.launcher.step_on_device(1, *of.tables, of, None, torch.tensor([0.0]), False)
    assert of.skip == 0
    assert of.scale() == theory.advance(Scale(1.5, 3, 0.25), hyper).scale


@interpreter
def test_a_step_without_any_group_says_whether_it_is_skipped():
    """And that its gradients, of which there are none, have norm 0."""
    state = SimpleNamespace(
        scales=torch.zeros(0, 4),
        momentum_initialized=torch.zeros(0, dtype=torch.uint8),
        norm=torch.ones(1, dtype=torch.float64),
    )
    launcher = launch().Launcher()
    for clip in (None, *((1.0, reduction, True) for reduction in GRADS_ALONE)):
        for found_inf in (1.0, 0.0, 1.0):
            launcher.step_on_device(1, b"", b"", b"", state, None, torch.tensor([found_inf]), False, clip)
            (advance,) = [*launcher._steps.values()][-1]._last.launches[2]
            assert advance.tensors[3] == found_inf
            assert state.norm == (clip is None)
        state.norm.fill_(1.0)


class Clipped:
    """Steps on the device of tensors in groups, each with a P of its own, whose gradients are clipped."""

    def __init__(self, *groups: tuple[float, list[torch.Tensor | None]]) -> None:
        self.grads = [(P, g) for P, grads in groups for g in grads]
        self.params = [torch.zeros(37 if g is None else g.shape, dtype=torch.float64) for _, g in self.grads]
        self.scales = torch.tensor([[P, 0, 0, 0] for P, _ in groups], dtype=torch.float64)
        self.momentum_initialized = torch.zeros(1, dtype=torch.uint8)
        self.norm = torch.zeros(1, dtype=torch.float64)
        self.table, requests, begin = b"", [], 0
        for i, (scale, (_, grads)) in enumerate(zip(self.scales, groups, strict=True)):
            kinds = [layout.IDLE if g is None else layout.STEP for g in grads]
            requests += [layout.RowRequest(group=i, slot=0, kind=kind) for kind in kinds]
            group = layout.GroupEntry(scale=scale.data_ptr(), begin=begin, end=len(requests))
            group.lr.value, begin = 1.0, len(requests)
            self.table += bytes(group)
        self.requests, self.launcher = b"".join(requests), launch().Launcher()

    def step(self, clip: tuple | None, *, grad_scale=None, version: int = 1, capturing: bool = False) -> None:
        tensors = b"".join(tensor_entry(p, g) for p, (_, g) in zip(self.params, self.grads, strict=True))
        scale = None if grad_scale is None else torch.tensor([grad_scale])
        self.launcher.step_on_device(version, tensors, self.table, self.requests, self, scale, None, capturing, clip)

    def expected_norm(self, reduction: int, grad_scale: float = 1.0) -> float:
        grads = [P * g.double().flatten() for P, g in self.grads if g is not None]
        return torch.cat(grads).norm(2 if reduction == layout.GRAD_SQUARES else math.inf).item() / grad_scale


def of_three_groups() -> Clipped:
    """Of all dtypes, some without gradients, some without elements; 21 tensors."""
    generator, groups = torch.Generator().manual_seed(0), []
    for k, P in enumerate((1.0, 1.75, 1.25)):
        grads = [torch.randn(n, generator=generator).to(DTYPES[(n + k) % 4]) for n in (1, 0, 500, 17, 3, 8193)]
        groups.append((P, [*grads, None]))
    return Clipped(*groups)


@interpreter
@of_grads_alone
@pytest.mark.parametrize("grad_scale", [None, 3.0, 2.0**16])
@pytest.mark.parametrize("at_once", [4, 256])
def test_the_norm_of_all_groups(monkeypatch, at_once, grad_scale, reduction):
    """At θ, without what the loss was scaled by. Gradients are clipped by it; it has the same bits in every run."""
    monkeypatch.setattr(launch(), "_BLOCK", at_once)
    norms = []
    for max_norm in (math.inf, 2.0):
        of, scale = of_three_groups(), grad_scale or 1.0
        of.step((max_norm, reduction, False), grad_scale=grad_scale)
        # Each product and each sum rounds once, by 2^-53 of the whole at most, and so does what it is compared to.
        roundings = 2 * sum(0 if g is None else g.numel() + 3 for _, g in of.grads) * 2.0**-53
        assert of.norm.item() == pytest.approx(of.expected_norm(reduction, scale), rel=roundings)
        factor = theory.clip_factor(of.norm.item(), max_norm)
        norms.append(of.norm.item())
        for p, (P, g) in zip(of.params, of.grads, strict=True):
            expected = torch.zeros_like(p) if g is None else -P * P * g.double() * factor / scale
            assert torch.allclose(p, expected, rtol=8 * 2.0**-53, atol=0)
    assert norms[0] == norms[1]


@interpreter
@settings(max_examples=40)
@given(
    hyper=hypers,
    P=st.floats(1, 2, exclude_max=True),
    kappa=st.floats(0, 100, allow_subnormal=False),
    grad_scale=st.sampled_from([None, 2.0**16, 3.0]),
    grad=st.sampled_from([0.0, 1e-8, -0.3, 1e200, math.inf, math.nan]),
    max_norm=st.sampled_from([0.0, 1e-3, 0.7, math.inf]),
    reduction=st.sampled_from(GRADS_ALONE),
)
def test_the_rows_of_a_clipped_step_have_the_bits_of_theory(hyper, P, kappa, grad_scale, grad, max_norm, reduction):
    """They are those of gradients that are divided by more."""
    scale = Scale(P, 3, kappa)
    of = Advanced(scale, hyper, True, False, grad_scale, grad=grad, clip=(max_norm, reduction, False))
    norm, scaled_by = of.norm.item(), grad_scale or 1.0
    if reduction == layout.GRAD_MAX or abs(grad) < 1e100:  # not where squares are infinite
        count = len(of.p) if reduction == layout.GRAD_SQUARES else 1
        assert norm == pytest.approx(P * abs(grad) * math.sqrt(count) / scaled_by, rel=16 * 2.0**-53, nan_ok=True)
    factor = theory.clip_factor(norm, max_norm)
    step = theory.advance(scale, hyper, first=False, grad_scale=scaled_by / factor if factor else math.inf)
    expected = torch.tensor([step.running, step.first], dtype=torch.float64)
    assert torch.allclose(of.rows[:2], expected, rtol=0, atol=0, equal_nan=True)
    assert of.scale() == step.scale
    assert of.skip == 0


@interpreter
@of_grads_alone
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_norm_that_is_not_finite_can_skip_the_step(value, reduction):
    of = of_three_groups()
    grad, scales = of.grads[3][1], of.scales.clone()
    kept, grad[5] = grad[5].clone(), value
    of.step((1.0, reduction, True))
    assert not of.norm.isfinite()
    assert not any(p.any() for p in of.params)
    assert same_bits(of.scales, scales)
    grad[5] = kept
    of.step((1.0, reduction, True))
    assert of.norm.item() == pytest.approx(of.expected_norm(reduction))
    assert of.params[0].isfinite().all()
    assert of.params[0].any()
    grad[5] = value
    of.step((1.0, reduction, False))
    assert not of.norm.isfinite()
    assert all(p.isnan().all() for p, (_, g) in zip(of.params, of.grads, strict=True) if g is not None)


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_hyperparameters_on_the_device(dtype):
    """All four of them, changed in place between steps; float32 ones are taken as what they are in float64."""

    def run(make, **arguments) -> nn.Parameter:
        p = nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))
        optimizer = texp.SGD([p], lr=0.1, momentum=0.5, scale_invariant=True, **arguments)
        group = optimizer.param_groups[0]
        numbers = {key: make(0.5) for key in ("lr", "momentum", "dampening", "weight_decay")}
        group.update(numbers)
        for t in range(6):
            for key, value in zip(numbers, (0.1, 0.8, 0.25, 0.2), strict=True):
                if isinstance(numbers[key], torch.Tensor):
                    numbers[key].fill_(value / (t + 1))
                else:
                    group[key] = torch.tensor(value / (t + 1), dtype=dtype).item()
            p.grad = torch.full_like(p, math.cos(t))
            optimizer.step()
        return p

    on_device = run(lambda x: torch.tensor(x, dtype=dtype), backend="triton", capturable=True)
    assert relative_error(on_device, run(lambda x: x, backend="reference")) < 1e-13


class TestUploads:
    """Tables go to the device when their version has changed, rows when one of them has, and nothing else does."""

    @pytest.fixture
    def uploads(self, monkeypatch) -> list[int]:
        """How many bytes each of the uploads that follow has."""
        if REASON != backends.OK:
            pytest.skip(REASON)
        made, upload = [], launch()._Tables.upload
        monkeypatch.setattr(
            launch()._Tables, "upload", lambda self, data: (made.append(len(data)), upload(self, data))
        )
        return made

    def test_what_has_the_same_version_stays(self, uploads):
        launcher, p, g = launch().Launcher(), torch.zeros(10), torch.ones(10)
        tensors = tensor_entry(p, g)
        for step, (version, e) in enumerate([(7, 1.0), (7, 1.0), (7, 1.0), (7, 2.0), (7, 2.0), (8, 2.0), (8, 2.0)]):
            launcher.apply("cpu", version, memoryview(tensors), memoryview(rows_of([Row(c_g=1.0, e=e)])))
            assert uploads == [120, 80, 120][: (1, 1, 1, 2, 2, 3, 3)[step]]
        assert torch.equal(p, torch.full((10,), -11.0))

    @pytest.mark.parametrize("change", ["gradient", "size", "dtype", "more tensors", "more rows"])
    def test_another_version_is_uploaded(self, uploads, change):
        """A size or a dtype also where the address stays the same."""
        launcher, p, g = launch().Launcher(), torch.ones(10), torch.ones(10)
        launcher.apply("cpu", 1, tensor_entry(p, g), rows_of([Row(c_g=1.0, e=1.0)]))
        q, tensors, rows = p[:4], [tensor_entry(p, g)], [Row(c_g=1.0, e=1.0)]
        if change == "gradient":
            grads = g + 1
            tensors = [tensor_entry(p, grads)]
            expected = torch.full((10,), -2.0)
        elif change == "size":
            tensors = [tensor_entry(q, g[:4])]
            expected = torch.tensor([-1.0] * 4 + [0.0] * 6)
        elif change == "dtype":
            p.view(torch.bfloat16).fill_(3.0)
            g.view(torch.bfloat16).fill_(1.0)
            tensors = [tensor_entry(p.view(torch.bfloat16), g.view(torch.bfloat16))]
            expected = torch.full((20,), 2.0, dtype=torch.bfloat16).view(torch.float32)
        elif change == "more tensors":
            tensors = [tensor_entry(q, g[:4]), tensor_entry(p[4:], g[4:])]
            expected = torch.full((10,), -1.0)
        else:
            tensors, rows = [tensor_entry(p, g, row=1)], [Row(), Row(c_g=1.0, e=5.0)]
            expected = torch.full((10,), -5.0)
        launcher.apply("cpu", 2, b"".join(tensors), rows_of(rows))
        assert uploads == [120, 40 * len(tensors) + 80 * len(rows)]
        assert torch.equal(p, expected)

    def test_lists_of_tensors_that_take_turns(self, monkeypatch):
        """Their tables are kept apart, up to so many."""
        if REASON != backends.OK:
            pytest.skip(REASON)
        launcher, made, tiles = launch().Launcher(), [], launch()._tiles
        monkeypatch.setattr(launch(), "_tiles", lambda *sizes: (made.append(sizes), tiles(*sizes))[1])
        many = launch()._KNOWN + 1
        params, g = [torch.zeros(n) for n in range(1, many + 1)], torch.ones(many)
        for version, p in enumerate([*params[:2] * 5, *params]):
            launcher.apply("cpu", version, tensor_entry(p, g), rows_of([Row(c_g=1.0, e=1.0)]))
            assert len(made) == min(version + 1, 2) if version < 10 else max(2, version - 9)
        assert [p[-1].item() for p in params] == [-6.0, -6.0, *[-1.0] * (many - 2)]
        assert len(made) == many

    def test_nothing_is_kept_of_a_step_that_failed(self, monkeypatch, uploads):
        launcher, p, g = launch().Launcher(), torch.zeros(3), torch.ones(3)
        for version, lr in ((1, 1.0), (1, 2.0), (2, 2.0)):
            given = ("cpu", version, tensor_entry(p, g), rows_of([Row(c_g=1.0, e=lr)]))
            before = p.clone()
            with monkeypatch.context() as patch:
                patch.setattr(launch()._Tables, "upload", failing)
                for _ in range(2):
                    with pytest.raises(MemoryError):
                        launcher.apply(*given)
            assert same_bits(p, before)
            launcher.apply(*given)
            assert torch.equal(p, before - lr)

    def test_pinned_memory_is_used_again_when_it_has_been_copied(self, monkeypatch):
        """On a GPU that is not there: half of the slots are waited for, and only after the other half was filled."""
        if REASON != backends.OK:
            pytest.skip(REASON)
        happened = []

        class Event:
            def record(self):
                happened.append(("record", events.index(self)))

            def synchronize(self):
                happened.append(("wait", events.index(self)))

        shape = launch()._shape((tensor_entry(torch.zeros(3)), bytes(8)))
        of = launch()._Tables(torch.device("cpu"), shape, lambda device, tiles, begins, *tables: tables)
        tensors, rows = of.launches
        events = of._copied = [Event(), Event()]
        slots, total = launch()._SLOTS, 0
        for n in range(3 * slots):
            of.upload(bytes([n] * 48))
            assert (tensors.tolist(), rows.tolist()) == ([n] * 40, [n] * 8)
            total += 1
            if n % 5 == 0:
                of.upload(bytes([100] * 8))
                assert (tensors.tolist(), rows.tolist()) == ([n] * 40, [100] * 8)
                total += 1
        turns = range(-(-total // (slots // 2)))
        assert happened == [(what, k % 2) for n in turns for what, k in (("record", n + 1), ("wait", n))]

    @of_grads_alone
    def test_another_limit_is_uploaded_alone(self, uploads, reduction):
        """With 24 bytes, and only where it is another one."""
        of, whole = Clipped((1.0, [torch.full((4,), 3.0)])), 40 + 80 + 24 + 24
        norm = 6.0 if reduction == layout.GRAD_SQUARES else 3.0
        assert of.expected_norm(reduction) == norm
        total = 0.0
        for limit, skips, sizes in (
            (1.0, True, [whole]), (1.0, True, []), (2.0, True, [24]), (2.0, False, [24]), (math.inf, False, [24]),
        ):  # fmt: skip
            uploads.clear()
            of.step((limit, reduction, skips))
            assert uploads == sizes
            total -= 3 * min(1, limit / (norm + 1e-6))
            assert of.params[0].tolist() == pytest.approx([total] * 4, rel=1e-14)
        uploads.clear()
        of.step(None)  # tables of its own
        assert uploads == [whole - 24]
        assert of.params[0].tolist() == pytest.approx([total - 3] * 4, rel=1e-14)

    @of_grads_alone
    def test_a_captured_step_clips(self, reduction):
        """By the limit that it was captured with, and gradients as they are when it is launched again. The capture
        needs a step that clips by the same norm before it."""
        if REASON != backends.OK:
            pytest.skip(REASON)
        of = Clipped((1.5, [torch.full((4,), 2.0), torch.full((5,), -2.0)]), (1.0, [torch.full((7,), 1.0)]))
        of.launcher.capturable = True
        of.step(None)
        with pytest.raises(RuntimeError, match="take one of the same tensors before each capture"):
            of.step((1.0, reduction, False), capturing=True)
        of.step((3.0, reduction, False))
        of.step((1.0, reduction, False), capturing=True)
        of.step((2.0, reduction, False), version=2)
        (captured,) = [phases for step in of.launcher._steps.values() for _, phases in step._captured]
        other = [torch.full((1000,), 7.0, dtype=torch.float64) for _ in range(10)]  # takes memory that was freed
        for k in (1.0, 4.0):
            for _, g in of.grads:
                g.copy_(g.sign() * k)
            before = [p.clone() for p in of.params]
            given = (of.momentum_initialized, launch()._argument(None), launch()._argument(None), of.norm)
            for phase, arguments in zip(captured, ((), (given[1], of.norm), given, ()), strict=True):
                for again in phase:
                    again(None, *arguments)
            assert of.norm.item() == pytest.approx(of.expected_norm(reduction), rel=1e-14)
            factor = theory.clip_factor(of.norm.item(), 1.0)
            for p, start, (P, g) in zip(of.params, before, of.grads, strict=True):
                assert torch.allclose(p - start, -P * P * g.double() * factor, rtol=1e-13)
        assert all((x == 7).all() for x in other)

    @pytest.mark.parametrize("clip", CLIPS, ids=["unclipped", "squares", "max"])
    def test_a_captured_step_has_trust_ratios(self, clip):
        """Of norms as they are when it is launched again."""
        if REASON != backends.OK:
            pytest.skip(REASON)
        hyper = theory.Hyperparameters(0.5, 0.9, weight_decay=0.1, trust=theory.Trust(0.02))
        of = Advanced(Scale(), hyper, True, False, 2.0, weight=2.0, grad=1.0, clip=clip)
        of.launcher.capturable = True
        of.step()
        of.step(capturing=True)
        of.step()
        (captured,) = [phases for step in of.launcher._steps.values() for _, phases in step._captured]
        rows, _, _, sums = captured[2][0].tensors[2:]
        other = [torch.full((1000,), 7.0, dtype=torch.float64) for _ in range(10)]  # takes memory that was freed
        for k in (1.0, 4.0):
            of.p.fill_(3.0 * k)
            of.g.fill_(k * k)
            scale, norm = of.given[0], launch()._argument(of.norm if clip else None)
            given = (of.momentum_initialized, scale, launch()._argument(None), norm)
            for phase, arguments in zip(captured, ((), (scale, norm), given, ()), strict=True):
                for again in phase:
                    again(None, *arguments)
            assert sums[0].tolist() == [9 * k**2, k**4]
            assert of.ratio(9 * k**2, k**4) != 1
            running = theory.advance(Scale(), hyper, grad_scale=of.divided_by()).running
            assert rows[0].tolist() == list(running.with_ratio(of.ratio(9 * k**2, k**4)))
        assert all((x == 7).all() for x in other)

    def test_a_capture_reads_memory_of_its_own(self, uploads):
        """What is captured can be launched again whatever came in between; each capture needs a step before it."""
        launcher, p = launch().Launcher(), torch.zeros(3, dtype=torch.float64)
        of = Advanced(Scale(), theory.Hyperparameters(0.1), True, False)
        of.scales.view(torch.int64)[0, 2:] = 0

        def step(version: int, grad: torch.Tensor, capturing: bool) -> None:
            request, group = layout.RowRequest(kind=layout.STEP), layout.GroupEntry.from_buffer_copy(of.tables[1])
            group.end = 1
            tables = tensor_entry(p, grad), bytes(group), bytes(request)
            launcher.step_on_device(version, *tables, of, None, None, capturing)

        grads = [torch.full((3,), float(k), dtype=torch.float64) for k in (1, 10, 100)]
        why = "take one of the same tensors before each capture"
        with pytest.raises(RuntimeError, match=why):
            step(1, grads[0], True)
        step(1, grads[0], False)
        with pytest.raises(RuntimeError, match=why):  # it was not said that one would come
            step(1, grads[0], True)
        launcher.capturable = True
        step(1, grads[0], False)
        uploads.clear()
        step(2, grads[1], True)
        with pytest.raises(RuntimeError, match=why):
            step(2, grads[1], True)
        assert uploads == []
        step(3, grads[2], False)
        expected = -0.1 * (1 + 1 + 10 + 100)
        assert p.tolist() == pytest.approx([expected] * 3, rel=1e-15)
        (captured,) = [launches for s in launcher._steps.values() for _, launches in s._captured]
        _, _, (advance,), (apply_,) = captured
        advance(None, of.momentum_initialized, *map(launch()._argument, (None, None, None)))
        apply_(None)
        assert p.tolist() == pytest.approx([expected - 1] * 3, rel=1e-15)


def failing(*arguments, **options) -> None:
    raise MemoryError


@interpreter
@pytest.mark.parametrize("capturable", [False, True])
def test_a_launch_that_fails_changes_nothing(monkeypatch, capturable):
    """No momentum buffer is left behind either."""
    optimizer = texp.SGD(
        [nn.Parameter(torch.ones(3))], 0.1, 0.9, scale_invariant=True, backend="triton", capturable=capturable
    )
    (p,) = optimizer.param_groups[0]["params"]
    p.grad = torch.ones(3)
    monkeypatch.setattr(launch(), "_prepare", failing)
    before = snapshot(optimizer)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert not optimizer.state
    assert_unchanged(optimizer, before)


@interpreter
def test_other_defaults_of_torch_change_nothing():
    """Neither its default dtype nor its default device is that of the tables."""
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        optimizer = texp.SGD([p], lr=1.0, momentum=0.9, backend="triton", capturable=True)
        for _ in range(2):
            optimizer.step()
        optimizer.state_dict()
        texp.SGD([p], lr=1.0, backend="triton").step()
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    assert torch.allclose(p.detach(), torch.full((3,), 1 - 1 - 1.9 - 1))


@interpreter
def test_what_no_kernel_can_take_is_refused():
    p = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    message = "backend='triton' was requested, but of a parameter of shape .* is not float32, float64, bfloat16 or fl"
    with pytest.raises(RuntimeError, match=message):
        texp.SGD([p], lr=0.1, backend="triton").step()


@pytest.mark.parametrize(
    ("native", "interpret", "reason"),
    [
        ("1", "0", "there is no GPU that torch can use; with TRITON_INTERPRET=1"),
        ("1", "1", "ok"),
        ("0", "1", "there is no C++ core: "),
    ],
)
def test_when_it_is_available(native, interpret, reason):
    if backends.triton.missing():
        pytest.skip(backends.triton.missing())
    if native == "1" and backends.core() is None:
        pytest.skip("without the C++ core")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code = "from texp import backends; print(backends.available()['triton'])"
    env = environment(TEXP_NATIVE=native, TRITON_INTERPRET=interpret)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(reason)


@pytest.mark.skipif(backends.core() is None, reason="without the C++ core")
def test_without_triton(monkeypatch):
    backends.triton._kernels.cache_clear()
    try:
        monkeypatch.setattr(backends.triton.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(RuntimeError, match="backend='triton' was requested, but Triton is not installed"):
            texp.SGD([nn.Parameter(torch.ones(1))], backend="triton")
    finally:
        backends.triton._kernels.cache_clear()

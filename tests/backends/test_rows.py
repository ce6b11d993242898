"""What applies a row, texp.backends.reference and the kernels, against its four equations in float64."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.backends.tables import launch, rows_of, tensor_entry
from tests.conftest import INTERPRETED, same_bits
from texp import backends
from texp.backends import reference
from texp.backends.reference import Entry
from texp.theory import KEEP, Row

ORDINARY = Row(a_b=0.9, a_g=1.0, a_p=0.01, c_u=1.0, e=0.1, r_u=1.0)
EXPONENTIAL = Row(a_b=0.9, a_g=0.7, a_p=0.002, c_u=0.9, c_g=1.0, c_p=0.003, s_p=0.5, e=0.06, r_u=1.98, r_d=0.001)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex128, torch.complex64]


def foreach(row, entries):
    reference.apply(row, entries, foreach=True)


def core(row, entries):
    backends.core().apply(row, entries)


def triton(row, entries):
    """Of dense tensors in the same order of elements, which the host side makes of any."""
    dense = [[x if x is None else x.contiguous() for x in entry] for entry in entries]
    launch().Launcher().apply("cpu", 1, b"".join(tensor_entry(*entry) for entry in dense), rows_of([row]))
    for (p, _, b), (of_p, _, of_b) in zip(entries, dense, strict=True):
        p.copy_(of_p)
        if b is not None:
            b.copy_(of_b)


def unless(reason: str | None) -> list:
    return [] if reason is None else [pytest.mark.skip(reason=reason)]


NO_CORE = "without the C++ core" if backends.core() is None else None
NO_TRITON = backends.available()["triton"] if backends.available()["triton"] != "ok" else None
if NO_TRITON is None and not INTERPRETED:
    NO_TRITON = "Triton's interpreter is not asked for: TRITON_INTERPRET=1"

APPLY = [
    reference.apply,
    foreach,
    pytest.param(core, marks=unless(NO_CORE)),
    pytest.param(triton, marks=unless(NO_TRITON)),
]
each_apply = pytest.mark.parametrize("apply", APPLY)

SHAPES = {
    "0-dim": lambda make: make(()),
    "empty": lambda make: make((3, 0)),
    "odd": lambda make: make((7, 5)),
    "transposed": lambda make: make((6, 9)).t(),
    "every other": lambda make: make((20,))[::2],
    "misaligned": lambda make: make((33,))[1:],
    "channels last": lambda make: make((2, 3, 4, 5)).to(memory_format=torch.channels_last),
}


def definition(row: Row, p, g, b):
    u = row.a_b * b + row.a_g * g + row.a_p * p
    d = row.c_u * u + row.c_g * g + row.c_p * p
    return row.s_p * p - row.e * d, row.r_u * u + row.r_d * d


def bounds(row: Row, p, g, b, dtype: torch.dtype, rounding: float):
    """How far p and b may be from the definition: each of the seven products and six sums rounds at most once,
    and each scalar once, in the dtype of the arithmetic; each error is at most half an ulp of the sum of the
    absolute values. Then one rounding to the dtype of the tensor, by at most `rounding` ulp."""
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    positive = Row(*map(abs, row))
    size_p, size_b = definition(positive._replace(e=-positive.e), p.abs(), g.abs(), b.abs())
    # The smallest subnormal is the floor of what a rounding can be wrong by.
    own, floor = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return ((10 * eps + rounding * own) * size + floor for size in (size_p, size_b))


def check(apply, row, p, g, b, *, dtype=None):
    wide = torch.complex128 if p.is_complex() else torch.float64
    before = [x.to(wide) for x in (p, g, b)]
    g_before = g.clone()
    expected = definition(row, *before)
    # Triton's interpreter truncates to bf16.
    within = bounds(row, *before, dtype or p.dtype, 1.0 if apply is triton and p.dtype == torch.bfloat16 else 0.5)
    apply(row, [Entry(p, g, b)])
    for actual, value, bound in zip((p, b), expected, within, strict=True):
        assert ((actual.to(wide) - value).abs() <= bound).all()
    assert same_bits(g, g_before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("row", [ORDINARY, EXPONENTIAL], ids=["ordinary", "exponential"])
@each_apply
def test_every_dtype_and_shape(dtype, shape, row, apply):
    if apply is triton and dtype.is_complex:
        pytest.skip("not given to kernels: tests/backends/test_triton.py")
    if apply is core and dtype.is_complex:
        with pytest.raises(ValueError, match="is not float32, float64, bfloat16 or float16"):
            core(row, [Entry(torch.zeros(3, dtype=dtype))])
        return
    generator = torch.Generator().manual_seed(1)
    p, g, b = (SHAPES[shape](lambda size: torch.randn(size, generator=generator, dtype=dtype)) for _ in "pgb")
    check(apply, row, p, g, b)


@each_apply
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_wider_buffer_and_grad_strides_that_differ(apply, dtype):
    p = torch.randn(8, 6).to(dtype)
    check(apply, EXPONENTIAL, p, torch.randn(6, 8).to(dtype).t(), torch.randn(8, 6), dtype=dtype)


scalars = st.sampled_from([0.0, 1.0, -1.0, 0.5, 0.3])


@each_apply
@given(row=st.builds(Row, *[scalars] * 10), scale=st.sampled_from([1.0, 0.5]))
def test_any_row(apply, row, scale):
    """Also those with zeros and ones in unusual places, where operands could be mistaken for results."""
    row = row._replace(s_p=scale)
    p, g, b = torch.randn(3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    check(apply, row, p, g, b)


@each_apply
def test_a_buffer_that_becomes_the_old_weight(apply):
    """p is changed as well: what is read must be what it was."""
    check(apply, Row(a_p=1.0, c_g=1.0, e=0.5, r_u=1.0), *torch.randn(3, 5, dtype=torch.float64))


@each_apply
@given(row=st.builds(Row, *[scalars] * 10), missing=st.sampled_from(["grad", "buf", "both"]))
def test_a_missing_grad_or_buffer_is_zero(apply, row, missing):
    p, g, b = torch.randn(3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    g = None if missing != "buf" else g
    b = None if missing != "grad" else b
    zero = torch.zeros_like(p)
    expected_p, expected_b = definition(row, p, zero if g is None else g, zero if b is None else b)
    apply(row, [Entry(p, g, b)])
    assert torch.allclose(p, expected_p, rtol=0, atol=1e-14)
    if b is not None:
        assert torch.allclose(b, expected_b, rtol=0, atol=1e-14)


def test_an_operand_whose_scalar_is_zero_is_not_read():
    p, b = torch.ones(3), torch.full((3,), torch.nan)
    reference.apply(Row(a_g=1.0, c_u=1.0, e=1.0, r_u=1.0), [Entry(p, torch.ones(3), b)])
    assert torch.equal(p, torch.zeros(3))
    assert torch.equal(b, torch.ones(3))


@each_apply
def test_one_rounding_to_the_dtype_of_the_parameter(apply):
    """bf16 arithmetic would round at each of the four lines: here p is the nearest bf16 to the float32 result."""
    if apply is triton:
        pytest.skip("Triton's interpreter truncates to bf16")
    p, g, b = (torch.randn(1000).bfloat16() for _ in "pgb")
    wide = [x.float() for x in (p, g, b)]
    apply(EXPONENTIAL, [Entry(p, g, b)])
    apply(EXPONENTIAL, [Entry(wide[0], wide[1], wide[2])])
    assert same_bits(p, wide[0].bfloat16())
    assert same_bits(b, wide[2].bfloat16())


def test_a_batch_of_mixed_kinds_is_the_same_as_one_by_one():
    def entries():
        generator = torch.Generator().manual_seed(4)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for size in ((), (0,), (5,), (3, 4)):
                p, g, b = (torch.randn(size, generator=generator).to(dtype) for _ in "pgb")
                yield from (Entry(p, g, b), Entry(p.clone(), g), Entry(p.clone(), g, b.float().clone()))

    one_by_one, batched = list(entries()), list(entries())
    reference.apply(EXPONENTIAL, one_by_one, foreach=False)
    reference.apply(EXPONENTIAL, batched, foreach=True)
    for a, b in zip(one_by_one, batched, strict=True):
        assert all((x is None and y is None) or same_bits(x, y) for x, y in zip(a, b, strict=True))


# Views of 12 elements, 4 each, by where they begin and by their steps; and entries of them, by number: a parameter,
# and a buffer, one of those or one of its own.
views = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=6)
numbers = st.integers(0, 5)


@given(views, st.lists(st.tuples(numbers, st.none() | st.just("own") | numbers), min_size=2, max_size=6))
@example([(0, 1)], [(0, None)] * 3)
@example([(0, 1), (2, 1)], [(0, "own"), (1, "own")])
@example([(0, 1), (4, 1), (8, 1)], [(0, 1), (1, "own"), (2, "own")])  # a buffer is the parameter of another
@example([(0, 1), (4, 1), (8, 1)], [(0, 2), (1, 2)])  # two have one buffer
def test_entries_that_share_memory_are_stepped_one_after_the_other(views, of_entries):
    """In the order in which they are given, batched or not."""

    def run(foreach: bool) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(5)
        storage = torch.randn(12, generator=generator)
        made = [storage[begin : begin + 3 * step + 1 : step] for begin, step in views]
        entries = []
        for p, b in of_entries:
            g, own = torch.randn(2, 4, generator=generator)
            b = own if b == "own" else None if b is None else made[b % len(made)]
            entries.append(Entry(made[p % len(made)], g, b))
        reference.apply(EXPONENTIAL, entries, foreach=foreach)
        return [storage, *(entry.buf for entry in entries if entry.buf is not None)]

    for x, y in zip(run(True), run(False), strict=True):
        assert same_bits(x, y)


def test_entries_that_share_no_memory_stay_in_batches(monkeypatch):
    """Also where others share some."""
    storage, batches = torch.zeros(20), []
    entries = [Entry(storage[4 * i : 4 * i + 4], torch.ones(4)) for i in range(5)]
    shared = [Entry(storage[2:6], torch.ones(4)), Entry(torch.ones(4), None, storage[1:5])]
    monkeypatch.setattr(reference, "_apply", lambda row, batch: batches.append(len(batch)))
    reference.apply(ORDINARY, entries, foreach=True)
    assert batches == [5]
    batches.clear()
    reference.apply(ORDINARY, [*entries, *shared], foreach=True)
    assert sorted(batches) == [1, 1, 1, 1, 3]


@pytest.mark.parametrize("apply", APPLY[:3])  # launchers write to addresses: tests/step/test_cache.py
def test_version_counters_are_bumped(apply):
    p, b = torch.ones(3), torch.ones(3)
    versions = p._version, b._version
    apply(ORDINARY, [Entry(p, torch.ones(3), b)])
    assert p._version > versions[0]
    assert b._version > versions[1]


def test_rows_of_a_table_without_a_gradient_keep_their_bits():
    p = torch.randn(6, 3)
    before = p.clone()
    g = torch.sparse_coo_tensor([[1, 4, 1]], torch.ones(3, 3), (6, 3), check_invariants=True)
    reference.apply(Row(c_g=1.0, e=0.5), [Entry(p, g)])
    untouched = [0, 2, 3, 5]
    assert same_bits(p[untouched], before[untouched])
    assert torch.allclose(p[[1, 4]], before[[1, 4]] - torch.tensor([[1.0], [0.5]]))


@each_apply
def test_keep_keeps(apply):
    p, b = torch.randn(5).bfloat16(), torch.randn(5)
    before = p.clone(), b.clone()
    apply(KEEP, [Entry(p, None, b)])
    assert same_bits(p, before[0])
    assert same_bits(b, before[1])

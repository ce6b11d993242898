"""The C++ core: what it shares with texp.theory, and that it writes every element once."""

import os
from fractions import Fraction
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import texp
from tests.conftest import relative_error, same_bits
from tests.test_theory import hypers
from texp import theory
from texp.backends import reference
from texp.backends.reference import Entry
from texp.theory import Row, Scale

core = texp.backends.core()
pytestmark = pytest.mark.skipif(core is None, reason=f"without the C++ core: {texp.backends.available()['cpu']}")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# Each takes whole numbers below 100 to other whole numbers, exactly in every dtype; a second application is seen.
ROWS = {
    "increments": Row(c_g=1.0, e=-1.0, a_b=1.0, a_g=1.0, r_u=1.0),  # p ← p + g, b ← b + g
    "heavy ball": Row(a_b=1.0, a_g=1.0, c_u=1.0, e=-1.0, r_u=1.0),  # b ← b + g, p ← p + b
    "heavy ball with decay": Row(a_b=1.0, a_g=1.0, a_p=-0.5, c_u=1.0, s_p=0.5, e=-1.0, r_u=2.0),
    "all terms": Row(a_b=1.0, a_g=2.0, a_p=-1.0, c_u=1.0, c_g=-1.0, c_p=1.0, s_p=0.5, e=0.5, r_u=1.0, r_d=-1.0),
}


def applied(row: Row, p, g, b):
    """The row in float64; g and b may be 0."""
    u = row.a_b * b + row.a_g * g + row.a_p * p
    d = row.c_u * u + row.c_g * g + row.c_p * p
    return row.s_p * p - row.e * d, row.r_u * u + row.r_d * d


@pytest.fixture(params=core.cpu_variants() if core else [])
def variant(request):
    """Each instruction set that this processor has; other tests use the best."""
    core.use_cpu_variant(request.param)
    yield
    core.use_cpu_variant(core.cpu_variants()[0])


@given(
    hyper=hypers,
    P=st.floats(1, 2, exclude_max=True),
    exponent=st.integers(-5, 5000),
    kappa=st.floats(0, 100, allow_subnormal=False),
    first=st.booleans(),
    grad_scale=st.sampled_from([1.0, 2.0**16, 3.0]),
)
def test_scale_h_has_the_bits_of_theory(hyper, P, exponent, kappa, first, grad_scale):
    scale = Scale(P, exponent, kappa)
    step = theory.advance(scale, hyper, first=first, grad_scale=grad_scale)
    rows = core.advance(scale, hyper, first, grad_scale)
    assert rows == (step.running, step.first, step.idle, step.scale, step.growth)


SIZES = [0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 255, 256, 257, 511, 512, 513, 4097]
POISON = -7.0


def poisoned(values: torch.Tensor, dtype: torch.dtype, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The values in the middle of a poisoned storage, aligned or not, and that storage."""
    guard = 64
    storage = torch.full((len(values) + 2 * guard,), POISON, dtype=dtype)
    inside = storage[guard + offset :][: len(values)]
    inside.copy_(values)
    return inside, storage


def write_everything(row: Row, sizes: list[int], dtypes: tuple[torch.dtype, ...], offset: int) -> None:
    """All sizes in one step, each with and without gradient and buffer; no other element is written.

    dtypes: of parameter, gradient and buffer.
    """
    entries, checks = [], []
    for size in sizes:
        for with_grad, with_buf in ((True, True), (True, False), (False, True), (False, False)):
            start = (torch.arange(size) % 50 * 2).double()
            p, p_storage = poisoned(start, dtypes[0], offset)
            b, b_storage = poisoned(start + 2, dtypes[2], offset)
            g = torch.full((size + offset,), 4.0, dtype=dtypes[1])[offset:]
            entries.append(Entry(p, g if with_grad else None, b if with_buf else None))
            p_next, b_next = applied(row, start, 4.0 if with_grad else 0.0, start + 2 if with_buf else 0.0)
            checks.append((p, p_storage, p_next))
            checks.append((b, b_storage, b_next if with_buf else start + 2))
    core.apply(row, entries)
    for inside, storage, expected in checks:
        assert torch.equal(inside.double(), expected)
        inside.fill_(POISON)
        assert (storage == POISON).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide_buf", [False, True], ids=["own buf", "wide buf"])
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("name", ROWS)
def test_every_element_is_written_once_and_no_other(variant, dtype, wide_buf, offset, name):
    wide = torch.promote_types(dtype, torch.float32) if wide_buf else dtype
    write_everything(ROWS[name], SIZES, (dtype, dtype, wide), offset)


@pytest.mark.parametrize("dtypes", list(product(DTYPES, repeat=3)), ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_of_any_mix_of_dtypes(variant, dtypes, offset):
    write_everything(ROWS["all terms"], SIZES, dtypes, offset)


@pytest.mark.parametrize("threads", [2, 3, 4])
@pytest.mark.parametrize("name", ROWS)
def test_by_several_threads_too(threads, name):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        write_everything(ROWS[name], [*SIZES, 32_769, 50_001], (torch.float32,) * 3, 1)
    finally:
        torch.set_num_threads(before)


def test_what_lies_between_the_elements_of_a_view_is_not_written():
    storage = torch.full((100, 4), POISON)
    p = storage[:, 1:3]
    p.copy_(torch.ones(100, 2))
    core.apply(ROWS["increments"], [Entry(p, torch.ones(100, 2))])
    assert (p == 2).all()
    p.fill_(POISON)
    assert (storage == POISON).all()


@given(sizes=st.lists(st.sampled_from([0, 0, 1, 5, 4096, 4097, 12_288, 40_000]), max_size=12))
def test_any_list_of_sizes(sizes):
    params = [torch.zeros(size) for size in sizes]
    core.apply(ROWS["increments"], [Entry(p, torch.ones_like(p)) for p in params])
    assert all((p == 1).all() for p in params)


def free_memory() -> int:
    """Bytes that can be had without swapping, those of the file cache among them where that is known."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        return 1024 * int(meminfo.read_text().partition("MemAvailable:")[2].split()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    size, elements = 2**31 + 4099, 2  # bytes
    needed = 3 * size * elements + 2**30
    free = free_memory()
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory, there are {free / 2**30:.0f}")
    p, b = (torch.zeros(size, dtype=torch.bfloat16) for _ in "pb")
    g = torch.ones(size, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        core.apply(ROWS["increments"], [Entry(p, g, b)])
    finally:
        torch.set_num_threads(threads)
    for x in (p, b):
        assert all((part == 1).all() for part in x.split(2**24))


def test_bf16_and_fp16_are_rounded_as_in_torch():
    """Every float32 exponent, with ties and their neighbours; every half as an input."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator, dtype=torch.int64).to(torch.int32)
    for keep in (0xFFFF8000, 0xFFFFF000):  # ties of bf16 and of fp16
        tie = bits & (keep - 2**32)
        bits = torch.cat((bits, tie, tie + 1, tie - 1))
    special = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504.0, 65519.99, 65520.0, 2.0**-24, 2.0**-25]
    )
    values = torch.cat((bits.view(torch.float32), special))
    for dtype in (torch.bfloat16, torch.float16):
        p, b = torch.zeros(len(values), dtype=dtype), values.clone()
        core.apply(Row(a_b=1.0, c_u=1.0, s_p=0.0, e=-1.0, r_u=1.0), [Entry(p, None, b)])
        expected = values.to(dtype)
        assert torch.equal(p.isnan(), expected.isnan())
        numbers = ~expected.isnan()
        # -0 is rounded to +0 here: 0·p is added.
        assert torch.equal(p[numbers], expected[numbers])
        inputs = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        inputs = inputs[~inputs.isnan()]
        p, b = inputs.clone(), torch.zeros(len(inputs))
        core.apply(Row(a_p=1.0, s_p=1.0, r_u=1.0), [Entry(p, None, b)])
        assert torch.equal(b, inputs.float())
        assert torch.equal(p, inputs)


def steps(params, grads, backend, threads=1, **arguments):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        optimizer = texp.SGD(params, backend=backend, **arguments)
        for gs in grads:
            for p, g in zip(params, gs, strict=True):
                p.grad = g
            optimizer.step()
    finally:
        torch.set_num_threads(before)
    return optimizer


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_the_number_of_threads_changes_no_bit(threads):
    torch.manual_seed(0)
    shapes = [(300, 300), (5,), (0,), (100_000,), (3, 3)]
    grads = [[torch.randn(shape) for shape in shapes] for _ in range(3)]
    start = [torch.randn(shape) for shape in shapes]
    runs = []
    for count in (1, threads):
        params = [nn.Parameter(p.clone()) for p in start]
        steps(params, grads, "cpu", count, lr=0.1, momentum=0.9, weight_decay=0.1, scale_invariant=True)
        runs.append(params)
    assert all(same_bits(p, q) for p, q in zip(*runs, strict=True))


def test_every_instruction_set_gives_the_same_bits():
    """Those that this processor has; the best is what all other tests use."""
    names = core.cpu_variants()
    assert names[-1] == "any"
    hypers = [
        theory.Hyperparameters(0.1, 0.9, 0.1, 0.1, scale_invariant=s, nesterov=n) for s in (0, 1) for n in (0, 1)
    ]
    rows = [*ROWS.values(), *(theory.advance(Scale(1.99, 0, 0.1), hyper).running for hyper in hypers)]
    results = []
    try:
        for name in names:
            core.use_cpu_variant(name)
            generator = torch.Generator().manual_seed(0)
            entries = []
            for dtypes in product(DTYPES, repeat=3):
                p, g, b = (torch.randn(1003, generator=generator).to(dtype) for dtype in dtypes)
                entries.append(Entry(p, g, b))
            for dtype in DTYPES:
                p, g, b = (torch.randn(1003, generator=generator).to(dtype) for _ in "pgb")
                wide = b.to(torch.float64 if dtype == torch.float64 else torch.float32, copy=True)
                entries += [
                    Entry(p, g, b),
                    Entry(p.clone(), g, wide),
                    Entry(p.clone(), g),
                    Entry(p.clone(), None, b.clone()),
                ]
            for row in rows:
                core.apply(row, entries)
            results.append([x for entry in entries for x in (entry.param, entry.buf) if x is not None])
    finally:
        core.use_cpu_variant(names[0])
    for other in results[1:]:
        assert all(same_bits(x, y) for x, y in zip(results[0], other, strict=True))
    with pytest.raises(ValueError, match="cannot run the variant mmx"):
        core.use_cpu_variant("mmx")


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "with gaps": lambda x: torch.stack((x, x + 9), -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
}


STEPS = {
    "plain": {"lr": 0.1, "weight_decay": 0.01},
    "heavy ball": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
}


@cache
def exact_steps(dtype: torch.dtype, name: str):
    """Start and gradients, and the weights and buffers after three steps, in rational numbers where the dtype is
    float64 and in float64 otherwise.
    """
    torch.manual_seed(0)
    start, *grads = (torch.randn(8, 12, 10, 14).to(dtype) for _ in range(4))
    number = Fraction if dtype == torch.float64 else float
    h = {"momentum": 0.0, "nesterov": False} | STEPS[name]
    lr, decay, momentum = (number(h[key]) for key in ("lr", "weight_decay", "momentum"))
    p = [number(x) for x in start.flatten().tolist()]
    v = [number(0) for _ in p]
    for t, g in enumerate(grads):
        g = [number(x) + decay * w for x, w in zip(g.flatten().tolist(), p, strict=True)]
        v = g if t == 0 else [momentum * x + y for x, y in zip(v, g, strict=True)]
        d = [x + momentum * y for x, y in zip(g, v, strict=True)] if h["nesterov"] else v
        p = [w - lr * x for w, x in zip(p, d, strict=True)]
    return start, grads, p, v


def mean_error(x: torch.Tensor, exact: list) -> float:
    """Differences are taken before they are rounded."""
    number = type(exact[0])
    return sum(abs(float(number(a) - b)) for a, b in zip(x.flatten().tolist(), exact, strict=True)) / len(exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_the_error_is_no_larger_than_that_of_torch(dtype, name):
    """In every combination of strides, which changes no bit; in the mean over 13,440 elements after three steps, from
    the same state.
    """
    start, grads, p_exact, b_exact = exact_steps(dtype, name)
    for p_layout in ("contiguous", "channels last", "transposed", "with gaps"):
        for g_layout in LAYOUTS:
            laid_out = [LAYOUTS[g_layout](g) for g in grads]
            p = nn.Parameter(LAYOUTS[p_layout](start.clone()))
            strides = p.stride()
            optimizer = steps([p], [[g] for g in laid_out], "cpu", **STEPS[name])
            q = nn.Parameter(start.clone())
            plain = steps([q], [[g.contiguous()] for g in laid_out], "cpu", **STEPS[name])
            assert p.stride() == strides
            assert same_bits(p, q)
            if "momentum" in STEPS[name]:
                assert same_bits(optimizer.state[p]["momentum_buffer"], plain.state[q]["momentum_buffer"])
    p = nn.Parameter(start.clone())
    optimizer = steps([p], [[g] for g in grads], "cpu", **STEPS[name])
    q = nn.Parameter(start.clone())
    peer = torch.optim.SGD([q], foreach=False, **STEPS[name])
    for g in grads:
        q.grad = g
        peer.step()
    assert mean_error(p, p_exact) <= mean_error(q, p_exact)
    if "momentum" in STEPS[name]:
        b, c = optimizer.state[p]["momentum_buffer"], peer.state[q]["momentum_buffer"]
        assert mean_error(b, b_exact) <= mean_error(c, b_exact)


def test_the_two_backends_agree_over_a_run():
    torch.manual_seed(0)
    shapes = [(20, 30), (7,)]
    grads = [[torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(50)]
    start = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    runs = []
    for backend in ("cpu", "reference"):
        params = [nn.Parameter(p.clone()) for p in start]
        optimizer = steps(params, grads, backend, lr=0.1, momentum=0.9, weight_decay=0.05, scale_invariant=True)
        runs.append((params, optimizer.param_groups[0]["scale"], optimizer.log10_lr()))
    assert runs[0][1:] == runs[1][1:]
    assert all(relative_error(p, q) < 1e-14 for p, q in zip(runs[0][0], runs[1][0], strict=True))


def test_reference_rows_and_core_rows_on_one_entry():
    p, g, b = (torch.randn(100, dtype=torch.float64) for _ in "pgb")
    q, c = p.clone(), b.clone()
    row = theory.advance(Scale(), theory.Hyperparameters(0.1, 0.9, weight_decay=0.1, scale_invariant=True)).running
    core.apply(row, [Entry(p, g, b)])
    reference.apply(row, [Entry(q, g, c)])
    assert relative_error(p, q) < 1e-15
    assert relative_error(b, c) < 1e-15

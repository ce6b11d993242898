"""The C++ core: what it shares with texp.theory, that it writes every element once, and its host side."""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import texp
from tests.conftest import relative_error, same_bits
from tests.states import snapshot
from tests.test_theory import hypers
from texp import reference, theory
from texp.reference import Entry
from texp.theory import Row, Scale

core = texp.backends.core(None)
pytestmark = pytest.mark.skipif(core is None, reason=f"without the C++ core: {texp.backends.available()['cpu']}")

INCREMENT = Row(c_g=1.0, e=-1.0, a_b=1.0, a_g=1.0, r_u=1.0)  # p ← p + g, b ← b + g
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


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


SIZES = [0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 4095, 4096, 4097, 8191, 8192, 8193, 50_001]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide_buf", [False, True])
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("threads", [1, 4])
def test_every_element_is_written_once_and_no_other(dtype, wide_buf, offset, threads):
    """All sizes in one step, each in the middle of a poisoned storage, aligned or not."""
    before = torch.get_num_threads()
    guard, entries, storages = 64, [], []
    for size in SIZES:
        p_storage = torch.full((size + 2 * guard,), -7.0, dtype=dtype)
        wide = torch.float32 if wide_buf and dtype != torch.float64 else dtype
        b_storage = torch.full((size + 2 * guard,), -7.0, dtype=wide)
        inside = slice(guard + offset, guard + offset + size)
        values = torch.arange(size) % 100
        p_storage[inside], b_storage[inside] = values.to(dtype), values.to(wide)
        g = torch.ones(size + offset, dtype=dtype)[offset:]
        entries.append(Entry(p_storage[inside], g, b_storage[inside]))
        storages.append((p_storage, b_storage, inside, values))
    torch.set_num_threads(threads)
    try:
        core.apply(INCREMENT, entries)
    finally:
        torch.set_num_threads(before)
    for p_storage, b_storage, inside, values in storages:
        for storage in (p_storage, b_storage):
            assert torch.equal(storage[inside].double(), values + 1.0)
            storage[inside] = -7.0
            assert (storage == -7.0).all()


@given(sizes=st.lists(st.sampled_from([0, 0, 1, 5, 4096, 4097, 12_288, 40_000]), max_size=12))
def test_any_list_of_sizes(sizes):
    params = [torch.zeros(size) for size in sizes]
    core.apply(INCREMENT, [Entry(p, torch.ones_like(p)) for p in params])
    assert all((p == 1).all() for p in params)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    size, elements = 2**31 + 4099, 2  # bytes
    needed = 3 * size * elements + 2**30
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory, there are {free / 2**30:.0f}")
    p, b = (torch.zeros(size, dtype=torch.bfloat16) for _ in "pb")
    g = torch.ones(size, dtype=torch.bfloat16)
    core.apply(INCREMENT, [Entry(p, g, b)])
    for x in (p, b):
        # Sums of ones over slices, which are exact in float32.
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
        inputs = inputs[inputs.isfinite()]  # 0 times infinity is not 0
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
    rows = [INCREMENT, theory.advance(Scale(1.5, 0, 0.1), theory.Hyperparameters(0.1, 0.9, 0.1, 0.1, True)).running]
    results = []
    try:
        for name in names:
            core.use_cpu_variant(name)
            generator = torch.Generator().manual_seed(0)
            entries = []
            for dtype in DTYPES:
                p, g, b = (torch.randn(1003, generator=generator).to(dtype) for _ in "pgb")
                wide = b.float() if dtype != torch.float64 else b.clone()
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p_layout", ["contiguous", "channels last", "transposed", "with gaps"])
@pytest.mark.parametrize("g_layout", LAYOUTS)
def test_the_error_is_no_larger_than_that_of_torch(dtype, p_layout, g_layout):
    """Against float64, over three steps from the same state, in every combination of strides."""
    torch.manual_seed(0)
    start = torch.randn(4, 6, 5, 7).to(dtype)
    grads = [LAYOUTS[g_layout](torch.randn(4, 6, 5, 7).to(dtype)) for _ in range(3)]
    arguments = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
    errors = {}
    exact = nn.Parameter(start.double())
    for backend in ("exact", "cpu", "torch"):
        p = exact if backend == "exact" else nn.Parameter(LAYOUTS[p_layout](start))
        make = torch.optim.SGD if backend != "cpu" else texp.SGD
        optimizer = make([p], **arguments, **({"backend": "cpu"} if backend == "cpu" else {"foreach": False}))
        for g in grads:
            p.grad = g.double() if backend == "exact" else g
            optimizer.step()
        errors[backend] = relative_error(p, exact)
        if backend == "cpu":
            assert p.stride() == LAYOUTS[p_layout](start).stride()
    # For float32 and float64 both are at the level of rounding: which is smaller is chance there, within a tenth.
    assert errors["cpu"] <= errors["torch"] * 1.1 + torch.finfo(torch.float64).eps


def test_tensors_for_the_reference_do_not_hold_up_the_others():
    """Complex, sparse, a subclass and an ordinary parameter in one group, a late one in another."""

    class Tagged(nn.Parameter):
        pass

    def make(backend):
        torch.manual_seed(0)
        params = [
            nn.Parameter(torch.randn(4, dtype=torch.complex64)),
            nn.Parameter(torch.randn(5, 3)),
            Tagged(torch.randn(4)),
            nn.Parameter(torch.randn(4)),
            nn.Parameter(torch.randn(4)),
        ]
        groups = [{"params": params[:4]}, {"params": params[4:], "scale_invariant": True, "weight_decay": 0.5}]
        return params, texp.SGD(groups, lr=0.1, momentum=0.9, backend=backend)

    runs = []
    for backend in (None, "reference"):
        params, optimizer = make(backend)
        for t in range(8):
            torch.manual_seed(t)
            for i, p in enumerate(params):
                p.grad = torch.randn_like(p.detach())
                if i == 1:
                    p.grad = p.grad.to_sparse()
                if i == 4 and t in (0, 5):
                    p.grad = None
            optimizer.step()
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        assert (
            relative_error(
                torch.view_as_real(p) if p.is_complex() else p, torch.view_as_real(q) if q.is_complex() else q
            )
            < 1e-6
        )


def test_state_that_is_edited_between_steps_is_seen():
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = texp.SGD([p, q], lr=1.0, momentum=0.5, backend="cpu")
    p.grad = q.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[p] = {"momentum_buffer": torch.full((3,), 10.0)}
    del optimizer.state[q]
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((3,), -6.0))  # 1 − 1 − (5 + 1)
    assert torch.equal(q.detach(), torch.full((3,), -1.0))  # 1 − 1 − 1
    torch.utils.swap_tensors(p, nn.Parameter(torch.zeros(3)))
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((3,), -4.0))  # 0 − (3 + 1)


def test_a_parameter_that_is_there_twice():
    """torch warns and steps it twice; so does texp."""
    runs = []
    for make in (torch.optim.SGD, texp.SGD):
        p = nn.Parameter(torch.ones(100_000))
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = make([p, p], lr=0.1, momentum=0.9)
        for _ in range(3):
            p.grad = torch.ones_like(p)
            optimizer.step()
        runs.append(p)
    assert torch.equal(*runs)


def test_a_step_inside_the_check_of_another():
    """The check of what is left to the reference is Python, which may do anything, even step another optimizer."""
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.complex64))
    inner_p = nn.Parameter(torch.ones(3))
    p.grad, q.grad, inner_p.grad = torch.ones(3), torch.ones(3, dtype=torch.complex64), torch.ones(3)
    inner = texp.SGD([inner_p], lr=0.5)
    outer = texp.SGD([p, q], lr=0.5)
    core.step(outer.param_groups, outer.state, 1.0, lambda left: inner.step())
    assert torch.equal(p.detach(), torch.full((3,), 0.5))
    assert torch.equal(inner_p.detach(), torch.full((3,), 0.5))


def test_an_error_in_the_last_group_changes_nothing():
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = texp.SGD(
        [{"params": [p], "scale_invariant": True} for p in params], lr=0.1, momentum=0.9, weight_decay=0.1
    )
    for p in params:
        p.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[1]["scale"] = "two"
    before = snapshot(optimizer)
    with pytest.raises(TypeError):
        optimizer.step()
    assert snapshot(optimizer)[0] == before[0]
    assert all(same_bits(a, b) for a, b in zip(snapshot(optimizer)[1:], before[1:], strict=True))


def test_hooks_run_once_and_are_seen_when_they_come_late():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = texp.SGD([p], lr=0.1, backend="cpu")
    optimizer.step()
    calls = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global")),
    ]
    optimizer.step()
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert calls == ["pre", "global"]


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

"""Parameter, gradient and momentum buffer of any mix of dtypes: all kernels convert each element to the type of the
arithmetic, float64 if one of the three is and otherwise float32, and round p and b once to their own dtypes."""

from collections.abc import Callable, Iterable
from itertools import product

import pytest
import torch
from torch import nn

from tests.backends.test_rows import EXPONENTIAL, NO_CORE, NO_TRITON, ORDINARY, SHAPES, bounds, core, triton, unless
from tests.conftest import DEVICES, INTERPRETED, Target, same_bits, targets
from texp import backends
from texp.backends.reference import Entry
from texp.theory import Row

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHORT = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
MIXES = list(product(DTYPES, repeat=3))  # of p, g and b
VARIANTS = [] if NO_CORE else backends.core().cpu_variants()
ROWS = {"heavy ball": ORDINARY, "all terms": EXPONENTIAL}

needs_core = pytest.mark.skipif(NO_CORE is not None, reason=str(NO_CORE))
needs_grad_dtype = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch keeps gradients in the dtype of their parameters"
)


def name_of(mix: Iterable[torch.dtype]) -> str:
    return " ".join(SHORT[dtype] for dtype in mix)


each_mix = pytest.mark.parametrize("mix", MIXES, ids=name_of)


def on_variant(name: str) -> Callable:
    def apply(row, entries):
        core_ = backends.core()
        core_.use_cpu_variant(name)
        try:
            core(row, entries)
        finally:
            core_.use_cpu_variant(core_.cpu_variants()[0])

    return apply


each_kernel = pytest.mark.parametrize(
    "apply",
    [
        *(pytest.param(on_variant(name), id=f"cpu-{name}") for name in VARIANTS),
        pytest.param(triton, id="triton", marks=unless(NO_TRITON)),
    ],
)


def arithmetic(*tensors: torch.Tensor | None) -> torch.dtype:
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def normal(dtype: torch.dtype, generator: torch.Generator) -> Callable[[tuple[int, ...]], torch.Tensor]:
    return lambda size: torch.randn(size, generator=generator).to(dtype)


def rounded(x: torch.Tensor, dtype: torch.dtype, truncates: bool) -> torch.Tensor:
    """As torch rounds; Triton's interpreter cuts off what bf16 has no room for."""
    if truncates and dtype == torch.bfloat16:
        return x.detach().float().view(torch.int32).bitwise_and(-(2**16)).view(torch.float32).to(dtype)
    return x.detach().to(dtype)


PRESENT = {"all": (True, True), "no gradient": (False, True), "no buffer": (True, False), "neither": (False, False)}


@each_kernel
@each_mix
@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_the_bits_are_those_of_the_arithmetic_rounded_once(apply, mix, row):
    """And near the four equations in float64; in every layout, of which no two tensors need have the same."""
    generator = torch.Generator().manual_seed(0)
    shapes = ["odd", "transposed", "misaligned"] if apply is triton else list(SHAPES)
    for shape, (with_grad, with_buf) in product(shapes, PRESENT.values()):
        p, g, b = (SHAPES[shape](normal(dtype, generator)) for dtype in mix)
        g, b = g if with_grad else None, b if with_buf else None
        before = [x if x is None else x.clone() for x in (p, g, b)]
        T = arithmetic(p, g, b)
        wide = Entry(*(x if x is None else x.to(T, copy=True) for x in before))
        exact = [torch.zeros(p.shape, dtype=torch.float64) if x is None else x.double() for x in before]
        u = row.a_b * exact[2] + row.a_g * exact[1] + row.a_p * exact[0]
        d = row.c_u * u + row.c_g * exact[1] + row.c_p * exact[0]
        apply(row, [Entry(p, g, b)])
        apply(row, [wide])
        expected = (row.s_p * exact[0] - row.e * d, row.r_u * u + row.r_d * d)
        for actual, of_wide, value, index in zip((p, b), (wide.param, wide.buf), expected, range(2), strict=True):
            if actual is None:
                continue
            assert same_bits(actual, rounded(of_wide, actual.dtype, apply is triton))
            ulp = 1.0 if apply is triton and actual.dtype == torch.bfloat16 else 0.5
            bound = list(bounds(row, *exact, actual.dtype, ulp))[index]
            assert ((actual.double() - value).abs() <= bound).all()
        assert g is None or same_bits(g, before[1])


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@needs_core
@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 511, 513, 100_003])
def test_every_tile_of_a_tensor(threads, size):
    """Tiles are converted one by one on the CPU; many tensors in one step, usual ones among them."""
    generator = torch.Generator().manual_seed(0)
    entries, wide = [], []
    for mix in MIXES if size < 1000 else MIXES[::7]:
        p, g, b = (torch.randn(size + 1, generator=generator).to(dtype)[1:] for dtype in mix)
        entries.append(Entry(p, g, b))
        wide.append(Entry(*(x.to(arithmetic(p, g, b), copy=True) for x in (p, g, b))))
    core(EXPONENTIAL, entries)
    core(EXPONENTIAL, wide)
    for (p, _, b), (p_wide, _, b_wide) in zip(entries, wide, strict=True):
        assert same_bits(p, p_wide.to(p.dtype))
        assert same_bits(b, b_wide.to(b.dtype))


@each_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float64_is_rounded_to_16_bits_as_in_torch(apply, dtype):
    """By way of float32, which makes ties of what lies near them; and beyond the range of float32."""
    if apply is triton and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bf16")
    half_ulp = torch.finfo(dtype).eps / 2
    ties = 1 + half_ulp * torch.arange(1, 40, 2, dtype=torch.float64)
    values = torch.cat([(ties + shift) * 2.0**k for k in (-14, 0, 9) for shift in (0.0, 1e-12, -1e-12)])
    values = torch.cat((values, -values, torch.tensor([0.0, 1e300, -1e300, 1e-300, torch.inf, torch.nan]).double()))
    once = torch.where((values.abs() < 1e5) & (values.abs() > 1e-5), values, 1.0)
    assert (once.to(dtype).double() - once).abs().gt(half_ulp * 2.0 ** once.abs().log2().floor()).any()
    p, b = torch.zeros(len(values), dtype=dtype), torch.zeros(len(values), dtype=dtype)
    apply(Row(a_g=1.0, c_u=1.0, e=-1.0, r_u=1.0), [Entry(p, values, b)])
    numbers = ~values.isnan()
    for x in (p, b):
        assert torch.equal(x[numbers], values.to(dtype)[numbers])
        assert torch.equal(x.isnan(), ~numbers)


@needs_core
@pytest.mark.parametrize("which", ["gradient", "buffer"])
def test_a_step_that_is_too_large_for_float32_is_taken_in_float64(which):
    """Where the gradient or the buffer is float64, whatever the weights are."""
    row = Row(a_b=1e39, a_g=1e39, c_u=1.0, e=1.0)
    tiny = torch.full((3,), 1e-39, dtype=torch.float64)
    p, g, b = torch.ones(3), torch.zeros(3), torch.zeros(3)
    with pytest.raises(ValueError, match="too narrow for a step as large as this"):
        core(row, [Entry(p, g, b)])
    core(row, [Entry(p, tiny, b) if which == "gradient" else Entry(p, g, tiny)])
    assert (p.abs() < 1e-7).all()


KERNELS = [
    param for param in targets() if param.values[0].backend in DEVICES and param.values[0].backend != "reference"
]


def step_in_both(target: Target, mix: tuple[torch.dtype, ...], steps: int, **options) -> None:
    """Steps a parameter beside one that has the dtype of the arithmetic, from the same values each time."""
    generator = torch.Generator().manual_seed(0)
    T = torch.float64 if torch.float64 in mix else torch.float32
    p = nn.Parameter(torch.randn(7, 5, generator=generator).to(mix[0]).to(target.device))
    twin = nn.Parameter(p.detach().to(T))
    p.grad_dtype = mix[1]
    optimizers = []
    for x, dtype in ((p, mix[2]), (twin, T)):
        optimizer = target.sgd(
            [x], lr=0.1, momentum=0.9, weight_decay=0.1, scale_invariant=True, momentum_dtype=dtype, **options
        )
        optimizer.state[x]["momentum_buffer"] = torch.zeros(7, 5, dtype=dtype, device=target.device)
        optimizers.append(optimizer)
    b, b_wide = (optimizer.state[x]["momentum_buffer"] for optimizer, x in zip(optimizers, (p, twin), strict=True))
    truncates = target.backend == "triton" and INTERPRETED
    for _ in range(steps):
        p.grad = torch.randn(7, 5, generator=generator).to(mix[1]).to(target.device)
        twin.grad = p.grad.to(T)
        with torch.no_grad():
            twin.copy_(p)
            b_wide.copy_(b)
        for optimizer in optimizers:
            optimizer.step()
        assert same_bits(p, rounded(twin, p.dtype, truncates))
        assert same_bits(b, rounded(b_wide, b.dtype, truncates))
    assert optimizers[0].state[p]["momentum_buffer"] is b
    assert b.dtype == mix[2]


@needs_grad_dtype
@each_mix
@pytest.mark.parametrize("target", KERNELS, indirect=True)
def test_optimizers_step_every_mix(target, mix):
    """Without converting a buffer that is there."""
    step_in_both(target, mix, 3)


@needs_grad_dtype
@needs_core
@pytest.mark.parametrize("mix", MIXES[::5], ids=name_of)
@pytest.mark.parametrize("target", [param for param in KERNELS if param.values[0].backend != "cpu"], indirect=True)
def test_optimizers_whose_scale_is_on_the_device_step_mixes(target, mix):
    step_in_both(target, mix, 3, capturable=True)

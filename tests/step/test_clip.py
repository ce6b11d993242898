"""Clipping in the step, against torch.nn.utils.clip_grad_norm_ and a step of torch.optim.SGD after it."""

import copy
import math
import pickle
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import texp
from tests.conftest import relative_error, same_bits
from tests.states import assert_unchanged, param, snapshot

SHAPES = [(4, 3), (5,), (7, 2), (1,), (3, 700)]
ARGUMENTS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
NORM_TYPES = [2.0, math.inf]
# Of the theorem: λη ≤ (1 − √γ)².
GRID = [
    {"lr": lr, "momentum": momentum, "weight_decay": decay, "nesterov": nesterov}
    for lr, momentum, decay, nesterov in product((0.1, 1.0), (0.0, 0.5, 0.9), (0.0, 2e-3), (False, True))
    if momentum or not nesterov
]


class Run:
    """Two groups whose gradients depend on θ, of which some are missing in some steps."""

    def __init__(self, make, device: str, dtype: torch.dtype = torch.float64) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(self.normal(shape).to(device, dtype)) for shape in SHAPES]
        self.optimizer = make([{"params": self.params[:2]}, {"params": self.params[2:], "lr": 0.03}])
        self.norms: list[float] = []

    def normal(self, shape: tuple) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def scales(self) -> list[float]:
        of_groups = [1.0, 1.0]
        if isinstance(self.optimizer, texp.SGD):
            of_groups = [float(P) for P in self.optimizer.intrinsic_scales()]
        return [of_groups[0]] * 2 + [of_groups[1]] * 3

    def gradients(self, t: int) -> None:
        """At θ, that of a quadratic function with noise whose size changes, so that some are clipped and some not."""
        for i, (p, P) in enumerate(zip(self.params, self.scales(), strict=True)):
            at_theta = p.detach().cpu().double() / P + self.normal(p.shape) * (1 + t % 3)
            p.grad = None if (t + i) % 5 == 4 else (at_theta / P).to(p.device, p.dtype)

    def step(self, t: int, norm_type: float, max_norm: float) -> None:
        self.gradients(t)
        if isinstance(self.optimizer, texp.SGD):
            before = [None if p.grad is None else p.grad.clone() for p in self.params]
            self.optimizer.step()
            self.norms.append(self.optimizer.grad_norm.item())
            assert all(x is None or same_bits(x, p.grad) for x, p in zip(before, self.params, strict=True))
        else:
            self.norms.append(clip_grad_norm_(self.params, max_norm, norm_type).item())
            self.optimizer.step()


def pair(target, norm_type: float, max_norm: float, *, exponential: bool, **arguments) -> tuple[Run, Run]:
    clip = {"max_norm": max_norm, "norm_type": norm_type, "scale_invariant": exponential}
    return (
        Run(lambda groups: target.sgd(groups, **clip, **arguments), target.device),
        Run(lambda groups: torch.optim.SGD(groups, foreach=False, **arguments), target.device),
    )


def assert_agree(ours: Run, theirs: Run, error: float) -> None:
    ours.optimizer.fold()
    assert ours.norms == pytest.approx(theirs.norms, rel=error)
    for p, q in zip(ours.params, theirs.params, strict=True):
        assert relative_error(p, q) < error


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("exponential", [False, True], ids=["ordinary", "exponential"])
@pytest.mark.parametrize("arguments", GRID, ids=str)
def test_as_torch_clips(swift_target, arguments, exponential, norm_type):
    """Over 250 steps in float64, a few of which are not clipped. Each step rounds a few times, by 1e-16, and forgets
    what the steps before it have done; the exponential form has more roundings."""
    limit = 80.0 if norm_type == 2 else 6.0
    runs = pair(swift_target, norm_type, limit, exponential=exponential, **arguments)
    for t in range(250):
        for run in runs:
            run.step(t, norm_type, limit)
    assert min(runs[0].norms) < limit < max(runs[0].norms)
    assert_agree(*runs, 1e-11 if exponential else 1e-12)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("exponential", [False, True], ids=["ordinary", "exponential"])
def test_on_every_backend(target, exponential, norm_type):
    """The same in a few steps, max_norm changing meanwhile."""
    runs = pair(target, norm_type, 20.0, exponential=exponential, **ARGUMENTS)
    for t in range(8):
        limit = (1.0, 0.0, 1e6, 3.0)[t % 4]
        runs[0].optimizer.max_norm = limit
        for run in runs:
            run.step(t, norm_type, limit)
    assert_agree(*runs, 1e-13)


@settings(max_examples=30)
@given(st.data())
def test_any_run(data):
    """Of options that change from group to group, in any order of clipped and other steps."""
    draw = data.draw
    norm_type, backend = draw(st.sampled_from(NORM_TYPES)), draw(st.sampled_from(["cpu", "reference"]))
    if texp.backends.available()[backend] != "ok":
        backend = "reference"
    nesterov = draw(st.booleans())
    arguments = {
        "lr": draw(st.floats(1e-3, 0.5)),
        "momentum": draw(st.floats(0.1, 0.95)),
        "weight_decay": draw(st.floats(0, 0.01)),
        "dampening": 0.0 if nesterov else draw(st.floats(0, 0.9)),
        "nesterov": nesterov,
        "maximize": draw(st.booleans()),
    }
    ours = Run(
        lambda groups: texp.SGD(
            groups, backend=backend, norm_type=norm_type, scale_invariant=draw(st.booleans()), **arguments
        ),
        "cpu",
    )
    theirs = Run(lambda groups: torch.optim.SGD(groups, **arguments), "cpu")
    for t in range(draw(st.integers(1, 6))):
        limit = draw(st.sampled_from([0.5, 5.0, 50.0, math.inf]))
        ours.optimizer.max_norm = limit
        for run in (ours, theirs):
            run.step(t, norm_type, limit)
    assert_agree(ours, theirs, 1e-11)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("scale_invariant", [False, True])
def test_scaled_gradients(target, scale_invariant, norm_type):
    """With fused=True a GradScaler leaves them scaled: the norm is that of the gradients without it."""
    p, q = param(device=target.device), param(device=target.device)
    arguments = {"max_norm": 0.5, "norm_type": norm_type, "scale_invariant": scale_invariant, **ARGUMENTS}
    plain, scaled = target.sgd([q], **arguments), target.sgd([p], fused=True, **arguments)
    scaler = torch.amp.GradScaler(target.device, init_scale=2.0**10)
    for t in range(5):
        scaled.zero_grad()
        scaler.scale((p * p * math.cos(t)).sum()).backward()
        if t == 2:
            p.grad[0] = math.inf
            before = snapshot(scaled)
        scaler.step(scaled)
        scaler.update()
        assert scaled.step_was_skipped is (t == 2)
        if t == 2:
            assert_unchanged(scaled, before)
            continue
        q.grad = None
        (q * q * math.cos(t)).sum().backward()
        plain.step()
        # Scales are powers of two: unscaling is exact.
        assert scaled.grad_norm.item() == plain.grad_norm.item()
        assert same_bits(p, q)


NONFINITE = [math.inf, -math.inf, math.nan]


class TestANormThatIsNotFinite:
    @pytest.mark.parametrize("scale_invariant", [False, True])
    @pytest.mark.parametrize("norm_type", NORM_TYPES)
    @pytest.mark.parametrize("value", NONFINITE)
    @pytest.mark.parametrize("option", ["error_if_nonfinite", "skip_nonfinite"])
    def test_no_step(self, target, option, value, norm_type, scale_invariant):
        """Neither a first one nor a later one; the next is taken as if this one had not been asked for."""
        p, q = param(device=target.device), param(device=target.device)
        arguments = {"norm_type": norm_type, "scale_invariant": scale_invariant, **ARGUMENTS}
        optimizer = target.sgd([p], max_norm=1.0, **{option: True}, **arguments)
        plain = target.sgd([q], max_norm=1.0, **arguments)
        for t in range(5):
            p.grad = torch.full_like(p, 1.5 + t)
            if t in (0, 3):
                p.grad[-1] = value
                before = snapshot(optimizer)
                if option == "skip_nonfinite":
                    optimizer.step()
                    assert optimizer.step_was_skipped
                else:
                    with pytest.raises(RuntimeError, match=r"total norm of order .* is non-finite"):
                        optimizer.step()
                assert not optimizer.grad_norm.isfinite()
                assert_unchanged(optimizer, before)
                continue
            q.grad = p.grad.clone()
            optimizer.step()
            plain.step()
            assert not optimizer.step_was_skipped
            assert same_bits(p, q)

    @pytest.mark.parametrize("value", NONFINITE)
    def test_a_step_all_the_same(self, target, value):
        """As in torch, which leaves no doubt either."""
        p, q = param(device=target.device), param(device=target.device)
        optimizer, plain = target.sgd([p], max_norm=1.0, **ARGUMENTS), torch.optim.SGD([q], **ARGUMENTS)
        for x in (p, q):
            x.grad = torch.full_like(x, value)
        norm = clip_grad_norm_([q], 1.0)
        optimizer.step()
        plain.step()
        assert torch.equal(optimizer.grad_norm.isnan().cpu(), norm.isnan().cpu())
        assert q.isnan().all()
        assert p.isnan().all()

    def test_without_max_norm(self, target):
        p = param(device=target.device)
        optimizer = target.sgd([p], lr=0.1, skip_nonfinite=True)
        p.grad = torch.full_like(p, 2.0)
        optimizer.step()
        assert torch.allclose(p.detach().cpu(), param().detach() - 0.2)
        before, p.grad[0] = snapshot(optimizer), math.nan
        optimizer.step()
        assert optimizer.step_was_skipped
        assert_unchanged(optimizer, before)


def test_gradients_that_no_kernel_takes(general):
    """They count, and are clipped by the norm of all."""
    params = [param(), nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(6, dtype=torch.complex64))]
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = general.sgd(params, lr=0.1, max_norm=1.0)
    params[0].grad = torch.full_like(params[0], 3.0)
    params[1].grad = torch.sparse_coo_tensor([[1, 1]], [[1.0, 2.0], [3.0, 4.0]], (4, 2), check_invariants=True)
    params[2].grad = torch.full_like(params[2], 3 + 4j)
    for p, q in zip(params, copies, strict=True):
        q.grad = p.grad.to_dense() if p.grad.is_sparse else p.grad.clone()
    norm = clip_grad_norm_(copies, 1.0, foreach=False)
    optimizer.step()
    torch.optim.SGD(copies, lr=0.1).step()
    assert optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    for p, q in zip(params, copies, strict=True):
        assert torch.allclose(p, q, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_norm_of_narrow_gradients_is_that_of_their_values(target, dtype):
    """Added in float64: torch adds in float32, and rounds the norm to the dtype of the gradients."""
    p = nn.Parameter(torch.zeros(40_000, dtype=dtype, device=target.device))
    p.grad = torch.randn(40_000, generator=torch.Generator().manual_seed(0)).to(target.device, dtype)
    optimizer = target.sgd([p], lr=1.0, max_norm=1.0)
    optimizer.step()
    norm = p.grad.double().norm().item()
    assert optimizer.grad_norm.item() == pytest.approx(norm, rel=1e-13)
    roundings = 2 * torch.finfo(dtype).eps  # of the factor in float32, and of the result
    expected = -p.grad.double() / (norm + 1e-6)
    assert ((p.double() - expected).abs() <= roundings * expected.abs() + torch.finfo(dtype).tiny).all()


def test_a_norm_beyond_the_range_of_the_gradients(target):
    """Of finite gradients in fp16; torch sets them to 0 (findings/torch_clip_grad_norm_overflows_in_fp16.sh)."""
    p = nn.Parameter(torch.zeros(70_000, dtype=torch.float16, device=target.device))
    p.grad = torch.full_like(p, 300.0)
    optimizer = target.sgd([p], lr=1.0, max_norm=100.0)
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(300 * math.sqrt(70_000), rel=1e-12)
    assert torch.allclose(p.float(), torch.full_like(p, -100 / math.sqrt(70_000)).float(), rtol=1e-3)


def test_a_step_long_enough_to_release_the_gil(target):
    if target.backend == "triton" and target.device == "cpu":
        pytest.skip("takes Triton's interpreter a second; no lock is released there")
    p = nn.Parameter(torch.zeros(2_000_000, device=target.device))
    p.grad = torch.full_like(p, 0.5)
    optimizer = target.sgd([p], lr=1.0, max_norm=1.0)
    optimizer.step()
    norm = math.sqrt(p.numel()) * 0.5
    assert optimizer.grad_norm.item() == pytest.approx(norm, rel=1e-12)
    assert torch.allclose(p, torch.full_like(p, -0.5 / norm), rtol=1e-6)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_nothing_to_clip(target, norm_type):
    """No gradient, or none with elements."""
    p, empty = param(device=target.device), nn.Parameter(torch.zeros(0, 3, device=target.device))
    optimizer = target.sgd([p, empty], max_norm=1.0, norm_type=norm_type, **ARGUMENTS)
    assert optimizer.grad_norm is None
    before = p.detach().clone()
    optimizer.step()
    empty.grad = torch.zeros_like(empty)
    optimizer.step()
    assert optimizer.grad_norm.item() == 0
    assert same_bits(p.detach(), before)


def test_the_norm_is_a_copy(target):
    p = param(device=target.device)
    optimizer, norms = target.sgd([p], lr=0.1, max_norm=1.0), []
    for k in (1.0, 2.0):
        p.grad = torch.full_like(p, k)
        optimizer.step()
        norms.append(optimizer.grad_norm)
    assert [x.shape for x in norms] == [(), ()]
    assert norms[1].item() == pytest.approx(2 * norms[0].item())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_norm": -1.0}, "max_norm must be at least 0, got -1.0"),
        ({"max_norm": math.nan}, "max_norm must be at least 0, got nan"),
        ({"max_norm": torch.ones(2)}, "max_norm must be a number or a tensor of one element"),
        ({"max_norm": 1.0, "norm_type": 1.0}, "norm_type must be 2 or inf, got 1.0"),
        ({"skip_nonfinite": True, "error_if_nonfinite": True}, "not both"),
        ({"max_norm": 1.0, "differentiable": True}, "a differentiable step cannot clip"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        texp.SGD([param()], lr=0.1, **arguments)


def test_a_max_norm_that_is_text():
    with pytest.raises(TypeError, match="max_norm must be a number or a tensor of one element, got '1'"):
        texp.SGD([param()], lr=0.1, max_norm="1")


def test_a_bad_max_norm_between_steps():
    optimizer = texp.SGD([param()], lr=0.1, max_norm=1.0)
    with pytest.raises(ValueError, match="max_norm must be at least 0, got -2"):
        optimizer.max_norm = -2
    assert optimizer.max_norm == 1.0
    optimizer = texp.SGD([param()], lr=0.1, differentiable=True)
    with pytest.raises(ValueError, match="a differentiable step cannot clip"):
        optimizer.max_norm = 1.0
    assert optimizer.max_norm is None


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_clip(copied):
    optimizer = copied(texp.SGD([param()], lr=1.0, max_norm=1.0, norm_type=math.inf, skip_nonfinite=True))
    p = optimizer.param_groups[0]["params"][0]
    p.grad, before = torch.full_like(p, 4.0), p.detach().clone()
    optimizer.step()
    assert torch.allclose(p, before - 1, atol=1e-6)
    p.grad[0] = math.nan
    optimizer.step()
    assert optimizer.step_was_skipped

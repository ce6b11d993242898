"""texp.LARS against the paper's formula in plain torch; against timm's in tests/integration/test_timm.py."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import texp
from tests.conftest import Target, relative_error, same_bits
from tests.states import assert_unchanged, param, snapshot

SHAPES = [(4, 3), (5,), (7, 2), (1,), (3, 700)]


class Lars(torch.optim.Optimizer):
    """The formula, one tensor after the other."""

    def __init__(self, params, lr=1.0, **options) -> None:
        defaults = {"lr": lr, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}
        defaults |= {"trust_coeff": 0.001, "eps": 1e-8, "trust_clip": False, "always_adapt": False, "maximize": False}
        super().__init__(params, defaults | options)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] * self.update(p, -p.grad if group["maximize"] else p.grad, group)

    def update(self, p: Tensor, g: Tensor, group: dict) -> Tensor:
        decay, state = group["weight_decay"], self.state[p]
        if decay != 0 or group["always_adapt"]:
            p_norm, g_norm = p.norm(), g.norm()
            ratio = 1.0
            if p_norm > 0 and g_norm > 0:
                ratio = group["trust_coeff"] * p_norm / (g_norm + decay * p_norm + group["eps"])
            if group["trust_clip"]:
                ratio = min(ratio / group["lr"], 1.0)
            g = ratio * (g + decay * p)
        if group["momentum"] == 0:
            return g
        if "momentum_buffer" in state:
            state["momentum_buffer"].mul_(group["momentum"]).add_(g, alpha=1 - group["dampening"])
        else:
            state["momentum_buffer"] = g.clone()
        return g + group["momentum"] * state["momentum_buffer"] if group["nesterov"] else state["momentum_buffer"]


class Run:
    """Three groups, one of them without decay, with gradients that depend on the weights, some of them missing, one
    tensor whose weights begin at 0, and one whose gradient is sometimes 0."""

    def __init__(self, make, device: str) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(self.normal(shape).to(device)) for shape in SHAPES]
        with torch.no_grad():
            self.params[1].zero_()
        groups = ([0, 1], {}), ([2], {"weight_decay": 0.0}), ([3, 4], {"lr": 0.7})
        self.optimizer = make([{"params": [self.params[i] for i in which], **of} for which, of in groups])

    def normal(self, shape: tuple) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def gradients(self, t: int) -> None:
        for i, p in enumerate(self.params):
            grad = p.detach().cpu() + self.normal(p.shape) * (1 + t % 3)
            if i == 3 and t % 4 == 1:
                grad = torch.zeros_like(grad)
            p.grad = None if (t + i) % 5 == 4 else grad.to(p.device)

    def step(self, t: int) -> None:
        self.gradients(t)
        self.optimizer.step()


def assert_agree(ours: Run, theirs: Run, error: float) -> None:
    for p, q in zip(ours.params, theirs.params, strict=True):
        assert relative_error(p, q) < error


def lars(target: Target, groups, **options) -> texp.LARS:
    return texp.LARS(groups, backend=target.backend, **options)


OPTIONS = [
    {
        "momentum": momentum,
        "nesterov": nesterov,
        "dampening": dampening,
        "trust_clip": trust_clip,
        "always_adapt": always,
    }
    for momentum, nesterov, dampening in ((0.0, False, 0.0), (0.9, False, 0.0), (0.9, False, 0.3), (0.9, True, 0.0))
    for trust_clip, always in product((False, True), repeat=2)
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_as_the_paper_has_it(swift_target, options):
    """Over 200 steps in float64; sums of up to 2,100 squares round by 1e-13 at most, their roots by half of that."""
    options = {"lr": 0.5, "weight_decay": 0.01, "trust_coeff": 0.02, **options}
    ours, theirs = (
        Run(make, swift_target.device)
        for make in (lambda groups: lars(swift_target, groups, **options), lambda groups: Lars(groups, **options))
    )
    for t in range(200):
        ours.step(t)
        theirs.step(t)
    assert_agree(ours, theirs, 1e-12)


@pytest.mark.parametrize("options", OPTIONS[5::6], ids=str)
def test_on_every_backend(target, options):
    options = {"lr": 0.5, "weight_decay": 0.01, "trust_coeff": 0.02, **options}
    ours, theirs = (
        Run(make, target.device)
        for make in (lambda groups: lars(target, groups, **options), lambda groups: Lars(groups, **options))
    )
    for t in range(8):
        ours.step(t)
        theirs.step(t)
    assert_agree(ours, theirs, 1e-13)


@settings(max_examples=30)
@given(st.data())
def test_any_run(data):
    draw = data.draw
    nesterov = draw(st.booleans())
    options = {
        "lr": draw(st.floats(1e-3, 2.0)),
        "momentum": draw(st.floats(0.1, 0.95)),
        "weight_decay": draw(st.sampled_from([0.0, 1e-3, 0.1])),
        "dampening": 0.0 if nesterov else draw(st.floats(0, 0.9)),
        "nesterov": nesterov,
        "maximize": draw(st.booleans()),
        "trust_coeff": draw(st.floats(1e-4, 0.1)),
        "eps": draw(st.sampled_from([0.0, 1e-8, 1.0])),
        "trust_clip": draw(st.booleans()),
        "always_adapt": draw(st.booleans()),
    }
    limit = draw(st.sampled_from([None, 1.0, 1e3]))
    ours = Run(lambda groups: texp.LARS(groups, max_norm=limit, **options), "cpu")
    theirs = Run(lambda groups: Lars(groups, **options), "cpu")
    for t in range(draw(st.integers(1, 6))):
        ours.step(t)
        theirs.gradients(t)
        if limit is not None:
            norm = clip_grad_norm_(theirs.params, limit)
            assert ours.optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-13)
        theirs.optimizer.step()
    assert_agree(ours, theirs, 1e-11)


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_clipped_and_scaled_gradients(target, norm_type):
    """Norms are those of gradients that are unscaled and clipped; scales are powers of two, so to the bit."""
    options = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01, "max_norm": 0.5, "norm_type": norm_type}
    p, q = param(device=target.device), param(device=target.device)
    plain, scaled = lars(target, [q], **options), lars(target, [p], fused=True, **options)
    expected = param()
    reference = Lars([expected], lr=0.5, momentum=0.9, weight_decay=0.01)
    scaler = torch.amp.GradScaler(target.device, init_scale=2.0**10)
    for t in range(5):
        scaled.zero_grad()
        scaler.scale((p * p * math.cos(t)).sum()).backward()
        if t == 2:
            p.grad[0] = math.inf
            before = snapshot(scaled)
        scaler.step(scaled)
        scaler.update()
        if t == 2:
            assert scaled.step_was_skipped
            assert_unchanged(scaled, before)
            continue
        for x in (q, expected):
            x.grad = None
            (x * x * math.cos(t)).sum().backward()
        clip_grad_norm_([expected], 0.5, norm_type)
        plain.step()
        reference.step()
        assert same_bits(p, q)
        assert relative_error(p, expected) < 1e-14


def test_tensors_that_no_kernel_takes(general):
    """A sparse gradient, whose norm is that of its sum, and complex weights."""
    params = [nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.full((6,), 1 + 1j)), param()]
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    ours = texp.LARS(params, lr=0.1, backend=general.backend, always_adapt=True)
    theirs = Lars(copies, lr=0.1, always_adapt=True)
    params[0].grad = torch.sparse_coo_tensor([[1, 1]], [[1.0, 2.0], [3.0, 4.0]], (4, 2), check_invariants=True)
    params[1].grad = torch.full_like(params[1], 3 + 4j)
    params[2].grad = torch.ones_like(params[2])
    for p, q in zip(params, copies, strict=True):
        q.grad = p.grad.to_dense() if p.grad.is_sparse else p.grad.clone()
    ours.step()
    theirs.step()
    for p, q in zip(params, copies, strict=True):
        assert torch.allclose(p, q, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number of at least 0"),
        ({"lr": torch.ones(2)}, r"lr must be a number or a tensor of one element, got one of shape \(2,\)"),
        ({"momentum": -1.0}, "momentum must be a finite number of at least 0"),
        ({"trust_coeff": math.nan}, "trust_coeff must be a finite number of at least 0"),
        ({"eps": -1.0}, "eps must be a finite number of at least 0"),
        ({"nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
        ({"max_norm": -1.0}, "max_norm must be at least 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        texp.LARS([param()], **options)


def test_no_exponential_form(target):
    """Neither at first nor later; nothing is changed."""
    p = param(device=target.device)
    with pytest.raises(ValueError, match="LARS takes no scale_invariant group"):
        texp.LARS([{"params": [p], "scale_invariant": True}], backend=target.backend)
    optimizer = lars(target, [p], weight_decay=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups[0]["scale_invariant"] = True
    before = p.detach().clone()
    with pytest.raises(ValueError, match="LARS takes no group in exponential form"):
        optimizer.step()
    assert same_bits(p.detach(), before)


def test_a_run_goes_on_from_its_state(target):
    whole, first = (
        Run(lambda groups: lars(target, groups, momentum=0.9, weight_decay=0.1), target.device) for _ in "ab"
    )
    for t in range(4):
        whole.step(t)
        first.step(t)
    second = Run(lambda groups: lars(target, groups), target.device)
    with torch.no_grad():
        for p, q in zip(second.params, first.params, strict=True):
            p.copy_(q)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.generator.set_state(first.generator.get_state())
    for t in range(4, 7):
        whole.step(t)
        second.step(t)
    for p, q in zip(whole.params, second.params, strict=True):
        assert same_bits(p, q)


@pytest.mark.parametrize("backend", ["reference", None])
def test_options_of_another_optimizer(backend):
    """LARS keeps its own where SGD has saved none; SGD takes none of LARS, and no group that has them."""
    p, q = param(), param()
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    lars, sgd = (
        texp.LARS([p], trust_coeff=0.02, backend=backend, **options),
        texp.SGD([q], backend=backend, **options),
    )
    of_lars = lars.state_dict()
    lars.load_state_dict(sgd.state_dict())
    sgd.load_state_dict(of_lars)
    assert lars.param_groups[0]["trust_coeff"] == 0.02
    assert sgd.param_groups[0].keys() == torch.optim.SGD([param()]).param_groups[0].keys()
    with pytest.raises(ValueError, match="trust_coeff is an option of"):
        sgd.add_param_group({"params": [param()], "trust_coeff": 0.1, "eps": 0.0, "trust_clip": 0, "always_adapt": 0})
    expected = [param(), param()]
    peers = Lars([expected[0]], trust_coeff=0.02, **options), torch.optim.SGD([expected[1]], **options)
    for x in (p, q, *expected):
        x.grad = torch.ones_like(x)
    for optimizer in (lars, sgd, *peers):
        optimizer.step()
    for x, y in zip((p, q), expected, strict=True):
        assert relative_error(x, y) < 1e-14


def test_an_ordinary_group_that_holds_a_scale(target):
    """As folding leaves it: P = 1 and κ = 0."""
    p, q = param(device=target.device), param(device=target.device)
    optimizer, plain = (lars(target, [x], momentum=0.9, weight_decay=0.1) for x in (p, q))
    optimizer.param_groups[0].update(scale=1.0, scale_exponent=0, carried_decay=0.0)
    for _ in range(3):
        for x, of in ((p, optimizer), (q, plain)):
            x.grad = torch.full_like(x, 2.0)
            of.step()
    assert same_bits(p, q)

"""Ordinary groups of texp.SGD against torch.optim.SGD(foreach=False)."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from tests.conftest import relative_error, same_bits


@dataclass(frozen=True)
class Case:
    momentum: float = 0.9
    dampening: float = 0.0
    weight_decay: float = 0.01
    nesterov: bool = False
    maximize: bool = False
    first: bool = False  # without a momentum buffer

    lr = 0.1

    def arguments(self) -> dict:
        return {
            "lr": self.lr,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "maximize": self.maximize,
        }

    def same_operations(self, backend: str) -> bool:
        """In the reference, all but (1−τ)(g + λp), which is (1−τ)g + (1−τ)λp in a row. Kernels also add γb without
        rounding it first, and Triton may or may not round any product before it is added."""
        if backend == "triton":
            return False
        if self.momentum == 0 or self.first:
            return True
        return backend == "reference" and (self.dampening == 0 or self.weight_decay == 0)


CASES = [
    Case(*values)
    for values in itertools.product([0.0, 0.9], [0.0, 0.3], [0.0, 0.01], [False, True], [False, True], [False, True])
]


def step(optimizer, case: Case, p, g, b) -> tuple[torch.Tensor, torch.Tensor | None]:
    # Set in the group: torch.optim.SGD refuses Nesterov with dampening in its constructor only.
    optimizer.param_groups[0].update(dampening=case.dampening, nesterov=case.nesterov)
    p.grad = g.clone()
    if case.momentum != 0 and not case.first:
        optimizer.state[p]["momentum_buffer"] = b.clone()
    optimizer.step()
    assert same_bits(p.grad, g)
    return p.detach(), optimizer.state.get(p, {}).get("momentum_buffer")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_step(target, case, dtype):
    """From the same state. Where the operations are the same, so are the bits.

    Elsewhere each side rounds (1−τ)(|g| + λ|p|) at most 2.5 times by half an ulp and then adds the rest, γb rounded
    or not: buffers differ by at most 3.5 half-ulps on each side of what they are summed from. In p that counts with
    lr = 0.1, and the last addition rounds on both sides by half an ulp: within 2 ulp in all.
    """
    generator = torch.Generator().manual_seed(0)
    p, g, b = (torch.randn(10_007, generator=generator, dtype=torch.float64).to(dtype) for _ in "pgb")
    p, g, b = (x.to(target.device) for x in (p, g, b))
    theirs, ours = nn.Parameter(p.clone()), nn.Parameter(p.clone())
    expected = step(torch.optim.SGD([theirs], foreach=False, **case.arguments()), case, theirs, g, b)
    actual = step(target.sgd([ours], **case.arguments()), case, ours, g, b)
    if case.same_operations(target.backend):
        assert same_bits(actual[0], expected[0])
        assert (actual[1] is None) == (expected[1] is None) == (case.momentum == 0)
        assert actual[1] is None or same_bits(actual[1], expected[1])
        return
    eps = torch.finfo(dtype).eps
    entering = g.abs() + case.weight_decay * p.abs()
    buffer = case.momentum * b.abs() + (1 - case.dampening) * entering
    update = entering + case.momentum * buffer if case.nesterov else buffer
    assert ((actual[0] - expected[0]).abs() <= 2 * eps * (p.abs() + case.lr * update)).all()
    if case.momentum != 0:
        assert ((actual[1] - expected[1]).abs() <= 3.5 * eps * buffer).all()


LRS = {
    "constant": lambda t: 0.1,
    "step": lambda t: 0.1 * 0.1 ** (t // 100),
    "cosine": lambda t: 0.05 * (1 + math.cos(math.pi * t / 250)),
    "warm-up from 0": lambda t: 0.002 * min(t, 50),
}
MOMENTA = {"none": lambda t: 0.0, "fixed": lambda t: 0.9, "changing": lambda t: (0.9, 0.5, 0.0, 0.8)[t // 70]}

BLENDS = list(itertools.product(MOMENTA, [0.0, 0.3], [False, True]))


@pytest.mark.parametrize("lr", LRS)
@pytest.mark.parametrize(("momentum", "dampening", "nesterov"), BLENDS)
def test_250_steps(swift_target, momentum, dampening, nesterov, lr):
    """A network with nothing scale-invariant about it, some grads missing; rounding of 1e-16 a step is not
    amplified here, so 250 steps stay within 1e-12."""

    def train(make) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double().to(swift_target.device)
        optimizer = make(model.parameters(), lr=0.1, weight_decay=1e-3)
        optimizer.param_groups[0].update(dampening=dampening, nesterov=nesterov)
        generator = torch.Generator().manual_seed(1)
        for t in range(250):
            x = torch.randn(16, 6, generator=generator, dtype=torch.float64).to(swift_target.device)
            optimizer.zero_grad()
            mse_loss(model(x), x[:, :2] * x[:, 2:4]).backward()
            if t % 7 == 3 or t < 5:
                model[0].weight.grad = None
            optimizer.param_groups[0].update(lr=LRS[lr](t), momentum=MOMENTA[momentum](t))
            optimizer.step()
        return model

    for p, q in zip(train(swift_target.sgd).parameters(), train(torch.optim.SGD).parameters(), strict=True):
        assert relative_error(p, q) < 1e-12

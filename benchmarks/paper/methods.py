"""The methods that the experiments compare. Each is an optimizer and a list of learning rates, so that a run
can be taken up at any step."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from benchmarks.paper.setup import Setup
from texp import theory
from texp.theory import Hyperparameters, Scale


class Growth(NamedTuple):
    """By how much the weights of one step exceed those of the SGD run that it stands for."""

    log10_P: float  # noqa: N815
    alpha: float


NONE = Growth(0.0, 1.0)


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        label: for the figure.
        lrs: what the optimizer is given, one a step.
        weight_decay: what the optimizer is given.
        scale_invariant: texp.SGD in exponential form; otherwise torch.optim.SGD.
        growth: P and α of each step, where the LRs are an exponential schedule's; empty otherwise.
        corrections: {t: c}: before step t, c·p is added to the momentum buffer of every weight p.
        model: a name in models.MODELS.
    """

    label: str
    lrs: tuple[float, ...]
    weight_decay: float = 0.0
    scale_invariant: bool = False
    growth: tuple[Growth, ...] = ()
    corrections: dict[int, float] = field(default_factory=dict)
    model: str = "resnet"


def fixed(setup: Setup) -> tuple[float, ...]:
    """η of every step."""
    return (setup.lr,) * setup.steps


def step_decay(setup: Setup) -> tuple[float, ...]:
    """η of every step."""
    phases = (sum(t >= milestone for milestone in setup.milestones) for t in range(setup.steps))
    return tuple(setup.lr * setup.gamma**phase for phase in phases)


def cosine(setup: Setup) -> tuple[float, ...]:
    """η of every step, from η to 0 over the run."""
    return tuple(setup.lr * (1 + math.cos(math.pi * t / setup.steps)) / 2 for t in range(setup.steps))


def sgd(setup: Setup, lrs: tuple[float, ...], label: str) -> Method:
    """torch.optim.SGD with weight decay."""
    return Method(label, lrs, setup.weight_decay)


def texp_sgd(method: Method) -> Method:
    """texp.SGD in exponential form, told the same."""
    return replace(method, label="texp.SGD, exponential form", scale_invariant=True)


def translated(setup: Setup, lrs: Iterable[float], label: str) -> Method:
    """torch.optim.SGD without weight decay, with the paper's recursion for general schedules."""
    scale, growth, exact = Scale(), [], []
    for t, lr in enumerate(lrs):
        hyper = Hyperparameters(lr, setup.momentum, weight_decay=setup.weight_decay, scale_invariant=True)
        step = theory.advance(scale, hyper, first=t == 0)
        exact.append(10 ** theory.log10_lr(scale, hyper, first=t == 0))
        growth.append(Growth(scale.log10(), step.alpha))
        scale = step.scale
    return Method(label, tuple(exact), growth=tuple(growth))


def texp(
    setup: Setup,
    label: str,
    milestones: Iterable[int] | None = None,
    *,
    instant_decay: bool = True,
    taper: bool = True,
    corrected: bool = False,
) -> Method:
    """torch.optim.SGD without weight decay, with the schedule TEXP: `milestones` are the setup's unless given, and
    without any it is EXP.

    corrected: κ, the share of the weights that the momentum carries, jumps where TEXP's growth does. That of SGD does
        not, and starts at 0. In the buffer b = (v − κθ)/P the jump is made good, and the schedule becomes exact.
    """
    milestones = setup.milestones if milestones is None else tuple(milestones)
    decay, momentum = setup.weight_decay, setup.momentum
    switches = {"instant_decay": instant_decay, "taper": taper}
    phases = theory.texp_phases(setup.lr, decay, momentum, milestones, setup.gamma, **switches)
    lrs, growth, corrections = [], [], {}
    log10_P = kappa = 0.0
    for phase, end in zip(phases, [*milestones, setup.steps], strict=True):
        if corrected:
            equilibrium = (1 / phase.alpha - 1) / phase.lr
            corrections[phase.start] = (kappa - equilibrium) / 10 ** (2 * log10_P)
            kappa = equilibrium
        for t in range(phase.start, end):
            lrs.append(10 ** phase.log10_lr_at(t))
            growth.append(Growth(log10_P, phase.alpha))
            log10_P -= math.log10(phase.alpha)
    return Method(label, tuple(lrs), growth=tuple(growth), corrections=corrections)

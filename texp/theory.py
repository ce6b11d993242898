"""The paper in float64 and plain Python: Li & Arora, "An Exponential Learning Rate Schedule for
Deep Learning" (ICLR 2020).

Names and symbols, the same everywhere in this project:

    lr η    weight_decay λ    momentum γ    dampening τ        as in torch.optim.SGD
    alpha α                   what one step of decay leaves of the weights: θ ← αθ − …
    scale P                   the stored weights are Pθ; P grows by 1/α at every step
    kappa κ                   carried decay: the part κθ of the momentum that is not stored
    gamma                     the factor of an LR decay, as in torch's MultiStepLR (never γ)

Two facts about a loss with L(cθ) = L(θ) carry everything: ∇L is orthogonal to θ, and ∇L(cθ) = ∇L(θ)/c.

The first half of this file turns one step of SGD into a `Row` of ten scalars, for ordinary groups and for
scale-invariant ones by the same formula. The second half holds the paper's closed forms.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

ALPHA_MIN = 0.5  # a step hands at most half of the weights over to the scale, so that P at most doubles


class Row(NamedTuple):
    """One step for one element with weight p, gradient g and momentum buffer b:

    u = a_b·b + a_g·g + a_p·p
    d = c_u·u + c_g·g + c_p·p
    p ← s_p·p − e·d
    b ← r_u·u + r_d·d
    """

    a_b: float = 0.0
    a_g: float = 0.0
    a_p: float = 0.0
    c_u: float = 0.0
    c_g: float = 0.0
    c_p: float = 0.0
    s_p: float = 1.0
    e: float = 0.0
    r_u: float = 0.0
    r_d: float = 0.0


KEEP = Row(a_b=1.0, r_u=1.0)  # leaves p and b as they are


class Scale(NamedTuple):
    """How the stored p and b of a group relate to the θ and v that torch.optim.SGD would hold:
    p = Pθ and b = (v − κθ)/P.

    The paper's P is `P`·2^`exponent`: stored weights are kept divided by 2^exponent, which is exact, so that
    1 ≤ P < 2 and nothing leaves the range of a float however long the run.
    """

    P: float = 1.0
    exponent: int = 0
    kappa: float = 0.0

    def is_exponential(self) -> bool:
        """Whether p and b are anything but θ and v."""
        return (self.P, self.kappa) != (1.0, 0.0)

    def log10(self) -> float:
        """log10 of the paper's P."""
        return math.log10(self.P) + self.exponent * math.log10(2)


class Hyperparameters(NamedTuple):
    """What one group of torch.optim.SGD is told for one step, and whether it is scale-invariant."""

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    scale_invariant: bool = False

    def check(self) -> "Hyperparameters":
        """Returns itself. Raises ValueError for a number that is not finite, and for a momentum or weight decay
        below 0; a LR below 0 is let pass, as in torch: schedulers that end at 0 end a little below it."""
        check_non_negative(momentum=self.momentum, weight_decay=self.weight_decay)
        for name in ("lr", "dampening"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)}")
        return self


class Step(NamedTuple):
    """The rows of one group for one step, and its scale after it."""

    running: Row  # a tensor that has a momentum buffer
    first: Row  # a tensor's first step: PyTorch starts the buffer from the bare gradient, without dampening
    idle: Row  # a tensor whose grad is None while its group steps: θ and v stay as they are
    scale: Scale  # after the step
    alpha: float  # α of this step
    growth: float  # P after over P before, as stored

    def norm_stat(self, power: float) -> Row:
        """The row for a running statistic of a norm layer that scales with P^power."""
        # Powers 1 and 2, those of means and variances behind one layer, are exact products on every device.
        return Row(s_p={1: self.growth, 2: self.growth * self.growth}.get(power) or self.growth**power)


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients of that norm are multiplied by to have one of `max_norm` at most, as in
    torch.nn.utils.clip_grad_norm_; NaN where the norm is not finite.
    """
    return min(1.0, max_norm / (norm + 1e-6)) if norm < math.inf else math.nan


def advance(scale: Scale, hyper: Hyperparameters, *, first: bool = False, grad_scale: float = 1.0) -> Step:
    """One step of a group: its rows and its next scale.

    Args:
        scale: before the step. An ordinary group stays at Scale().
        hyper: of this step; all may change from step to step, lr may be 0.
        first: no tensor of the group has a momentum buffer yet.
        grad_scale: what the loss was multiplied by (AMP); the rows divide by it.

    Raises ValueError as `Hyperparameters.check`. The theorem's range is not needed.

    With ĝ = g + λθ, torch.optim.SGD computes v ← keep·v + enter·ĝ and θ ← θ − η(direct·ĝ + through·v), where

                      keep  enter  direct  through
        momentum 0    1     0      1       0        (a buffer left from an earlier momentum is kept)
        heavy ball    γ     1−τ    0       1
        Nesterov      γ     1−τ    1       γ
        first step    0     1                       (with momentum; direct and through as above)

    Put p = Pθ, b = (v − κθ)/P and the gradient at p, which is g/P, into that. The share κc of the momentum
    and μc of the update that lie along θ go into the scale, whatever exceeds the `_limits` stays as a_p and c_p.
    An ordinary group is one whose limits are 0. Inside the theorem's range, where α ≥ 1/2, a scale-invariant
    group has a_p = c_p = 0: no weight decay at all, only a growing learning rate. A first step
    with lr = 0 leaves κ at 0: torch.distributed.checkpoint takes one to make the buffers into which it then loads v.
    """
    hyper.check()
    lr, momentum, weight_decay = hyper.lr, hyper.momentum, hyper.weight_decay
    P, kappa = scale.P, scale.kappa
    heavy_ball = momentum != 0 and not hyper.nesterov
    keep, enter = (1.0, 0.0) if momentum == 0 else (momentum, 1 - hyper.dampening)
    direct, through = (0.0, 1.0) if heavy_ball else (1.0, momentum)

    kappa_limit, mu_limit = _limits(hyper)
    if first and lr == 0 and momentum != 0:
        kappa_limit = 0.0
    kappa_running = keep * kappa + enter * weight_decay
    kappa_first = kappa_running if momentum == 0 else weight_decay
    kappa_c = _clip(kappa_first if first else kappa_running, kappa_limit)
    mu = direct * weight_decay + through * kappa_c
    mu_c = _clip(mu, mu_limit)
    alpha = 1 - lr * mu_c

    P_after, k = _normalised(P / alpha)
    shrink = math.ldexp(1.0, -k)
    after = Scale(P_after, scale.exponent + k, kappa_c / alpha)

    sign = (-1.0 if hyper.maximize else 1.0) / grad_scale
    P2 = P * P
    running = Row(
        a_b=keep,
        a_g=enter * sign,
        a_p=(kappa_running - kappa_c) / P2,
        c_u=through,
        c_g=direct * sign,
        c_p=(mu - mu_c) / P2,
        s_p=shrink,
        e=P2 * lr / alpha * shrink,
        # Heavy ball has d = u, so that α·u + κc·η·d is u itself.
        r_u=(1.0 if heavy_ball else alpha) / shrink,
        r_d=(0.0 if heavy_ball else kappa_c * lr) / shrink,
    )
    first_row = running if momentum == 0 else running._replace(a_b=0.0, a_g=sign, a_p=(kappa_first - kappa_c) / P2)
    idle = Row(a_b=alpha, a_p=alpha * (kappa - after.kappa) / P2, s_p=shrink / alpha, r_u=1 / shrink)
    return Step(running, first_row, idle, after, alpha, shrink / alpha)


def fold_row(scale: Scale) -> Row:
    """The row that turns the stored p and b back into θ and v, after which the scale is Scale()."""
    return Row(a_b=scale.P, a_p=scale.kappa / scale.P, s_p=1 / scale.P, r_u=1.0)


def unfold_row(scale: Scale) -> Row:
    """The row that turns θ and v into the p and b that are stored at `scale`."""
    return Row(a_b=1.0, a_p=-scale.kappa, s_p=scale.P, r_u=1 / scale.P)


def log10_lr(scale: Scale, hyper: Hyperparameters, *, first: bool = False) -> float:
    """log10 of the paper's η̃_t = P_t·P_{t+1}·η_t for the step that would come next; −inf where lr is 0, nan where
    it is negative."""
    return _log10_lr(hyper.lr, scale, advance(scale, hyper, first=first).alpha)


def _log10_lr(lr: float, scale: Scale, alpha: float) -> float:
    return math.log10(lr) + 2 * scale.log10() - math.log10(alpha) if lr > 0 else -math.inf if lr == 0 else math.nan


def translate(lrs: Iterable[float], weight_decay: float, momentum: float = 0.0) -> list[float]:
    """The exponential schedule that equals SGD with heavy-ball momentum γ, weight decay λ and LRs `lrs`, η_t of every
    step in order; exactly, from an empty momentum buffer on (the paper's recursion for general schedules).

    Returns log10 of η̃_t, one float a step (η̃ itself leaves float64's range in long runs): plain SGD with
    these LRs, the same momentum and no weight decay visits the same functions.

    Raises ValueError for a negative or non-finite argument, and for an lr so large that the decay of its step
    would leave nothing of the weights (α ≤ 0): no exponential schedule equals that.
    """
    scale, log10_lrs = Scale(), []
    for t, lr in enumerate(lrs):
        check_non_negative(lr=lr, weight_decay=weight_decay, momentum=momentum)
        kappa = momentum * scale.kappa + weight_decay
        alpha = 1 - lr * kappa
        if alpha <= 0:
            raise ValueError(
                f"no exponential schedule exists for lr = {lr} at step {t} with weight_decay = {weight_decay} and "
                f"momentum = {momentum}: the decay of that step leaves nothing of the weights (α = {alpha:.6g})"
            )
        log10_lrs.append(_log10_lr(lr, scale, alpha))
        P, k = _normalised(scale.P / alpha)
        scale = Scale(P, scale.exponent + k, kappa / alpha)
    return log10_lrs


def _limits(hyper: Hyperparameters) -> tuple[float, float]:
    """The most of κ and of μ that one step hands over to the scale.

    Under constant hyperparameters κ rises to the equilibrium of the theorem, as long as there is one. At the end
    of its range, λη = (1 − √γ)² for heavy ball and ((1 − γ)/(1 + γ))² for Nesterov, κ and μ reach the values
    below (with α = √γ and 2γ/(1 + γ)). Beyond them κ would run away, out of all proportion to the momentum, and
    would not come back when the range is entered again; stopped there, it does.
    """
    momentum = hyper.momentum
    if not hyper.scale_invariant or momentum >= 1 or hyper.lr < 0:
        return 0.0, 0.0
    if hyper.lr == 0:
        return math.inf, math.inf
    if momentum == 0:
        kappa = mu = 1.0
    elif hyper.nesterov:
        kappa, mu = 2 * (1 - momentum) / ((1 + momentum) * (1 + momentum)), (1 - momentum) / (1 + momentum)
    else:
        kappa = mu = 1 - math.sqrt(momentum)
    return min(kappa, 1 - ALPHA_MIN) / hyper.lr, min(mu, 1 - ALPHA_MIN) / hyper.lr


def _clip(kappa: float, limit: float) -> float:
    return min(max(kappa, 0.0), limit)


def _normalised(P: float) -> tuple[float, int]:
    """P·2^−k and k, with 1 ≤ P·2^−k < 2; exact."""
    mantissa, exponent = math.frexp(P)
    return 2 * mantissa, exponent - 1


def alpha_star(lr: float, weight_decay: float, momentum: float = 0.0) -> float:
    """α* of the main theorem: the larger root of x² − (1 + γ − λη)x + γ = 0, towards which α settles under a
    constant LR. Without momentum it is 1 − λη.

    Raises ValueError for a negative or non-finite argument, momentum ≥ 1, and outside the theorem's range
    λη ≤ (1 − √γ)² (λη < 1 without momentum, where α* would be 0).
    """
    check_non_negative(lr=lr, weight_decay=weight_decay, momentum=momentum)
    if momentum >= 1:
        raise ValueError(f"momentum must be less than 1 for an equilibrium to exist, got {momentum}")
    decay = lr * weight_decay
    largest = (1 - math.sqrt(momentum)) ** 2
    if decay > largest or decay == 1:
        raise ValueError(
            f"lr·weight_decay = {lr}·{weight_decay} = {decay:.6g} is outside the theorem's range: with momentum = "
            f"{momentum} it must be {'at most (1 − √momentum)² = ' if momentum else 'less than '}{largest:.6g}"
        )
    discriminant = max((1 - momentum - decay) ** 2 - 4 * momentum * decay, 0.0)
    return (1 + momentum - decay + math.sqrt(discriminant)) / 2


class Phase(NamedTuple):
    """One phase of TEXP: the steps between two milestones."""

    start: int  # its first step
    lr: float  # η of the step decay in this phase
    alpha: float  # growth per step is alpha^−2
    instant: float  # the factor η_I/η_{I−1} of its first step; 1 in the first phase
    log10_lr: float  # log10 of η̃ at its first step

    def log10_lr_at(self, t: int) -> float:
        """log10 of η̃ at step t of the run, inside this phase."""
        return self.log10_lr - 2 * (t - self.start) * math.log10(self.alpha)


def texp_phases(
    lr: float,
    weight_decay: float,
    momentum: float,
    milestones: Sequence[int],
    gamma: float = 0.1,
    *,
    instant_decay: bool = True,
    taper: bool = True,
) -> list[Phase]:
    """The phases of TEXP (tapered exponential), the paper's counterpart of a step decay: inside phase I the LR
    is multiplied at each step by α*_I^−2, on the phase's first step by (η_I/η_{I−1})·α*_{I−1}^−1·α*_I^−1.

    Args:
        lr: η of the first phase, > 0.
        milestones: first steps of the later phases, ascending, in optimizer steps.
        gamma: η_I = lr·gamma^I.
        instant_decay: False leaves η_I/η_{I−1} out (the paper's "TEXP−−").
        taper: False keeps the growth of the first phase throughout ("instant decay only").

    Raises ValueError as `alpha_star`, and for milestones that are not ascending positive integers.
    """
    milestones = list(milestones)
    positive = all(math.isfinite(m) and m == int(m) and m > 0 for m in milestones)
    if not positive or sorted(set(milestones)) != milestones:
        raise ValueError(f"milestones must be ascending positive step numbers, got {milestones}")
    check_non_negative(lr=lr, gamma=gamma)
    if lr == 0 or gamma == 0:
        raise ValueError(f"lr and gamma must be greater than 0, got lr = {lr} and gamma = {gamma}")
    phases: list[Phase] = []
    for index, start in enumerate([0, *map(int, milestones)]):
        try:
            phase_lr = lr * gamma**index
        except OverflowError:
            phase_lr = math.inf
        if phase_lr in (0, math.inf):
            raise ValueError(f"lr·gamma^{index} = {lr}·{gamma}^{index} leaves the range of a float")
        alpha = alpha_star(phase_lr if taper else lr, weight_decay, momentum)
        instant, log10_lr = 1.0, math.log10(lr) - math.log10(alpha)
        if phases:
            last = phases[-1]
            instant = phase_lr / last.lr if instant_decay else 1.0
            log10_growth = -(2 * (start - last.start) - 1) * math.log10(last.alpha) - math.log10(alpha)
            log10_lr = last.log10_lr + math.log10(instant) + log10_growth
        phases.append(Phase(start, phase_lr, alpha, instant, log10_lr))
    return phases


def texp_lr(
    t: int,
    lr: float,
    weight_decay: float,
    momentum: float,
    milestones: Sequence[int],
    gamma: float = 0.1,
    *,
    instant_decay: bool = True,
    taper: bool = True,
) -> float:
    """η̃ of step t under TEXP; arguments and errors as for `texp_phases`.

    It matches step decay up to one momentum correction per new phase (`translate` has none to make).
    Raises OverflowError where η̃ leaves float64's range.
    """
    if t < 0:
        raise ValueError(f"t must be a step number from 0 on, got {t}")
    phases = texp_phases(lr, weight_decay, momentum, milestones, gamma, instant_decay=instant_decay, taper=taper)
    log10_lr = [phase for phase in phases if phase.start <= t][-1].log10_lr_at(t)
    try:
        return 10**log10_lr
    except OverflowError:
        raise OverflowError(
            f"the learning rate of step {t} is 10^{log10_lr:.1f}, beyond float64: texp.SGD with scale_invariant=True "
            "takes the same steps with weights and learning rate in range"
        ) from None


def exp_lr(t: int, lr: float, weight_decay: float, momentum: float = 0.0) -> float:
    """η̃ of step t for a constant LR: η·α*^(−2t−1), the main theorem (without momentum, the warm-up theorem).

    It equals SGD whose momentum buffer starts at its equilibrium share of θ; from an empty buffer, see
    `translate`. Raises ValueError as `alpha_star`, OverflowError where η̃ leaves float64's range.
    """
    return texp_lr(t, lr, weight_decay, momentum, ())


def check_non_negative(**values: float) -> None:
    """Raises ValueError, with the name, for a value that is negative, infinite or not a number."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0, got {value}")

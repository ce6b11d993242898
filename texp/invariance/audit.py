"""Finds which parameters of a model are scale-invariant together, from gradients alone, for any nn.Module.

A set S of parameters is invariant when f(cθ_S, θ_rest) = f(θ_S, θ_rest) for every c > 0. By Euler that is so
exactly when Σ_{i∈S} ⟨p_i, ∂f/∂p_i⟩ = 0 everywhere, so a row M[i] = ⟨p_i, ∂(r·f(x))/∂p_i⟩ for random x and r, at a
random point, is an equation Σ M[i]·d_i = 0 for its indicator d. A norm with running statistics adds equations with
one unknown more, the power D of P with which its input grows: a statistic m (mean: k = 1, variance: k = 2) needs
Σ ⟨p_i, ∂m/∂p_i⟩·d_i = k·D·m; otherwise evaluation would not be that of the SGD run. Rows are collected until
their rank has settled; the largest S is then a small integer programme, and is confirmed by really scaling it.

Rules that look at one layer at a time ("a convolution before a norm") are both too weak and wrong: in a
pre-activation ResNet nothing that writes to the residual stream is invariant, but all of it together is.
"""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from texp.invariance.equations import FREE, AuditError, Bounds, Equations, largest, parts, scipy_optimize
from texp.invariance.probe import Probe, no_trace, untouched
from texp.step.norm_stats import NormStat

PATIENCE = 8  # the rank has settled when this many inputs have not increased it
FACTORS = (2.0, 0.5, 2.0**4, 2.0**10, 2.0**20)  # large enough to reach activations that clip
LARGE_EPS = 0.01  # relative change of the output, when weights are doubled, above which to warn
TRIES = 4  # attempts to solve the equations and confirm the set, each with more rows

PINNED = "moves the output, whatever is scaled with it"
OPPOSED = "only while another shrinks"
NEEDS_HELD = "only with some that no_decay holds out"
SMALLER = "only at the cost of a larger set"
HELD = "held out by no_decay"
NO_EFFECT = "no effect on the output"
UNREACHED = "reached by no input that was tried"
FOLLOWS = "no effect, no decay: scaled like the running statistics"


@dataclasses.dataclass(frozen=True)
class Audit:
    """What `audit` found. Names are those of `model.named_parameters()` and `named_buffers()`."""

    invariant: list[str]  # S, invariant as a whole
    sets: list[list[str]]  # S taken apart: each is invariant by itself
    rest: list[str]  # trainable, but not in S
    frozen: list[str]  # requires_grad is False: never scaled
    without_effect: list[str]  # trainable, in S or not: the output does not depend on them
    unreached: list[str]  # of these, those without any gradient: no input that was tried gets there
    reasons: dict[str, str]  # why not, for each of `rest`
    sizes: dict[str, int]  # numbers in each parameter
    modules: dict[str, str]  # the class of the module that holds it
    norm_stats: list[tuple[str, float]]  # what must grow with S, and the power of P: buffers, parameters that FOLLOW
    rows: int  # equations collected
    rank: int  # of these rows
    gap: float  # the smallest singular value that counted over the largest that did not
    deviation: float  # largest relative change of the output when S is scaled by FACTORS; 0 in exact arithmetic
    eps_deviation: float  # by 2, at the model's own weights, with its own eps: what eps spoils between P = 1 and 2

    @property
    def fraction(self) -> float:
        """The share of the trainable numbers that is in S, from 0 to 1."""
        return sum(self.sizes[n] for n in self.invariant) / sum(self.sizes[n] for n in self.invariant + self.rest)

    def __str__(self) -> str:
        scaled, left = (sum(self.sizes[n] for n in names) for names in (self.invariant, self.rest))
        total = scaled + left
        lines = [
            f"scale-invariant together: {len(self.invariant)} of {len(self.invariant + self.rest)} trainable "
            f"parameters, {scaled:,} of {total:,} numbers ({self.fraction:.2%})",
            f"parts that are so alone: {len(self.sets)}, the largest of {max(map(len, self.sets), default=0)} "
            f"parameters; running statistics that grow with them: {len(self.norm_stats)}",
        ]
        if self.rest:
            width = max(8, *map(len, self.rest))
            kind = max(6, *(len(self.modules[n]) for n in self.rest))
            lines += ["", f"{'left out':{width}}  {'module':{kind}}  {'numbers':>13}  {'share':>7}  why"]
            for n in sorted(self.rest, key=lambda n: -self.sizes[n]):
                size, share = self.sizes[n], self.sizes[n] / total
                lines.append(f"{n:{width}}  {self.modules[n]:{kind}}  {size:>13,}  {share:>7.2%}  {self.reasons[n]}")
            lines.append("")
        if self.frozen:
            lines.append(f"frozen, never scaled: {', '.join(self.frozen)}")
        if unseen := [n for n in self.without_effect if n in self.invariant]:
            lines.append(f"scaled, but seen by running statistics alone: {', '.join(unseen)}")
        if self.unreached:
            lines.append(f"{UNREACHED} (if others do, this may be wrong): {', '.join(self.unreached)}")
        lines += [
            f"rank {self.rank} of {self.rows} rows, singular gap {self.gap:.1e}",
            f"scaled by up to {FACTORS[-1]:.0e}, the output moves by {self.deviation:.1e} (relative); by 2, with the "
            f"model's own weights and eps, by {self.eps_deviation:.1e}",
        ]
        return "\n".join(lines)


def audit(
    model: nn.Module,
    *example_inputs: Any,
    forward: Callable[..., Any] | None = None,
    hold: Callable[[str, nn.Parameter], bool] | None = None,
    seed: int = 0,
    max_rows: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float64,
    progress: Callable[[int, int, int], None] | None = None,
) -> Audit:
    """Finds the largest set of parameters of `model` that is scale-invariant as a whole.

    Args:
        model: in any mode, on any device; a deep copy is audited, in train mode, at a random point, without dropout
            or stochastic depth, with eps ≈ 0 in its norms.
        example_inputs: arguments of its forward: tensors, or lists, tuples and dicts of them. Others like them are
            drawn: floats with the same mean and deviation, integers in the same range. A batch of 4 is large
            enough; a BatchNorm must see at least 3 values per channel.
        forward: (model, *inputs) → all that the loss depends on, a tensor or a tuple, list, dict or dataclass of
            tensors. Default: model(*inputs).
        hold: (name, parameter) → whether it must not be scaled, as it has no weight decay. Default: none of the
            trainable ones.
        seed: random seed; determines the result.
        max_rows: maximum number of rows. Default: as many as can be needed.
        device, dtype: of the copy; defaults: the model's device, float64. float32 is faster, but deep models need
            float64 to tell small effects from rounding; an AuditError says so.
        progress: called with (rows, rank, max_rows) from time to time.

    Costs one forward and two backward passes for each pair of rows; there are about as many rows as parameters
    and norms, at most. Needs scipy. The model, its buffers and grads, and the global random states are left as they
    are; hooks of the model run on the copy too.

    Raises AuditError, with the numbers, where no clear answer can be given: the rank has not settled, the singular
    values leave no gap, or S fails when it is really scaled. Raises ValueError for a model without trainable
    parameters, with complex or uninitialised ones or such as share memory; for outputs that are not finite, hold
    something unknown or do not depend on parameters; for a forward that uses the model itself instead of the copy;
    and for buffers that grow with the weights but are no running statistics known here.
    """
    scipy_optimize()  # an ImportError before the work rather than after it
    device = torch.device(next((p.device for p in model.parameters()), "cpu") if device is None else device)
    if dtype not in (torch.float64, torch.float32):
        raise ValueError(f"dtype must be torch.float64 or torch.float32, got {dtype}")
    with no_trace(device, dtype), untouched(model):
        probe = Probe(model, example_inputs, forward, seed, device, dtype)
        if not probe.params:
            raise ValueError("the model has no trainable parameters")
        equations = Equations(len(probe.params), len(probe.norms), dtype)
        for attempt in itertools.count(1):
            _collect(equations, probe, max_rows, progress)
            try:
                return _solved(model, probe, equations, hold or (lambda name, p: False))
            except AuditError as error:
                # More rows may help, for example with a branch that few inputs reach.
                if attempt == TRIES or (max_rows is not None and len(equations.rows) >= max_rows):
                    raise AuditError(f"{error}{_seldom(probe, equations)}") from error
                if isinstance(error, UnconfirmedError):
                    # Activations that clip, as ReLU6, look invariant where they do not clip: go on where they do.
                    probe.rescale(error.powers, error.c)


def param_groups(
    model: nn.Module,
    *example_inputs: Any,
    forward: Callable[..., Any] | None = None,
    no_decay: str | Callable[[str, nn.Parameter], bool] | None = None,
    seed: int = 0,
    max_rows: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float64,
    progress: Callable[[int, int, int], None] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Groups of `model`'s parameters for texp.SGD: the scale-invariant set with its `norm_stats`, the rest, and
    those without decay; the functions visited are those of torch.optim.SGD with the same weight decays.

    Args:
        no_decay: which parameters have weight_decay 0: "bias_and_norm" (those with one dimension, and biases, as
            in timm), or (name, parameter) → bool. They are not scaled, and the set is the largest one without
            them. Default: none.
        options: lr, momentum, weight_decay, … of all groups.
        Others as for `audit`, which also says what is raised.

    The model may be moved and converted afterwards, since `norm_stats` (texp.NormStat) name its modules; make the
    groups again where modules have been replaced, or when a run is resumed: they are not in state dicts.

    A bias without decay that nothing but a BatchNorm sees (as that of a convolution before it) gets no gradient and
    no group; its value stays what it is, in units of P, by standing among the `norm_stats`. Where nothing is
    scale-invariant, there is no such group, and a warning says why; others tell where eps is so large that it spoils
    the equality, and where no input that was tried reaches some parameters.
    """
    if isinstance(no_decay, str):
        if no_decay != "bias_and_norm":
            raise ValueError(f'no_decay must be "bias_and_norm" or (name, parameter) -> bool, got {no_decay!r}')
        no_decay = bias_or_norm
    found = audit(
        model, *example_inputs, forward=forward, hold=no_decay, seed=seed, max_rows=max_rows, device=device,
        dtype=dtype, progress=progress,
    )  # fmt: skip
    for warning in _warnings(found):
        warnings.warn(warning, stacklevel=2)
    # Named by their modules, they are found wherever the model moves.
    paths = [(*name.rpartition(".")[::2], name, power) for name, power in found.norm_stats]
    stats = [NormStat(model.get_submodule(path), last, power=power, name=name) for path, last, name, power in paths]
    placed = {name for name, _ in found.norm_stats}
    scaled, decayed, still = [], [], []
    for name, p in model.named_parameters():
        if name in found.invariant:
            scaled.append(p)
        elif name not in placed:
            (still if no_decay is not None and no_decay(name, p) else decayed).append(p)
    groups = [
        {"params": scaled, "scale_invariant": True, "norm_stats": stats},
        {"params": decayed, "scale_invariant": False},
        {"params": still, "scale_invariant": False, "weight_decay": 0.0},
    ]
    return [{**options, **group} for group in groups if group["params"]]


def bias_or_norm(name: str, parameter: nn.Parameter) -> bool:
    """What timm keeps out of weight decay: parameters with at most one dimension, and biases."""
    return parameter.dim() <= 1 or name.endswith(".bias") or name == "bias"


def _warnings(found: Audit) -> Iterator[str]:
    """What training with these groups may suffer from."""
    if not found.invariant:
        why = {}
        for name in sorted(found.rest, key=lambda name: -found.sizes[name]):
            why.setdefault(found.reasons[name], []).append(name)
        reasons = "; ".join(f"{len(names)} parameters ({names[0]}, …) {reason}" for reason, names in why.items())
        yield f"no parameters are scale-invariant, all groups are ordinary: {reasons}"
    elif found.unreached:
        yield (
            f"no input that was tried reaches {len(found.unreached)} parameters ({found.unreached[0]}, …). If others "
            "do, as with experts, what is scale-invariant may not be so for them: give an example large enough to "
            "reach all parameters, and requires_grad = False to those that are never used"
        )
    if found.eps_deviation > LARGE_EPS:
        yield (
            f"the eps of the model's norms is large: it moves outputs by {found.eps_deviation:.2g} (relative) when "
            "the scale-invariant weights are doubled, so that training will differ from that of torch.optim.SGD"
        )


def _seldom(probe: Probe, equations: Equations) -> str:
    """Advice for parameters that only some of the inputs reach."""
    fewest, name = min((n, name) for n, name in zip(equations.reached(), probe.params, strict=True) if n)
    advice = f"rows see {name}: a larger example would tell more, if it reaches it"
    return f". Only {fewest} of {len(equations.rows)} {advice}" if fewest < PATIENCE else ""


class UnconfirmedError(AuditError):
    """A set solves the equations, but the output moves when it is scaled by c."""

    def __init__(self, powers: dict[str, float], c: float, moved: float, tol: float) -> None:
        super().__init__(
            f"a set of {len(powers)} parameters solves the equations, but when it is scaled by {c:g} the output "
            f"moves by {moved:.2e} (relative), more than {tol:.1e}"
        )
        self.powers, self.c = powers, c


def _solved(model: nn.Module, probe: Probe, equations: Equations, hold) -> Audit:
    """Solves the equations and confirms the solution."""
    names, norms = list(probe.params), list(probe.norms.values())
    effect, seen = equations.effects()
    reached = equations.reached()
    if not effect.any():
        raise ValueError("the output depends on none of the trainable parameters")
    params = dict(model.named_parameters())
    held = torch.tensor([bool(hold(name, params[name])) for name in names])
    # What only running statistics see has no gradient. Without decay it never moves and may follow any power.
    follows = held & seen & ~effect
    bounds = [FREE if f else (0, int(s)) for f, s in zip(follows, (effect | seen) & ~held, strict=True)]
    sizes = [0 if f else params[name].numel() for name, f in zip(names, follows, strict=True)]
    reduced, gap = equations.reduced()
    values = largest(reduced, sizes, bounds)
    chosen = [v > 0.5 and not f for v, f in zip(values, follows, strict=False)]
    invariant = [name for name, c in zip(names, chosen, strict=True) if c]
    following = {name: _snap(v) for name, v, f in zip(names, values, follows, strict=False) if f and _snap(v) != 0}
    powers = dict.fromkeys(invariant, 1.0) | following
    deviation, growth = _confirm(probe, powers, dict(zip(norms, values[len(names) :], strict=True)), equations.tol)
    probe.as_it_was(model)
    eps_deviation = probe.scaled(powers, 2.0).output if invariant else 0.0

    reasons = {
        name: FOLLOWS if name in following
        else UNREACHED if not reached[i]
        else HELD if held[i]
        else NO_EFFECT if not (effect[i] or seen[i])
        else _why_not(i, reduced, bounds)
        for i, name in enumerate(names) if name not in invariant
    }  # fmt: skip
    return Audit(
        invariant=invariant,
        sets=[[names[i] for i in part] for part in parts(reduced, chosen, follows)],
        rest=[name for name in names if name not in invariant],
        frozen=[name for name, p in params.items() if not p.requires_grad],
        without_effect=[name for name, e in zip(names, effect, strict=True) if not e],
        unreached=[name for name, r in zip(names, reached, strict=True) if not r],
        reasons=reasons,
        sizes={name: p.numel() for name, p in params.items()},
        modules={name: type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in params},
        norm_stats=[*growth.items(), *following.items()],
        rows=len(equations.rows),
        rank=len(reduced),
        gap=gap,
        deviation=deviation,
        eps_deviation=eps_deviation,
    )


def _collect(equations: Equations, probe: Probe, max_rows: int | None, progress) -> None:
    """Adds rows until their rank has settled; raises AuditError if it has not after max_rows."""
    start, rank = len(equations.rows), 0
    limit = start + 2 * (equations.n + equations.K + 2 * PATIENCE) if max_rows is None else max_rows
    patience = PATIENCE * (2 if equations.K else 1)  # in rows: an input gives a second one if there are statistics
    while len(equations.rows) < limit:
        equations.rows += probe.rows()
        done = len(equations.rows)
        if done % (patience // 2) == 0:
            rank = equations.rank()
            if progress is not None:
                progress(done, rank, limit)
            if done - start > patience and rank == equations.rank(done - patience):
                return
    raise AuditError(f"the rank of the equations has not settled: it is {rank} after max_rows = {limit} rows")


def _why_not(i: int, reduced: torch.Tensor, bounds: list[Bounds]) -> str:
    """Why parameter i is not in the largest set, though it could be."""
    if any(row[i] != 0 and row.count_nonzero() == 1 for row in reduced):
        return PINNED
    alone = [int(j == i) for j in range(len(bounds))]
    if largest(reduced, alone, [b if b == FREE else (0, 1) for b in bounds], whole=False)[i] < 1e-6:
        return OPPOSED
    return NEEDS_HELD if largest(reduced, alone, bounds, whole=False)[i] < 1e-6 else SMALLER


def _confirm(
    probe: Probe, powers: dict[str, float], degrees: dict[str, float], tol: float
) -> tuple[float, dict[str, float]]:
    """Scales the set by FACTORS, each time at another point. Returns the largest relative change of the output, and
    the power of P of every running statistic that changes; raises AuditError where these are not what they must be.
    """
    if not powers:
        return 0.0, {}
    changes = []
    for c in FACTORS if probe.dtype == torch.float64 else FACTORS[:-1]:  # variances would leave float32
        probe.move()
        changes.append(probe.scaled(powers, c))
        if not changes[-1].output <= tol:
            raise UnconfirmedError(powers, c, changes[-1].output, tol)
    growth = {}
    for name, power in changes[0].powers.items():
        norm, _, kind = name.rpartition(".")
        expected = (2 if kind == "running_var" else 1) * degrees[norm] if norm in degrees else power
        measured = [change.powers[name] for change in changes if not math.isnan(change.powers[name])]
        if not all(abs(p - _snap(expected)) <= 1e3 * tol for p in measured):
            raise AuditError(
                f"{name} does not grow as a power of the scale: {expected:.6f} was expected, "
                f"{', '.join(f'{p:.6f}' for p in measured)} measured"
            )
        if measured and _snap(expected) != 0:
            growth[name] = _snap(expected)
    return max(change.output for change in changes), growth


def _snap(power: float) -> float:
    """The nearest multiple of one half."""
    return round(2 * power) / 2 if math.isfinite(power) else power

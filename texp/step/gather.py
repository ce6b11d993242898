"""A step in Python: gather which tensors it changes, reduce their gradients if these are clipped, advance the scale
and the rows of each group, apply the rows. csrc/host does the same for the tensors that its kernels can take, and
leaves the others to texp.step.fallback, to which all are left here.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from texp import theory
from texp.backends.reference import Entry
from texp.step import buffers, checks, groups
from texp.step.clip import Clip
from texp.step.fallback import Fallback
from texp.step.norm_stats import Found
from texp.theory import Hyperparameters, Step


class GroupUpdate(NamedTuple):
    """What one step changes in one group."""

    index: int
    group: dict[str, Any]
    hyper: Hyperparameters
    first: bool  # no tensor of it has a momentum buffer yet
    tensors: list[tuple[str | float, Entry]]  # parameters by their row's name in theory.Step, norm_stats by power

    def finish(self, step: Step) -> None:
        """Stores what the group needs for its next step."""
        if groups.is_exponential(self.group):
            groups.set_scale(self.group, step.scale)
            if not self.group["params"] and self.hyper.momentum != 0:
                self.group["started"] = True
            if "swa_lr" in self.group:
                groups.warn_of_averaging()


def step(
    param_groups: list[dict[str, Any]],
    stats: Found,
    state: dict[Tensor, Any],
    grad_scale: float,
    momentum_dtype: torch.dtype | None,
    clip: Clip,
) -> float | None:
    """One step of all groups in plain torch; modifies parameters, momentum buffers, norm_stats and scales.

    Returns the norm of the gradients if they are clipped. Raises before anything is changed. Changes nothing either
    where `clip` refuses the norm.
    """
    updates = gather(param_groups, stats, state)
    norm = None
    if clip.limit is not None:
        entries = ((groups.scale_of(update.group).P, entry) for update in updates for _, entry in update.tensors)
        norm = clip.norm((P, entry.grad) for P, entry in entries if entry.grad is not None) / grad_scale
        if clip.refuses(norm):
            return norm
        grad_scale *= clip.divisor(norm)
    steps = [advance(update, grad_scale) for update in updates]
    fallback = Fallback(None, param_groups, state, momentum_dtype)
    for update, step in zip(updates, steps, strict=True):
        for kind, entry in update.tensors:
            row = getattr(step, kind) if isinstance(kind, str) else step.norm_stat(kind)
            fallback.check([(update.index, None, row, *entry, kind == "first")])
    fallback.do()
    for update, step in zip(updates, steps, strict=True):
        update.finish(step)
    return norm


def gather(param_groups: list[dict[str, Any]], stats: Found, state: dict[Tensor, Any]) -> list[GroupUpdate]:
    """What a step changes in the groups that take part in it."""
    updates = []
    for index, group in enumerate(param_groups):
        if not groups.steps(group):
            continue
        checks.refuse_capture(index, group)
        groups.check_step(index, group)
        hyper = groups.hyperparameters(group)
        uses_bufs = hyper.momentum != 0 or groups.is_exponential(group)  # otherwise they are left alone
        tensors = []
        for p in group["params"]:
            buf = buffers.buf_of(state, p) if uses_bufs else None
            kind = "idle" if p.grad is None else "first" if buf is None and hyper.momentum != 0 else "running"
            tensors.append((kind, Entry(p, p.grad, buf)))
        first = groups.is_first(group, [entry.buf for _, entry in tensors])
        tensors += [(float(power), Entry(stat)) for stat, power in stats[index]]
        updates.append(GroupUpdate(index, group, hyper, first, tensors))
    return updates


def advance(update: GroupUpdate, grad_scale: float) -> Step:
    """The rows of a group and its next scale, by theory.advance."""
    try:
        return theory.advance(groups.scale_of(update.group), update.hyper, first=update.first, grad_scale=grad_scale)
    except ValueError as error:
        raise ValueError(f"parameter group {update.index}: {error}") from None

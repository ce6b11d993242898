"""A step in Python: gather which tensors it changes, advance the scale and the rows of each group, apply the rows.
csrc/host does the same for the tensors that its kernels can take, and leaves the others to texp.step.fallback.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from texp import theory
from texp.backends import reference
from texp.backends.reference import Entry
from texp.step import buffers, checks, groups
from texp.step.norm_stats import Found
from texp.theory import KEEP, Hyperparameters, Row, Step


class GroupUpdate(NamedTuple):
    """What one step changes in one group."""

    index: int
    group: dict[str, Any]
    hyper: Hyperparameters
    first: bool  # no tensor of it has a momentum buffer yet
    work: dict[str | float, list[Entry]]  # parameters by the name of their row in theory.Step, norm_stats by power
    new_bufs: list[tuple[Tensor, Tensor]]  # by parameter

    def finish(self, step: Step, state: dict[Tensor, Any]) -> None:
        """Stores what the group needs for its next step."""
        for param, buf in self.new_bufs:
            state[param]["momentum_buffer"] = buf
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
) -> None:
    """One step of all groups in plain torch; modifies parameters, momentum buffers, norm_stats and scales.

    Raises before anything is changed.
    """
    updates = gather(param_groups, stats, state, momentum_dtype)
    steps = [advance(update, grad_scale) for update in updates]
    for update, step in zip(updates, steps, strict=True):
        for kind, entries in update.work.items():
            if (row := _row_of(step, kind)) not in (KEEP, Row()):
                reference.apply(row, entries, foreach=update.group["foreach"])
        update.finish(step, state)


def gather(
    param_groups: list[dict[str, Any]], stats: Found, state: dict[Tensor, Any], momentum_dtype: torch.dtype | None
) -> list[GroupUpdate]:
    """What a step changes in the groups that take part in it; raises for tensors that cannot be stepped."""
    return [
        _of_group(index, group, stats[index], state, momentum_dtype)
        for index, group in enumerate(param_groups)
        if groups.steps(group)
    ]


def _of_group(
    index: int,
    group: dict[str, Any],
    stats: list[tuple[Tensor, float]],
    state: dict[Tensor, Any],
    momentum_dtype: torch.dtype | None,
) -> GroupUpdate:
    checks.refuse_capture(index, group)
    groups.check_step(index, group)
    hyper = groups.hyperparameters(group)
    entries = [Entry(p, p.grad) for p in group["params"]]
    if hyper.momentum != 0 or groups.is_exponential(group):  # otherwise buffers are left alone
        entries = [entry._replace(buf=buffers.buf_of(state, entry.param)) for entry in entries]
    first = groups.is_first(group, [entry.buf for entry in entries])
    update = GroupUpdate(index, group, hyper, first, {}, [])
    for entry in entries:
        checks.check_fused(group, entry)
        checks.check_tensors(index, entry)
        if entry.grad is None:
            kind = "idle"
        elif entry.buf is None and hyper.momentum != 0:
            kind = "first"
            entry = buffers.with_buf(entry, momentum_dtype)
            update.new_bufs.append((entry.param, entry.buf))
        else:
            kind = "running"
        if entry.buf is not None and kind != "first":
            entry = buffers.widened(entry, momentum_dtype, update.new_bufs)
        update.work.setdefault(kind, []).append(entry)
    for stat, power in stats:
        update.work.setdefault(float(power), []).append(Entry(stat))
    return update


def advance(update: GroupUpdate, grad_scale: float) -> Step:
    """The rows of a group and its next scale, by theory.advance; raises for rows that its tensors cannot take."""
    scale, hyper, first, index = groups.scale_of(update.group), update.hyper, update.first, update.index
    try:
        step = theory.advance(scale, hyper, first=first, grad_scale=grad_scale)
    except ValueError as error:
        raise ValueError(f"parameter group {index}: {error}") from None
    for kind, entries in update.work.items():
        for entry in entries:
            checks.check_row(index, _row_of(step, kind), entry)
            if checks.is_sparse(entry):
                checks.check_sparse(index, hyper, _row_of(step, kind))
    return step


def _row_of(step: Step, kind: str | float) -> Row:
    """The row for a key of `GroupUpdate.work`."""
    return getattr(step, kind) if isinstance(kind, str) else step.norm_stat(kind)

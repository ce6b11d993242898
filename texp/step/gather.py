"""What a step changes, gathered in Python: which row applies to which tensor. csrc/host/gather.h does it in C++,
for the tensors that its kernels can take, and leaves the others to texp.step.fallback.
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
    """What one step does to one group."""

    index: int
    group: dict[str, Any]
    step: Step
    first: bool  # no tensor of it has a momentum buffer yet
    work: dict[str | float, list[Entry]]  # parameters by the name of their row in `step`, norm_stats by their power
    new_bufs: list[tuple[Tensor, Tensor]]

    def finish(self, state: dict[Tensor, Any]) -> None:
        """Keeps what the group needs for its next step."""
        for param, buf in self.new_bufs:
            state[param]["momentum_buffer"] = buf
        if groups.is_exponential(self.group):
            groups.set_scale(self.group, self.step.scale)
            if not self.group["params"] and groups.number("momentum", self.group["momentum"]) != 0:
                self.group["started"] = True
            if "swa_lr" in self.group:
                groups.warn_of_averaging()


def _row_of(step: Step, kind: str | float) -> Row:
    """The row of a kind of `GroupUpdate.work`."""
    return getattr(step, kind) if isinstance(kind, str) else step.norm_stat(kind)


def _changes_nothing(row: Row) -> bool:
    return row in (KEEP, Row())


def step(
    param_groups: list[dict[str, Any]],
    stats: Found,
    state: dict[Tensor, Any],
    grad_scale: float,
    momentum_dtype: torch.dtype | None,
) -> None:
    """One step of all groups in plain torch; modifies parameters, momentum buffers, norm_stats and scales.

    All of it is gathered before any of it is done: an error leaves everything as it was.
    """
    for update in gather(param_groups, stats, state, grad_scale, momentum_dtype):
        for kind, entries in update.work.items():
            if not _changes_nothing(row := _row_of(update.step, kind)):
                reference.apply(row, entries, foreach=update.group["foreach"])
        update.finish(state)


def gather(
    param_groups: list[dict[str, Any]],
    stats: Found,
    state: dict[Tensor, Any],
    grad_scale: float,
    momentum_dtype: torch.dtype | None,
) -> list[GroupUpdate]:
    """What a step does to the groups that take part in it; raises where one of them cannot, and changes nothing."""
    return [
        _of_group(index, group, stats[index], state, grad_scale, momentum_dtype)
        for index, group in enumerate(param_groups)
        if groups.steps(group)
    ]


def _of_group(
    index: int,
    group: dict[str, Any],
    stats: list[tuple[Tensor, float]],
    state: dict[Tensor, Any],
    grad_scale: float,
    momentum_dtype: torch.dtype | None,
) -> GroupUpdate:
    checks.refuse_capture(index, group)
    entries = [Entry(p, p.grad) for p in group["params"]]
    if groups.number("momentum", group["momentum"]) != 0 or groups.is_exponential(group):  # else they are not touched
        entries = [entry._replace(buf=buffers.buf_of(state, entry.param)) for entry in entries]
    first = groups.is_first(group, [entry.buf for entry in entries])
    hyper, step = _advance(index, group, first, grad_scale)
    update = GroupUpdate(index, group, step, first, {}, [])
    for entry in entries:
        if entry.grad is None:
            kind = "idle"
        elif entry.buf is None and hyper.momentum != 0:
            kind = "first"
            entry = buffers.with_buf(entry, momentum_dtype)
            update.new_bufs.append((entry.param, entry.buf))
        else:
            kind = "running"
        checks.check_fused(group, entry)
        checks.check_tensors(index, _row_of(step, kind), entry)
        checks.check_sparse(index, hyper, _row_of(step, kind), entry)
        if entry.buf is not None and kind != "first":
            entry = buffers.widened(entry, momentum_dtype, update.new_bufs)
        update.work.setdefault(kind, []).append(entry)
    for stat, power in stats:
        update.work.setdefault(float(power), []).append(Entry(stat))
    return update


def _advance(index: int, group: dict[str, Any], first: bool, grad_scale: float) -> tuple[Hyperparameters, Step]:
    """What theory.advance says of a group, whose number stands in the errors."""
    groups.check_step(index, group)
    hyper = groups.hyperparameters(group)
    try:
        return hyper, theory.advance(groups.scale_of(group), hyper, first=first, grad_scale=grad_scale)
    except ValueError as error:
        raise ValueError(f"parameter group {index}: {error}") from None

"""The host side of a step in Python: which row applies to which tensor. csrc/bindings.cpp does the same in C++,
for the tensors that its kernel can take, and leaves the others to `Rest`.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from texp import backends, groups, reference, theory
from texp.reference import Entry
from texp.theory import KEEP, Hyperparameters, Row, Scale


class Plan(NamedTuple):
    """What one step does to one group."""

    group: dict[str, Any]
    scale: Scale  # after the step
    work: dict[Row, list[Entry]]
    new_bufs: list[tuple[Tensor, Tensor]]


def step(param_groups: list[dict[str, Any]], state: dict[Tensor, Any], grad_scale: float) -> None:
    """One step of all groups by `texp.reference`; modifies parameters, momentum buffers, norm_stats and scales.

    All of it is planned before any of it is done: an error leaves everything as it was.
    """
    plans = [
        _plan(index, group, state, grad_scale)
        for index, group in enumerate(param_groups)
        if any(p.grad is not None for p in group["params"])
    ]
    for plan in plans:
        _do(plan.work, plan.group, plan.new_bufs, state)
        groups.set_scale(plan.group, plan.scale)


def _plan(index: int, group: dict[str, Any], state: dict[Tensor, Any], grad_scale: float) -> Plan:
    if group["capturable"]:
        backends.check_capturable()
    hyper = groups.hyperparameters(group)
    entries = [Entry(p, p.grad, buf_of(state, p)) for p in group["params"]]
    try:
        step = theory.advance(groups.scale_of(group), hyper, first=all_first(entries), grad_scale=grad_scale)
    except ValueError as error:
        raise ValueError(f"parameter group {index}: {error}") from None
    plan = Plan(group, step.scale, {}, [])
    for entry in entries:
        if entry.grad is None:
            row = step.idle
        elif entry.buf is None and hyper.momentum != 0:
            row = step.first
            entry = with_buf(entry)
            plan.new_bufs.append((entry.param, entry.buf))
        else:
            row = step.running
        _check(index, hyper, row, entry)
        plan.work.setdefault(row, []).append(entry)
    groups.check_norm_stats(group["norm_stats"])
    for stat, power in group["norm_stats"]:
        plan.work.setdefault(step.norm_stat(power), []).append(Entry(stat))
    for nothing in (KEEP, Row()):
        plan.work.pop(nothing, None)
    return plan


class Rest:
    """What the C++ core leaves to `texp.reference` in a step: its `check` is called before anything is changed, `do`
    after the core has done its part.

    Args:
        named: the backend that was asked for by name, or None; a named one leaves nothing to others.
    """

    def __init__(self, named: str | None, param_groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> None:
        self.named = named
        self.param_groups = param_groups
        self.state = state
        self.plans: dict[int, Plan] = {}

    def check(self, left: Iterable[tuple]) -> None:
        for index, reason, row, param, grad, buf, starts in left:
            entry = Entry(param, grad, buf)
            if buf is not None:
                _check_buf(index, entry)
            if self.named is not None:
                raise RuntimeError(
                    f"backend={self.named!r} was requested, but parameter group {index} has a parameter of shape "
                    f"{tuple(param.shape)} that, or the gradient or buffer of which, {reason}"
                )
            group = self.param_groups[index]
            plan = self.plans.setdefault(index, Plan(group, groups.scale_of(group), {}, []))
            if starts:
                entry = with_buf(entry)
                plan.new_bufs.append((entry.param, entry.buf))
            _check(index, groups.hyperparameters(group), Row(*row), entry)
            plan.work.setdefault(Row(*row), []).append(entry)

    def do(self) -> None:
        for plan in self.plans.values():
            _do(plan.work, plan.group, plan.new_bufs, self.state)


def _do(
    work: dict[Row, list[Entry]],
    group: dict[str, Any],
    new_bufs: list[tuple[Tensor, Tensor]],
    state: dict[Tensor, Any],
) -> None:
    for row, entries in work.items():
        reference.apply(row, entries, foreach=group["foreach"])
    for param, buf in new_bufs:
        state[param]["momentum_buffer"] = buf


def _check(index: int, hyper: Hyperparameters, row: Row, entry: Entry) -> None:
    if any(x is not None and x.layout != torch.strided for x in entry):
        groups.check_sparse(index, hyper, row)
    if entry.buf is not None:
        _check_buf(index, entry)


def _check_buf(index: int, entry: Entry) -> None:
    """That a buffer which somebody put there fits."""
    param, grad, buf = entry
    would_densify = buf.layout != torch.strided and grad is not None and grad.layout == torch.strided
    if buf.shape != param.shape or would_densify:
        raise RuntimeError(
            f"parameter group {index}: a momentum buffer of shape {tuple(buf.shape)} and layout {buf.layout} does "
            f"not fit a parameter of shape {tuple(param.shape)}{' with a dense gradient' if would_densify else ''}"
        )


def with_buf(entry: Entry) -> Entry:
    """With a momentum buffer of zeros, dense or sparse as the gradient is."""
    dense = entry.grad.layout == torch.strided
    return entry._replace(buf=torch.zeros_like(entry.param if dense else entry.grad))


def all_first(entries: Iterable[Entry]) -> bool:
    """Whether no tensor of a group has a momentum buffer yet."""
    return all(entry.buf is None for entry in entries)


def buf_of(state: dict[Tensor, Any], param: Tensor) -> Tensor | None:
    return state[param].get("momentum_buffer") if param in state else None

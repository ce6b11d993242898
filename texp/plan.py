"""The host side of a step in Python: which row applies to which tensor. csrc/walk.h does the same in C++, for the
tensors that its kernels can take, and leaves the others to `Rest`.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from texp import groups, reference, theory
from texp.memory import that_share_memory
from texp.norm_stats import Found
from texp.reference import Entry
from texp.theory import KEEP, Hyperparameters, Row, Step
from texp.torch_internals import check_for_fused


class Plan(NamedTuple):
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


def row_of(step: Step, kind: str | float) -> Row:
    """The row of a kind of `Plan.work`."""
    return getattr(step, kind) if isinstance(kind, str) else step.norm_stat(kind)


def changes_nothing(row: Row) -> bool:
    return row in (KEEP, Row())


def step(
    param_groups: list[dict[str, Any]],
    stats: Found,
    state: dict[Tensor, Any],
    grad_scale: float,
    momentum_dtype: torch.dtype | None,
) -> None:
    """One step of all groups by `texp.reference`; modifies parameters, momentum buffers, norm_stats and scales.

    All of it is planned before any of it is done: an error leaves everything as it was.
    """
    for plan in of_groups(param_groups, stats, state, grad_scale, momentum_dtype):
        for kind, entries in plan.work.items():
            if not changes_nothing(row := row_of(plan.step, kind)):
                reference.apply(row, entries, foreach=plan.group["foreach"])
        plan.finish(state)


def of_groups(
    param_groups: list[dict[str, Any]],
    stats: Found,
    state: dict[Tensor, Any],
    grad_scale: float,
    momentum_dtype: torch.dtype | None,
) -> list[Plan]:
    """Plans a step of the groups that take part in it; raises where one of them cannot, and changes nothing."""
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
) -> Plan:
    _refuse_capture(index, group)
    entries = [Entry(p, p.grad) for p in group["params"]]
    if groups.number("momentum", group["momentum"]) != 0 or groups.is_exponential(group):  # else they are not touched
        entries = [entry._replace(buf=buf_of(state, entry.param)) for entry in entries]
    first = groups.is_first(group, [entry.buf for entry in entries])
    hyper, step = advance(index, group, first, grad_scale)
    plan = Plan(index, group, step, first, {}, [])
    for entry in entries:
        if entry.grad is None:
            kind = "idle"
        elif entry.buf is None and hyper.momentum != 0:
            kind = "first"
            entry = with_buf(entry, momentum_dtype)
            plan.new_bufs.append((entry.param, entry.buf))
        else:
            kind = "running"
        _check_fused(group, entry)
        check_tensors(index, row_of(step, kind), entry)
        _check_sparse(index, hyper, row_of(step, kind), entry)
        if entry.buf is not None and kind != "first":
            entry = widened(entry, momentum_dtype, plan.new_bufs)
        plan.work.setdefault(kind, []).append(entry)
    for stat, power in stats:
        plan.work.setdefault(float(power), []).append(Entry(stat))
    return plan


def advance(index: int, group: dict[str, Any], first: bool, grad_scale: float) -> tuple[Hyperparameters, Step]:
    """What theory.advance says of a group, whose number stands in the errors."""
    groups.check_step(index, group)
    hyper = groups.hyperparameters(group)
    try:
        return hyper, theory.advance(groups.scale_of(group), hyper, first=first, grad_scale=grad_scale)
    except ValueError as error:
        raise ValueError(f"parameter group {index}: {error}") from None


class Rest:
    """What the C++ core leaves to `texp.reference` in a step: its `check` is called before anything is changed, `do`
    after the core has done its part.

    Args:
        named: the backend that was asked for by name, or None; a named one leaves no parameter to others.
        momentum_dtype: that of the optimizer.
    """

    def __init__(
        self,
        named: str | None,
        param_groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        momentum_dtype: torch.dtype | None,
    ) -> None:
        self.named = named
        self.param_groups = param_groups
        self.state = state
        self.momentum_dtype = momentum_dtype
        self.work: list[tuple[tuple[bool | None, Row], Entry]] = []  # with `foreach` and row
        self.new_bufs: list[tuple[Tensor, Tensor]] = []

    def check(self, left: Iterable[tuple]) -> None:
        for index, why, row, param, grad, buf, starts in left:
            group, row, entry = self.param_groups[index], Row(*row), Entry(param, grad, buf)
            _refuse_capture(index, group)
            _check_fused(group, entry)
            check_tensors(index, row, entry)
            if self.named is not None and why is not None:  # a tensor of norm_stats is left without a reason
                raise RuntimeError(
                    f"backend={self.named!r} was requested, but of a parameter of shape {tuple(param.shape)} in "
                    f"parameter group {index}, {why}; backend=None leaves such parameters to plain torch"
                )
            _check_sparse(index, groups.hyperparameters(group), row, entry)
            if starts:
                entry = with_buf(entry, self.momentum_dtype)
                self.new_bufs.append((entry.param, entry.buf))
            elif buf is not None:
                entry = widened(entry, self.momentum_dtype, self.new_bufs)
            self.work.append(((group["foreach"], row), entry))

    def do(self) -> None:
        shared = that_share_memory(reference.written(entry for _, entry in self.work))
        for (foreach, row), entries in reference.in_batches(self.work, shared):
            reference.apply(row, entries, foreach=foreach, shared=shared)
        for param, buf in self.new_bufs:
            self.state[param]["momentum_buffer"] = buf


def _refuse_capture(index: int, group: dict[str, Any]) -> None:
    """Raises where a graph would replay one step of a schedule for ever."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing() and groups.is_exponential(group):
        raise RuntimeError(
            f"parameter group {index} is scale_invariant: its step cannot be captured by the reference backend, "
            "which computes P on the host; backend='cuda' and 'triton' with capturable=True can"
        )


def check_tensors(index: int, row: Row, entry: Entry) -> None:
    """Raises where a tensor cannot be stepped, or a buffer that somebody put there does not fit."""
    param, grad, buf = entry
    where = f"parameter group {index}: a parameter of shape {tuple(param.shape)}"
    if not (param.is_floating_point() or param.is_complex()):
        raise RuntimeError(f"{where} and dtype {param.dtype} cannot take a step, which is not an integer")
    if buf is not None:
        would_densify = buf.layout != torch.strided and grad is not None and grad.layout == torch.strided
        fits = buf.shape == param.shape and buf.device == param.device and not would_densify
        is_number = buf.is_complex() if param.is_complex() else buf.is_floating_point()
        if not fits or not is_number:
            raise RuntimeError(
                f"{where}, {param.dtype}, on {param.device} cannot have a momentum buffer of shape "
                f"{tuple(buf.shape)}, {buf.dtype}, {buf.layout}, on {buf.device}"
                f"{' with a dense gradient' if would_densify else ''}"
            )
    for what, tensor in (("a parameter", param), ("a momentum buffer", buf)):
        if tensor is None or tensor.layout != torch.strided:
            continue
        strides = () if tensor.is_contiguous() else zip(tensor.shape, tensor.stride(), strict=True)
        if any(size > 1 and stride == 0 for size, stride in strides):
            raise RuntimeError(
                f"parameter group {index}: {what} of shape {tuple(tensor.shape)} holds several elements in one place "
                "(it was expanded) and cannot be written to; clone() it first"
            )
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"parameter group {index}: {what} of shape {tuple(tensor.shape)} was made in inference mode and "
                "cannot be written to outside of it; clone() it first"
            )
    dtype = reference.arithmetic(entry)
    limit = torch.finfo(dtype).max
    if not all(abs(x) <= limit for x in row):
        raise ValueError(
            f"parameter group {index}: a step with these hyperparameters leaves the range of the arithmetic of "
            f"{dtype}, {limit:.3g}: {row}"
        )


def _check_sparse(index: int, hyper: Hyperparameters, row: Row, entry: Entry) -> None:
    if any(x is not None and x.layout != torch.strided for x in entry):
        groups.check_sparse(index, hyper, row)


def _check_fused(group: dict[str, Any], entry: Entry) -> None:
    """Raises, in torch's words, where fused=True was asked for and torch's fused step takes no such tensor. DTensors,
    which it refuses too, are taken here.
    """
    if not group["fused"] or entry.grad is None:
        return
    check_for_fused(entry.param)
    if entry.grad.is_sparse:
        raise RuntimeError("`_fused_sgd` does not support sparse gradients")


def buffer_dtype(param: Tensor, other: Tensor, momentum_dtype: torch.dtype | None) -> torch.dtype:
    """That of the momentum buffer of a parameter.

    Args:
        other: its gradient, or a buffer that there is already.
        momentum_dtype: what was asked for.
    """
    if momentum_dtype is None:
        return torch.promote_types(param.dtype, other.dtype)
    return momentum_dtype.to_complex() if param.is_complex() else momentum_dtype


def with_buf(entry: Entry, momentum_dtype: torch.dtype | None) -> Entry:
    """With a momentum buffer of zeros, dense or sparse as the gradient is."""
    dense = entry.grad.layout == torch.strided
    dtype = buffer_dtype(entry.param, entry.grad, momentum_dtype)
    with torch.inference_mode(False):  # for later steps outside of it
        return entry._replace(buf=torch.zeros_like(entry.param if dense else entry.grad, dtype=dtype))


def widened(entry: Entry, momentum_dtype: torch.dtype | None, new_bufs: list[tuple[Tensor, Tensor]]) -> Entry:
    """With a wider momentum buffer where there is one narrower than it is to be, as after model.float()."""
    dtype = torch.promote_types(entry.buf.dtype, buffer_dtype(entry.param, entry.param, momentum_dtype))
    if entry.buf.dtype == dtype or not (entry.buf.is_floating_point() or entry.buf.is_complex()):
        return entry
    with torch.inference_mode(False):
        entry = entry._replace(buf=entry.buf.to(dtype))
    new_bufs.append((entry.param, entry.buf))
    return entry


def buf_of(state: dict[Tensor, Any], param: Tensor) -> Tensor | None:
    values = state.get(param)
    return None if values is None else values.get("momentum_buffer")

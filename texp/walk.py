"""Where there is no C++ core: what its functions `step` and `step_on_device` do, in Python, for kernels that read
tables (texp.kernels.step).
"""

import struct
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from texp import groups, plan, tables
from texp.reference import Entry
from texp.tables import BUFFERED, FRESH, IDLE, STATISTIC, STEPPING, Table
from texp.theory import Row

_NUMBERS = ("lr", "momentum", "dampening", "weight_decay")
_FLAGS = ("nesterov", "maximize", "scale_invariant")

_GROUP = struct.Struct("=32sQ4B4?8x")  # csrc/cuda.h
_HOST, _FLOAT32, _FLOAT64 = range(3)  # where a number is


def observed() -> bool:
    """Whether a profiler or another observer is to see the next step: without the core there is no telling."""
    return True


@torch.no_grad()
def step(
    param_groups: list[dict[str, Any]],
    state: dict[Tensor, Any],
    grad_scale: float,
    check: Callable[[Iterable[tuple]], object],
    cpu: bool,
    cuda: bool,
    kernel: Callable[[str, bytearray, bytearray], object],
) -> list[tuple]:
    """Takes a step of all tensors that a kernel can take, and returns the others; see csrc/bindings.cpp."""
    plans = plan.of_groups(param_groups, state, grad_scale)
    made, left = {}, []
    shared = tables.that_share_memory(entry for p in plans for entries in _work(p) for entry in entries[1])
    for p in plans:
        for row, entries, of_params in _work(p):
            for entry in entries:
                why = tables.refusal(entry, cpu, cuda, shared)
                if why is None:
                    made.setdefault(str(entry.param.device), Table()).add_fixed(entry, row)
                else:
                    left.append((p.index, why if of_params else None, row, *entry, False))
    if left:
        check(left)
    for device, table in made.items():
        kernel(device, table.tensors, table.rows())
        table.finish()
    for p in plans:
        p.finish(state)
    return left


def _work(p: plan.Plan) -> list[tuple[Row, list[Entry], bool]]:
    """Rows, what they apply to, and whether those are parameters."""
    return [(*work, True) for work in p.work.items()] + [(*work, False) for work in p.stats.items()]


@torch.no_grad()
def step_on_device(
    param_groups: list[dict[str, Any]],
    state: dict[Tensor, Any],
    states: Tensor,
    started: Tensor,
    ticket: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    capturing: bool,
    kernel: Callable[[bytearray, bytearray], object],
) -> str | None:
    """Takes a step of groups whose scales are on a device, or says why it cannot be taken in this way and changes
    nothing; see csrc/bindings.cpp. The kernel is called with the tables alone.
    """
    walk = _DeviceWalk(states, capturing)
    slot = 0
    for index, group in enumerate(param_groups):
        if (why := walk.add(index, group, state, slot)) is not None:
            return why
        slot += len(group["params"])
    if tables.that_share_memory(walk.entries):
        return "parameters, buffers or norm_stats share memory"
    if walk.table.tensors:
        kernel(walk.table.tensors, walk.groups)
    walk.table.finish()
    for param, buf in walk.new_bufs:
        state[param]["momentum_buffer"] = buf
    return None


class _DeviceWalk:
    """What is found on the way through the groups."""

    def __init__(self, states: Tensor, capturing: bool) -> None:
        self.states = states
        self.capturing = capturing
        self.table = Table()
        self.groups = bytearray()
        self.entries: list[Entry] = []
        self.new_bufs: list[tuple[Tensor, Tensor]] = []

    def add(self, index: int, group: dict[str, Any], state: dict[Tensor, Any], slot: int) -> str | None:
        """Adds a group whose parameters have the slots from `slot` on, or says why the step cannot be taken."""
        entries = [Entry(p, p.grad) for p in group["params"]]
        if self.capturing and not group["capturable"]:
            return "a group has capturable=False"
        if self.capturing and any(entry.grad is None for entry in entries):
            return "a parameter has no gradient: replays would go on without it"
        if all(entry.grad is None for entry in entries):
            return None
        groups.check_step(index, group)
        numbers = [_number(key, group[key], self.states.device) for key in _NUMBERS]
        if None in numbers:
            return "a hyperparameter is not a float32 or float64 tensor of one element on its device"
        known = {key: x if place == _HOST else 0.0 for key, (x, place) in zip(_NUMBERS, numbers, strict=True)}
        try:
            groups.hyperparameters({**group, **known}).check()
        except ValueError as error:
            raise ValueError(f"parameter group {index}: {error}") from None
        ordinary = not groups.is_exponential(group)
        has_momentum = numbers[1] != (0.0, _HOST)
        if has_momentum or not ordinary:
            entries = [entry._replace(buf=plan.buf_of(state, entry.param)) for entry in entries]
        source = len(self.groups) // _GROUP.size
        if source > 0xFFFF:
            return "there are more than 65,535 groups"
        self.groups += _GROUP.pack(
            b"".join(struct.pack("=d" if place == _HOST else "=Q", x) for x, place in numbers),
            self.states[index].data_ptr(),
            *(place for _, place in numbers),
            *(bool(group[key]) for key in _FLAGS),
            plan.all_first(entries),
        )
        for i, entry in enumerate(entries, slot):
            if entry.grad is None and ordinary:
                continue
            starts = has_momentum and entry.grad is not None and entry.buf is None
            if starts and self.capturing:  # memory made in a capture would be set to 0 again by each replay
                return "a parameter has no momentum buffer yet; take a step before the capture"
            if why := self._refusal(entry):
                return why
            if starts:
                entry = plan.with_buf(entry)
                self.new_bufs.append((entry.param, entry.buf))
            flags = (BUFFERED if entry.buf is not None else 0) | (FRESH if starts else 0)
            self._add(entry, source, STEPPING if entry.grad is not None else IDLE, slot=i, flags=flags)
        for stat, power in group["norm_stats"] if not ordinary else ():
            if self._refusal(Entry(stat)):
                return "norm_stats are not plain tensors on its device"
            self._add(Entry(stat), source, STATISTIC, power=power)
        return None

    def _refusal(self, entry: Entry) -> str | None:
        if entry.param.device != self.states.device:
            return "a parameter is not a plain tensor on its device"
        return tables.refusal(entry, cpu=True, cuda=True, shared=set())

    def _add(self, entry: Entry, source: int, kind: int, **fields) -> None:
        self.entries.append(entry)
        self.table.add(entry, source, kind, **fields)


def _number(key: str, value: Any, device: torch.device) -> tuple[float | int, int] | None:
    """A hyperparameter, or its address on the device, and which of both; None where it is neither."""
    if not isinstance(value, Tensor) or (value.device.type == "cpu" and device.type != "cpu"):
        return groups.number(key, value), _HOST
    place = {torch.float32: _FLOAT32, torch.float64: _FLOAT64}.get(value.dtype)
    fits = value.numel() == 1 and value.device == device
    return (value.data_ptr(), place) if fits and place is not None else None

"""Where there is no C++ core: what it does in a step, in Python, for kernels that read tables (texp.kernels.step)."""

import struct
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any, Literal

import torch
from torch import Tensor

from texp import groups, plan, tables
from texp.memory import that_share_memory
from texp.norm_stats import Found, NormStats
from texp.reference import Entry, written
from texp.tables import BUFFERED, FRESH, IDLE, STATISTIC, STEPPING, Table
from texp.theory import Row, Step
from texp.torch_internals import is_watched

_NUMBERS = ("lr", "momentum", "dampening", "weight_decay")
_POINT = itemgetter(*_NUMBERS, "nesterov", "maximize")

_GROUP = struct.Struct("=32sQ4B4?8x")  # csrc/cuda.h
_HOST, _FLOAT32, _FLOAT64 = range(3)  # where a number is

Kernel = Callable[[str, bytearray, bytearray], object]  # called with a device and tables of tensors and rows

_WATCHED = "the parameter is stepped under a TorchDispatchMode, which is to see what happens to it"


class Walk:
    """Takes the place of the core in one optimizer."""

    def __init__(self) -> None:
        self._last: _Last | None = None

    def observed(self) -> bool:
        """Whether a profiler or another observer is to see the next step: without the core there is no telling."""
        return True

    @torch.no_grad()
    def step(
        self,
        param_groups: list[dict[str, Any]],
        norm_stats: NormStats,
        state: dict[Tensor, Any],
        grad_scale: float,
        momentum_dtype: torch.dtype | None,
        check: Callable[[Iterable[tuple]], object],
        cpu: Kernel | Literal[False],
        cuda: Kernel | Literal[False],
    ) -> list[tuple]:
        """Takes a step of all tensors that a kernel can take, and returns the others; see csrc/bindings.cpp."""
        kernel = cpu or cuda  # there is one for one of the two
        watched = is_watched()
        if norm_stats.are_weak():
            self._last = None  # which would hold them
        stats = norm_stats.found(param_groups)
        key = None if watched else _key(param_groups, stats, state)
        if key is not None and self._last is not None and key == self._last.key:
            steps = self._last.advance(param_groups, grad_scale)
            if self._last.serves(steps):
                self._last.run(steps, kernel)
                for index, step in steps.items():
                    if groups.is_exponential(param_groups[index]):
                        groups.set_scale(param_groups[index], step.scale)
                return []
        self._last = None  # and with it what it holds
        plans = plan.of_groups(param_groups, stats, state, grad_scale, momentum_dtype)
        last, left = _Last(key, plans), []
        work = [(p, kind, entry) for p in plans for kind in last.kinds[p.index] for entry in p.work[kind]]
        shared = that_share_memory(written(entry for _, _, entry in work))
        for p, kind, entry in work:
            why = _WATCHED if watched else tables.refusal(entry, bool(cpu), bool(cuda), shared)
            if why is None:
                last.add(entry, p.index, kind)
            else:
                of_param = isinstance(kind, str)
                left.append((p.index, why if of_param else None, plan.row_of(p.step, kind), *entry, False))
        if left:
            check(left)
        last.run({p.index: p.step for p in plans}, kernel)
        for p in plans:
            p.finish(state)
        if key is not None and not left and not any(table.copies for table in last.tables.values()):
            self._last = last
        return left

    def apply_rows(
        self, work: list[tuple[Row, Entry]], check: Callable[[list[int]], object], cpu: object, cuda: object
    ) -> list[int]:
        """Applies rows to tensors; returns the places of those that it leaves to others: here, of all."""
        left = list(range(len(work)))
        check(left)
        return left

    @torch.no_grad()
    def step_on_device(
        self,
        param_groups: list[dict[str, Any]],
        norm_stats: NormStats,
        state: dict[Tensor, Any],
        momentum_dtype: torch.dtype | None,
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
        walk = _DeviceWalk(states, momentum_dtype, capturing)
        slot = 0
        stats = norm_stats.found(param_groups)
        for index, group in enumerate(param_groups):
            if (why := walk.add(index, group, stats[index], state, slot)) is not None:
                return why
            slot += len(group["params"])
        if that_share_memory(written(walk.entries)):
            return "parameters, buffers or norm_stats share memory"
        if walk.table.tensors:
            kernel(walk.table.tensors, walk.groups)
        walk.table.finish()
        for param, buf in walk.new_bufs:
            state[param]["momentum_buffer"] = buf
        for group in walk.started:
            group["started"] = True
        return None


def _key(param_groups: list[dict[str, Any]], found: Found, state: dict[Tensor, Any]) -> tuple | None:
    """What a step is told of its tensors: where two steps have the same, the second can be taken as the first was.
    None where that cannot be told in short.
    """
    params = [p for group in param_groups for p in group["params"]]
    stats = [stat for stats in found for stat in stats]
    grads = [p.grad for p in params]
    bufs = [values and values.get("momentum_buffer") for values in map(state.get, params)]
    written = params + [b for b in bufs if b is not None] + [stat for stat, _ in stats]
    present = [g for g in grads if g is not None]
    tensors = written + present
    try:
        return (
            [
                (len(group["params"]), len(stats), bool(group["momentum"]), groups.is_exponential(group))
                for group, stats in zip(param_groups, found, strict=True)
            ],
            [power for _, power in stats],
            [g is None for g in grads],
            [b is None for b in bufs],
            list(map(id, written)),  # these the last step holds, so that nothing else can have their ids
            list(map(type, present)),
            list(map(Tensor.is_neg, present)),
            *(list(map(of, tensors)) for of in _METADATA),
        )
    except (RuntimeError, TypeError, AttributeError, ValueError):
        return None  # a sparse tensor has no address


_METADATA = (Tensor.data_ptr, Tensor.size, Tensor.stride, Tensor.dtype.__get__)


def _equal(x: Any, y: Any) -> bool:
    """Of numbers and flags; no two tensors are."""
    return type(x) is type(y) and type(x) in (float, int, bool) and x == y


class _Last:
    """A step that can be taken again, with other numbers, as long as its tensors are the same."""

    def __init__(self, key: tuple | None, plans: list[plan.Plan]) -> None:
        self.key = key
        self.tables: dict[str, Table] = {}  # by device
        self._first = {p.index: p.first for p in plans}
        self._all_kinds = {p.index: list(p.work) for p in plans}
        self.kinds = self._kinds({p.index: p.step for p in plans})  # that change something, by the index of the group

    def add(self, entry: Entry, index: int, kind: str | float) -> None:
        self.tables.setdefault(str(entry.param.device), Table()).add_fixed(entry, (index, kind))

    def advance(self, param_groups: list[dict[str, Any]], grad_scale: float) -> dict[int, Step]:
        steps: dict[int, Step] = {}
        before, step = None, None
        for index, first in self._first.items():
            # Groups in a row that stand at the same point are advanced, and checked, once.
            group = param_groups[index]
            point = (first, groups.is_scale_invariant(group), *groups.scale_of(group), *_POINT(group))
            if step is None or any(x is not y and not _equal(x, y) for x, y in zip(point, before, strict=True)):
                _, step = plan.advance(index, param_groups[index], first, grad_scale)
            steps[index], before = step, point
        return steps

    def serves(self, steps: dict[int, Step]) -> bool:
        """Whether the same rows change something as before, and all are within the range of float32."""
        return self._kinds(steps) == self.kinds and all(
            abs(x) <= _MOST
            for index, kinds in self.kinds.items()
            for kind in kinds
            for x in plan.row_of(steps[index], kind)
        )

    def run(self, steps: dict[int, Step], kernel: Callable[[str, bytearray, bytearray], object]) -> None:
        for device, table in self.tables.items():
            rows = (plan.row_of(steps[index], kind) for index, kind in table.sources)
            kernel(device, table.tensors, tables.table_of(rows))
            table.finish()

    def _kinds(self, steps: dict[int, Step]) -> dict[int, list[str | float]]:
        return {
            index: [kind for kind in kinds if not plan.changes_nothing(plan.row_of(steps[index], kind))]
            for index, kinds in self._all_kinds.items()
        }


_MOST = torch.finfo(torch.float32).max


class _DeviceWalk:
    """What is found on the way through the groups."""

    def __init__(self, states: Tensor, momentum_dtype: torch.dtype | None, capturing: bool) -> None:
        self.states = states
        self.momentum_dtype = momentum_dtype
        self.capturing = capturing
        self.table = Table()
        self.groups = bytearray()
        self.entries: list[Entry] = []
        self.new_bufs: list[tuple[Tensor, Tensor]] = []
        self.started: list[dict[str, Any]] = []  # groups without parameters that take a step with momentum

    def add(
        self,
        index: int,
        group: dict[str, Any],
        stats: list[tuple[Tensor, float]],
        state: dict[Tensor, Any],
        slot: int,
    ) -> str | None:
        """Adds a group whose parameters have the slots from `slot` on, or says why the step cannot be taken."""
        entries = [Entry(p, p.grad) for p in group["params"]]
        if self.capturing and any(entry.grad is None for entry in entries):
            return "a parameter has no gradient: replays would go on without it"
        if not groups.steps(group):
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
        if source >= 0xFFFF:
            return "there are more than 65,535 groups"
        self.groups += _GROUP.pack(
            b"".join(struct.pack("=d" if place == _HOST else "=Q", x) for x, place in numbers),
            self.states[index].data_ptr(),
            *(place for _, place in numbers),
            bool(group["nesterov"]),
            bool(group["maximize"]),
            groups.is_scale_invariant(group),
            groups.is_first(group, [entry.buf for entry in entries]),
        )
        if not entries:  # its scale is to go with those of other processes, and no tensor brings it here
            self._add(Entry(torch.empty(0, device=self.states.device)), source, STATISTIC)
            if has_momentum:
                self.started.append(group)
        for i, entry in enumerate(entries, slot):
            if entry.grad is None and ordinary:
                continue
            starts = has_momentum and entry.grad is not None and entry.buf is None
            if starts and self.capturing:  # memory made in a capture would be set to 0 again by each replay
                return "a parameter has no momentum buffer yet; take a step before the capture"
            narrow = entry.buf
            if starts:
                entry = plan.with_buf(entry, self.momentum_dtype)
                self.new_bufs.append((entry.param, entry.buf))
            elif entry.buf is not None:
                entry = plan.widened(entry, self.momentum_dtype, self.new_bufs)
                if self.capturing and entry.buf is not narrow:
                    return "a momentum buffer is narrower than it is to be; take a step before the capture"
            if why := self._refusal(entry):
                return why
            flags = (BUFFERED if entry.buf is not None else 0) | (FRESH if starts else 0)
            self._add(entry, source, STEPPING if entry.grad is not None else IDLE, slot=i, flags=flags)
        for stat, power in stats if not ordinary else ():
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

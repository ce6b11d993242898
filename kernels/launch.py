"""Uploads the tables of a step and launches its kernels; texp.kernels.layout says what stands in the tables."""

import contextlib
import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from texp.kernels import layout
from texp.kernels import step as kernels

INTERPRETED = not isinstance(kernels.apply, JITFunction)
"""Whether Triton runs kernels on the CPU: TRITON_INTERPRET=1 was set when this was imported."""

Bytes = bytes | bytearray | memoryview
Launch = Callable[..., object]  # takes the arguments that are not fixed yet, and `stream`

_ENTRY, _GROUP = (layout.offsets(struct) for struct in (layout.TensorEntry, layout.GroupEntry))
_SLOTS = 8  # that tables are uploaded from in turn
_AT_ONCE = 256  # rows of `advance`, tiles of `add`

# Of each kernel the types of its pointers, and whether it fuses products and sums: `apply` does, for fewer
# instructions and one rounding less for each sum, but P and κ are to have the bits that the host computes. It is said
# of each, for the default of Triton changes.
_KERNELS = {
    kernels.apply: ((torch.uint8, torch.int64, torch.float64, torch.int32), True),
    kernels.advance: (
        (*[torch.uint8] * 2, torch.float64, torch.int32, torch.uint8, *[torch.float32] * 2), False
    ),
    kernels.reduce: ((torch.uint8, torch.int64, torch.int64, torch.float64), False),
    kernels.add: ((torch.int64, torch.float64, torch.float64), False),
}  # fmt: skip


def types_of(dtypes: int) -> tuple[tl.dtype, tl.dtype, tl.dtype]:
    """Of p, g and b."""
    return tuple(getattr(tl, layout.DTYPES[dtypes >> shift & 3]) for shift in (0, 2, 4))


def tile_of(dtypes: int) -> int:
    """Elements of a program: 8 for each thread, or 4 where the arithmetic is in float64, for want of registers; the
    interpreter likes fewer programs.
    """
    return 1024 * (1 if tl.float64 in types_of(dtypes) else 2) * (4 if INTERPRETED else 1)


if INTERPRETED:
    import numpy

    def _argument(x: Tensor | None) -> Tensor:
        return torch.empty(0, dtype=torch.float32, device="cpu") if x is None else x

    def _prepare(kernel, device: torch.device, programs: int, constants: tuple, *fixed: Tensor | None) -> Launch:
        arguments = [*constants, *map(_argument, fixed)]

        def launch(*given, stream: None) -> None:
            with numpy.errstate(all="ignore"):  # a GPU does not warn of infinities either
                kernel[programs, 1, 1](*arguments, *given)

        launch.tensors = fixed
        return launch

else:

    def _argument(x: Tensor | None) -> int:
        """An address, as a number: of a tensor, each launch would ask for its address and whether a GPU has it."""
        return 0 if x is None else x.data_ptr()

    def _prepare(kernel, device: torch.device, programs: int, constants: tuple, *fixed: Tensor | None) -> Launch:
        """A launch with these arguments, and those that it is called with, which keeps the tensors."""
        key = (kernel, device, constants)
        if key not in _compiled:
            types, fusion = _KERNELS[kernel]
            _compiled[key] = kernel.warmup(*constants, *types, grid=(1,), num_warps=8, enable_fp_fusion=fusion)
        launch = partial(_compiled[key][programs, 1, 1], *constants, *map(_argument, fixed))
        launch.tensors = fixed
        return launch


_compiled: dict[tuple, Any] = {}


def _pinned(size: int, device: torch.device) -> tuple[Tensor, memoryview]:
    """Memory from which `device` can copy while the host goes on."""
    memory = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
    return memory, memoryview((ctypes.c_char * size).from_address(memory.data_ptr())).cast("B")


class _Memory:
    """Bytes on a device. The host writes into one slot of pinned memory after the other, from which they are copied:
    it may be ahead of the device by half of the slots at least.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self.bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self._slots = [_pinned(size, device) for _ in range(_SLOTS)]
        self._copied = [torch.cuda.Event(), torch.cuda.Event()] if device.type == "cuda" else None  # half of them
        self._views: dict[int, tuple[Tensor, list[Tensor]]] = {}
        self._next = 0

    def upload(self, data: bytes, begin: int = 0) -> None:
        """Replaces what is there from `begin` to the end."""
        if begin not in self._views:
            self._views[begin] = self.bytes[begin:], [slot[begin:] for slot, _ in self._slots]
        half, within = divmod(self._next, _SLOTS // 2)
        if within == 0 and self._copied is not None:
            self._copied[1 - half].record()
            self._copied[half].synchronize()
        to, slots = self._views[begin]
        self._slots[self._next][1][begin:] = data
        to.copy_(slots[self._next], non_blocking=True)
        self._next = (self._next + 1) % _SLOTS


def _tiles(numel: bytes, dtypes: bytes, device: torch.device) -> tuple[dict[int, Tensor], Tensor]:
    """The table of tiles of each mix of dtypes, and how many tiles there are before those of each tensor."""
    with torch.device("cpu"):
        kinds = torch.tensor(list(dtypes), dtype=torch.int64)
        tile = torch.tensor([tile_of(kind) for kind in range(64)])[kinds]
        counts = (torch.tensor(memoryview(numel).cast("q").tolist(), dtype=torch.int64) + tile - 1) // tile
        begins = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        within = torch.arange(int(begins[-1])) - begins[:-1].repeat_interleave(counts)
        words = (torch.arange(len(counts)).repeat_interleave(counts) << 32) + within
        kinds = kinds.repeat_interleave(counts)
        tiles = {kind: words[kinds == kind] for kind in kinds.unique().tolist()}
    if device.type == "cpu":
        return tiles, begins
    *tables, begins = (x.pin_memory().to(device, non_blocking=True) for x in (*tiles.values(), begins))
    return dict(zip(tiles, tables, strict=True)), begins


class _Step:
    """One kind of step on one device: the tables of the last one, and its launches.

    prepare: makes the launches, of what :func:`_tiles` returns and of the tables, which are on the device.
    """

    def __init__(self, device: torch.device, prepare: Callable[..., list[Launch]]) -> None:
        self.device, self._prepare = device, prepare
        self._key = self._stream = self._shape = None
        self._changing = b""
        self._spare: tuple[Tensor, memoryview] | None = None
        self._captured: list = []

    def launches(self, version: object, stream: int | None, tables: tuple, changing: bytes = b"") -> list[Launch]:
        """The launches for these tables, which are uploaded unless those of the same version are there.

        changing: another table, the last one, which may differ within a version.
        """
        if (version, stream) != self._key or len(changing) != len(self._changing):
            self._replace(stream, (*tables, changing) if changing else tables)
        elif changing != self._changing:
            self._key = None  # should an error come in between
            self._memory.upload(changing, len(self._memory.bytes) - len(changing))
        self._key, self._changing = (version, stream), changing
        return self._launches

    def _replace(self, stream: int | None, tables: tuple) -> None:
        self._key = None
        lengths, *_ = shape = _shape(tables)
        if shape != self._shape or stream != self._stream:
            # In memory of its own: what is there may still be read, by another stream.
            self._shape = self._spare = None
            self._tiles = _tiles(*shape[1:], self.device)
            self._memory = _Memory(self.device, sum(lengths))
            self._launches = self._prepare(self.device, *self._tiles, *self._memory.bytes.split(lengths))
            self._shape, self._stream = shape, stream
        self._memory.upload(b"".join(tables))

    def reserve(self) -> None:
        """Takes the pinned memory that the next capture, which must not allocate any, will need."""
        if self._spare is None:
            self._spare = _pinned(len(self._memory.bytes), self.device)

    def captured(self, tables: tuple) -> list[Launch]:
        """Launches for a graph: what they read when it is replayed stays as it is, also what it is copied from."""
        lengths, *_ = shape = _shape(tables)
        if self._spare is None or shape != self._shape:
            raise RuntimeError("this step cannot be captured: take one of the same tensors before each capture")
        (memory, view), self._spare = self._spare, None
        view[:] = b"".join(tables)
        there = memory.to(self.device, non_blocking=True)
        launches = self._prepare(self.device, *self._tiles, *there.split(lengths))
        self._captured.append((memory, launches))
        return launches


def _shape(tables: tuple) -> tuple[list[int], bytes, bytes]:
    """What memory and launches depend on: the tables' lengths, how many elements tensors have, and their dtypes."""
    words, entries = memoryview(tables[0]).cast("q"), memoryview(tables[0])
    size = _ENTRY["size"]
    numel = words[_ENTRY["numel"] // 8 :: size // 8].tobytes()
    return [len(table) for table in tables], numel, entries[_ENTRY["dtypes"] :: size].tobytes()


def _applies(tiles: dict[int, Tensor], tensors: Tensor, rows: Tensor, skip: Tensor | None) -> list[Launch]:
    return [
        _prepare(
            kernels.apply, tensors.device, len(table), (*types_of(kind), tile_of(kind), skip is not None),
            tensors, table, rows, skip,
        )
        for kind, table in tiles.items()
    ]  # fmt: skip


def _host_rows(device: torch.device, tiles, begins: Tensor, tensors: Tensor, rows: Tensor) -> list[Launch]:
    return _applies(tiles, tensors, rows.view(torch.float64), None)


def _device_rows(device: torch.device, tiles, begins: Tensor, tensors: Tensor, groups, requests) -> list[Launch]:
    rows = torch.empty(10 * (len(begins) - 1), dtype=torch.float64, device=device)
    skip = torch.empty(1, dtype=torch.int32, device=device)
    programs = len(groups) // _GROUP["size"]
    advance = _prepare(kernels.advance, device, programs, (_AT_ONCE,), groups, requests, rows, skip)
    return [advance, *_applies(tiles, tensors, rows, skip)]


def _sums(device: torch.device, tiles, begins: Tensor, tensors: Tensor) -> list[Launch]:
    of_tiles = torch.empty(2 * sum(map(len, tiles.values())), dtype=torch.float64, device=device)
    made = [
        _prepare(
            kernels.reduce, device, len(table), (*types_of(kind)[:2], tile_of(kind)), tensors, table, begins, of_tiles
        )
        for kind, table in tiles.items()
    ]
    return [*made, _prepare(kernels.add, device, len(begins) - 1, (_AT_ONCE,), begins, of_tiles)]


class Launcher:
    """Launches what one optimizer does on GPUs, or, with Triton's interpreter, on the CPU. Tables are the bytes of
    structs of csrc/tables.h, and are read during the call only.
    """

    capturable = False  # whether a step may be captured after the next one

    def __init__(self) -> None:
        self._steps: dict[tuple, _Step] = {}

    def apply(self, device: str, version: int, tensors: Bytes, rows: Bytes) -> None:
        """Applies given rows.

        Args:
            version: another one whenever `tensors` has changed since the last call for this device.
        """
        step, stream = self._step(device, _host_rows)
        with _current(step.device):
            for launch in step.launches(version, stream, (tensors,), bytes(rows)):
                launch(stream=stream)

    def step_on_device(
        self,
        version: int,
        tensors: Bytes,
        groups: Bytes,
        requests: Bytes,
        state: Any,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        capturing: bool,
    ) -> None:
        """Advances groups whose P and κ are on a device, and applies the rows that result: to each tensor that for
        which the request has the same index.

        Args:
            version: another one whenever one of the tables has changed since the last call.
            state: has `scales`, to which `groups` point, and `momentum_initialized`: uint8, by slot.
            grad_scale, found_inf: float32 tensors of one element; None: 1 and 0.
            capturing: whether the step is being captured in a graph.
        """
        step, stream = self._step(state.scales.device, _device_rows)
        tables = (tensors, groups or bytes(_GROUP["size"]), requests)
        given = map(_argument, (state.momentum_initialized, grad_scale, found_inf))
        with _current(step.device):
            advance, *applies = step.captured(tables) if capturing else step.launches(version, stream, tables)
            advance(*given, stream=stream)
            for launch in applies:
                launch(stream=stream)
            if self.capturable and not capturing:
                step.reserve()

    def reduce(self, device: str, tensors: Bytes) -> Tensor:
        """‖p‖² and ‖g‖² of each tensor: float64, one row a tensor, with the same bits whenever it is called."""
        step, stream = self._step(device, _sums)
        sums = torch.empty(len(tensors) // _ENTRY["size"], 2, dtype=torch.float64, device=step.device)
        if len(sums):
            with _current(step.device):
                *tiles, add = step.launches(object(), stream, (tensors,))
                for launch in tiles:
                    launch(stream=stream)
                add(_argument(sums), stream=stream)
        return sums

    def _step(self, device: str | torch.device, prepare: Callable[..., list[Launch]]) -> tuple[_Step, int | None]:
        """The step of that kind, and the stream that is the current one there."""
        step = self._steps.get((device, prepare))
        if step is None:
            step = self._steps[device, prepare] = _Step(torch.device(device), prepare)
        return step, None if INTERPRETED else triton.runtime.driver.active.get_current_stream(step.device.index)


_AS_IT_IS = contextlib.nullcontext()


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes the device the current one, for a while."""
    is_current = device.type == "cpu" or torch.cuda.current_device() == device.index
    return _AS_IT_IS if is_current else torch.cuda.device(device)

"""Uploads the tables of a step and launches its kernels; texp.kernels.layout says what stands in the tables."""

import contextlib
import ctypes
import functools
import struct
from collections.abc import Callable
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

if INTERPRETED:
    import numpy

Bytes = bytes | bytearray | memoryview
Launch = Callable[..., None]  # takes a stream, and the arguments that are not fixed
Prepare = Callable[..., list]  # of launches
Tiles = dict[int, Tensor]  # the table of tiles for each mix of dtypes (TensorEntry)

_ENTRY, _GROUP = layout.offsets(layout.TensorEntry), layout.offsets(layout.GroupEntry)
_BLOCK = 256  # rows of `advance`, tiles of `add`
_SLOTS = 8  # of pinned memory
_KNOWN = 8  # lists of tensors, at most
_AS_IT_IS = contextlib.nullcontext()

# Of each kernel the types of its pointers, and whether products and sums are fused, for Triton's default changes. In
# `apply` that saves instructions and roundings, but P and κ are to have the bits that the host computes.
_KERNELS = {
    kernels.apply: ("uint8 int64 float64 int32", True),
    kernels.advance: ("uint8 uint8 float64 int32 float64 float64 uint8 float32 float32 float64", False),
    kernels.reduce: ("uint8 int64 int64 float64", False),
    kernels.add: ("int64 float64 float64", False),
    kernels.norm: ("uint8 uint8 float64 float64 float32 float64", False),
}
_compiled: dict[tuple, Any] = {}


def types_of(dtypes: int) -> tuple[tl.dtype, tl.dtype, tl.dtype]:
    """Of p, g and b."""
    return tuple(getattr(tl, layout.DTYPES[dtypes >> shift & 3]) for shift in (0, 2, 4))


def tile_of(dtypes: int) -> int:
    """Elements of a program: 8 for each thread, or 4 where the arithmetic is in float64, for want of registers; the
    interpreter likes fewer programs.
    """
    return 1024 * (1 if tl.float64 in types_of(dtypes) else 2) * (4 if INTERPRETED else 1)


def _argument(x: Tensor | None) -> Tensor | int:
    """An address, as a number: given a tensor, each launch would ask whether it is on a GPU."""
    if INTERPRETED:
        return torch.empty(0, dtype=torch.float32, device="cpu") if x is None else x
    return 0 if x is None else x.data_ptr()


def _prepare(kernel, device: torch.device, programs: int, constants: tuple, *fixed: Tensor | None) -> Launch:
    """A launch with these arguments and those that it is called with. It keeps the tensors."""
    arguments = [*constants, *map(_argument, fixed)]
    if INTERPRETED:

        @numpy.errstate(all="ignore")  # a GPU does not warn of infinities either
        def launch(stream: None, *given: Tensor) -> None:
            kernel[programs, 1, 1](*arguments, *given)

    else:
        key = (kernel, device, constants)
        if key not in _compiled:
            types, fusion = _KERNELS[kernel]
            types = [getattr(torch, name) for name in types.split()]
            _compiled[key] = kernel.warmup(*constants, *types, grid=(1,), num_warps=8, enable_fp_fusion=fusion)
        compiled, hooks = _compiled[key], triton.knobs.runtime
        run, hooked = compiled.run, compiled[programs, 1, 1]
        function, metadata = compiled.function, compiled.packed_metadata

        def launch(stream: int, *given: int) -> None:
            enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook  # a profiler's
            if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
                hooked(*arguments, *given, stream=stream)
            else:  # takes less than half of the time
                run(programs, 1, 1, stream, function, metadata, None, None, None, *arguments, *given)

    launch.tensors = fixed
    return launch


def _pinned(device: torch.device, *size: int) -> Tensor:
    """Memory from which the device can copy while the host goes on."""
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")


def _tiles(device: torch.device, numel: bytes, dtypes: bytes) -> tuple[Tiles, Tensor]:
    """The tiles of all tensors, and how many there are before those of each tensor, and in all."""
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


def _shape(tables: tuple) -> tuple[tuple[int, ...], bytes, bytes]:
    """What launches depend on: the lengths of the tables, and of all tensors how many elements and which dtypes."""
    tensors, size = memoryview(tables[0]), _ENTRY["size"]
    numel = tensors.cast("q")[_ENTRY["numel"] // 8 :: size // 8].tobytes()
    return tuple(map(len, tables)), numel, tensors[_ENTRY["dtypes"] :: size].tobytes()


class _Tables:
    """Tables of one shape on a device, for one stream, and the launches that read them.

    The host writes to one slot of pinned memory after the other, from which tables are copied: it can be ahead of the
    device by half of the slots at least.
    """

    def __init__(self, device: torch.device, shape: tuple, prepare: Prepare) -> None:
        lengths, *sizes = shape
        self.size, self.tiles = sum(lengths), _tiles(device, *sizes)
        self._there = torch.empty(self.size, dtype=torch.uint8, device=device)
        self.launches = prepare(device, *self.tiles, *self._there.split(lengths))
        self._slots, self._next = _pinned(device, _SLOTS, self.size), 0
        self._written = memoryview((ctypes.c_char * self._slots.numel()).from_address(self._slots.data_ptr())).cast(
            "B"
        )
        self._copied = (
            [torch.cuda.Event() for _ in range(2)] if device.type == "cuda" else []
        )  # half of the slots each
        self._views: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def upload(self, data: bytes) -> None:
        """Replaces the last of the bytes, or all of them."""
        at, begin, self._next = self._next, self.size - len(data), (self._next + 1) % _SLOTS
        if begin not in self._views:
            self._views[begin] = self._there[begin:], list(self._slots[:, begin:])
        if self._copied and at % (_SLOTS // 2) == 0:
            half = at // (_SLOTS // 2)
            self._copied[1 - half].record()
            self._copied[half].synchronize()
        self._written[at * self.size + begin : (at + 1) * self.size] = data
        to, slots = self._views[begin]
        to.copy_(slots[at], non_blocking=True)


class _Step:
    """What one kind of step has on one device.

    prepare: makes the launches, of what :func:`_tiles` returns and of the tables, on the device.
    """

    def __init__(self, device: str | torch.device, prepare: Prepare) -> None:
        self.device, self._prepare = torch.device(device), prepare
        self.stream_of = (lambda index: None) if INTERPRETED else triton.runtime.driver.active.get_current_stream
        self._known: dict[tuple, _Tables] = {}
        self._key: tuple | None = None  # version and stream of the tables that are there,
        self._last: _Tables | None = None  # in this memory,
        self._changing = b""  # with these bytes at the end
        self._spare: Tensor | None = None  # pinned memory for the next capture
        self._captured: list = []

    def is_current(self) -> contextlib.AbstractContextManager:
        """Makes the device the current one, for a while."""
        there = self.device.type == "cpu" or torch.cuda.current_device() == self.device.index
        return _AS_IT_IS if there else torch.cuda.device(self.device)

    def launches(self, version: object, stream: int | None, tables: tuple, changing: bytes = b"") -> list:
        """The launches for these tables, which are uploaded unless those of this version are there.

        changing: one more table, which may also differ from the last one of the same version.
        """
        same = (version, stream) == self._key
        if not same or changing != self._changing:
            self._key = None  # should an error come in between
            if same and len(changing) == len(self._changing):
                self._last.upload(changing)
            else:
                tables = (*tables, changing) if changing else tables
                key = stream, shape = stream, _shape(tables)
                if key not in self._known:
                    if len(self._known) == _KNOWN:
                        self._known.clear()
                    self._known[key] = _Tables(self.device, shape, self._prepare)
                self._last = self._known[key]
                self._last.upload(b"".join(tables))
            self._key, self._changing = (version, stream), changing
        return self._last.launches

    def reserve(self) -> None:
        """Takes the pinned memory that the next capture needs, for a capture must not allocate any."""
        if self._spare is None or len(self._spare) != self._last.size:
            self._spare = _pinned(self.device, self._last.size)

    def captured(self, tables: tuple) -> list:
        """Launches for a graph, which will read what is here again, and copy it again, when it is replayed."""
        shape, data = _shape(tables), bytearray().join(tables)
        known = next((known for (_, other), known in self._known.items() if other == shape), None)
        if known is None or self._spare is None or len(self._spare) != len(data):
            raise RuntimeError("this step cannot be captured: take one of the same tensors before each capture")
        source, self._spare = self._spare.copy_(torch.frombuffer(data, dtype=torch.uint8)), None
        there = source.to(self.device, non_blocking=True)
        launches = self._prepare(self.device, *known.tiles, *there.split(shape[0]))
        self._captured.append((source, launches))
        return launches


def _applies(tiles: Tiles, tensors: Tensor, rows: Tensor, skip: Tensor | None) -> list[Launch]:
    made = []
    for kind, table in tiles.items():
        constants = (*types_of(kind), tile_of(kind), skip is not None)
        made.append(_prepare(kernels.apply, rows.device, len(table), constants, tensors, table, rows, skip))
    return made


def _with_rows(device: torch.device, tiles: Tiles, begins: Tensor, tensors: Tensor, rows: Tensor) -> list[Launch]:
    return _applies(tiles, tensors, rows.view(torch.float64), None)


def _sums(reduction: int, device: torch.device, tiles: Tiles, begins: Tensor, tensors: Tensor, *sums) -> list[Launch]:
    of_tiles = torch.empty(sum(map(len, tiles.values())), 2, dtype=torch.float64, device=device)
    made = []
    for kind, table in tiles.items():
        of_p, of_g, _ = types_of(kind)
        constants = (of_p if reduction == layout.SQUARES else of_g, of_g, tile_of(kind), reduction)
        made.append(_prepare(kernels.reduce, device, len(table), constants, tensors, table, begins, of_tiles))
    constants = _BLOCK, reduction
    return [*made, _prepare(kernels.add, device, len(begins) - 1, constants, begins, of_tiles, *sums)]


def _on_device(
    has_trust: bool, reduction: int | None, device: torch.device, tiles: Tiles, begins: Tensor, tensors: Tensor,
    groups: Tensor, requests: Tensor, clip: Tensor | None = None,
) -> list[list[Launch]]:  # fmt: skip
    """One list for each phase: reduce, for trust ratios and clipping, norm, for clipping, advance, apply."""
    n = len(begins) - 1
    rows = torch.empty(n, 10, dtype=torch.float64, device=device)
    skip = torch.empty(1, dtype=torch.int32, device=device)
    # Trust ratios and the 2-norm are made of the same sums.
    of_norm = layout.SQUARES if has_trust and reduction == layout.GRAD_SQUARES else reduction
    needed = [layout.SQUARES] * has_trust + [of_norm] * (clip is not None)
    sums = {which: torch.empty(n, 2, dtype=torch.float64, device=device) for which in needed}
    reduces = [x for which, to in sums.items() if n for x in _sums(which, device, tiles, begins, tensors, to)]
    norms = []
    if clip is not None:
        clip = clip.view(torch.float64)
        norms = [_prepare(kernels.norm, device, 1, (_BLOCK, reduction), groups, requests, clip, sums[of_norm])]
    count = len(groups) // _GROUP["size"]
    of_trust = sums.get(layout.SQUARES)
    advance = _prepare(kernels.advance, device, count, (_BLOCK,), groups, requests, rows, skip, clip, of_trust)
    return [reduces, norms, [advance], _applies(tiles, tensors, rows, skip)]


class Launcher:
    """Launches what one optimizer does on GPUs, or, with Triton's interpreter, on the CPU. Tables are the bytes of
    structs of csrc/tables.h, and are read during the call only.
    """

    capturable = False  # whether a step may be captured after the next one

    def __init__(self) -> None:
        self._steps: dict[tuple, _Step] = {}

    def apply(self, device: str, version: int, tensors: Bytes, rows: Bytes) -> None:
        """Applies rows that are given.

        Args:
            version: another one whenever `tensors` differs from that of the last call for this device.
        """
        step = self._step(device, _with_rows)
        with step.is_current():
            stream = step.stream_of(step.device.index)
            for launch in step.launches(version, stream, (tensors,), bytes(rows)):
                launch(stream)

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
        clip: tuple[float, int, bool] | None = None,
        has_trust: bool = False,
    ) -> None:
        """Advances groups whose P and κ are on a device, and applies to each tensor the row that it has requested.

        Args:
            version: another one whenever one of the tables differs from that of the last call.
            state: has `scales`, where `groups` point to, and `momentum_initialized`: uint8, by slot.
            grad_scale, found_inf: float32 tensors of one element; None: 1 and 0.
            capturing: whether the step is being captured in a graph.
            clip: by what the norm of all gradients is to be at most, layout.GRAD_SQUARES or GRAD_MAX, and whether a
                norm that is not finite changes nothing. The norm is left in `state.norm`, one float64.
            has_trust: whether one of the groups has a Trust, for which tensors are summed up.
        """
        max_norm, reduction, skips_nonfinite = clip or (0.0, None, False)
        step = self._step(state.scales.device, _on_device, has_trust, reduction)
        tables = (tensors, groups or bytes(_GROUP["size"]), requests)
        clipping = struct.pack("3d", max_norm, skips_nonfinite, len(tensors) // _ENTRY["size"]) if clip else b""
        scale, norm = _argument(grad_scale), _argument(state.norm if clip else None)
        to_advance = (_argument(state.momentum_initialized), scale, _argument(found_inf), norm)
        with step.is_current():
            stream = step.stream_of(step.device.index)
            if capturing:
                phases = step.captured((*tables, clipping) if clip else tables)
            else:
                phases = step.launches(version, stream, tables, clipping)
            for launches, given in zip(phases, ((), (scale, norm), to_advance, ()), strict=True):
                for launch in launches:
                    launch(stream, *given)
            if self.capturable and not capturing:
                step.reserve()

    def reduce(self, device: str, tensors: Bytes, reduction: int = layout.SQUARES) -> Tensor:
        """‖p‖² and ‖g‖² of each tensor: float64, one row a tensor, with the same bits whenever it is called.

        Args:
            reduction: with layout.GRAD_SQUARES and GRAD_MAX p is not read: of each row the first number is anything,
                the second ‖g‖² or max |g|, which is NaN where an element is.
        """
        step = self._step(device, _sums, reduction)
        sums = torch.empty(len(tensors) // _ENTRY["size"], 2, dtype=torch.float64, device=step.device)
        if len(sums):
            with step.is_current():
                stream = step.stream_of(step.device.index)
                *launches, add = step.launches(object(), stream, (tensors,))
                for launch in launches:
                    launch(stream)
                add(stream, _argument(sums))
        return sums

    def _step(self, device: str | torch.device, prepare: Prepare, *options: int | None) -> _Step:
        key = (device, prepare, *options)
        if key not in self._steps:
            self._steps[key] = _Step(device, functools.partial(prepare, *options) if options else prepare)
        return self._steps[key]

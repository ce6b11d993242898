"""Uploads the tables of a step and launches its kernels; texp.kernels.step says what stands in a table."""

from array import array
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from texp.kernels import step as kernels

INTERPRETED = not isinstance(kernels.step, JITFunction)
"""Whether Triton runs kernels on the CPU: TRITON_INTERPRET=1 was set when this was imported."""

if INTERPRETED:
    import numpy

# Words of 8 bytes.
_TENSOR, _GROUP, _ROW = 5, 7, 10

# In the order of csrc/step.h `Dtype`.
_TYPES = (tl.float32, tl.float64, tl.bfloat16, tl.float16)

# How Triton compiles the kernels. Whether it fuses products and sums is said of each, for its default changes: from
# 3.10 on it fuses none.
_STEP = {"num_warps": 8, "enable_fp_fusion": True}  # fewer instructions, and one rounding less for each sum
_ADVANCE = {"num_warps": 8, "enable_fp_fusion": False}  # P and κ are to have the bits that the host computes


# Of the byte of dtypes and flags those bits that are dtypes.
_MASK = 0b11001111


def types_of(types: int) -> tuple[tl.dtype, tl.dtype, tl.dtype]:
    """Of p, g and b."""
    return _TYPES[types & 3], _TYPES[types >> 6], _TYPES[types >> 2 & 3]


def tile_of(types: int) -> int:
    """Elements of a program: 8 for each thread, or 4 where the arithmetic is in float64, for want of registers; the
    interpreter likes fewer programs.
    """
    return 1024 * (1 if tl.float64 in types_of(types) else 2) * (4 if INTERPRETED else 1)


_TENSORS_OF_A_GROUP = 256  # that `advance` takes at once


class Launch(NamedTuple):
    """Of the kernel `step`, for all tensors of the same types."""

    types: int  # the byte of a tensor's dtypes, without flags
    tiles: Tensor


class _Tables:
    """The tables of the last step on one device. A step that needs the same ones uploads nothing: they are all that
    a kernel knows of a step, so that they are compared as they are, byte for byte.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._stream: int | None = None
        self._known: tuple[bytearray, ...] = ()
        self._sizes: Tensor | None = None  # of the tensors that the launches are for
        self._spare: Tensor | None = None  # pinned memory for the next capture
        self._captured: list = []  # what graphs read when they are replayed
        self._on_device: list[Tensor] = []
        self._launches: list[Launch] = []
        # For found_inf and grad_scale where there is none.
        self.zero = torch.zeros(1, dtype=torch.float32, device=device)
        self.one = torch.ones(1, dtype=torch.float32, device=device)

    def of(self, *tables: bytearray, capturing: bool = False) -> tuple[list[Tensor], list[Launch]]:
        """The tables on the device, those of tensors first, and the launches that cover all tensors."""
        if capturing:
            on_device, launches, _ = self._made(tables, self._captured_upload)
            self._captured.append((on_device, launches))
            return on_device, launches
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else None
        if self._known != tables or self._stream != stream:
            if self._stream != stream:
                self._sizes = None
            self._known, self._stream = (), stream  # should an error come in between
            self._on_device, self._launches, self._sizes = self._made(
                tables, self._upload, self._sizes, self._launches
            )
            self._known = tables
        return self._on_device, self._launches

    def prepare_capture(self) -> None:
        """Reserves the pinned memory that a capture, which must not allocate any, will need."""
        needed = sum(map(len, self._known)) // 8 + sum(launch.tiles.numel() for launch in self._launches)
        if self.device.type == "cuda" and (self._spare is None or self._spare.numel() < needed):
            self._spare = torch.empty(needed, dtype=torch.int64, pin_memory=True)

    def _made(self, tables, upload, known_sizes=None, known_launches=()) -> tuple[list[Tensor], list[Launch], Tensor]:
        """The tables, the launches, and the sizes that those are for; for the same ones they are not made again."""
        with torch.device("cpu"):
            words = [torch.frombuffer(table, dtype=torch.int64) for table in tables]
            tensors = words[0].view(-1, _TENSOR)
            sizes = torch.stack((tensors[:, 3], tensors[:, 4] >> 56 & _MASK))
            same = known_sizes is not None and torch.equal(sizes, known_sizes)
            tiles = {} if same else _tiles(*sizes)
            whole = torch.cat(words + list(tiles.values()))
        lengths = [len(table) for table in (*words, *tiles.values())]
        on_device = upload(whole).split(lengths)
        made = [Launch(types, table) for types, table in zip(tiles, on_device[len(words) :], strict=True)]
        return list(on_device[: len(words)]), known_launches if same else made, sizes

    def _upload(self, words: Tensor) -> Tensor:
        return words if self.device.type == "cpu" else words.pin_memory().to(self.device, non_blocking=True)

    def _captured_upload(self, words: Tensor) -> Tensor:
        if self._spare is None or self._spare.numel() < len(words):
            raise RuntimeError("this step cannot be captured: take one of the same tensors before each capture")
        source, self._spare = self._spare[: len(words)], None
        self._captured.append(source.copy_(words))
        return source.to(self.device, non_blocking=True)


def _tiles(numel: Tensor, types: Tensor) -> dict[int, Tensor]:
    """For each mix of types its table of tiles, which has one word for each program."""
    made = {}
    for kind in types.unique().tolist():
        index = (types == kind).nonzero().squeeze(1)
        tile = tile_of(kind)
        counts = (numel[index] + tile - 1) // tile
        first = counts.cumsum(0) - counts
        total = int(counts.sum())
        if total:
            within = torch.arange(total) - first.repeat_interleave(counts)
            made[kind] = (index.repeat_interleave(counts) << 32) + within
    return made


class Launcher:
    """Launches the steps of one optimizer."""

    def __init__(self) -> None:
        self._tables: dict[str, _Tables] = {}

    def step(self, device: str, tensors: bytearray, rows: bytearray) -> None:
        """Steps tensors whose rows are given, of the kind FIXED.

        Args:
            device: "cuda:0", say, or "cpu" where Triton's interpreter runs.
            tensors, rows: tables as texp.kernels.step says; `source` is the index of a tensor's row.
        """
        (on_device, on_device_rows), launches = self._tables_of(device).of(tensors, rows)
        not_read = on_device_rows  # in place of found_inf
        self._step(launches, on_device, on_device_rows.view(torch.float64), not_read, on_device=False)

    def step_on_device(
        self,
        tensors: bytearray,
        groups: bytearray,
        started: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        *,
        capturing: bool,
        capturable: bool,
    ) -> None:
        """Steps tensors of groups whose P and κ are on the device, and advances those.

        Args:
            tensors, groups: tables as texp.kernels.step says; `source` is the index of a tensor's group, and a
                group's tensors follow each other.
            started: uint8, by slot: whether the tensor has taken its first step with momentum. Modified in place.
            grad_scale, found_inf: float32 tensors of one element on the device; None: 1 and 0.
            capturing: whether the step is being captured in a graph.
            capturable: whether one may be captured next.
        """
        tables = self._tables_of(str(started.device))
        found_inf = tables.zero if found_inf is None else found_inf
        grad_scale = tables.one if grad_scale is None else grad_scale
        count = len(groups) // 8 // _GROUP
        with torch.device("cpu"):
            source = torch.frombuffer(tensors, dtype=torch.int64).view(-1, _TENSOR)[:, 4] >> 32 & 0xFFFF
            first = array("q", torch.searchsorted(source, torch.arange(count + 1)).tolist())
        (on_device, on_device_groups, on_device_first), launches = tables.of(
            tensors, groups, bytearray(first.tobytes()), capturing=capturing
        )
        rows = torch.empty(len(source) * _ROW, dtype=torch.float64, device=started.device)
        arguments = (on_device_groups, on_device_first, on_device, rows, started, grad_scale, found_inf)
        _launch(kernels.advance, _ADVANCE, count, started.device, *arguments, _TENSORS_OF_A_GROUP)
        self._step(launches, on_device, rows, found_inf, on_device=True)
        if capturable and not capturing:
            tables.prepare_capture()

    def _tables_of(self, device: str) -> _Tables:
        if device not in self._tables:
            self._tables[device] = _Tables(device)
        return self._tables[device]

    def _step(self, launches, tensors: Tensor, rows: Tensor, found_inf: Tensor, *, on_device: bool) -> None:
        for types, tiles in launches:
            arguments = (tensors, tiles, rows, found_inf, *types_of(types), tile_of(types), on_device)
            _launch(kernels.step, _STEP, len(tiles), tensors.device, *arguments)


_compiled: dict[tuple, object] = {}


def _launch(kernel, options: dict, programs: int, device: torch.device, *arguments) -> None:
    """Launches through the kernel that the first launch has compiled: Triton's own look-up costs several times as
    much as a launch.

    Args:
        options: the same ones whenever the kernel is launched.
    """
    grid = (programs, 1, 1)
    if INTERPRETED:
        with numpy.errstate(all="ignore"):  # a GPU does not warn of infinities either
            kernel[grid](*arguments)
        return
    # What a kernel is compiled for, and nothing else: it is told to assume no alignment.
    key = (kernel, device, *(x.dtype if isinstance(x, Tensor) else x for x in arguments))
    with torch.cuda.device(device):
        if (compiled := _compiled.get(key)) is not None:
            compiled[grid](*arguments)
        else:
            _compiled[key] = kernel[grid](*arguments, **options)

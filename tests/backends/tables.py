"""Tables of tensors and rows, made by hand for the Triton kernels; texp.kernels.step says what stands in one."""

import struct
from collections.abc import Hashable, Iterable

import torch
from torch import Tensor

from texp.backends.reference import Entry
from texp.theory import Row

FIXED, STEPPING, IDLE, STATISTIC = range(4)  # kinds
BUFFERED, FRESH = 16, 32  # flags

# csrc/cuda/kernels.h: Tensor, once with g and once with the power of a statistic in its place.
_WITH_GRAD, _WITH_POWER = struct.Struct("=QQQqiHBB"), struct.Struct("=QdQqiHBB")

GROUP = struct.Struct("=32sQ4B4?8x")
HOST, FLOAT32, FLOAT64 = range(3)  # where a number is

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def table_of(rows: Iterable[Row]) -> bytearray:
    return bytearray().join(struct.pack("=10d", *row) for row in rows)


class Table:
    """Tensors for a kernel, in a table."""

    def __init__(self) -> None:
        self.tensors = bytearray()
        self.sources: dict[Hashable, int] = {}  # what stands for a row, and its index
        self.copies: list[Tensor] = []
        self._written: list[Tensor] = []
        self._written_back: list[tuple[Tensor, Tensor]] = []

    def add_fixed(self, entry: Entry, row: Hashable) -> None:
        source = self.sources.setdefault(row, len(self.sources))
        if source >= 0xFFFF:
            raise RuntimeError("a step on a GPU takes at most 65,535 different rows")
        self.add(entry, source, FIXED)

    def add(self, entry: Entry, source: int, kind: int, slot: int = 0, flags: int = 0, power: float = 0.0) -> None:
        p, g, b = entry
        dense = p if _is_dense(p) else self._copied(p, torch.empty_like(p), write_back=True)
        if g is not None and not _same_layout(dense, g):
            g = self._copied(g, torch.empty_like(dense), write_back=False)
        if b is not None:
            self._written.append(b)
            if not _same_layout(dense, b):
                b = self._copied(b, torch.empty_like(dense, dtype=b.dtype), write_back=True)
        self._written.append(p)
        numbers = (_address(b), p.numel(), slot, source, kind, _dtypes(entry) | flags)
        if kind == STATISTIC:
            self.tensors += _WITH_POWER.pack(dense.data_ptr(), power, *numbers)
        else:
            self.tensors += _WITH_GRAD.pack(dense.data_ptr(), _address(g), *numbers)

    def finish(self) -> None:
        """What remains to be done after the kernel."""
        for original, copy in self._written_back:
            original.copy_(copy)
        torch.autograd.graph.increment_version(self._written)

    def _copied(self, x: Tensor, copy: Tensor, *, write_back: bool) -> Tensor:
        copy.copy_(x)
        self.copies.append(copy)
        if write_back:
            self._written_back.append((x, copy))
        return copy


def _dtypes(entry: Entry) -> int:
    """That of p in bits 0 and 1, of b in 2 and 3, of g in 6 and 7; what is not there counts as p, for fewer mixes."""
    p, g, b = (DTYPES.index((entry.param if x is None else x).dtype) for x in entry)
    return p | b << 2 | g << 6


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(x)


def _same_layout(a: Tensor, b: Tensor) -> bool:
    if a.is_contiguous() and b.is_contiguous():
        return True
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(s == t for size, s, t in strides if size > 1) and _is_dense(b)

"""Tables of tensors for kernels that read them (texp.kernels.step says what stands in one), made in Python: what
csrc/plan.h and csrc/launch.h do where there is a C++ core.
"""

import struct
from collections.abc import Hashable, Iterable

import torch
from torch import Tensor

from texp.memory import PLAIN
from texp.reference import Entry
from texp.theory import Row
from texp.torch_internals import is_zero_tensor

FIXED, STEPPING, IDLE, STATISTIC = range(4)  # kinds
BUFFERED, FRESH = 16, 32  # flags

# csrc/cuda.h: Tensor, once with g and once with the power of a statistic in its place.
_WITH_GRAD, _WITH_POWER = struct.Struct("=QQQqiHBB"), struct.Struct("=QdQqiHBB")

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def refusal(entry: Entry, cpu: bool, cuda: bool, shared: set[int]) -> str | None:
    """Why no kernel takes a tensor."""
    p, g, b = entry
    for who, x in (("the parameter", p), ("its gradient", g), ("its momentum buffer", b)):
        if x is None:
            continue
        if type(x) not in PLAIN or x.is_conj() or x.is_neg() or is_zero_tensor(x):
            return f"{who} is a subclass or a lazy view of a tensor"
        if x.layout != torch.strided:
            return f"{who} is not strided (sparse, say)"
        if x.dtype not in _DTYPES:
            return f"{who} is not float32, float64, bfloat16 or float16"
        if x.device != p.device:
            return f"{who} is on another device"
        if x.shape != p.shape:
            return f"{who} has another shape"
        if x is not g and x.is_inference():
            return f"{who} is an inference tensor"
        if x is not g and any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
            return f"{who} holds several elements in one place (expanded)"
    if not (cpu if p.device.type == "cpu" else cuda and p.device.type == "cuda"):
        return "the parameter is on a device whose kernel is not asked for or cannot be used here"
    if id(p) in shared or id(b) in shared:
        return "the parameter or its buffer lies in memory that another tensor of this step lies in, too"
    return None


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
    p, g, b = (_DTYPES.index((entry.param if x is None else x).dtype) for x in entry)
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

"""The tables of csrc/tables.h packed in Python, for tests that call a launcher themselves."""

import struct
from collections.abc import Iterable

import torch
from torch import Tensor

from texp import backends
from texp.theory import Row

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # in the order of Dtype


def launch():
    """texp.kernels.launch, which may be imported only where Triton is."""
    return backends.triton.import_kernels()


def dtypes_of(p: torch.dtype, g: torch.dtype, b: torch.dtype) -> int:
    return DTYPES.index(p) | DTYPES.index(g) << 2 | DTYPES.index(b) << 4


def tensor_entry(p: Tensor, g: Tensor | None = None, b: Tensor | None = None, row: int = 0) -> bytes:
    dtypes = dtypes_of(*(p.dtype if x is None else x.dtype for x in (p, g, b)))
    addresses = (0 if x is None else x.data_ptr() for x in (p, g, b))
    return struct.pack("=QQQqiB3x", *addresses, p.numel(), row, dtypes)


def rows_of(rows: Iterable[Row]) -> bytes:
    return b"".join(struct.pack("=10d", *row) for row in rows)

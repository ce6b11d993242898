"""The tables of csrc/tables.h made in Python, for tests that call a launcher or a kernel themselves."""

from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor

from texp import backends
from texp.theory import Row

layout = backends.triton.import_kernels("layout")  # the structs; it can be imported without Triton
DTYPES = [getattr(torch, name) for name in layout.DTYPES]


def launch() -> ModuleType:
    """texp.kernels.launch, which may be imported only where Triton is."""
    return backends.triton.import_kernels()


def address(x: Tensor | None) -> int | None:
    return None if x is None or x.numel() == 0 else x.data_ptr()


def tensor_entry(p: Tensor, g: Tensor | None = None, b: Tensor | None = None, row: int = 0) -> bytes:
    of_p, of_g, of_b = (DTYPES.index((p if x is None else x).dtype) for x in (p, g, b))
    return bytes(layout.TensorEntry(*map(address, (p, g, b)), p.numel(), row, of_p | of_g << 2 | of_b << 4))


def rows_of(rows: Iterable[Row]) -> bytes:
    return b"".join(layout.Row(*row) for row in rows)

"""Momentum buffers: their dtypes, finding them, making new ones."""

from typing import Any

import torch
from torch import Tensor

from texp.backends.reference import Entry


def buffer_dtype(param: Tensor, other: Tensor, momentum_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the momentum buffer of a parameter.

    Args:
        other: its gradient, or a buffer that exists already.
        momentum_dtype: of the optimizer.
    """
    if momentum_dtype is None:
        return torch.promote_types(param.dtype, other.dtype)
    return momentum_dtype.to_complex() if param.is_complex() else momentum_dtype


def with_buf(entry: Entry, momentum_dtype: torch.dtype | None) -> Entry:
    """The entry with a momentum buffer of zeros, dense or sparse like the gradient."""
    dense = entry.grad.layout == torch.strided
    dtype = buffer_dtype(entry.param, entry.grad, momentum_dtype)
    with torch.inference_mode(False):  # later steps may be outside of it
        return entry._replace(buf=torch.zeros_like(entry.param if dense else entry.grad, dtype=dtype))


def widened(entry: Entry, momentum_dtype: torch.dtype | None) -> Entry:
    """The entry with its momentum buffer converted if that is too narrow, as after model.float()."""
    dtype = torch.promote_types(entry.buf.dtype, buffer_dtype(entry.param, entry.param, momentum_dtype))
    if entry.buf.dtype == dtype or not (entry.buf.is_floating_point() or entry.buf.is_complex()):
        return entry
    with torch.inference_mode(False):
        return entry._replace(buf=entry.buf.to(dtype))


def buf_of(state: dict[Tensor, Any], param: Tensor) -> Tensor | None:
    values = state.get(param)
    return None if values is None else values.get("momentum_buffer")

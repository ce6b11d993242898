"""Which tensors share memory."""

from collections.abc import Iterable

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)


def that_share_memory(tensors: Iterable[Tensor]) -> set[int]:
    """Ids of tensors whose memory, from the first to the last element, overlaps with that of another in the list; a
    tensor that is listed twice counts. Subclasses and sparse tensors are compared by identity alone.
    """
    shared: set[int] = set()
    end, furthest = 0, 0
    for begin, until, tensor in sorted(map(_span, tensors)):
        if begin < end:
            shared.update((tensor, furthest))
        if until > end:
            end, furthest = until, tensor
    return shared


def _span(x: Tensor) -> tuple[int, int, int]:
    """Where its memory begins and ends, and its id. Tensors without an address stand for themselves."""
    if type(x) not in PLAIN or x.layout != torch.strided:
        return id(x), id(x) + 1, id(x)
    begin = x.data_ptr()  # 0 if there are no elements
    if x.is_contiguous():
        return begin, begin + x.nbytes, id(x)
    steps = ((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return begin, begin + (sum(steps) + 1) * x.element_size(), id(x)

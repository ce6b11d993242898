"""Rows and reductions in plain torch: any device, any dtype. This is the definition that other backends are
tested against, so it is written to read like the four equations of texp.theory.Row.
"""

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from texp.backends.base import OK, Backend
from texp.backends.memory import PLAIN, that_share_memory
from texp.theory import Row
from texp.torch_internals import foreach_add, foreach_add_, foreach_copy_, foreach_mul

# Elements that are processed at a time: a share of all, which bounds the temporaries, but at least so many that the
# arithmetic takes longer than the calls.
SHARE, AT_LEAST = 1 / 32, 2**16

SUMMED = 2**14  # elements that are summed at a time: so few that torch does it in one thread


class Entry(NamedTuple):
    """One tensor in a step. `param` and `buf` are modified in place, `grad` is read only."""

    param: Tensor
    grad: Tensor | None = None  # None: 0
    buf: Tensor | None = None  # None: 0, and not written


def written(entries: Iterable[Entry]) -> list[Tensor]:
    """The tensors that a step modifies."""
    return [x for entry in entries for x in (entry.param, entry.buf) if x is not None]


@torch.no_grad()
def apply(row: Row, entries: Iterable[Entry], *, foreach: bool | None = None, shared: set[int] | None = None) -> None:
    """Applies `row` to each entry; params and bufs are modified in place.

    Arithmetic is in float32, or where one of param, grad and buf is wider, in the dtype that holds all of them, and
    is rounded once to the dtypes of param and buf. Sparse grads and bufs are allowed where a_p = c_p = 0; then rows
    of a param that have no gradient are not touched, unless s_p ≠ 1. Sparse bufs are coalesced.

    Args:
        foreach: batch the tensors of each device and dtype, which saves kernel launches. None: if all are plain
            tensors on an accelerator, as in torch.optim. Those that share memory are always stepped one by one.
        shared: the ids of those, if the caller knows them.
    """
    entries = list(entries)
    most = max(AT_LEAST, int(SHARE * sum(entry.param.numel() for entry in entries)))
    if foreach is None:
        foreach = all(type(e.param) in PLAIN and e.param.device.type != "cpu" for e in entries)
    if not foreach:
        batches = [[entry] for entry in entries]
    else:
        shared = that_share_memory(written(entries)) if shared is None else shared
        batches = [batch for _, batch in in_batches([(_kind(entry), entry) for entry in entries], shared)]
    for batch in batches:
        pieces = (piece for entry in batch for piece in _pieces(entry, most))
        for part in in_parts(pieces, lambda piece: piece.param.numel(), most):
            _apply(row, part)


REDUCTIONS = ("squares", "grad_squares", "grad_max")  # in the order of csrc/tables.h


@torch.no_grad()
def reduce(entries: Iterable[Entry], reduction: str = "squares") -> Tensor:
    """‖p‖² and ‖g‖² of each entry: float64 of shape [n, 2], on the device of the entries.

    Elements are squared and added in float64, in an order that depends on the shape and strides of a tensor alone:
    the sums have the same bits in every run, whatever the number of threads. A missing gradient counts as 0, a sparse
    one as the dense tensor that it stands for; for complex numbers, absolute values are squared. For a DTensor the
    sum is over all shards, which takes a collective: all of its processes must call this.

    Args:
        reduction: "squares"; "grad_squares" for ‖g‖² alone, or "grad_max" for max |g| in its place, NaN where an
            element is NaN: p is then not read, and what stands in its column is of no account.
    """
    sums = [
        torch.zeros((), dtype=torch.float64, device=entry.param.device)
        if x is None or (column == 0 and reduction != "squares")
        else _reduced(x, reduction == "grad_max")
        for entry in entries
        for column, x in enumerate(entry[:2])
    ]
    return torch.stack(sums).view(-1, 2) if sums else torch.zeros(0, 2, dtype=torch.float64)


def _reduced(x: Tensor, is_max: bool) -> Tensor:
    if x.layout == torch.sparse_coo:
        x = x.coalesce().values()
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    if type(x) not in PLAIN:
        values = x.to(torch.promote_types(x.dtype, torch.float64)).abs()
        total = (values.amax() if is_max else values.square().sum()) if x.numel() else total
        return total.full_tensor() if hasattr(total, "full_tensor") else total
    for piece in _split(Entry(x), SUMMED) if x.numel() else ():
        if is_max:
            total = torch.maximum(total, piece.param.abs().amax().double())
        else:
            values = torch.view_as_real(piece.param.resolve_conj()) if x.is_complex() else piece.param
            total += values.double().square().sum()
    return total


def _is_lazy(x: Tensor) -> bool:
    """Whether it is conjugated or negated when read; foreach operations cannot write to such views."""
    return x.is_conj() or x.is_neg()


def _kind(entry: Entry) -> tuple:
    """What the entries of a batch have in common: device, dtypes, layouts, whether there are grad and buf."""
    return tuple([None if x is None else (type(x), x.device, x.dtype, x.layout, _is_lazy(x)) for x in entry])


def in_batches(work: Iterable[tuple[Hashable, Entry]], shared: set[int]) -> list[tuple[Hashable, list[Entry]]]:
    """Entries grouped by key. Those that share memory are batches of their own, in the given order, because all of a
    batch is read before any of it is written.
    """
    batches: dict[tuple, list[Entry]] = {}
    for key, entry in work:
        alone = id(entry.param) in shared or id(entry.buf) in shared
        batches.setdefault((key, len(batches) if alone else None), []).append(entry)
    return [(key, batch) for (key, _), batch in batches.items()]


def in_parts(work: Iterable[Any], numel: Callable[[Any], int], most: int) -> Iterator[list[Any]]:
    """Splits the work, in its order, into parts of at most `most` elements each, or of one item."""
    part, size = [], 0
    for item in work:
        elements = numel(item)
        if part and size + elements > most:
            yield part
            part, size = [], 0
        part.append(item)
        size += elements
    if part:
        yield part


def _pieces(entry: Entry, most: int) -> Iterable[Entry]:
    """Views of at most `most` elements each. Subclasses, sparse tensors, and tensors of which one piece might read
    what another writes, stay whole.
    """
    if entry.param.numel() <= most:
        return [entry]
    tensors = [x for x in entry if x is not None]
    plain = all(type(x) in PLAIN and x.layout == torch.strided for x in tensors)
    return [entry] if not plain or that_share_memory(tensors) else _split(entry, most)


def _split(entry: Entry, most: int) -> Iterator[Entry]:
    p = entry.param
    if p.numel() <= most:
        yield entry
        return
    # Along the dimension with the largest stride: pieces of a tensor without gaps have none.
    dim = max((dim for dim, size in enumerate(p.shape) if size > 1), key=p.stride)
    slices = max(1, most * p.shape[dim] // p.numel())
    for begin in range(0, p.shape[dim], slices):
        until = min(slices, p.shape[dim] - begin)
        yield from _split(Entry(*(None if x is None else x.narrow(dim, begin, until) for x in entry)), most)


def arithmetic(entry: Entry) -> torch.dtype:
    """The dtype in which a row is applied: float32, or a wider one if one of the three tensors is."""
    return functools.reduce(torch.promote_types, (x.dtype for x in entry if x is not None), torch.float32)


def _apply(row: Row, batch: list[Entry]) -> None:
    params, grads, bufs = (None if xs[0] is None else list(xs) for xs in zip(*batch, strict=True))
    dtype = arithmetic(batch[0])
    p, g, b = (_term(xs, dtype) for xs in (params, grads, bufs))

    # In the order of torch.optim.SGD: first grad + λp, then the buffer.
    u = _sum(row.a_b, b, 1.0, _sum(row.a_g, g, row.a_p, p))
    d = _sum(1.0, _sum(row.c_g, g, row.c_p, p), row.c_u, u)
    b_next = _sum(row.r_u, u, row.r_d, d)
    if b_next is not None and b_next.tensors is p.tensors:
        b_next = _Term(1.0, foreach_mul(b_next.tensors, b_next.scalar))  # p changes before b is written
    if row.s_p != 1:
        p = _sum(row.s_p, p, -row.e, d)
    elif d is not None:  # in place, so that a sparse d costs only its own rows
        foreach_add_(p.tensors, d.tensors, alpha=-row.e * d.scalar)
    _write(params, p)
    if bufs is not None:
        _write(bufs, b_next)


class _Term(NamedTuple):
    """A scalar times tensors, not multiplied out yet. None in place of a term is 0."""

    scalar: float
    tensors: list[Tensor]


def _term(tensors: list[Tensor] | None, dtype: torch.dtype) -> _Term | None:
    if tensors is None:
        return None
    values = [x.to(dtype) for x in tensors]
    return _Term(1.0, [x.resolve_conj().resolve_neg() for x in values] if _is_lazy(tensors[0]) else values)


def _sum(x: float, a: _Term | None, y: float, b: _Term | None) -> _Term | None:
    """x·a + y·b"""
    a, b = (None if term is None or s == 0 else term._replace(scalar=s * term.scalar) for s, term in ((x, a), (y, b)))
    if a is None or b is None:
        return a or b
    if a.scalar == 1 or type(a.tensors[0]) not in PLAIN:  # a sum of DTensors may be placed otherwise than the first
        return _Term(1.0, foreach_add(_product(a), b.tensors, alpha=b.scalar))
    total = foreach_mul(a.tensors, a.scalar)
    foreach_add_(total, b.tensors, alpha=b.scalar)
    return _Term(1.0, total)


def _product(term: _Term) -> list[Tensor]:
    return term.tensors if term.scalar == 1 else foreach_mul(term.tensors, term.scalar)


def _write(destination: list[Tensor], term: _Term | None) -> None:
    if term is None:
        for x in destination:
            x.zero_()
        return
    values = _product(term)
    if values[0] is destination[0]:
        return
    if destination[0].layout == torch.sparse_coo:
        values = [x.coalesce() for x in values]  # or it would grow by the rows of each gradient
    if type(destination[0]) in PLAIN and not _is_lazy(destination[0]):
        foreach_copy_(destination, values)
    else:
        for x, value in zip(destination, values, strict=True):  # a DTensor has no foreach copy
            x.copy_(value)


class Reference(Backend):
    name = "reference"

    def device_types(self) -> tuple[str, ...]:
        return "cpu", "cuda"

    def reason(self) -> str:
        return OK

    def kernel(self) -> bool:
        return False

    def reduce(self, entries: Iterable[Entry], reduction: str = "squares") -> Tensor:
        return reduce(entries, reduction)

"""Working on θ: a group in exponential form holds Pθ, but code that reads or writes absolute sizes needs θ."""

import gc
import sys
import weakref
from collections.abc import Callable, Iterable
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from texp import backends, theory
from texp.backends.memory import PLAIN
from texp.backends.reference import Entry, in_parts
from texp.step import buffers, checks, groups
from texp.theory import Row, Scale
from texp.torch_internals import foreach_copy_

_BATCH = 1 << 24  # elements that are restored together

Given = list[tuple[int, torch.Size, torch.dtype]]


class _Item(NamedTuple):
    """A tensor in exponential form, and the rows that turn it into θ and back."""

    index: int  # of the group
    find: Callable[[], Tensor | None]
    what: str  # "weight": with its buffer; "gradient": of the tensor; "alone": just the tensor
    fold: Row
    unfold: Row


def fold(optimizer: Any) -> None:
    """Turns the weights and momentum of all groups into θ and v, and their gradients into those at θ, in place."""
    work = _work(optimizer, _items(optimizer), "fold")
    backends.apply(optimizer._stepper, [job[1:] for job in work], lambda left: _check(work[i] for i in left))
    _set_scales(optimizer, [(group, Scale()) for group in optimizer.param_groups])


class Folded:
    """Folds all groups and remembers what they were."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._scales = [(group, groups.scale_of(group)) for group in optimizer.param_groups]
        self._items = _items(optimizer)
        self._saved = list(map(_copy, _entries(optimizer, self._items)))
        fold(optimizer)

    def restore(self) -> None:
        """Restores the exponential form: its old bits wherever θ and v are unchanged, elsewhere that of the present θ
        and v. Raises, and changes nothing, if it cannot.
        """
        items = [*self._items, *self._added()]
        _check(_work(self._optimizer, items, "unfold"))
        each = zip_longest(items, self._saved, _entries(self._optimizer, items))
        there = ((item, saved, now) for item, saved, now in each if now is not None)
        for batch in in_parts(there, lambda part: part[-1].param.numel(), _BATCH):
            again = [_copy(saved) for _, saved, _ in batch]
            work = [(item.fold, entry) for (item, *_), entry in zip(batch, again, strict=True) if entry]
            backends.apply(self._optimizer._stepper, work)
            unchanged = []
            for (item, saved, now), folded in zip(batch, again, strict=True):
                if saved is not None and _same(now, folded):
                    unchanged += [pair for pair in zip(now, saved, strict=True) if pair[0] is not None]
                else:
                    self._restore(item, now, saved or _NOTHING, folded or _NOTHING)
            if unchanged:
                foreach_copy_(*map(list, zip(*unchanged, strict=True)))
        _set_scales(self._optimizer, self._scales)

    def _added(self) -> list[_Item]:
        """Parameters that have been added to these groups meanwhile."""
        known = {id(item.find()) for item in self._items}
        return [
            item
            for index, (group, scale) in enumerate(self._scales)
            if scale.is_exponential()
            for item in _of_params(index, [p for p in group["params"] if id(p) not in known], scale)
        ]

    def _restore(self, item: _Item, now: Entry, saved: Entry, folded: Entry) -> None:
        same_param = _equal(now.param, folded.param)
        same_buf = None if now.buf is None else _equal(now.buf, folded.buf) & same_param
        backends.apply(self._optimizer._stepper, [(item.unfold, now)])
        for x, before, same in ((now.param, saved.param, same_param), (now.buf, saved.buf, same_buf)):
            if x is not None and before is not None and _alike(x, before):
                x.copy_(torch.where(same, before, x))


_NOTHING = Entry(None)


def _items(optimizer: Any) -> list[_Item]:
    """All that fold() changes; raises if there is more to be changed than it can reach."""
    found = optimizer._norm_stats.found(optimizer.param_groups)
    items = []
    for index, group in enumerate(optimizer.param_groups):
        scale = groups.scale_of(group)
        if not scale.is_exponential():
            continue
        _refuse_copies(index, group, optimizer._given_to(group))
        items += _of_params(index, [*group["params"], *_stepped_elsewhere(optimizer, index)], scale)
        stats = optimizer._norm_stats.of(group) if found[index] else ()
        rows = {stat.power: (Row(s_p=scale.P**-stat.power), Row(s_p=scale.P**stat.power)) for stat in stats}
        items += [_Item(index, stat.find, "alone", *rows[stat.power]) for stat in stats]
    return items


def _of_params(index: int, params: list[Tensor], scale: Scale) -> list[_Item]:
    weight = "weight", theory.fold_row(scale), theory.unfold_row(scale)
    gradient = "gradient", Row(s_p=scale.P), Row(s_p=1 / scale.P)
    return [_Item(index, lambda p=p: p, *kind) for kind in (weight, gradient) for p in params]


def _work(optimizer: Any, items: list[_Item], way: str) -> list[tuple[int, Row, Entry]]:
    """The group, the row and the tensors of the items that exist; a gradient that parameters share is taken once."""
    each = zip(items, _entries(optimizer, items), strict=True)
    return [(item.index, getattr(item, way), entry) for item, entry in each if entry]


def _check(work: Iterable[tuple[int, Row, Entry]]) -> None:
    """Raises if a tensor cannot be written to."""
    for index, row, entry in work:
        if not _is_surely_writable(entry):  # the full check takes longer than folding
            checks.check_tensors(index, entry)
            checks.check_row(index, row, entry)


def _is_surely_writable(entry: Entry) -> bool:
    p = entry.param
    return all(
        type(x) in PLAIN and x.layout == torch.strided and x.is_contiguous() and not x.is_inference()
        and x.shape == p.shape and x.device == p.device
        for x in (p, entry.buf) if x is not None
    )  # fmt: skip


def given(group: dict[str, Any]) -> Given:
    """What identifies the parameters of a group, so that fold() can see whether it still holds all of them. Without
    references: they may be large, and torch.utils.swap_tensors refuses tensors with weak references.
    """
    return [(id(p), p.shape, p.dtype) for p in group["params"]]


def _refuse_copies(index: int, group: dict[str, Any], given: Given) -> None:
    """Raises if the group no longer holds the parameters that it was given, nor others of the same shapes in their
    place, such as the shards of fully_shard: something else then steps the model's own weights, or nothing does.
    """
    held = {id(p) for p in group["params"]}
    now = [(p.shape, p.dtype) for p in group["params"]]
    in_place = len(now) == len(given)
    gone = [
        shape
        for i, (of, shape, dtype) in enumerate(given)
        if of not in held and not (in_place and now[i] == (shape, dtype))
    ]
    if gone:
        raise RuntimeError(
            f"parameter group {index} cannot be folded: {len(gone)} of the parameters that it was given (the first "
            f"of shape {tuple(gone[0])}) are no longer in it and would keep Pθ while the others become θ. A wrapper "
            "that steps copies of the weights, as DeepSpeed's ZeRO does, has to be asked for θ itself, or the "
            "model's weights be divided by group['scale']"
        )


def _stepped_elsewhere(optimizer: Any, index: int) -> list[Tensor]:
    """Parameters of the group that are in this process's model but stepped by other processes, under
    torch.distributed.optim.ZeroRedundancyOptimizer. Their momentum is there, too.
    """
    own = {id(p) for p in optimizer.param_groups[index]["params"]}
    return [p for group in exposed(optimizer)[index : index + 1] for p in group["params"] if id(p) not in own]


def exposed(optimizer: Any) -> list[dict[str, Any]]:
    """The groups that ZeroRedundancyOptimizer shows, with the parameters of all processes. At every step it copies
    their options into the optimizer's groups. There is no reference to it, so all objects are searched: once, and
    only if the class has been imported.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return []
    if optimizer._zero is None:
        of = (x for x in gc.get_objects() if issubclass(type(x), module.ZeroRedundancyOptimizer))
        zero = next((x for x in of if getattr(x, "optim", None) is optimizer), None)
        optimizer._zero = (lambda: None) if zero is None else weakref.ref(zero)
    zero = optimizer._zero()
    return [] if zero is None else zero.param_groups


def _entries(optimizer: Any, items: list[_Item]) -> list[Entry | None]:
    """What each item is now; None also for a gradient that is in the list already: parameters may share one."""
    entries, gradients = [], set()
    for item in items:
        tensor = item.find()
        if item.what == "gradient":
            tensor = None if id(tensor.grad) in gradients else tensor.grad
            gradients.add(id(tensor))
        buf = buffers.buf_of(optimizer.state, tensor) if item.what == "weight" else None
        entries.append(None if tensor is None else Entry(tensor, buf=buf))
    return entries


def _copy(entry: Entry | None) -> Entry | None:
    with torch.inference_mode(False):  # kernels do not take inference tensors
        return None if entry is None else Entry(*(None if x is None else x.detach().clone() for x in entry))


def _same(now: Entry, folded: Entry) -> bool:
    """A quick check that nothing was changed; False if in doubt."""
    return all(
        a is b if a is None or b is None else type(a) in PLAIN and _alike(a, b) and torch.equal(a, b)
        for a, b in zip(now, folded, strict=True)
    )


def _equal(a: Tensor, b: Tensor | None) -> Tensor:
    """A mask of the elements that are equal, NaN included; all False if the model was converted meanwhile."""
    if b is None or not _alike(a, b):
        return torch.zeros((), dtype=torch.bool, device=a.device)
    return (a == b) | ((a != a) & (b != b))


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether their elements can be compared."""
    return a.layout == b.layout == torch.strided and (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def _set_scales(optimizer: Any, scales: list[tuple[dict[str, Any], Scale]]) -> None:
    shown = dict(zip(map(id, optimizer.param_groups), exposed(optimizer), strict=False))
    for group, scale in scales:
        for place in (group, shown.get(id(group))):
            if place is not None and scale != groups.scale_of(place):
                groups.set_scale(place, scale)
    # At P = 1 there is nothing that parameters elsewhere would have to agree with.
    optimizer._given = [(group, given(group)) for group in optimizer.param_groups]
    if optimizer._device is not None:
        optimizer._device.write(optimizer.state)

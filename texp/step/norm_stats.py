"""Running statistics that grow with the weights of a group. They are looked up in the model at every step, because
`model.to` and the like replace buffers.
"""

import math
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from texp.step import groups

Found = list[list[tuple[Tensor, float]]]
"""The statistics of each group, with their powers of P."""

_FORMS = (
    "norm_stats must be a list of (module, name, power), (function, power) or (tensor, power), with a finite power "
    "of the scale and a floating-point tensor"
)


class NormStat:
    """A tensor that a step multiplies by the change of P^power.

    Args:
        source: a module and the name of one of its buffers or parameters; or a function that returns the tensor
            (a copy of the model keeps the same function); or the tensor itself, which is held weakly and lost once
            nothing else holds it.
        power: the power of P with which it grows.
        name: for error messages; None: derived from the source.

    Attributes:
        find: returns the tensor, or None if it is lost.
        name, power: as given.
    """

    __slots__ = ("__weakref__", "_attribute", "_held", "_module", "_of_module", "find", "name", "power")

    def __init__(self, *source, power: float, name: str | None = None) -> None:
        if not isinstance(power, (int, float)) or not math.isfinite(power):
            raise ValueError(f"{_FORMS}; got the power {power!r}")
        self._set(source, power, name)
        if self._module is not None:
            self._of_module = source[0]._buffers, source[0]._parameters
        if not _is_statistic(self.find()):
            raise ValueError(f"{_FORMS}; {self.name} is {_described(self.find())}")

    def _set(self, source: tuple, power: float, name: str | None) -> None:
        self.power = float(power)
        self._attribute = self._held = self._module = self._of_module = None
        match source:
            case (nn.Module() as module, str() as attribute):
                self.name = f"{attribute} of {type(module).__name__}"
                self.find: Callable[[], Tensor | None] = self._find_in_module
                self._module = weakref.ref(module, self._module_is_gone)
                self._attribute = attribute
            case (Tensor() as tensor,):
                self.name = f"a tensor of shape {tuple(tensor.shape)}"
                self.find = weakref.ref(tensor)
            case (None,):
                self.find = _lost
            case (function,) if callable(function) and not isinstance(function, nn.Module):
                self.name = getattr(function, "__qualname__", repr(function))
                self.find = function
            case _:
                raise ValueError(f"{_FORMS}; got {source!r}")
        self.name = self.name if name is None else name

    def _find_in_module(self) -> Tensor | None:
        module = self._module()
        if module is None:
            return None
        found = module._buffers.get(self._attribute)
        return module._parameters.get(self._attribute) if found is None else found

    def _module_is_gone(self, _: weakref.ref) -> None:
        # Another module may have taken over its tensor, as SyncBatchNorm does. That module is not tracked.
        held = (of.get(self._attribute) for of in self._of_module or ())
        tensor = next((x for x in held if x is not None), None)
        self.find = _lost if tensor is None else weakref.ref(tensor)
        self.name += " (a module that is no longer there)"
        self._module = self._of_module = None

    def source(self) -> tuple:
        """What it was made from, or the tensor that is left of it: the arguments for a copy."""
        if self._module is not None:
            return self._module(), self._attribute
        if isinstance(self.find, weakref.ref) or self.find is _lost:
            return (self.find(),)
        return (self.find,)

    def __reduce__(self) -> tuple:
        return _copy, (self.source(), self.power, self.name)

    def __repr__(self) -> str:
        return f"NormStat({self.name}, power={self.power:g})"


def _lost() -> None:
    return None


def _copy(source: tuple, power: float, name: str) -> NormStat:
    """A NormStat copied along with its module by pickle or deepcopy. The module may not be complete yet, and nothing
    else may hold it.
    """
    stat = NormStat.__new__(NormStat)
    stat._set(source, power, name)
    stat._held = source[0]
    return stat


def parsed(given: Any) -> list[NormStat]:
    """The statistics given as group["norm_stats"]; raises ValueError if they are malformed."""
    if not isinstance(given, (list, tuple)):
        raise ValueError(f"{_FORMS}; got {given!r}")
    stats = []
    for stat in given:
        if isinstance(stat, NormStat):
            stats.append(stat)
        elif isinstance(stat, (list, tuple)) and len(stat) in (2, 3):
            stats.append(NormStat(*stat[:-1], power=stat[-1]))
        else:
            raise ValueError(f"{_FORMS}; got {stat!r}")
    return stats


class NormStats(dict):
    """The statistics of an optimizer: from the id of a group to the group and its list. They belong to the group and
    not to its index: DeepSpeed steps one group at a time.
    """

    exposed: Callable[[], list[dict[str, Any]]] = list
    """Returns the groups that a wrapper of the optimizer shows in place of these."""

    def of(self, group: dict[str, Any]) -> list[NormStat]:
        return self[id(group)][1] if id(group) in self else []

    def put(self, group: dict[str, Any], stats: list[NormStat]) -> None:
        self.pop(id(group), None)
        if stats:
            self[id(group)] = group, stats

    def take(self, param_groups: list[dict[str, Any]]) -> None:
        """Moves what has been set as group["norm_stats"] in here.

        Raises ValueError, and changes nothing, if some of it is malformed.
        """
        given = []
        for i, group in enumerate(param_groups):
            if "norm_stats" in group:
                try:
                    given.append((group, parsed(group["norm_stats"])))
                except ValueError as error:
                    raise ValueError(f"parameter group {i}: {error}") from None
        for group, stats in given:
            del group["norm_stats"]
            self.put(group, stats)
        for group in self.exposed():
            group.pop("norm_stats", None)

    def found(self, param_groups: list[dict[str, Any]]) -> Found:
        """The tensors of this step, except those of ordinary groups. The C++ core calls it too.

        Raises ValueError if one can no longer be found, or cannot be scaled.
        """
        if any("norm_stats" in group for group in param_groups):
            self.take(param_groups)
        return [
            _found(i, self.of(group) or self._of_copied(group)) if self and groups.is_exponential(group) else []
            for i, group in enumerate(param_groups)
        ]

    def _of_copied(self, group: dict[str, Any]) -> list[NormStat]:
        """The statistics of a group with the same parameters, if this group is a copy of it."""
        params = list(map(id, group["params"]))
        copied = (stats for of, stats in self.values() if params and list(map(id, of["params"])) == params)
        self.put(group, next(copied, []))
        return self.of(group)


def _found(index: int, stats: list[NormStat]) -> list[tuple[Tensor, float]]:
    tensors = [(stat.find(), float(stat.power)) for stat in stats]
    for (tensor, _), stat in zip(tensors, stats, strict=True):
        if not _is_statistic(tensor):
            why = f"is {_described(tensor)} and cannot be scaled"
            if tensor is None:
                why = (
                    "can no longer be found: the model has replaced it. Give the group's norm_stats anew, named by "
                    "their modules, as (module, 'running_mean', power); texp.param_groups does"
                )
            raise ValueError(f"parameter group {index}: {stat.name}, one of norm_stats, {why}")
    return tensors


def _is_statistic(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_floating_point()


def _described(x: Any) -> str:
    return f"a tensor of {x.dtype}" if isinstance(x, Tensor) else repr(x)

"""Statistics that grow with the weights of a group, found anew in the model at every step: `model.to` and the like
replace its buffers.
"""

import math
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from texp.step import groups

Found = list[list[tuple[Tensor, float]]]
"""For each group its statistics and their powers of P."""

_FORMS = (
    "norm_stats must be a list of (module, name, power), (function, power) or (tensor, power), with a finite power "
    "of the scale and a floating-point tensor"
)


class NormStat:
    """A tensor that a step multiplies by the change of P^power.

    Args:
        source: a module and the name of one of its buffers or parameters; or a function that returns the tensor,
            which is not copied with the model; or the tensor itself, which is then held weakly: once nothing else
            holds it, it is lost.
        power: the power of P with which it grows.
        name: what errors are to call it; None: they find a name.

    Attributes:
        find: returns the tensor, or None where it is lost.
        name: what errors call it.
        power: as given.
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
        # Another module may have taken its tensor over, as SyncBatchNorm does. It is followed no further.
        held = (of.get(self._attribute) for of in self._of_module or ())
        tensor = next((x for x in held if x is not None), None)
        self.find = _lost if tensor is None else weakref.ref(tensor)
        self.name += " (a module that is no longer there)"
        self._module = self._of_module = None

    def source(self) -> tuple:
        """What it was made from, or the tensor that remains of it: the arguments of a copy."""
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
    """A NormStat that comes with a copy of its module, by pickle or deepcopy, which may not be complete yet. It is
    kept: there may be no other.
    """
    stat = NormStat.__new__(NormStat)
    stat._set(source, power, name)
    stat._held = source[0]
    return stat


def parsed(given: Any) -> list[NormStat]:
    """Of what stands in a group; raises ValueError where it is no list of statistics."""
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
    """Those of all groups of an optimizer that have any: id of the group to the group and its list. They belong to
    the group itself, wherever it stands: DeepSpeed steps one group at a time.
    """

    exposed: Callable[[], list[dict[str, Any]]] = list
    """Returns groups that a wrapper of the optimizer shows in place of these, and may write into them."""

    def of(self, group: dict[str, Any]) -> list[NormStat]:
        return self[id(group)][1] if id(group) in self else []

    def put(self, group: dict[str, Any], stats: list[NormStat]) -> None:
        self.pop(id(group), None)
        if stats:
            self[id(group)] = group, stats

    def take(self, param_groups: list[dict[str, Any]]) -> None:
        """Takes over what somebody has put into groups, as group["norm_stats"].

        Raises ValueError, and changes nothing, where it cannot.
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
        """The tensors of this step; called by the C++ core too. Those of ordinary groups are not looked for.

        Raises ValueError where one can no longer be found, or cannot be scaled.
        """
        if any("norm_stats" in group for group in param_groups):
            self.take(param_groups)
        return [
            _found(i, self.of(group) or self._of_copied(group)) if self and groups.is_exponential(group) else []
            for i, group in enumerate(param_groups)
        ]

    def _of_copied(self, group: dict[str, Any]) -> list[NormStat]:
        """Those of a group with the same parameters, of which somebody has made a copy of his own."""
        params = list(map(id, group["params"]))
        copied = (other for other, _ in self.values() if params and list(map(id, other["params"])) == params)
        if (other := next(copied, None)) is None:
            return []
        self.put(group, self.of(other))
        return self.of(group)


def _found(index: int, stats: list[NormStat]) -> list[tuple[Tensor, float]]:
    tensors = [(stat.find(), float(stat.power)) for stat in stats]
    for (tensor, _), stat in zip(tensors, stats, strict=True):
        if not _is_statistic(tensor):
            raise ValueError(
                f"parameter group {index}: {stat.name}, one of norm_stats, "
                + (
                    "can no longer be found: the model has replaced it. Give the group's norm_stats anew, named by "
                    "their modules, as (module, 'running_mean', power); texp.param_groups does"
                    if tensor is None
                    else f"is {_described(tensor)} and cannot be scaled"
                )
            )
    return tensors


def _is_statistic(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_floating_point()


def _described(x: Any) -> str:
    return f"a tensor of {x.dtype}" if isinstance(x, Tensor) else repr(x)

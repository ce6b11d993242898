"""Clipping gradients by the norm that they have at θ, in the step itself."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from texp import theory
from texp.backends import reference
from texp.backends.reference import Entry
from texp.step import groups


@dataclass(frozen=True)
class Clip:
    """How the gradients of a step are clipped; the arguments of texp.SGD.

    Attributes:
        limit: (max_norm, which of reference.REDUCTIONS, whether a step is to be left out if the norm is not finite);
            None: gradients are not clipped.
    """

    max_norm: float | None = None
    norm_type: float = 2.0
    error_if_nonfinite: bool = False
    skip_nonfinite: bool = False
    limit: tuple[float, int, bool] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        leaves_out = self.error_if_nonfinite or self.skip_nonfinite
        max_norm = math.inf if self.max_norm is None else groups.number("max_norm", self.max_norm)
        if not max_norm >= 0:
            raise ValueError(f"max_norm must be at least 0, got {self.max_norm}")
        if self.norm_type not in (2, math.inf):
            raise ValueError(f"norm_type must be 2 or inf, got {self.norm_type}")
        if self.error_if_nonfinite and self.skip_nonfinite:
            raise ValueError("a norm that is not finite can raise an error or skip the step, not both")
        if self.max_norm is not None or leaves_out:
            kind = reference.REDUCTIONS.index("grad_squares" if self.norm_type == 2 else "grad_max")
            object.__setattr__(self, "limit", (max_norm, kind, leaves_out))

    def reduce(self, grads: Iterable[tuple[float, Tensor]]) -> float:
        """Of gradients, with the P of their groups: the sum of squares at θ, or the maximum. Waits for devices."""
        total, kind = 0.0, reference.REDUCTIONS[self.limit[1]]
        for P, grad in grads:
            x = float(reference.reduce([Entry(grad, grad)], kind)[0, 1])
            if self.norm_type == 2:
                total += P * P * x
            elif P * x > total or math.isnan(x):
                total = P * x
        return total

    def norm(self, grads: Iterable[tuple[float, Tensor]]) -> float:
        total = self.reduce(grads)
        return math.sqrt(total) if self.norm_type == 2 else total

    def divisor(self, norm: float) -> float:
        """What a step divides gradients of that norm by."""
        factor = theory.clip_factor(norm, self.limit[0])
        return 1 / factor if factor else math.inf

    def refuses(self, norm: float) -> bool:
        """Whether no step is to be taken with gradients of that norm."""
        return self.limit[2] and not math.isfinite(norm)

    def refuse(self) -> None:
        """For such a step: raises RuntimeError, in torch's words, if that was asked for."""
        if self.error_if_nonfinite:
            raise RuntimeError(
                f"The total norm of order {self.norm_type} for gradients from `parameters` is non-finite, so it "
                "cannot be clipped. To disable this error and scale the gradients by the non-finite norm anyway, "
                "set `error_if_nonfinite=False`"
            )

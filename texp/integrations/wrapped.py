"""The optimizer of texp, such as texp.SGD, inside of what frameworks wrap around it."""

from texp.optimizer import FusedOptimizer
from texp.step import groups

# Where a wrapper keeps what it wraps: Lightning, accelerate and DeepSpeed, ZeroRedundancyOptimizer, opacus, SAM of
# pytorch-optimizer, fastai.
KEPT_AS = ("_optimizer", "optimizer", "optim", "original_optimizer", "base_optimizer", "opt")


def texp_sgd(optimizer: object) -> FusedOptimizer | None:
    """The optimizer of texp that `optimizer` is or wraps, however deep; None if there is none.

    Lightning's wrappers are of the class of what they wrap, and keep for themselves what its methods assign: it is
    the innermost that is looked for.
    """
    seen = set()
    while id(optimizer) not in seen:
        seen.add(id(optimizer))
        attributes = getattr(optimizer, "__dict__", {})  # its own, not those that it passes on
        inner = next((attributes[name] for name in KEPT_AS if name in attributes), None)
        if inner is None:
            return optimizer if isinstance(optimizer, FusedOptimizer) else None
        optimizer = inner
    return None


def has_exponential_groups(optimizer: FusedOptimizer) -> bool:
    """Whether any of its parameters hold, or are about to hold, anything but θ."""
    return any(map(groups.is_exponential, optimizer.param_groups))

"""What stands in a parameter group of texp.SGD beside the options of torch.optim.SGD, and what may stand there."""

import math
from typing import Any

import torch
from torch import Tensor

from texp import theory
from texp.theory import Hyperparameters, Row, Scale

# The scale of a group, as it stands in the group and in state dicts.
SCALE_KEYS = {"scale": 1.0, "scale_exponent": 0, "carried_decay": 0.0}

# What groups saved by older versions of torch.optim.SGD may lack.
TORCH_DEFAULTS = {"nesterov": False, "maximize": False, "foreach": None, "differentiable": False, "fused": None}


def scale_of(group: dict[str, Any]) -> Scale:
    return Scale(*(group[key] for key in SCALE_KEYS))


def set_scale(group: dict[str, Any], scale: Scale) -> None:
    group.update(zip(SCALE_KEYS, scale, strict=True))


def is_exponential(group: dict[str, Any]) -> bool:
    """Whether its parameters are, or are about to be, anything but θ itself."""
    scale = scale_of(group)
    return bool(group["scale_invariant"]) or (scale.P, scale.kappa) != (1.0, 0.0)


def hyperparameters(group: dict[str, Any]) -> Hyperparameters:
    numbers = ("lr", "momentum", "dampening", "weight_decay")
    flags = ("nesterov", "maximize", "scale_invariant")
    return Hyperparameters(
        **{key: number(key, group[key]) for key in numbers},
        **{key: bool(group[key]) for key in flags},
    )


def number(name: str, value: Any) -> float:
    """A hyperparameter as a float; raises TypeError for what is not a number."""
    if isinstance(value, Tensor):
        return value.item()
    if not hasattr(value, "__float__"):  # float() would read text
        raise TypeError(f"{name} must be a number or a tensor of one element, got {value!r}")
    return float(value)


def check_scale(group: dict[str, Any]) -> None:
    """Raises ValueError unless the group's scale is one that a step can leave behind."""
    P, exponent, kappa = scale_of(group)
    theory.check_non_negative(scale=P, carried_decay=kappa)
    if not 1 <= P < 2 or not isinstance(exponent, int):
        raise ValueError(f"scale must be in [1, 2) and scale_exponent an integer, got {P} and {exponent}")


def check_norm_stats(norm_stats: Any) -> None:
    """Raises ValueError unless it is a list of pairs of a floating-point tensor and a finite number."""
    for stat in norm_stats if isinstance(norm_stats, list) else [None]:
        tensor, power = stat if isinstance(stat, tuple) and len(stat) == 2 else (None, None)
        number = isinstance(power, (int, float)) and math.isfinite(power)
        if not (isinstance(tensor, Tensor) and torch.is_floating_point(tensor) and number):
            raise ValueError(
                "norm_stats must be a list of pairs (floating-point tensor, finite power of the scale), got "
                f"{norm_stats!r}"
            )


def check_step(index: int, group: dict[str, Any]) -> None:
    """Raises ValueError where a step of the group `index` would start from a wrong scale or wrong norm_stats."""
    try:
        check_scale(group)
        check_norm_stats(group["norm_stats"])
    except ValueError as error:
        raise ValueError(f"parameter group {index}: {error}") from None


def check_sparse(index: int, hyper: Hyperparameters, row: Row) -> None:
    """Raises RuntimeError where `row` would make a sparse gradient or buffer dense."""
    if hyper.weight_decay != 0 and not (hyper.scale_invariant and hyper.momentum == 0):
        raise RuntimeError(
            f"parameter group {index}: sparse gradients with weight_decay = {hyper.weight_decay} need a "
            "scale_invariant group without momentum (torch.optim.SGD refuses them altogether); an ordinary decay "
            "would have to touch every row of the parameter"
        )
    if row.a_p != 0 or row.c_p != 0:
        raise RuntimeError(
            f"parameter group {index}: with sparse gradients lr·weight_decay must be at most {1 - theory.ALPHA_MIN} "
            f"and no decay may be carried in the momentum, got lr = {hyper.lr}, weight_decay = {hyper.weight_decay}"
        )


class AsIs:
    """Carries a value past torch's load_state_dict, which copies what stands in groups and casts tensors to the
    parameter's dtype."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict) -> "AsIs":
        return self


def prepare_loading(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Checks a state dict, fills in what torch.optim.SGD does not save, and keeps the dtypes of buffers.

    A pre-hook of load_state_dict; raises ValueError where something does not fit.
    """
    groups, state = [], dict(state_dict["state"])
    for index, saved in enumerate(state_dict["param_groups"]):
        saved = dict(saved)
        groups.append(saved)
        if index >= len(optimizer.param_groups):
            continue  # torch has the error for this
        group = optimizer.param_groups[index]
        if not SCALE_KEYS.keys() <= saved.keys():
            saved.update(SCALE_KEYS, scale_invariant=group["scale_invariant"])
        # The model's own, and how the step runs here, are not part of a run's state.
        saved.update(norm_stats=AsIs(group["norm_stats"]), capturable=group["capturable"])
        check_scale(saved)
        if optimizer.defaults["differentiable"] and is_exponential(saved):
            raise ValueError(
                f"parameter group {index} of the state dict is scale_invariant, this optimizer is "
                "differentiable: fold() the one that was saved first"
            )
        for key, param in zip(saved["params"], group["params"], strict=False):
            buf = state.get(key, {}).get("momentum_buffer")
            if buf is None:
                continue
            if buf.shape != param.shape:
                raise ValueError(
                    f"loaded state dict has a momentum buffer of shape {tuple(buf.shape)} for a parameter of shape "
                    f"{tuple(param.shape)} (number {key} of the state dict)"
                )
            state[key] = {**state[key], "momentum_buffer": AsIs(buf)}
    return {**state_dict, "state": state, "param_groups": groups}

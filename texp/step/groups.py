"""The keys of a parameter group and their valid values. An ordinary group has the keys of torch.optim.SGD and no
others. A group in exponential form also has `scale_invariant` and its scale, all plain numbers, and in a process that
holds none of its parameters, `started`.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from texp import theory
from texp.theory import Hyperparameters, Scale, Trust

# The scale of a group in exponential form: keys and initial values, also in state dicts.
SCALE_KEYS = {"scale": 1.0, "scale_exponent": 0, "carried_decay": 0.0}

# The options of trust ratios, which groups of texp.LARS have and no others.
TRUST_KEYS = ("trust_coeff", "eps", "trust_clip", "always_adapt")

# Keys that groups saved by older versions of torch.optim.SGD may lack.
TORCH_DEFAULTS = {"nesterov": False, "maximize": False, "foreach": None, "differentiable": False, "fused": None}


def scale_of(group: dict[str, Any]) -> Scale:
    """The scale of a group; Scale() if it has none, as an ordinary group."""
    return Scale(*(group.get(key, value) for key, value in SCALE_KEYS.items())) if "scale" in group else Scale()


def set_scale(group: dict[str, Any], scale: Scale) -> None:
    group.update(zip(SCALE_KEYS, scale, strict=True))


def set_keys(group: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Sets the keys that a new group in exponential form has besides those of torch.optim.SGD, and removes ours from
    an ordinary one.
    """
    values = {**SCALE_KEYS, **defaults, **group}
    group.pop("norm_stats", None)
    if is_exponential(values):
        group["scale_invariant"] = is_scale_invariant(values)
        set_scale(group, scale_of(values))
        return
    # The flag is kept only if the default differs from it.
    for key in SCALE_KEYS if is_scale_invariant(defaults) else ("scale_invariant", *SCALE_KEYS):
        group.pop(key, None)


def is_exponential(group: dict[str, Any]) -> bool:
    """Whether its parameters hold, or are about to hold, anything but θ."""
    return is_scale_invariant(group) or scale_of(group).is_exponential()


def is_scale_invariant(group: dict[str, Any]) -> bool:
    return bool(group.get("scale_invariant", False))


def steps(group: dict[str, Any]) -> bool:
    """Whether the group takes part in a step. A group in exponential form does even if this process holds none of its
    parameters: its scale, and the statistics here, must be the same in all processes.
    """
    params = group["params"]
    return any(p.grad is not None for p in params) if params else is_exponential(group)


def is_first(group: dict[str, Any], bufs: Iterable[Tensor | None]) -> bool:
    """Whether no tensor of a group has a momentum buffer yet; if it has no tensors, as the group says."""
    if group["params"]:
        return all(buf is None for buf in bufs)
    return not group.get("started", False) and scale_of(group) == Scale()


def warn_of_averaging() -> None:
    """Called after a step of a group in exponential form that torch.optim.swa_utils.SWALR has set an LR for."""
    warnings.warn(
        "the weights of a scale_invariant group are averaged, as torch.optim.swa_utils.SWALR tells, but they are Pθ "
        "with a P that changes: average them inside `with optimizer.folded():`, where they are θ",
        stacklevel=3,
    )


def hyperparameters(group: dict[str, Any]) -> Hyperparameters:
    numbers = ("lr", "momentum", "dampening", "weight_decay")
    return Hyperparameters(
        **{key: number(key, group[key]) for key in numbers},
        **{key: bool(group[key]) for key in ("nesterov", "maximize")},
        scale_invariant=is_scale_invariant(group),
        trust=_trust(group) if "trust_coeff" in group else None,
    )


def _trust(group: dict[str, Any]) -> Trust:
    numbers = (number(key, group[key]) for key in TRUST_KEYS[:2])
    return Trust(*numbers, *(bool(group[key]) for key in TRUST_KEYS[2:]))


def number(name: str, value: Any) -> float:
    """A hyperparameter as a float; raises TypeError if it is no number, ValueError for a tensor of several."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} must be a number or a tensor of one element, got one of shape {tuple(value.shape)}")
    if isinstance(value, Tensor):
        return value.item()
    if not hasattr(value, "__float__"):  # float() would read text
        raise TypeError(f"{name} must be a number or a tensor of one element, got {value!r}")
    return float(value)


def check_scale(group: dict[str, Any]) -> None:
    """Raises ValueError for a scale that no step can have left in a group."""
    P, exponent, kappa = scale_of(group)
    theory.check_non_negative(scale=P, carried_decay=kappa)
    if not 1 <= P < 2 or not isinstance(exponent, int):
        raise ValueError(f"scale must be in [1, 2) and scale_exponent an integer, got {P} and {exponent}")


def check_step(index: int, group: dict[str, Any]) -> None:
    """The same with the index of the group in the message. The C++ core calls it too."""
    try:
        check_scale(group)
    except ValueError as error:
        raise ValueError(f"parameter group {index}: {error}") from None


@dataclass
class AsIs:
    """Carries a value through torch's load_state_dict, which would copy it, and cast a tensor to the parameter's
    dtype.
    """

    value: Any

    def __deepcopy__(self, memo: dict) -> "AsIs":
        return self


def prepare_loading(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Checks a state dict, adds what torch.optim.SGD does not save, and protects the dtypes of buffers.

    A pre-hook of load_state_dict; raises ValueError if something does not fit.
    """
    sizes = [[len(group["params"]) for group in of] for of in (state_dict["param_groups"], optimizer.param_groups)]
    if sizes[0] != sizes[1]:
        return state_dict  # torch raises the error
    groups, state = [], dict(state_dict["state"])
    for index, saved in enumerate(state_dict["param_groups"]):
        saved = dict(saved)
        groups.append(saved)
        group = optimizer.param_groups[index]
        if "scale_invariant" not in saved and is_scale_invariant(group):
            saved.update(SCALE_KEYS, scale_invariant=True)
        saved.pop("norm_stats", None)
        if "trust_coeff" in optimizer.defaults:
            saved.update({key: group[key] for key in TRUST_KEYS if key not in saved})
        elif "trust_coeff" in saved:  # of LARS; a step of SGD must not become one of it
            for key in TRUST_KEYS:
                saved.pop(key, None)
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

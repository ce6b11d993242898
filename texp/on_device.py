"""P and κ of all groups in the memory of a CUDA device, for steps that the host does not follow: those that a
GradScaler may skip, and replays of a captured graph. csrc/device_walk.h takes such steps, csrc/cuda.h has the layout.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from texp import groups
from texp.theory import Scale


class OnDevice:
    """The state of an optimizer's groups while it is on a device; meanwhile what stands in the groups is out of date.

    Attributes:
        states: float64, one row a group: P, κ, and, as int64, the exponent and whether any tensor has started.
        started: uint8, one for each parameter of all groups: whether it has taken its first step.
        ticket: int32, one element, 0 between steps.
    """

    def __init__(self, param_groups: list[dict[str, Any]], state: dict[Tensor, Any], device: torch.device) -> None:
        self.groups = list(param_groups)
        self.params = [tuple(group["params"]) for group in param_groups]
        started = [[_has_buffer(state, p) for p in params] for params in self.params]
        host = torch.zeros(len(self.groups), 4, dtype=torch.float64)
        for row, group, of_params in zip(host, self.groups, started, strict=True):
            scale = groups.scale_of(group)
            row[0], row[1] = scale.P, scale.kappa
            row.view(torch.int64)[2], row.view(torch.int64)[3] = scale.exponent, any(of_params)
        self.states = host.to(device)
        self.started = torch.tensor([x for of_params in started for x in of_params], dtype=torch.uint8).to(device)
        self.ticket = torch.zeros(1, dtype=torch.int32, device=device)

    def is_of(self, param_groups: list[dict[str, Any]], device: torch.device) -> bool:
        """Whether these are still the groups, with the same parameters."""
        return (
            self.states.device == device
            and _same(self.groups, param_groups)
            and all(_same(params, group["params"]) for params, group in zip(self.params, param_groups, strict=True))
        )

    def settle(self, state: dict[Tensor, Any]) -> None:
        """Writes the scales back into the groups, and takes away buffers whose first step was skipped. Waits for the
        device.
        """
        host = self.states.cpu()
        for row, group in zip(host, self.groups, strict=True):
            P, kappa = row[:2].tolist()
            groups.set_scale(group, Scale(P, int(row.view(torch.int64)[2]), kappa))
        started = iter(self.started.tolist())
        for params in self.params:
            for p in params:
                if not next(started) and _has_buffer(state, p):
                    del state[p]["momentum_buffer"]
                    if not state[p]:
                        del state[p]


def _has_buffer(state: dict[Tensor, Any], param: Tensor) -> bool:
    return param in state and state[param].get("momentum_buffer") is not None


def _same(a: Iterable, b: Iterable) -> bool:
    a, b = list(a), list(b)
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))

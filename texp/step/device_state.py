"""P and κ of all groups in the memory of a GPU, for steps that the host does not follow: those that a GradScaler may
skip, and replays of a captured graph. csrc/host/device_walk.h takes such steps.
"""

from typing import Any

import torch
from torch import Tensor

from texp.step import groups
from texp.theory import Scale


class DeviceScaleState:
    """The state of an optimizer's groups while it is on a device. A captured graph knows these tensors by address.

    Attributes:
        scales: float64, one row a group: P, κ, and, as int64, the exponent and whether any tensor has started.
        momentum_initialized: uint8, one for each parameter of all groups: whether it has taken its first step with
            momentum.
        ticket: int32, one element, 0 between steps.
    """

    def __init__(self, param_groups: list[dict[str, Any]], state: dict[Tensor, Any], device: torch.device) -> None:
        self.groups = list(param_groups)
        self.params = [p for group in param_groups for p in group["params"]]
        self._parked: dict[Tensor, Tensor] = {}  # buffers whose first step was skipped, while the host looks
        self._layout = _layout(param_groups)
        host_scales, host_initialized = self._from_host(state)
        self.scales = host_scales.to(device)
        self.momentum_initialized = host_initialized.to(device)
        self.ticket = torch.zeros(1, dtype=torch.int32, device=device)

    def is_of(self, param_groups: list[dict[str, Any]], device: torch.device) -> bool:
        """Whether these are still the groups, with the parameters and scales that they had."""
        return (
            self.scales.device == device
            and _layout(param_groups) == self._layout
            and [groups.scale_of(group) for group in self.groups] == self._known
        )

    def read_back(self, state: dict[Tensor, Any]) -> None:
        """Writes the scales into the groups, and takes buffers whose first step was skipped out of `state`, until
        :meth:`restore`. Waits for the device.
        """
        if self.scales.is_cuda:
            torch.cuda.synchronize(self.scales.device)  # the step may have run on another stream
        for row, group, known in zip(self.scales.cpu(), self.groups, self._known, strict=True):
            if groups.scale_of(group) == known:  # else somebody has set another one since
                P, kappa = row[:2].tolist()
                if (scale := Scale(P, int(row.view(torch.int64)[2]), kappa)) != known:  # an ordinary group has none
                    groups.set_scale(group, scale)
                if "started" in group:
                    group["started"] = bool(row.view(torch.int64)[3])
        self._known = [groups.scale_of(group) for group in self.groups]
        for p, initialized in zip(self.params, self.momentum_initialized.tolist(), strict=True):
            if not initialized and _has_buffer(state, p):
                self._parked[p] = state[p].pop("momentum_buffer")
                if not state[p]:
                    del state[p]

    def restore(self, state: dict[Tensor, Any]) -> None:
        """Gives back what :meth:`read_back` took, before the next step on the device."""
        for p, buf in self._parked.items():
            state[p].setdefault("momentum_buffer", buf)
        self._parked.clear()

    def write(self, state: dict[Tensor, Any]) -> None:
        """Brings the device up to date with the groups, in place."""
        host_scales, host_initialized = self._from_host(state)
        self.scales.copy_(host_scales)
        self.momentum_initialized.copy_(host_initialized)

    def _from_host(self, state: dict[Tensor, Any]) -> tuple[Tensor, Tensor]:
        self._known = [groups.scale_of(group) for group in self.groups]
        scales = torch.zeros(len(self.groups), 4, dtype=torch.float64, device="cpu")
        for row, group, scale in zip(scales, self.groups, self._known, strict=True):
            row[0], row[1] = scale.P, scale.kappa
            row.view(torch.int64)[2] = scale.exponent
            bufs = [True if _has_buffer(state, p) else None for p in group["params"]]
            row.view(torch.int64)[3] = not groups.is_first(group, bufs)
        initialized = [_has_buffer(state, p) for p in self.params]
        return scales, torch.tensor(initialized, dtype=torch.uint8, device="cpu")


def _layout(param_groups: list[dict[str, Any]]) -> list:
    return [(id(group), groups.is_scale_invariant(group), *map(id, group["params"])) for group in param_groups]


def _has_buffer(state: dict[Tensor, Any], param: Tensor) -> bool:
    return param in state and state[param].get("momentum_buffer") is not None

"""P and κ of all groups in device memory, for steps whose outcome the host does not know: those that a GradScaler may
skip, and replays of a captured graph. csrc/host/step.h takes such steps.
"""

import operator
from typing import Any

import torch
from torch import Tensor

from texp.step import groups
from texp.step.buffers import buf_of
from texp.theory import Scale


class DeviceScaleState:
    """The scales of all groups while they are on a device. Captured graphs refer to its tensors by address.

    Attributes:
        groups, params: what it was made for; the core checks at every step that they are still the same.
        known: for each group whether it is scale-invariant, and its scale when it was last on the host.
        scales: float64, one row for each group: P, κ and, as int64, the exponent and whether any tensor has taken its
            first step with momentum.
        momentum_initialized: uint8, one for each parameter: whether it has taken that step.
        norm: float64, of one element: the norm of the gradients of the last step that clipped them.
        workspace, norm_workspace: for the rows of a step, and for what the norm is made of; allocated by the first
            step.
    """

    def __init__(self, param_groups: list[dict[str, Any]], state: dict[Tensor, Any], device: torch.device) -> None:
        self.groups = list(param_groups)
        self.params = [p for group in param_groups for p in group["params"]]
        self._parked: dict[Tensor, Tensor] = {}  # buffers whose first step was skipped, hidden from the host
        self.scales, self.momentum_initialized = (x.to(device) for x in self._from_host(state))
        self.norm = torch.zeros(1, dtype=torch.float64, device=device)
        self.workspace: Tensor | None = None
        self.norm_workspace: Tensor | None = None

    def is_of(self, param_groups: list[dict[str, Any]]) -> bool:
        """Whether these are still the same groups with the same scales."""
        same = len(param_groups) == len(self.groups) and all(map(operator.is_, param_groups, self.groups))
        return same and list(map(_known, param_groups)) == self.known

    def read_back(self, state: dict[Tensor, Any]) -> None:
        """Copies the scales into the groups, and removes buffers whose first step was skipped from `state` until
        :meth:`restore`. Waits for the device.
        """
        if self.scales.is_cuda:
            torch.cuda.synchronize(self.scales.device)  # steps may have run on other streams
        for row, group, (_, *known) in zip(self.scales.cpu(), self.groups, self.known, strict=True):
            if groups.scale_of(group) == tuple(known):  # otherwise it has been set on the host since
                P, kappa = row[:2].tolist()
                scale = Scale(P, int(row.view(torch.int64)[2]), kappa)
                if scale != tuple(known):  # an ordinary group has no scale
                    groups.set_scale(group, scale)
                if "started" in group:
                    group["started"] = bool(row.view(torch.int64)[3])
        self.known = list(map(_known, self.groups))
        for p, initialized in zip(self.params, self.momentum_initialized.tolist(), strict=True):
            if not initialized and buf_of(state, p) is not None:
                self._parked[p] = state[p].pop("momentum_buffer")
                if not state[p]:
                    del state[p]

    def restore(self, state: dict[Tensor, Any]) -> None:
        """Puts back what :meth:`read_back` removed, before the next step on the device."""
        for p, buf in self._parked.items():
            state[p].setdefault("momentum_buffer", buf)
        self._parked.clear()

    def write(self, state: dict[Tensor, Any]) -> None:
        """Copies the scales of the groups to the device, in place."""
        for own, host in zip((self.scales, self.momentum_initialized), self._from_host(state), strict=True):
            own.copy_(host)

    def _from_host(self, state: dict[Tensor, Any]) -> tuple[Tensor, Tensor]:
        self.known = list(map(_known, self.groups))
        scales = torch.zeros(len(self.groups), 4, dtype=torch.float64, device="cpu")
        for row, group in zip(scales, self.groups, strict=True):
            row[0], exponent, row[1] = groups.scale_of(group)
            row.view(torch.int64)[2] = exponent
            row.view(torch.int64)[3] = not groups.is_first(group, [buf_of(state, p) for p in group["params"]])
        initialized = [buf_of(state, p) is not None for p in self.params]
        return scales, torch.tensor(initialized, dtype=torch.uint8, device="cpu")


def _known(group: dict[str, Any]) -> tuple:
    return groups.is_scale_invariant(group), *groups.scale_of(group)

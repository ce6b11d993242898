"""What a backend is."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from texp import native

OK = "ok"


class Kernels(NamedTuple):
    """What an optimizer takes its steps with."""

    core: ModuleType | None = None
    """The C++ core, which gathers what a step changes; None: texp.backends.reference does all of it."""
    cpu: Any = False
    """The Backend.kernel of tensors on the CPU; False: they are stepped in plain torch."""
    cuda: Any = False
    """The same of tensors on GPUs."""
    scale_on: str | None = None
    """The type of device that can hold P and κ, and advance them."""
    launcher: Any = None
    """The texp.kernels.launch.Launcher of the Triton kernels; None: not theirs."""


class Backend(ABC):
    """A way to take steps on some devices. texp.backends.reference defines what applying rows and summing squares
    mean; other backends do the same in fewer launches. A backend is registered in texp.backends.

    Attributes:
        name: for the argument `backend` of texp.SGD.
        advances: whether it can advance P, κ and the rows on the device of the tensors, and not only the host.
    """

    name: str
    advances = False

    @abstractmethod
    def device_types(self) -> tuple[str, ...]:
        """The devices whose tensors it steps here, such as ("cpu", "cuda")."""

    @abstractmethod
    def reason(self) -> str:
        """OK, or why it cannot be used here. Builds nothing."""

    def supports(self, device: torch.device) -> bool:
        """Whether this device is one that it can use."""
        return True

    def is_default(self) -> bool:
        """Whether it may be chosen if no backend is named."""
        return True

    def kernel(self) -> Any:
        """What applies rows, for a new optimizer: False where that is plain torch, True for a kernel that is part of
        the C++ core, or an object that is given tables, such as a texp.kernels.launch.Launcher.
        """
        return True

    @abstractmethod
    def reduce(self, entries: Iterable, reduction: str = "squares") -> Tensor:
        """As texp.backends.reference.reduce defines it."""


def reason_of_core() -> str:
    """Why there is no C++ core, or OK."""
    return OK if native.load(may_build=False) else f"there is no C++ core: {native.why_missing('TEXP_NATIVE')}"

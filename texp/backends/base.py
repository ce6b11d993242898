"""What a backend is: a way to take steps on some devices, which may not be available here."""

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
    """One way to take steps. texp.backends.reference defines what a step and its sums are; the others do the same in
    as few launches as they can. Each is registered in texp.backends.

    Attributes:
        name: as texp.SGD's argument `backend` has it.
        advances: whether it advances P, κ and the rows where the tensors are. Otherwise the host does.
    """

    name: str
    advances = False

    @abstractmethod
    def device_types(self) -> tuple[str, ...]:
        """Of the tensors that it steps here, as in ("cpu", "cuda")."""

    @abstractmethod
    def reason(self) -> str:
        """Why it cannot be used here, or OK. Builds nothing."""

    def supports(self, device: torch.device) -> bool:
        """Whether it can be used on this very device, where it can be used at all."""
        return True

    def is_default(self) -> bool:
        """Whether it may be taken where no backend is named."""
        return True

    def kernel(self) -> Any:
        """What applies rows, for a new optimizer: False where that is plain torch, True for a kernel that is part of
        the C++ core, or an object that is given tables, such as a texp.kernels.launch.Launcher.
        """
        return True

    @abstractmethod
    def reduce(self, entries: Iterable) -> Tensor:
        """Sums of squares, as texp.backends.reference.reduce defines them."""


def reason_of_core() -> str:
    """Why there is no C++ core, or OK."""
    return OK if native.load(may_build=False) else f"there is no C++ core: {native.why_missing('TEXP_NATIVE')}"

"""The registry of backends: which ones can be used here, and which one takes a step.

By default tensors on the CPU are stepped by the C++ core, and tensors on a GPU by the CUDA kernel or, where that
cannot be used, by Triton. What none of them can take is stepped by texp.backends.reference, in plain torch.
"""

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch

from texp import native
from texp.backends import reference
from texp.backends.base import OK, Backend, Kernels
from texp.backends.cpu import Cpu
from texp.backends.cuda import Cuda
from texp.backends.memory import that_share_memory
from texp.backends.reference import Entry, Reference
from texp.backends.triton import Triton
from texp.theory import Row

ALL: dict[str, Backend] = {backend.name: backend for backend in (Cuda(), Cpu(), Triton(), Reference())}
"""In the order in which they are preferred."""


def core() -> ModuleType | None:
    """The C++ core, which is built if need be; None where it cannot be had, and `available` says why."""
    return native.load(may_build=True)


def available() -> dict[str, str]:
    """For each backend "ok", or the reason why it cannot be used here. Builds nothing."""
    return {name: backend.reason() for name, backend in ALL.items()}


def default_for(device_type: str, devices: Iterable[torch.device] = ()) -> str:
    """The backend that steps tensors on such a device, "cpu" or "cuda", by default; on these, if some are given."""
    return next(
        name
        for name, backend in ALL.items()
        if device_type in backend.device_types()
        and backend.reason() == OK
        and backend.is_default()
        and all(map(backend.supports, devices))
    )


def kernels(name: str | None, gpus: Iterable[torch.device] = ()) -> Kernels:
    """For a new optimizer with backend=`name` and parameters on these GPUs. Builds the C++ core if need be.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for one that is not available: a backend
    that was asked for by name never falls back to another.
    """
    if name is not None and name not in ALL:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, ALL))}, got {name!r}")
    made = Kernels(None if name == "reference" else core())
    if name is not None and ALL[name].reason() != OK:
        reasons = available()
        usable = ", ".join(repr(other) for other in ALL if reasons[other] == OK)
        raise RuntimeError(f"backend={name!r} was requested, but {reasons[name]}; available here: {usable}")
    if name is None:
        chosen = [("cpu", ALL[default_for("cpu")])]
        chosen += [("cuda", ALL[default_for("cuda", gpus)])] if gpus else []
    else:
        chosen = [(device_type, ALL[name]) for device_type in ALL[name].device_types()]
    for device_type, backend in chosen:
        kernel = backend.kernel()
        if backend.advances:
            made = made._replace(scale_on=device_type, launcher=None if kernel is True else kernel)
        made = made._replace(**{device_type: kernel})
    return made


def apply(
    stepper: Any, work: list[tuple[Row, Entry]], check: Callable[[Iterable[int]], object] = lambda left: None
) -> None:
    """Applies its row to each tensor, by the kernels of a core's Stepper, or in plain torch where they cannot take it
    or there is none: `check` is called with the places of these, before anything is changed, and may raise.
    """
    if stepper is None:
        left = range(len(work))
        check(left)
    else:
        left = stepper.apply_rows(work, check)
    work = [work[i] for i in left]
    shared = that_share_memory(reference.written(entry for _, entry in work))
    for row, entries in reference.in_batches(work, shared):
        reference.apply(row, entries, shared=shared)


def refuse_capturable() -> None:
    """Raises RuntimeError, with the reasons, for a step that no kernel can take with P and κ on a GPU."""
    reasons = "; ".join(f"{name!r}: {backend.reason()}" for name, backend in ALL.items() if backend.advances)
    raise RuntimeError(
        "capturable=True was requested, but no parameter is on a GPU for which there is a kernel, and rows that the "
        f"host computes cannot be captured; {reasons}"
    )

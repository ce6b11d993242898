"""Which backend takes a step, and why the others do not.

By default tensors on the CPU are stepped by the C++ core, tensors on a GPU by the CUDA kernel, or by Triton where
that cannot be used, and what none of them can take by texp.backends.reference, in plain torch.
"""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from texp import native
from texp.backends import reference
from texp.backends.memory import that_share_memory
from texp.backends.reference import Entry
from texp.theory import Row

NAMES = ("cuda", "triton", "cpu", "reference")  # in the order in which they are preferred

ON_DEVICE = ("cuda", "triton")  # those that can keep P and κ on a GPU

OK = "ok"


def _import_kernels() -> ModuleType:
    """texp.kernels.launch, from the package, or in a checkout from the folder beside it."""
    here = Path(__file__).parent.parent
    checkout = Path(__file__).resolve().parent.parent.parent  # to whose package there may be a link
    if "texp.kernels" not in sys.modules:
        folders = [folder for folder in (here / "kernels", checkout / "kernels") if (folder / "launch.py").exists()]
        if not folders:
            raise ImportError("texp.kernels is missing; reinstall texp")
        spec = importlib.util.spec_from_file_location(
            "texp.kernels", folders[0] / "__init__.py", submodule_search_locations=[str(folders[0])]
        )
        sys.modules["texp.kernels"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["texp.kernels"])
    return importlib.import_module("texp.kernels.launch")


def core() -> ModuleType | None:
    """The C++ core, which is built if need be; None where it cannot be had, and `available` says why."""
    return native.load(may_build=True)


def _cpu() -> str:
    core = native.load(may_build=False)
    return OK if core is not None else f"there is no C++ core: {native.why_missing('TEXP_NATIVE')}"


# Only when the reason is asked for: it loads the driver, after which a forked process can use no GPU.
@functools.cache
def _cuda_devices() -> tuple[int, str | None]:
    return native.core().cuda_devices()


def _cuda() -> str:
    if (why := _cpu()) != OK:
        return why
    if torch.version.hip is not None:
        return f"torch {torch.__version__} is built for ROCm, whose GPUs the Triton kernels serve"
    if not native.core().with_cuda:
        return f"the CUDA kernel was not built: {native.why_missing('TEXP_CUDA')}"
    devices, error = _cuda_devices()
    if devices < 1:
        return f"the CUDA kernel was built, but no device: {error or 'CUDA sees none'}"
    if not torch.backends.cuda.is_built():
        return f"the CUDA kernel was built, but torch {torch.__version__} was not: it has no CUDA tensors"
    return OK


def triton_missing() -> str:
    """Why there is no Triton that the kernels can be compiled with; "" if there is."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    try:
        version = importlib.import_module("triton").__version__
    except (ImportError, AttributeError) as error:  # any folder of that name passes for a package without a version
        return f"Triton is installed but does not load: {error}"
    too_old = tuple(map(int, version.split(".")[:2])) < (3, 6)
    return f"Triton {version} is too old: its kernels need 3.6 or newer" if too_old else ""


# Only when it is asked for: to import Triton takes longer than everything else here.
@functools.cache
def _triton_kernels() -> tuple[ModuleType | None, str]:
    """texp.kernels.launch, or None and the reason."""
    if why := triton_missing():
        return None, why
    try:
        kernels = _import_kernels()
    except ImportError as error:
        return None, f"Triton is installed but does not load: {error}"
    if not kernels.INTERPRETED and not torch.cuda.is_available():
        return None, "there is no GPU that torch can use; with TRITON_INTERPRET=1 it steps tensors on the CPU, slowly"
    return kernels, OK


def _triton() -> str:
    return why if (why := _cpu()) != OK else _triton_kernels()[1]


_REASONS = {"cuda": _cuda, "triton": _triton, "cpu": _cpu, "reference": lambda: OK}


def available() -> dict[str, str]:
    """For each backend "ok", or the reason why it cannot be used here. Builds nothing."""
    return {name: _REASONS[name]() for name in NAMES}


def default_for(device_type: str) -> str:
    """The backend that steps tensors on such a device, "cpu" or "cuda", by default."""
    if device_type == "cuda":
        return for_gpu()
    return "cpu" if _cpu() == OK else "reference"


class Kernels(NamedTuple):
    """What an optimizer takes its steps with."""

    core: Any = None
    """The C++ core, which gathers what a step changes; None: texp.backends.reference does all of it."""
    cpu: Any = False
    """Who takes tensors on the CPU: no kernel, that of the core (True), or a launcher, which is given the tables."""
    cuda: Any = False
    """The same for tensors on GPUs."""
    scale_on: str | None = None
    """The type of device that can hold P and κ."""
    launcher: Any = None
    """The texp.kernels.launch.Launcher of the Triton kernels; None: not theirs."""


def kernels(name: str | None, gpus: Iterable[torch.device] = ()) -> Kernels:
    """For a new optimizer with backend=`name` and parameters on these GPUs. Builds the C++ core if need be.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for one that is not available: a backend
    that was asked for by name never falls back to another.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, NAMES))}, got {name!r}")
    core_ = None if name == "reference" else core()
    if name is not None and _REASONS[name]() != OK:
        reasons = available()
        usable = ", ".join(repr(other) for other in NAMES if reasons[other] == OK)
        raise RuntimeError(f"backend={name!r} was requested, but {reasons[name]}; available here: {usable}")
    if name is None:
        for_gpus = for_gpu(gpus) if gpus else None
        cpu = core_ is not None
    else:
        for_gpus, cpu = name, name == "cpu"
    if for_gpus == "triton":
        module, _ = _triton_kernels()
        launcher = module.Launcher()
        if module.INTERPRETED:
            return Kernels(core_, cpu=launcher, scale_on="cpu", launcher=launcher)
        return Kernels(core_, cpu, launcher, scale_on="cuda", launcher=launcher)
    if for_gpus == "cuda":
        return Kernels(core_, cpu, True, scale_on="cuda")
    return Kernels(core_, cpu)


def apply(stepper: Any, work: list[tuple[Row, Entry]], check: Callable[[Iterable[int]], object]) -> None:
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


def for_gpu(gpus: Iterable[torch.device] = ()) -> str:
    """The backend that by default steps tensors on GPUs, on these if some are given; "reference" where none can."""
    if _cuda() == OK and all(_cuda_supports(gpu) for gpu in gpus):
        return "cuda"
    return "triton" if _triton() == OK and not _triton_kernels()[0].INTERPRETED else "reference"


def _cuda_supports(gpu: torch.device) -> bool:
    """Whether the CUDA kernel was built for a GPU of its kind."""
    try:
        native.core().load_cuda_kernels(gpu.index)
    except RuntimeError:
        return False
    return True


def refuse_capturable() -> None:
    """Raises RuntimeError, with the reasons, for a step that no kernel can take with P and κ on a GPU."""
    reasons = available()
    raise RuntimeError(
        "capturable=True was requested, but no parameter is on a GPU for which there is a kernel, and rows that the "
        f"host computes cannot be captured; 'cuda': {reasons['cuda']}; 'triton': {reasons['triton']}"
    )

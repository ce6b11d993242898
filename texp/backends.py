"""Which backend takes a step, and why the others do not.

Backends for the tensors of one device share a step: each tensor goes to the best that can take it.
"""

import functools
import importlib
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch  # also: its libraries before those of the core

NAMES = ("cuda", "triton", "cpu", "reference")  # in the order in which they are preferred

OK = "ok"

REINSTALL = "reinstall with TEXP_NATIVE=1 pip install --no-build-isolation ."


def _import(name: str) -> ModuleType | None:
    """texp.`name`, if it is in this folder: finders of editable installs would go on to look in another checkout."""
    full_name = f"texp.{name}"
    found = importlib.machinery.PathFinder.find_spec(full_name, [os.path.dirname(__file__)])
    return importlib.import_module(full_name) if found else None


def _import_kernels() -> ModuleType:
    """texp.kernels.launch, from this folder, or in a checkout from the one beside it."""
    here = Path(__file__).parent
    if "texp.kernels" not in sys.modules:
        folders = [
            folder for folder in (here / "kernels", here.parent / "kernels") if (folder / "launch.py").exists()
        ]
        if not folders:
            raise ImportError("texp.kernels is missing; reinstall texp")
        spec = importlib.util.spec_from_file_location(
            "texp.kernels", folders[0] / "__init__.py", submodule_search_locations=[str(folders[0])]
        )
        sys.modules["texp.kernels"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["texp.kernels"])
    return importlib.import_module("texp.kernels.launch")


def _load() -> tuple[ModuleType | None, str]:
    """The C++ core, or None and the reason. TEXP_NATIVE=0 in the environment turns it off, too."""
    if os.environ.get("TEXP_NATIVE") == "0":
        return None, "TEXP_NATIVE=0 turns the C++ core off"
    try:
        core = _import("_C")
    except ImportError as error:
        return None, f"the C++ core was built but does not load: {error}; {REINSTALL}"
    if core is not None:
        return core, OK
    return None, f"the C++ core was not built: {_left_out('NO_CORE')}; {REINSTALL}"


def _left_out(part: str) -> str:
    """Why setup.py left out a part: NO_CORE or NO_CUDA."""
    return getattr(_import("_build"), part, "") or "texp is run from sources that were not installed"


_C, _CORE = _load()


# Only when the reason is asked for: it loads the driver, after which a forked process can use no GPU.
@functools.cache
def _cuda_devices() -> tuple[int, str | None]:
    return _C.cuda_devices()


def _cuda() -> str:
    if _C is None:
        return _CORE
    if not _C.with_cuda:
        reinstall = REINSTALL.replace("TEXP_NATIVE", "TEXP_CUDA")
        return f"the CUDA kernel was not built: {_left_out('NO_CUDA')}; {reinstall}"
    devices, error = _cuda_devices()
    if devices < 1:
        return f"the CUDA kernel was built, but no device: {error or 'CUDA sees none'}"
    if torch.version.cuda is None:
        return f"the CUDA kernel was built, but torch {torch.__version__} was not: it has no CUDA tensors"
    return OK


# Only when it is asked for: to import Triton takes longer than everything else here.
@functools.cache
def _triton_kernels() -> tuple[ModuleType | None, str]:
    """texp.kernels.launch, or None and the reason."""
    if importlib.util.find_spec("triton") is None:
        return None, "Triton is not installed; pip install triton"
    try:
        version = importlib.import_module("triton").__version__
        if tuple(map(int, version.split(".")[:2])) < (3, 6):
            return None, f"Triton {version} is too old: its kernels need 3.6 or newer"
        kernels = _import_kernels()
    except ImportError as error:
        return None, f"Triton is installed but does not load: {error}"
    if not kernels.INTERPRETED and not torch.cuda.is_available():
        return None, "there is no GPU that torch can use; with TRITON_INTERPRET=1 it steps tensors on the CPU, slowly"
    return kernels, OK


_REASONS = {
    "cuda": _cuda,
    "triton": lambda: _triton_kernels()[1],
    "cpu": lambda: _CORE,
    "reference": lambda: OK,
}


def available() -> dict[str, str]:
    """For each backend "ok", or the reason why it cannot be used here."""
    return {name: _REASONS[name]() for name in NAMES}


def core(name: str | None):
    """What walks over the parameters of a new optimizer in steps by backend=`name`: the C++ core, or a texp.walk.Walk
    in its place, or None if steps are taken by `texp.reference` alone.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for one that is not available: a
    backend that was asked for by name never falls back to another.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, NAMES))}, got {name!r}")
    if name is not None and _REASONS[name]() != OK:
        reasons = available()
        usable = ", ".join(repr(other) for other in NAMES if reasons[other] == OK)
        raise RuntimeError(f"backend={name!r} was requested, but {reasons[name]}; available here: {usable}")
    if name == "triton" and _C is None:
        return importlib.import_module("texp.walk").Walk()
    return None if name == "reference" else _C


class Kernels(NamedTuple):
    """What steps by a backend are taken with."""

    cpu: bool = False  # tensors on the CPU
    cuda: bool = False  # and on GPUs
    scale_on: str | None = None  # type of device that can hold P and κ
    launcher: Any = None  # texp.kernels.launch.Launcher; None: the kernels of the core


def kernels(name: str | None) -> Kernels:
    """For a new optimizer. Those for GPUs have to be asked for: they have not run on one yet."""
    if name == "triton":
        module, _ = _triton_kernels()
        interpreted = module.INTERPRETED
        return Kernels(interpreted, not interpreted, "cpu" if interpreted else "cuda", module.Launcher())
    if name == "cuda":
        return Kernels(cuda=True, scale_on="cuda")
    return Kernels(cpu=name != "reference")


def is_capturable(name: str | None) -> bool:
    """Whether steps by backend=`name` can be captured in a graph."""
    return name in ("cuda", "triton")


def check_capturable(name: str | None) -> None:
    """Raises RuntimeError, with the reasons, unless steps by backend=`name` can be captured in a graph."""
    if not is_capturable(name):
        reasons = available()
        raise RuntimeError(
            "capturable=True was requested, but the other backends compute their rows on the host; "
            f"'cuda': {reasons['cuda']}; 'triton': {reasons['triton']}"
        )

"""Which backend takes a step, and why the others do not.

Backends for the tensors of one device share a step: each tensor goes to the best that can take it.
"""

import functools
import importlib
import importlib.machinery
import os
from types import ModuleType

import torch  # also: its libraries before those of the core

NAMES = ("cuda", "triton", "cpu", "reference")  # in the order in which they are preferred

OK = "ok"

REINSTALL = "reinstall with TEXP_NATIVE=1 pip install --no-build-isolation ."

NO_TRITON = "this version of texp has no Triton kernel (texp.kernels)"


def _import(name: str) -> ModuleType | None:
    """texp.`name`, if it is in this folder: finders of editable installs would go on to look in another checkout."""
    full_name = f"texp.{name}"
    found = importlib.machinery.PathFinder.find_spec(full_name, [os.path.dirname(__file__)])
    return importlib.import_module(full_name) if found else None


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


_REASONS = {
    "cuda": _cuda,
    "triton": lambda: NO_TRITON,
    "cpu": lambda: _CORE,
    "reference": lambda: OK,
}


def available() -> dict[str, str]:
    """For each backend "ok", or the reason why it cannot be used here."""
    return {name: _REASONS[name]() for name in NAMES}


def core(name: str | None):
    """The C++ core if backend=`name` uses it, None if steps are taken by `texp.reference` alone.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for one that is not available: a
    backend that was asked for by name never falls back to another.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, NAMES))}, got {name!r}")
    if name is not None and _REASONS[name]() != OK:
        reasons = available()
        usable = ", ".join(repr(other) for other in NAMES if reasons[other] == OK)
        raise RuntimeError(f"backend={name!r} was requested, but {reasons[name]}; available here: {usable}")
    return None if name == "reference" else _C


def kernels(name: str | None) -> tuple[bool, bool]:
    """Whether backend=`name` uses the kernel of the CPU, and that of CUDA devices. The latter has to be asked for: it
    has not run on a GPU yet.
    """
    return name in (None, "cpu"), name == "cuda"


def is_capturable(name: str | None) -> bool:
    """Whether steps by backend=`name` can be captured in a graph."""
    return kernels(name)[1]


def check_capturable(name: str | None) -> None:
    """Raises RuntimeError, with the reasons, unless steps by backend=`name` can be captured in a graph."""
    if not is_capturable(name):
        reasons = available()
        raise RuntimeError(
            "capturable=True was requested, but the other backends compute their rows on the host; "
            f"'cuda': {reasons['cuda']}; 'triton': {reasons['triton']}"
        )

"""Which backend takes a step, and why the others do not.

Backends for the tensors of one device share a step: each tensor goes to the best that can take it.
"""

import importlib
import importlib.machinery
import os
from types import ModuleType

import torch  # noqa: F401  (its libraries before those of the core)

NAMES = ("cuda", "triton", "cpu", "reference")  # in the order in which they are preferred

OK = "ok"

REINSTALL = "reinstall with TEXP_NATIVE=1 pip install --no-build-isolation ."


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
    build = _import("_build")  # written by setup.py
    reason = "texp is run from sources that were not installed" if build is None else build.NO_CORE
    return None, f"the C++ core was not built: {reason}; {REINSTALL}"


_C, _CORE = _load()


def available() -> dict[str, str]:
    """For each backend "ok", or the reason why it cannot be used here."""
    return {
        "cuda": "this version of texp has no CUDA kernel",
        "triton": "this version of texp has no Triton kernel (texp.kernels)",
        "cpu": _CORE,
        "reference": OK,
    }


def core(name: str | None):
    """The C++ core if backend=`name` uses it, None if steps are taken by `texp.reference` alone.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for one that is not available: a
    backend that was asked for by name never falls back to another.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, NAMES))}, got {name!r}")
    reasons = available()
    if name is not None and reasons[name] != OK:
        usable = ", ".join(repr(other) for other in NAMES if reasons[other] == OK)
        raise RuntimeError(f"backend={name!r} was requested, but {reasons[name]}; available here: {usable}")
    return None if name == "reference" else _C


def kernels(name: str | None) -> tuple[bool, bool]:
    """Whether backend=`name` uses the kernel of the CPU, and that of CUDA devices. The latter has to be asked for: it
    has not run on a GPU yet.
    """
    return name in (None, "cpu"), name == "cuda"


def check_capturable(name: str | None) -> None:
    """Raises RuntimeError, with the reasons, unless steps by backend=`name` can be captured in a graph."""
    if not kernels(name)[1]:
        reasons = available()
        raise RuntimeError(
            "capturable=True was requested, but the other backends compute their rows on the host; "
            f"'cuda': {reasons['cuda']}; 'triton': {reasons['triton']}"
        )

"""Which backend takes a step, and why the others do not.

Backends for the tensors of one device share a step: each tensor goes to the best that can take it.
"""

import os

NAMES = ("cuda", "triton", "cpu", "reference")  # in the order in which they are preferred

OK = "ok"

# The C++ core, where it was built. TEXP_NATIVE=0 in the environment turns it off, too.
_C = None
if os.environ.get("TEXP_NATIVE") == "0":
    _NO_CORE = "TEXP_NATIVE=0 turns the C++ core off"
else:
    try:
        import torch  # noqa: F401  (its libraries first)

        from texp import _C
    except ImportError as error:
        _NO_CORE = f"the C++ core is not part of this installation ({error})"


def available() -> dict[str, str]:
    """For each backend "ok", or the reason why it cannot be used here."""
    return {
        "cuda": "this version of texp has no CUDA kernel",
        "triton": "this version of texp has no Triton kernel (texp.kernels)",
        "cpu": OK if _C is not None else _NO_CORE,
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
        raise RuntimeError(f"backend={name!r} was requested, but {reasons[name]}")
    return None if name == "reference" else _C


def check_capturable() -> None:
    """Raises RuntimeError, with the reasons: no backend of this version can be captured in a graph."""
    reasons = available()
    raise RuntimeError(
        "capturable=True was requested, but the other backends compute their rows on the host; "
        f"'cuda': {reasons['cuda']}; 'triton': {reasons['triton']}"
    )

"""Which backend takes a step, and why the others do not."""

from collections.abc import Callable

from texp import reference

NAMES = ("cuda", "triton", "cpu", "reference")  # in the order in which they are preferred

OK = "ok"

_REASONS = {
    "cuda": "this version of texp has no C++ core (texp._C)",
    "triton": "this version of texp has no Triton kernel (texp.kernels)",
    "cpu": "this version of texp has no C++ core (texp._C)",
    "reference": OK,
}


def available() -> dict[str, str]:
    """For each backend "ok", or the reason why it cannot be used here."""
    return {name: _REASONS[name] for name in NAMES}


def choose(name: str | None) -> Callable[..., None]:
    """The function that applies a row, as `texp.reference.apply` does; of the backend `name`, or for None of
    the best one available.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for one that is not available: a
    backend that was asked for by name never falls back to another.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, NAMES))}, got {name!r}")
    reasons = available()
    if name is not None and reasons[name] != OK:
        raise RuntimeError(f"backend={name!r} was requested, but {reasons[name]}")
    return reference.apply


def check_capturable() -> None:
    """Raises RuntimeError, with the reason, where no backend can be captured in a graph."""
    reasons = available()
    raise RuntimeError(
        "capturable=True was requested, but the reference backend computes its rows on the host; "
        f"'cuda': {reasons['cuda']}; 'triton': {reasons['triton']}"
    )

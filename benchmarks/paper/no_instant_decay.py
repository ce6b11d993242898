"""TEXP without its instant decay (the paper's TEXP−−): where the growth is slow, the network takes long to settle."""

from collections.abc import Mapping, Sequence

from benchmarks.paper import methods, results, step_decay
from benchmarks.paper.results import Check, Curve, at_least
from benchmarks.paper.setup import Setup

TITLE = "TEXP without instant decay: only the growth changes"

SETTLING = 100  # steps after a milestone


def runs(setup: Setup) -> dict[str, methods.Method]:
    return {
        "step-sgd": step_decay.sgd(setup),
        "no-instant": methods.texp(setup, "SGD, TEXP without instant decay, no decay", instant_decay=False),
    }


def checks(curves: Mapping[str, Sequence[Curve]], setup: Setup) -> list[Check]:
    sgd, slow = map(results.average, curves.values())
    start = setup.milestones[0]
    excess = slow.mean_loss(start, start + SETTLING) / sgd.mean_loss(start, start + SETTLING) - 1
    return [at_least(f"loss over that of step decay − 1, first {SETTLING} steps of the second phase", excess, 0.02)]


draw = results.draw

"""TEXP without its instant decay (the paper's TEXP−−): where the growth is slow, the network takes long to settle."""

from collections.abc import Mapping

from benchmarks.paper import results, step_decay, ways
from benchmarks.paper.results import Check, Curve, at_least
from benchmarks.paper.setup import Setup

TITLE = "TEXP without instant decay: only the growth changes"

SETTLING = 100  # steps after a milestone


def runs(setup: Setup) -> dict[str, ways.Way]:
    return {
        "step-sgd": step_decay.sgd(setup),
        "no-instant": ways.texp(setup, "SGD, TEXP without instant decay, no decay", instant_decay=False),
    }


def checks(curves: Mapping[str, Curve], setup: Setup) -> list[Check]:
    sgd, slow = curves.values()
    return [
        at_least(
            f"loss over that of step decay − 1, in the first {SETTLING} steps of phase {phase}",
            slow.mean_loss(start, start + SETTLING) / sgd.mean_loss(start, start + SETTLING) - 1,
            0.02,
        )
        for phase, start in enumerate(setup.milestones, 1)
    ]


draw = results.draw

"""The instant decay of TEXP alone, the LR growing as before: what it changes, passes."""

from collections.abc import Mapping, Sequence

from benchmarks.paper import methods, results, step_decay
from benchmarks.paper.results import WINDOW, Check, Curve, at_least
from benchmarks.paper.setup import Setup

TITLE = "instant decay only: the growth of the first phase throughout"


def runs(setup: Setup) -> dict[str, methods.Method]:
    return {
        "step-sgd": step_decay.sgd(setup),
        "instant-only": methods.texp(setup, "SGD, instant decay only, no decay", taper=False),
    }


def checks(curves: Mapping[str, Sequence[Curve]], setup: Setup) -> list[Check]:
    sgd, instant = map(results.average, curves.values())
    drop, end = [*setup.milestones, setup.steps][:2]

    def change(curve: Curve) -> float:
        after, before = (curve.mean_loss(max(t - WINDOW, 0), t) for t in (end, drop))
        return after / before - 1

    return [
        Check(
            "instant decay only: loss at the end of the phase over that before the drop − 1",
            change(instant),
            -0.02,
            0.02,
        ),
        at_least("step decay: 1 − loss at the end of the phase over that before the drop", -change(sgd), 0.05),
    ]


draw = results.draw

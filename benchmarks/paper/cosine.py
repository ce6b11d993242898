"""A cosine schedule with weight decay, and its exponential form: the LR changes at every step, so that only the
paper's recursion for general schedules will do."""

from collections.abc import Mapping, Sequence

from benchmarks.paper import methods, results
from benchmarks.paper.results import Check, Curve, at_most
from benchmarks.paper.setup import Setup

TITLE = "cosine schedule with weight decay = its exponential form without"


def runs(setup: Setup) -> dict[str, methods.Method]:
    lrs = methods.cosine(setup)
    sgd = methods.sgd(setup, lrs, "SGD, cosine, weight decay")
    return {
        "cosine-sgd": sgd,
        "cosine-translated": methods.translated(setup, lrs, "SGD, translated schedule, no decay"),
        "cosine-texp-sgd": methods.texp_sgd(sgd),
    }


def checks(curves: Mapping[str, Sequence[Curve]], setup: Setup) -> list[Check]:
    sgd, translated, texp_sgd = curves.values()
    return [
        at_most("translated schedule against SGD, loss", results.largest_difference(translated, sgd), 1e-9),
        at_most("exponential form against SGD, loss", results.largest_difference(texp_sgd, sgd), 1e-9),
    ]


draw = results.draw

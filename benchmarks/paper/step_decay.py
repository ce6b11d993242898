"""Step decay with weight decay, and TEXP without it: the paper's closed form, the same with the momentum correction,
and as texp.SGD does it."""

from collections.abc import Mapping, Sequence

from benchmarks.paper import methods, results
from benchmarks.paper.results import Check, Curve
from benchmarks.paper.setup import Setup

TITLE = "step decay with weight decay = TEXP without"


def sgd(setup: Setup) -> methods.Method:
    return methods.sgd(setup, methods.step_decay(setup), "SGD, step decay, weight decay")


def runs(setup: Setup) -> dict[str, methods.Method]:
    return {
        "step-sgd": sgd(setup),
        "step-texp": methods.texp(setup, "SGD, TEXP, no decay"),
        "step-texp-corrected": methods.texp(setup, "TEXP with the momentum correction", corrected=True),
        "step-texp-sgd": methods.texp_sgd(sgd(setup)),
    }


def checks(curves: Mapping[str, Sequence[Curve]], setup: Setup) -> list[Check]:
    sgd, texp, corrected, texp_sgd = curves.values()
    averaged = results.averaged_difference(results.average(texp), results.average(sgd))
    return [
        results.at_most("TEXP against SGD, averaged loss", averaged, 0.03),
        results.at_most("corrected TEXP against SGD, loss", results.largest_difference(corrected, sgd), 1e-9),
        results.at_most("exponential form against SGD, loss", results.largest_difference(texp_sgd, sgd), 1e-9),
    ]


draw = results.draw

"""A fixed LR with weight decay, and the exponential LR without it."""

from collections.abc import Mapping, Sequence

from benchmarks.paper import methods, results
from benchmarks.paper.results import Check, Curve
from benchmarks.paper.setup import CIFAR10, EPOCH, Setup
from texp import theory

TITLE = "fixed LR with weight decay = exponential LR without"


def runs(setup: Setup) -> dict[str, methods.Method]:
    sgd = methods.sgd(setup, methods.fixed(setup), "SGD, fixed LR, weight decay")
    return {
        "fixed-sgd": sgd,
        "fixed-exp": methods.texp(setup, "SGD, EXP, no decay", ()),
        "fixed-exp-corrected": methods.texp(setup, "EXP from the matching momentum buffer", (), corrected=True),
        "fixed-texp-sgd": methods.texp_sgd(sgd),
    }


def checks(curves: Mapping[str, Sequence[Curve]], setup: Setup) -> list[Check]:
    sgd, exp, corrected, texp_sgd = curves.values()
    growth = theory.alpha_star(CIFAR10.lr, CIFAR10.weight_decay, CIFAR10.momentum) ** (-2 * EPOCH)
    end = setup.milestones[0]  # the fixed-LR phase is as long as the first of step decay
    found = [
        Check("growth of the LR in an epoch of the paper", growth, 1.48115, 1.48125),
        results.at_most("exponential form against SGD, loss", results.largest_difference(texp_sgd, sgd), 1e-9),
        results.at_most(
            "EXP from the matching buffer against SGD, loss", results.largest_difference(corrected, sgd), 1e-9
        ),
    ]
    for name, curve in (("SGD", sgd), ("EXP", exp)):
        half = results.average(curve).norm2_over_lr[end // 2 : end]
        what = f"‖w‖²/η̃ in the second half of the phase, {name}, largest over smallest − 1"
        found.append(results.at_most(what, max(half) / min(half) - 1, 0.2))
    return found


draw = results.draw

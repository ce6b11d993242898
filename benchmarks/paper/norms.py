"""Other norms than BatchNorm: step decay with weight decay and its exponential form, on a VGG-like network with
GroupNorm, LayerNorm and InstanceNorm."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from benchmarks.paper import methods, results, step_decay
from benchmarks.paper.results import Check, Curve, at_most
from benchmarks.paper.setup import Setup

TITLE = "the same with GroupNorm, LayerNorm and InstanceNorm"
NORMS = ("gn", "ln", "in")


def runs(setup: Setup) -> dict[str, methods.Method]:
    made, setup = {}, setup.shortened(setup.steps * 2 // 5)
    for norm in NORMS:
        sgd = replace(step_decay.sgd(setup), model=f"vgg-{norm}", label=f"{norm.upper()}: SGD, step decay")
        made[f"{norm}-sgd"] = sgd
        made[f"{norm}-texp-sgd"] = replace(methods.texp_sgd(sgd), label=f"{norm.upper()}: texp.SGD, exponential form")
    return made


def checks(curves: Mapping[str, Sequence[Curve]], setup: Setup) -> list[Check]:
    return [
        at_most(
            f"{norm.upper()}: exponential form against SGD, loss",
            results.largest_difference(curves[f"{norm}-texp-sgd"], curves[f"{norm}-sgd"]),
            1e-9,
        )
        for norm in NORMS
    ]


PAIRS = [
    style
    for wide, thin in (("0.75", "0.2"), ("#b8dfb8", "C2"), ("#f5c9a0", "C1"))
    for style in ({"lw": 3.5, "color": wide}, {"lw": 1.3, "color": thin, "ls": "--"})
]

draw = partial(results.draw, styles=PAIRS)

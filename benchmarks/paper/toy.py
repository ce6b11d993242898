"""The paper's toy example: BatchNorm alone reaches the optimum, weight decay alone reaches it, both together do not.

Two weights, no momentum, from (1, 1). With BatchNorm the loss is w₁²/‖w‖², without it w₁²/2.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.paper.methods import Method
from benchmarks.paper.results import Check, Curve, at_least, at_most
from benchmarks.paper.setup import Setup
from texp.bench.report import pyplot

TITLE = "toy example: BatchNorm and weight decay together never settle"
LR, WEIGHT_DECAY, STEPS = 0.1, 0.1, 20_000


class Toy(NamedTuple):
    """One value a step."""

    loss: list[float]
    intrinsic_lr: list[float]  # η/‖w‖²


def descend(norm: bool, weight_decay: float) -> Toy:
    """Gradient descent from (1, 1)."""
    toy, w1, w2 = Toy([], []), 1.0, 1.0
    for _ in range(STEPS):
        norm2 = w1 * w1 + w2 * w2
        toy.loss.append(w1 * w1 / norm2 if norm else w1 * w1 / 2)
        toy.intrinsic_lr.append(LR / norm2)
        g1, g2 = (2 * w1 * w2 * w2 / norm2**2, -2 * w1 * w1 * w2 / norm2**2) if norm else (w1, 0.0)
        w1, w2 = w1 - LR * (g1 + weight_decay * w1), w2 - LR * (g2 + weight_decay * w2)
    return toy


def runs(setup: Setup) -> dict[str, Method]:
    """None on data."""
    return {}


def toys() -> dict[str, Toy]:
    return {
        "BatchNorm, no decay": descend(True, 0.0),
        "weight decay, no BatchNorm": descend(False, WEIGHT_DECAY),
        "BatchNorm and weight decay": descend(True, WEIGHT_DECAY),
    }


def checks(curves: Mapping[str, Sequence[Curve]], setup: Setup) -> list[Check]:
    *alone, both = toys().items()
    return [
        *(at_most(f"{name}: last loss", toy.loss[-1], 1e-8) for name, toy in alone),
        at_least(
            f"{both[0]}: steps of the second half with a loss above 1e-3",
            sum(loss > 1e-3 for loss in both[1].loss[STEPS // 2 :]),
            101,
        ),
    ]


def write(path: Path) -> None:
    """A CSV of every step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "step", *Toy._fields])
        for name, toy in toys().items():
            writer.writerows([name, step, *values] for step, values in enumerate(zip(*toy, strict=True)))


def draw(title: str, labels: Mapping[str, str], curves: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """Loss and η/‖w‖² against the step, of the first thousand: they go on like that. All are written beside the runs
    of the other experiments."""
    write(path.parent / "steps" / "toy.csv")
    plt = pyplot()
    figure, (loss, intrinsic) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for name, toy in toys().items():
        loss.plot(toy.loss[:1000], lw=1, label=name)
        # Under weight decay without a norm the weights vanish, and this says nothing.
        if name.startswith("BatchNorm"):
            intrinsic.plot(toy.intrinsic_lr[:1000], lw=1)
        else:
            intrinsic.plot([], [])
    loss.set(title="loss", yscale="log", ylim=(1e-12, 2), xlabel="step")
    intrinsic.set(title=r"effective LR, $\eta/\|w\|^2$", yscale="log", xlabel="step")
    for panel in (loss, intrinsic):
        panel.grid(alpha=0.3)
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)

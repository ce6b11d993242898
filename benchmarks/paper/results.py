"""What came of the runs: read from their CSVs, drawn, and held against the shapes that the paper reports."""

import csv
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from texp.bench.report import pyplot

WINDOW = 50  # steps that a loss is averaged over before it is compared: single batches differ by more than the runs


class Curve(NamedTuple):
    """One run: a value a step in each list."""

    loss: list[float]
    log10_lr: list[float]
    norm2_over_lr: list[float]  # ‖w‖²/η̃, the inverse of the intrinsic LR
    test_error: dict[int, float]  # by the number of steps taken before

    def mean_loss(self, start: int, end: int) -> float:
        """Over the steps from `start` to before `end`."""
        return mean(self.loss[start:end])


class Check(NamedTuple):
    """A measured value and what it is to be."""

    what: str
    value: float
    low: float
    high: float

    @property
    def holds(self) -> bool:
        return self.low <= self.value <= self.high


def at_most(what: str, value: float, limit: float) -> Check:
    return Check(what, value, -math.inf, limit)


def at_least(what: str, value: float, limit: float) -> Check:
    return Check(what, value, limit, math.inf)


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def read(path: Path) -> Curve:
    """The CSV of a run."""
    curve = Curve([], [], [], {})
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            if line["test_error"]:
                curve.test_error[int(line["step"])] = float(line["test_error"])
            if line["loss"]:
                curve.loss.append(float(line["loss"]))
                curve.log10_lr.append(float(line["log10_lr"]))
                curve.norm2_over_lr.append(1 / float(line["intrinsic_lr"]))
    return curve


def average(curves: Sequence[Curve]) -> Curve:
    """The mean over the seeds, without the test errors. One run differs from another by some percent, as much as the
    shapes are about."""

    def over_seeds(lists: Iterable[list[float]]) -> list[float]:
        return [mean(values) for values in zip(*lists, strict=True)]

    return Curve(
        over_seeds(curve.loss for curve in curves),
        over_seeds(curve.log10_lr for curve in curves),
        over_seeds(curve.norm2_over_lr for curve in curves),
        {},
    )


def largest_difference(a: Sequence[Curve], b: Sequence[Curve]) -> float:
    """Of the losses of runs with the same seed, at any step."""
    pairs = (zip(x.loss, y.loss, strict=True) for x, y in zip(a, b, strict=True))
    return max(abs(x - y) for pair in pairs for x, y in pair)


def averaged_difference(a: Curve, b: Curve) -> float:
    """The largest relative difference of a's loss from b's, both averaged over 50 steps at a time."""
    starts = range(0, len(b.loss), WINDOW)
    return max(abs(a.mean_loss(s, s + WINDOW) / b.mean_loss(s, s + WINDOW) - 1) for s in starts)


def epochs(curves: Sequence[Curve]) -> list[list[float]]:
    """One row an epoch, the mean over the seeds: its first step, the mean loss, the test error before it, and at its
    first step log10 of the LR and ‖w‖²/η̃."""
    starts = sorted(curves[0].test_error)
    return [
        [s, *(mean(v) for v in zip(*(_epoch(c, s, end) for c in curves), strict=True))]
        for s, end in itertools.pairwise(starts)
    ]


def _epoch(curve: Curve, start: int, end: int) -> tuple[float, float, float, float]:
    return curve.mean_loss(start, end), curve.test_error[start], curve.log10_lr[start], curve.norm2_over_lr[start]


def write_summary(curves: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """One line an epoch and method, to six digits; curves: for each method, one a seed."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "step", "loss", "test_error", "log10_lr", "norm2_over_lr"])
        for name, seeds in curves.items():
            for step, *values in epochs(seeds):
                writer.writerow([name, step, *(f"{value:.6g}" for value in values)])


def write_checks(checks: Iterable[tuple[str, Check]], path: Path) -> None:
    """One line a check: experiment, what is measured, its value, and from where to where it may be."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["experiment", "what", "value", "low", "high", "holds"])
        for experiment, check in checks:
            row = [f"{value:.6g}" for value in (check.value, check.low, check.high)]
            writer.writerow([experiment, check.what, *row, check.holds])


STYLES = (
    {"lw": 3.5, "color": "0.75"},
    {"lw": 1.3, "color": "C1"},
    {"lw": 1.3, "color": "C0", "ls": "--"},
    {"lw": 1.3, "color": "C2", "ls": ":"},
)


def draw(
    title: str, labels: Mapping[str, str], curves: Mapping[str, Sequence[Curve]], path: Path, styles=STYLES
) -> None:
    """Loss and test error, the LR and ‖w‖²/η̃ of every method against the epoch, the mean over the seeds. Of
    the first two the scale is that of all but the first tenth of the run, where they fall from what chance gives."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
    for (name, seeds), style in zip(curves.items(), styles, strict=False):
        columns = list(zip(*epochs(seeds), strict=True))
        epoch = range(len(columns[0]))
        for panel, values in zip(axes, columns[1:], strict=True):
            panel.plot(epoch, values, **style, label=labels[name] if panel is axes[0] else None)
    axes[0].set(title="train loss, mean of an epoch")
    axes[1].set(title="test error")
    axes[2].set(title=r"$\log_{10}$ of the learning rate")
    axes[3].set(title=r"$\|w\|^2$ / learning rate", yscale="log")
    for panel in axes[:2]:
        late = [y for line in panel.get_lines() for y in line.get_ydata()[len(line.get_ydata()) // 10 :]]
        if all(map(math.isfinite, late)):
            room = 0.05 * (max(late) - min(late)) or 0.05
            panel.set_ylim(min(late) - room, max(late) + room)
    for panel in axes:
        panel.set_xlabel("epoch")
        panel.grid(alpha=0.3)
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)

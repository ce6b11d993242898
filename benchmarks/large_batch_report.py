"""What benchmarks/large_batch.py reports: a table, the optimizer's share of the step time, a CSV and a figure.

All are made of the rows of the CSV, one an epoch, with the fields of `Training.epoch` and what tells the runs apart.
"""

import csv
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from texp.bench.report import pyplot

Row = dict[str, Any]

STYLES = {
    "torch": {"lw": 3.5, "color": "0.75", "label": "torch.optim.SGD"},  # below, because the curves should coincide
    "texp": {"lw": 1.3, "color": "C0", "label": "texp.SGD"},
    "lars": {"lw": 1.3, "color": "C1", "label": "texp.LARS"},
}


def summaries(rows: list[Row]) -> list[Row]:
    """One row for each run, in their order: its last epoch, but times are medians over the epochs of the medians over
    each one's steps, on the first process."""
    made = []
    for _, of_run in itertools.groupby(rows, lambda row: (row["optimizer"], row["batch_size"])):
        epochs = list(of_run)
        times = ("samples_per_s", "step_ms", "optimizer_ms", "optimizer_share")
        made.append({**epochs[-1], **{name: statistics.median(row[name] for row in epochs) for name in times}})
    return made


def table(runs: list[Row], peak_lr: Callable[[int], float]) -> Table:
    """Of `summaries`; peak_lr: of a batch size."""
    made = Table("optimizer")
    for column in ("batch size", "peak LR", "last train loss", "last test accuracy", "samples/s", "step"):
        made.add_column(column, justify="right")
    for run in runs:
        made.add_row(
            run["optimizer"],
            str(run["batch_size"]),
            f"{peak_lr(run['batch_size']):g}",
            f"{run['train_loss']:.4f}",
            f"{run['test_accuracy']:.2%}",
            f"{run['samples_per_s']:,.0f}",
            f"{run['step_ms']:.2f} ms",
        )
    return made


def share(run: Row) -> str:
    """Of one of `summaries`, in words."""
    return (
        f"batch {run['batch_size']}: {run['optimizer']}'s optimizer step takes {run['optimizer_ms']:.3f} ms of "
        f"{run['step_ms']:.2f} ms, {run['optimizer_share']:.2%} of a training step"
    )


def write_csv(rows: list[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, tuple(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot(runs: list[Row], path: Path) -> None:
    """`summaries` against the batch size, a curve for each optimizer."""
    plt = pyplot()
    panels = {
        "train_loss": "train loss, last epoch",
        "test_accuracy": "test accuracy, last epoch",
        "samples_per_s": "samples/s",
        "optimizer_share": "optimizer's share of a step",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.4), layout="constrained")
    for panel, (name, title) in zip(axes, panels.items(), strict=True):
        for optimizer, style in STYLES.items():
            mine = sorted((run["batch_size"], run[name]) for run in runs if run["optimizer"] == optimizer)
            if mine:
                panel.plot(*zip(*mine, strict=True), marker="o", **style)
        sizes = sorted({run["batch_size"] for run in runs})
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, sizes)
        panel.minorticks_off()
        panel.set(xlabel="batch size", title=title)
        panel.grid(alpha=0.3)
    for panel in axes[1::2]:
        panel.yaxis.set_major_formatter(plt.matplotlib.ticker.PercentFormatter(1))
    for panel in axes[2:]:
        panel.set_ylim(0)
    run = runs[0]
    where = f"{run['processor'] or run['device']}, processes: {run['processes']}, threads: {run['threads']}"
    figure.suptitle(f"digits on {where}, autocast: {run['amp']}, torch {run['torch']}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES), frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)

"""texp schedule: the paper's schedule as a table, a CSV or a figure."""

import csv
import math
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from texp import theory
from texp.bench.report import pyplot
from texp.cli.common import check_writable, make_console

MOST_STEPS = 10_000_000  # in a CSV or a figure


def schedule(
    lr: Annotated[float, typer.Option(help="η of the first phase.")],
    weight_decay: Annotated[float, typer.Option(help="λ.")],
    momentum: Annotated[float, typer.Option(help="γ.")] = 0.9,
    milestones: Annotated[str, typer.Option(help="Epochs at which the LR decays, as in 80,120.")] = "",
    gamma: Annotated[float, typer.Option(help="Factor of the LR at each milestone.")] = 0.1,
    epochs: Annotated[int, typer.Option(min=1)] = 160,
    steps_per_epoch: Annotated[int, typer.Option(min=1)] = 391,
    csv_path: Annotated[Path | None, typer.Option("--csv", help="Where to write every step.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Where to write a figure.")] = None,
) -> None:
    """Shows the exponential schedule without weight decay that equals a step decay with it."""
    check_writable(csv_path)
    check_writable(plot, figure=True)
    steps = epochs * steps_per_epoch
    every_step = csv_path is not None or plot is not None
    if every_step and steps > MOST_STEPS:
        raise typer.BadParameter(f"--csv and --plot take at most {MOST_STEPS} steps, got {steps}")
    starts = _milestones(milestones, epochs, steps_per_epoch)
    try:
        phases = theory.texp_phases(lr, weight_decay, momentum, starts, gamma)
        ends = [*starts, steps]
        etas = [p.lr for p, end in zip(phases, ends, strict=True) for _ in range(p.start, end)] if every_step else []
        exact = theory.translate(etas, weight_decay, momentum)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None

    # One column for each phase: this fits a narrow terminal.
    table, columns = Table("phase"), []
    for index, (phase, end) in enumerate(zip(phases, ends, strict=True)):
        table.add_column(str(index), justify="right", no_wrap=True)
        growth = -2 * math.log10(phase.alpha)
        of_epoch = growth * steps_per_epoch
        values = {
            "epochs": f"{phase.start // steps_per_epoch}–{end // steps_per_epoch}",
            "LR with decay": f"{phase.lr:.6g}",
            "α*": f"{phase.alpha:.8f}",
            "growth per step": f"{10**growth:.8f}",
            "growth per epoch": f"{10**of_epoch:.4f}" if of_epoch < 4 else f"10^{of_epoch:.4f}",
            "instant factor": f"{phase.instant:.6g}",
            "log10 LR, first": f"{phase.log10_lr:.4f}",
            "log10 LR, last": f"{phase.log10_lr_at(end - 1):.4f}",
        }
        columns.append(values)
    for name in columns[0]:
        table.add_row(name, *(values[name] for values in columns))
    make_console().print(table)
    if not every_step:
        return
    closed = [p.log10_lr_at(t) for p, end in zip(phases, ends, strict=True) for t in range(p.start, end)]
    if csv_path is not None:
        with csv_path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "lr", "log10_texp_lr", "log10_exact_lr"])
            writer.writerows([t, *values] for t, values in enumerate(zip(etas, closed, exact, strict=True)))
        print(csv_path.resolve())
    if plot is not None:
        _plot([t / steps_per_epoch for t in range(steps)], etas, closed, exact, plot)
        print(plot.resolve())


def _milestones(text: str, epochs: int, steps_per_epoch: int) -> list[int]:
    try:
        milestones = [int(epoch) for epoch in text.split(",")] if text else []
    except ValueError:
        raise typer.BadParameter(f"--milestones must be epochs, separated by commas; got {text}") from None
    ascending = sorted(set(milestones)) == milestones
    if not ascending or any(not 0 < epoch < epochs for epoch in milestones):
        raise typer.BadParameter(f"--milestones must ascend from above 0 to below --epochs {epochs}, got {text}")
    return [epoch * steps_per_epoch for epoch in milestones]


def _plot(epoch: list[float], etas: list[float], closed: list[float], exact: list[float], path: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axes.plot(epoch, [math.log10(eta) for eta in etas], color="0.5", label="with weight decay")
    axes.plot(epoch, exact, color="C0", lw=2.5, label="without: exact (texp.theory.translate)")
    axes.plot(epoch, closed, color="C1", ls="--", label="without: TEXP")
    axes.set(xlabel="epoch", ylabel=r"$\log_{10}$ of the learning rate")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)

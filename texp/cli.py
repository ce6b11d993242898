"""The commands: texp demo | schedule | info."""

import csv
import math
import platform
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from texp import __version__, backends, demo, theory

app = typer.Typer(
    name="texp",
    help="SGD in the exponential-learning-rate form of Li & Arora (ICLR 2020).",
    no_args_is_help=True,
    add_completion=False,
)

# What typer raises for bad arguments: click's own class, or that of the copy which newer versions bring along.
UsageError = typer.BadParameter.__base__


def run(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code: 2, with one line on stderr, for bad arguments."""
    try:
        return app(arguments, prog_name="texp", standalone_mode=False) or 0
    except UsageError as error:
        print(f"texp: {error.format_message()}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"texp: this command needs {error.name}; install it with: pip install 'texp[demo]'", file=sys.stderr)
        return 1
    except (typer.Abort, KeyboardInterrupt):
        print("texp: interrupted", file=sys.stderr)
        return 130


@app.command("demo")
def demo_command(
    epochs: Annotated[int, typer.Option(min=4, help="Epochs of 11 steps for each run.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of the initialisation and the batches.")] = 0,
    plot: Annotated[Path, typer.Option(help="Where to write the figure.")] = Path("texp-demo.png"),
    csv_path: Annotated[Path | None, typer.Option("--csv", help="Where to write every step of every run.")] = None,
) -> None:
    """Trains one network on scikit-learn's digits in three ways that the paper says are one."""
    for path in (plot, csv_path):
        _check_writable(path)
    console = _console()
    start = time.perf_counter()
    data, runs = demo.load_digits(), demo.make_runs()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        steps = epochs * (len(data.train_x) // demo.BATCH_SIZE)
        tasks = [progress.add_task(run.name, total=steps, start=False) for run in runs]
        for run, task in zip(runs, tasks, strict=True):
            progress.start_task(task)
            for _ in run.train(data, epochs, seed):
                progress.advance(task)

    table = Table()
    for column, justify in (
        ("run", "left"),
        ("final train loss", "right"),
        ("test accuracy", "right"),
        ("largest difference of the loss", "right"),
        ("log10 of the last LR", "right"),
        ("weight norm, as stored", "right"),
    ):
        table.add_column(column, justify=justify, overflow="fold")
    for run in runs:
        last_epoch = run.loss[-steps // epochs :]
        table.add_row(
            run.name,
            f"{sum(last_epoch) / len(last_epoch):.6f}",
            f"{run.test_accuracy:.2%}",
            "–" if run is runs[0] else f"{demo.largest_difference(run, runs[0]):.1e}",
            f"{run.log10_lr[-1]:.2f}",
            f"{run.weight_norm:.4g}",
        )
    console.print(table)
    if csv_path is not None:
        demo.write_csv(runs, csv_path)
        print(csv_path.resolve())
    demo.plot(runs, epochs, plot)
    print(f"{epochs} epochs, {time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads")
    print(plot.resolve())


@app.command()
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
    """The exponential schedule without weight decay that equals a step decay with it."""
    for path in (csv_path, plot):
        _check_writable(path)
    starts = _milestones(milestones, epochs, steps_per_epoch)
    try:
        phases = theory.texp_phases(lr, weight_decay, momentum, starts, gamma)
        etas = [phase.lr for phase, end in _ends(phases, epochs * steps_per_epoch) for _ in range(phase.start, end)]
        exact = theory.translate(etas, weight_decay, momentum) if csv_path or plot else []
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None

    table = Table()
    for column in (
        "phase", "epochs", "LR", "α*", "growth per step", "growth per epoch", "instant factor",
        "log10 LR, first", "log10 LR, last",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    texp = []
    for index, (phase, end) in enumerate(_ends(phases, epochs * steps_per_epoch)):
        growth = -2 * math.log10(phase.alpha)
        texp += [phase.log10_lr + growth * t for t in range(end - phase.start)]
        table.add_row(
            str(index),
            f"{phase.start // steps_per_epoch}–{end // steps_per_epoch}",
            f"{phase.lr:.6g}",
            f"{phase.alpha:.8f}",
            f"{10**growth:.8f}",
            f"{10 ** (growth * steps_per_epoch):.4f}",
            f"{phase.instant:.6g}",
            f"{phase.log10_lr:.4f}",
            f"{texp[-1]:.4f}",
        )
    _console().print(table)
    if csv_path is not None:
        with csv_path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "lr", "log10_texp_lr", "log10_exact_lr"])
            writer.writerows([t, *values] for t, values in enumerate(zip(etas, texp, exact, strict=True)))
        print(csv_path.resolve())
    if plot is not None:
        _plot_schedule([t / steps_per_epoch for t in range(len(etas))], etas, texp, exact, plot)
        print(plot.resolve())


@app.command()
def info() -> None:
    """Versions, and the backends with the reason for each that is not available."""
    table = Table(show_header=False)
    table.add_row("texp", __version__)
    table.add_row("torch", torch.__version__)
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name, reason in backends.available().items():
        table.add_row(f"backend {name}", reason)
    _console().print(table)


def _console() -> Console:
    # Wide enough for the tables where the output is a file or a pipe, in which case rich would assume 80 columns.
    return Console() if sys.stdout.isatty() else Console(width=160)


def _check_writable(path: Path | None) -> None:
    """Before minutes of training, not after."""
    if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
        raise typer.BadParameter(f"cannot write {path}: its folder does not exist, or it is a folder itself")


def _milestones(text: str, epochs: int, steps_per_epoch: int) -> list[int]:
    try:
        milestones = [int(epoch) for epoch in text.split(",")] if text else []
    except ValueError:
        raise typer.BadParameter(f"--milestones must be epochs, separated by commas; got {text}") from None
    if any(not 0 < epoch < epochs for epoch in milestones):
        raise typer.BadParameter(f"--milestones must lie between 0 and --epochs {epochs}, got {text}")
    return [epoch * steps_per_epoch for epoch in milestones]


def _ends(phases: list[theory.Phase], steps: int) -> list[tuple[theory.Phase, int]]:
    """Each phase with the step after its last."""
    return list(zip(phases, [*(phase.start for phase in phases[1:]), steps], strict=True))


def _plot_schedule(epoch: list[float], etas: list[float], texp: list[float], exact: list[float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axes.plot(epoch, [math.log10(eta) for eta in etas], color="0.5", label="with weight decay")
    axes.plot(epoch, exact, color="C0", lw=2.5, label="without: exact (texp.theory.translate)")
    axes.plot(epoch, texp, color="C1", ls="--", label="without: TEXP")
    axes.set(xlabel="epoch", ylabel=r"$\log_{10}$ of the learning rate")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)

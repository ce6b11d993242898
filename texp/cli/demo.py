"""texp demo: the paper's claim on real data."""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Column, Table

from texp.cli import digits
from texp.cli.common import check_writable, make_console, make_progress


def demo(
    epochs: Annotated[int, typer.Option(min=4, help="Epochs of 11 steps for each run.")] = 100,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Random seed.")] = 0,
    plot: Annotated[Path, typer.Option(help="Where to write the figure.")] = Path("texp-demo.png"),
    csv_path: Annotated[Path | None, typer.Option("--csv", help="Where to write every step of every run.")] = None,
) -> None:
    """Trains one network on scikit-learn's digits in three ways that the paper says are one, and with all of its
    parameters in two."""
    check_writable(plot, figure=True)
    check_writable(csv_path)
    console = make_console()
    # A second thread saves a quarter of the time on an idle machine; beside a busy process it more than doubles it.
    torch.set_num_threads(1)
    start = time.perf_counter()
    data, runs = digits.load_digits(), digits.make_runs()
    with make_progress(console) as progress:
        steps = epochs * (len(data.train_x) // digits.BATCH_SIZE)
        tasks = [progress.add_task(run.name, total=steps, start=False) for run in runs]
        for run, task in zip(runs, tasks, strict=True):
            progress.start_task(task)
            for _ in run.train(data, epochs, seed):
                progress.advance(task)

    numbers = ["final train loss", "test accuracy", "largest difference of the loss", "log10 of the last LR"]
    numbers += ["norm of the convolutions, as stored"]
    columns = (Column(name, justify="right", overflow="fold") for name in numbers)
    table = Table(Column("run", overflow="fold"), *columns)
    for run in runs:
        last_epoch = run.loss[-steps // epochs :]
        table.add_row(
            run.name,
            f"{sum(last_epoch) / len(last_epoch):.6f}",
            f"{run.test_accuracy:.2%}",
            "–" if run.like is None else f"{digits.largest_difference(run, run.like):.1e}",
            f"{run.log10_lr[-1]:.2f}",
            f"{run.weight_norm:.4g}",
        )
    console.print(table)
    if csv_path is not None:
        digits.write_csv(runs, csv_path)
        print(csv_path.resolve())
    digits.plot(runs, epochs, plot)
    print(f"{epochs} epochs, {time.perf_counter() - start:.0f} s on one thread")
    print(plot.resolve())

"""texp bench: how long a step takes."""

import math
from pathlib import Path
from typing import Annotated

import torch
import typer

from texp import backends
from texp.bench import report, step_time
from texp.bench.shapes import MODELS
from texp.cli.common import check_writable, make_console, make_progress


def bench(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch; default: torch's choice.")] = None,
    models: Annotated[str, typer.Option(help="Names separated by commas; default: all.")] = "",
    seconds: Annotated[float, typer.Option(help="Minimum time for each candidate and model.")] = 2.0,
    csv_path: Annotated[Path | None, typer.Option("--csv", help="Where to write the records as they come.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Where to write a figure of the CSV; needs --csv.")] = None,
) -> None:
    """Step time of texp.SGD against torch.optim.SGD, in one run.

    Every backend of texp for the device is timed; the reference only up to 20 million parameters.
    """
    check_writable(csv_path)
    check_writable(plot, figure=True)
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device must be cpu or cuda, got {device}")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda was asked for, but torch sees no CUDA device")
    if plot is not None and csv_path is None:
        raise typer.BadParameter("--plot is drawn from the CSV: give --csv as well")
    if not 0 <= seconds < math.inf:
        raise typer.BadParameter(f"--seconds must be at least 0 and finite, got {seconds}")
    chosen = _models(models)
    if threads is not None:
        torch.set_num_threads(threads)
    console = make_console()
    # Refreshed between turns only: a drawing thread would disturb the timing.
    with make_progress(console, auto_refresh=False) as progress:
        task = progress.add_task("", total=len(chosen))
        made = step_time.run(
            device, chosen, seconds, lambda text: progress.update(task, description=text, refresh=True)
        )
        measured = []
        for record in made if csv_path is None else report.saved(made, csv_path):
            measured.append(record)
            progress.update(task, completed=chosen.index(record["model"]) + 1)
    console.print(report.table(measured))
    print(f"texp.SGD without backend= is texp {backends.default_for(device)} here")
    if csv_path is not None:
        print(csv_path.resolve())
    if plot is not None:
        report.plot(csv_path, plot)
        print(plot.resolve())


def _models(text: str) -> list[str]:
    """The named models, each once; all of them if none is named."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip())) or list(MODELS)
    for name in names:
        if name not in MODELS:
            raise typer.BadParameter(f"--models must be among {', '.join(MODELS)}; got {name}")
    return names

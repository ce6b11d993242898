"""The commands: texp demo | schedule | audit | bench | info."""

import csv
import dataclasses
import importlib
import json
import math
import operator
import platform
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from texp import __version__, backends, bench, demo, invariance, native, records, theory
from texp.build import SettingError
from texp.command import EXTRA, UsageError, check_writable, make_console

app = typer.Typer(
    name="texp",
    help="SGD in the exponential-learning-rate form of Li & Arora (ICLR 2020).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

MOST_STEPS = 10_000_000  # that a CSV or a figure of a schedule may have


def run(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code: 2, with one line on stderr, for bad arguments."""
    try:
        return app(arguments, prog_name="texp", standalone_mode=False) or 0
    except UsageError as error:
        return _fail(2, error.format_message() or "no command given, see texp --help")
    except ModuleNotFoundError as error:
        library = EXTRA.get((error.name or "").split(".")[0])
        if library is None:
            raise
        return _fail(
            1,
            f'this command needs {library}: install texp with the extra "demo", as in pip install ".[demo]"',
        )
    except (OSError, invariance.AuditError, SettingError, native.MissingError) as error:
        return _fail(1, str(error))
    except (typer.Abort, KeyboardInterrupt):
        return _fail(130, "interrupted")


def _fail(code: int, message: str) -> int:
    print(f"texp: {' '.join(message.split())}", file=sys.stderr)
    return code


@app.command("demo")
def demo_command(
    epochs: Annotated[int, typer.Option(min=4, help="Epochs of 11 steps for each run.")] = 100,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the initialisation and the batches.")] = 0,
    plot: Annotated[Path, typer.Option(help="Where to write the figure.")] = Path("texp-demo.png"),
    csv_path: Annotated[Path | None, typer.Option("--csv", help="Where to write every step of every run.")] = None,
) -> None:
    """Trains one network on scikit-learn's digits in three ways that the paper says are one, and with all of its
    parameters in two."""
    check_writable(plot, figure=True)
    check_writable(csv_path)
    console = make_console()
    # A second thread saves a quarter of the time where nothing else runs. Beside one busy process on two cores, it is
    # waited for, which takes twice the time and more; one thread is hardly slower there.
    torch.set_num_threads(1)
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
        ("norm of the convolutions, as stored", "right"),
    ):
        table.add_column(column, justify=justify, overflow="fold")
    for run in runs:
        last_epoch = run.loss[-steps // epochs :]
        table.add_row(
            run.name,
            f"{sum(last_epoch) / len(last_epoch):.6f}",
            f"{run.test_accuracy:.2%}",
            "–" if run.like is None else f"{demo.largest_difference(run, run.like):.1e}",
            f"{run.log10_lr[-1]:.2f}",
            f"{run.weight_norm:.4g}",
        )
    console.print(table)
    if csv_path is not None:
        demo.write_csv(runs, csv_path)
        print(csv_path.resolve())
    demo.plot(runs, epochs, plot)
    print(f"{epochs} epochs, {time.perf_counter() - start:.0f} s on one thread")
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
    check_writable(csv_path)
    check_writable(plot, figure=True)
    steps = epochs * steps_per_epoch
    every_step = csv_path is not None or plot is not None
    if every_step and steps > MOST_STEPS:
        raise typer.BadParameter(f"--csv and --plot take at most {MOST_STEPS} steps, got {steps}")
    starts = _milestones(milestones, epochs, steps_per_epoch)
    try:
        phases = theory.texp_phases(lr, weight_decay, momentum, starts, gamma)
        ends = [*(phase.start for phase in phases[1:]), steps]
        etas = [p.lr for p, end in zip(phases, ends, strict=True) for _ in range(p.start, end)] if every_step else []
        exact = theory.translate(etas, weight_decay, momentum)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None

    # A column a phase: so it fits a narrow terminal.
    table = Table("phase", show_lines=False)
    rows = {name: [] for name in (
        "epochs", "LR with decay", "α*", "growth per step", "growth per epoch", "instant factor",
        "log10 LR, first", "log10 LR, last",
    )}  # fmt: skip
    for index, (phase, end) in enumerate(zip(phases, ends, strict=True)):
        table.add_column(str(index), justify="right", no_wrap=True)
        growth = -2 * math.log10(phase.alpha)
        values = (
            f"{phase.start // steps_per_epoch}–{end // steps_per_epoch}",
            f"{phase.lr:.6g}",
            f"{phase.alpha:.8f}",
            f"{10**growth:.8f}",
            f"{10 ** (growth * steps_per_epoch):.4f}"
            if growth * steps_per_epoch < 4
            else f"10^{growth * steps_per_epoch:.4f}",
            f"{phase.instant:.6g}",
            f"{phase.log10_lr:.4f}",
            f"{phase.log10_lr_at(end - 1):.4f}",
        )
        for row, value in zip(rows.values(), values, strict=True):
            row.append(value)
    for name, row in rows.items():
        table.add_row(name, *row)
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
        _plot_schedule([t / steps_per_epoch for t in range(steps)], etas, closed, exact, plot)
        print(plot.resolve())


@app.command("audit")
def audit_command(
    model: Annotated[str, typer.Argument(metavar="MODULE:FACTORY", help="What makes the model, without arguments.")],
    shapes: Annotated[list[str], typer.Option("--input", help="Shape of an input, as in 2x3x32x32; repeatable.")],
    below: Annotated[int | None, typer.Option("--int", min=1, help="Inputs are integers from 0 to below it.")] = None,
    hold_bias_and_norm: Annotated[
        bool, typer.Option("--no-decay-on-bias-and-norm", help="Biases and norms get no decay, and are not scaled.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of all that is drawn.")] = 0,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Of the equations that are collected.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write what was found.")] = None,
) -> None:
    """Finds the parameters of a model that are scale-invariant together, and says why the others are not."""
    check_writable(json_path)
    sizes = [_shape(text) for text in shapes]
    made = _made_by(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inputs = [torch.randn(size) if below is None else torch.randint(below, size) for size in sizes]
    hold = invariance.bias_or_norm if hold_bias_and_norm else None
    console = make_console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("equations", total=None)

            def show(rows: int, rank: int, most: int) -> None:
                progress.update(task, description=f"equations, rank {rank}", completed=rows, total=most)

            found = invariance.audit(made, *inputs, hold=hold, seed=seed, max_rows=max_rows, progress=show)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    print(found)
    if json_path is not None:
        json_path.write_text(json.dumps(dataclasses.asdict(found) | {"fraction": found.fraction}, indent=2) + "\n")
        print(json_path.resolve())


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in text.split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise typer.BadParameter(f"--input must be a shape such as 2x3x32x32, got {text}")
    return shape


def _made_by(text: str) -> torch.nn.Module:
    """The module that `module:factory` makes; modules are also looked for in the current folder."""
    name, _, factory = text.partition(":")
    sys.path.insert(0, "")
    try:
        made = operator.attrgetter(factory)(importlib.import_module(name))()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise typer.BadParameter(f"no model could be made by {text}, a module:factory: {error}") from None
    finally:
        sys.path.remove("")
    if not isinstance(made, torch.nn.Module):
        raise typer.BadParameter(f"{text} makes a {type(made).__name__}, which is not a torch.nn.Module")
    return made


@app.command("bench")
def bench_command(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch on the CPU; default: torch's own.")] = None,
    models: Annotated[str, typer.Option(help="Names separated by commas; default: all.")] = "",
    seconds: Annotated[float, typer.Option(help="How long each candidate steps each model, at least.")] = 2.0,
    csv_path: Annotated[Path | None, typer.Option("--csv", help="Where to write the records, as they come.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Where to draw the CSV; needs --csv.")] = None,
) -> None:
    """Step time of texp.SGD against torch.optim.SGD, in one run.

    Of texp, each backend of the device; the reference only up to 20 million parameters.
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
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn between the turns: a thread that draws would disturb what is being timed.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        task = progress.add_task("", total=len(chosen))
        made = bench.run(device, chosen, seconds, lambda text: progress.update(task, description=text, refresh=True))
        measured = []
        for record in made if csv_path is None else records.saved(made, csv_path):
            measured.append(record)
            progress.update(task, completed=chosen.index(record["model"]) + 1)
    console.print(records.table(measured))
    print(f"texp.SGD without backend= is texp {backends.default_for(device)} here")
    if csv_path is not None:
        print(csv_path.resolve())
    if plot is not None:
        records.plot(csv_path, plot)
        print(plot.resolve())


def _models(text: str) -> list[str]:
    """Names separated by commas, each once; all if there is none."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip())) or list(bench.MODELS)
    for name in names:
        if name not in bench.MODELS:
            raise typer.BadParameter(f"--models must be among {', '.join(bench.MODELS)}; got {name}")
    return names


@app.command("build")
def build_command() -> int:
    """Builds the C++ core, with nvcc its CUDA kernel too, ahead of the first use: for container images, say."""
    return native.main()


@app.command()
def info() -> None:
    """Versions, the backends with the reason for each that is not available, and which are taken by default."""
    table = Table(show_header=False)
    table.add_row("texp", __version__)
    table.add_row("torch", torch.__version__)
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name, reason in backends.available().items():
        table.add_row(f"backend {name}", reason)
    core = native.core()
    table.add_row("C++ core", "none" if core is None else core.__file__)
    for device, where in (("cpu", "the CPU"), ("cuda", "GPUs")):
        table.add_row(f"default on {where}", backends.default_for(device))
    make_console().print(table)


def _milestones(text: str, epochs: int, steps_per_epoch: int) -> list[int]:
    try:
        milestones = [int(epoch) for epoch in text.split(",")] if text else []
    except ValueError:
        raise typer.BadParameter(f"--milestones must be epochs, separated by commas; got {text}") from None
    ascending = sorted(set(milestones)) == milestones
    if not ascending or any(not 0 < epoch < epochs for epoch in milestones):
        raise typer.BadParameter(f"--milestones must ascend from above 0 to below --epochs {epochs}, got {text}")
    return [epoch * steps_per_epoch for epoch in milestones]


def _plot_schedule(
    epoch: list[float], etas: list[float], closed: list[float], exact: list[float], path: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axes.plot(epoch, [math.log10(eta) for eta in etas], color="0.5", label="with weight decay")
    axes.plot(epoch, exact, color="C0", lw=2.5, label="without: exact (texp.theory.translate)")
    axes.plot(epoch, closed, color="C1", ls="--", label="without: TEXP")
    axes.set(xlabel="epoch", ylabel=r"$\log_{10}$ of the learning rate")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)

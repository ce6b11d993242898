"""python -m benchmarks.paper NAME: one experiment of the paper, or all."""

import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import BrokenExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Annotated

import torch
import typer
from rich.table import Table

from benchmarks.paper import cosine, data, fixed, instant_decay, no_instant_decay, norms, results, step_decay, toy
from benchmarks.paper.pool import train_all
from benchmarks.paper.setup import SETUPS
from benchmarks.paper.training import CheckpointError, path_of
from texp.cli.common import EXTRA, UsageError, make_console

EXPERIMENTS: dict[str, ModuleType] = {
    "fixed": fixed,
    "step-decay": step_decay,
    "instant-decay": instant_decay,
    "no-instant-decay": no_instant_decay,
    "cosine": cosine,
    "toy": toy,
    "norms": norms,
}

INTERRUPTED = 130
GOES_ON = "the same command goes on from the last checkpoints"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def run(arguments: list[str] | None = None) -> int:
    """Runs experiments; returns the exit code: 2 for bad arguments, 1 where something is missing or a shape does not
    hold, each with one line on stderr."""
    try:
        code = app(arguments, prog_name="python -m benchmarks.paper", standalone_mode=False) or 0
        return _fail(INTERRUPTED, f"interrupted: {GOES_ON}") if code == INTERRUPTED else code  # typer's, for Ctrl-C
    except UsageError as error:
        return _fail(2, error.format_message() or "no experiment given")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in EXTRA:
            raise
        return _fail(1, f'{error}: install texp with the extra "demo"')
    except (OSError, data.DataError, CheckpointError) as error:
        return _fail(1, str(error))
    except BrokenExecutor:
        return _fail(1, f"a process was killed, perhaps as memory is short: {GOES_ON}, with --jobs 1 in less of it")
    except (typer.Abort, KeyboardInterrupt):
        return _fail(INTERRUPTED, f"interrupted: {GOES_ON}")


def _fail(code: int, message: str) -> int:
    print(f"benchmarks.paper: {' '.join(message.split())}", file=sys.stderr)
    return code


@app.command()
def main(
    name: Annotated[str, typer.Argument(help=f"{', '.join(EXPERIMENTS)}, or all.")],
    data_name: Annotated[str, typer.Option("--data", help="digits or cifar10.")] = "digits",
    root: Annotated[Path | None, typer.Option(help="CIFAR-10: its folder or archive.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seeds: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Number of seeds; default: 3 for digits, 1 for cifar10.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for figures, summaries, CSVs and checkpoints.")] = Path(
        "build/paper"
    ),
    steps: Annotated[int | None, typer.Option(min=4, help="Steps of each run; shortens all phases.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time; default: 2 on two or more cores.")] = None,
) -> int:
    """Repeats experiments of the paper, and says whether they have the shapes that it reports.

    After an interruption the same command goes on from the last checkpoints.
    """
    start = time.perf_counter()
    if name not in (*EXPERIMENTS, "all"):
        raise typer.BadParameter(f"NAME must be among {', '.join(EXPERIMENTS)} and all, got {name}")
    if data_name not in SETUPS:
        raise typer.BadParameter(f"--data must be digits or cifar10, got {data_name}")
    if (data_name == "cifar10") != (root is not None):
        raise typer.BadParameter("--root DIR goes with --data cifar10: where CIFAR-10 is")
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device must be cpu or cuda, got {device}")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda was asked for, but torch sees no CUDA device")
    setup = replace(SETUPS[data_name], out=out, root=root, device=device)
    if steps is not None:
        setup = setup.shortened(steps)
    is_asserted = setup.is_asserted and (seeds is None or seeds >= setup.seeds)
    seeds = seeds or setup.seeds
    out.mkdir(parents=True, exist_ok=True)
    data.load(setup)  # raises its errors first

    chosen = EXPERIMENTS if name == "all" else {name: EXPERIMENTS[name]}
    methods = {key: method for module in chosen.values() for key, method in module.runs(setup).items()}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = jobs or (1 if device == "cuda" else min(2, cores))
    # Tensors of digits are too small to share between threads.
    threads = 1 if data_name == "digits" else max(1, cores // jobs)
    train_all(
        [(key, method, setup, seed, threads) for seed in range(seeds) for key, method in methods.items()],
        jobs,
        make_console(),
    )

    curves = {key: [results.read(path_of(key, setup, seed)) for seed in range(seeds)] for key in methods}
    checks = []
    for experiment, module in chosen.items():
        mine = {key: curves[key] for key in module.runs(setup)}
        checks += [(experiment, check) for check in module.checks(mine, setup)]
        labels = {key: methods[key].label for key in mine}
        module.draw(module.TITLE, labels, mine, out / f"{experiment}.png")
    results.write_checks(checks, out / "checks.csv")
    results.write_summary(curves, out / "summary.csv")
    _print(checks)
    print(f"{time.perf_counter() - start:.0f} s, {jobs} runs at a time; figures and summaries in {out.resolve()}")
    missed = [f"{experiment}: {check.what}" for experiment, check in checks if not check.holds]
    if missed and is_asserted:
        return _fail(1, f"{len(missed)} of {len(checks)} shapes do not hold: {'; '.join(missed)}")
    return 0


def _print(checks: Iterable[tuple[str, results.Check]]) -> None:
    table = Table("experiment", "measured", "value", "from", "to", "holds")
    for experiment, check in checks:
        limits = [f"{limit:.6g}" if abs(limit) != float("inf") else "" for limit in (check.low, check.high)]
        table.add_row(
            experiment,
            check.what,
            f"{check.value:.6g}",
            *limits,
            "yes" if check.holds else "NO",
        )
    make_console().print(table)


if __name__ == "__main__":
    sys.exit(run())

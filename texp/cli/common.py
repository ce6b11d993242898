"""What all commands have in common, also those in benchmarks: errors, where they print, what they may write."""

import sys
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# What typer raises for bad arguments: click's own class, or that of the copy which newer versions bring along.
UsageError = typer.BadParameter.__base__

# Libraries of the extra "demo", by the names of their modules.
EXTRA = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "scipy": "scipy"}

FIGURES = (".png", ".pdf", ".svg")


def make_console() -> Console:
    """Wide enough for the tables where the output is a file or a pipe, in which case rich would assume 80 columns."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def make_progress(console: Console, **options) -> Progress:
    """Bars with counts and times; `options` are those of rich.progress.Progress."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, **options)


def check_writable(path: Path | None, *, figure: bool = False) -> None:
    """Before minutes of training, not after. Raises BadParameter; None is nothing to write."""
    if path is None:
        return
    if figure and path.suffix not in FIGURES:
        raise typer.BadParameter(f"cannot write a figure to {path}: its name must end in {' or '.join(FIGURES)}")
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise typer.BadParameter(f"cannot write {path}: {error.strerror}") from None
    if not existed:
        path.unlink()

"""What all commands share, those in benchmarks too: errors, the console, checks of output files."""

import sys
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# What typer raises for bad arguments: click's class, or that of the copy of click in newer versions of typer.
UsageError = typer.BadParameter.__base__

# Libraries of the extra "demo", by module name.
EXTRA = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "scipy": "scipy"}

FIGURES = (".png", ".pdf", ".svg")


def make_console() -> Console:
    """Wide enough for the tables if the output is a file or a pipe, for which rich assumes 80 columns."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def make_progress(console: Console, **options) -> Progress:
    """Progress bars with counts and times; options as for rich.progress.Progress."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, **options)


def check_writable(path: Path | None, *, figure: bool = False) -> None:
    """Raises BadParameter for a file that cannot be written, before minutes of training rather than after them."""
    if path is None:
        return
    if figure and path.suffix not in FIGURES:
        raise typer.BadParameter(f"cannot write a figure to {path}: its name must end in {' or '.join(FIGURES)}")
    existed = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise typer.BadParameter(f"cannot write {path}: {error.strerror}") from None
    if not existed:
        path.unlink()

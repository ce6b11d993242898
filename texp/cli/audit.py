"""texp audit: which parameters of a model are scale-invariant together."""

import dataclasses
import importlib
import json
import operator
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from texp.cli.common import check_writable, make_console, make_progress
from texp.invariance import audit as invariance


def audit(
    model: Annotated[
        str, typer.Argument(metavar="MODULE:FACTORY", help="Makes the model; called without arguments.")
    ],
    shapes: Annotated[list[str], typer.Option("--input", help="Shape of an input, as in 2x3x32x32; repeatable.")],
    below: Annotated[int | None, typer.Option("--int", min=1, help="Integer inputs, from 0 to below this.")] = None,
    hold_bias_and_norm: Annotated[
        bool, typer.Option("--no-decay-on-bias-and-norm", help="Biases and norms get no decay and are not scaled.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Random seed.")] = 0,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Maximum number of equations.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write the result.")] = None,
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
    try:
        with make_progress(console, transient=True, disable=not console.is_terminal) as progress:
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

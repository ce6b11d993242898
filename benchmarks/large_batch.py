"""Large-batch training, a recipe to start from: `python -m benchmarks.large_batch --help`.

    python -m benchmarks.large_batch --batch-size 64,128,256,512
    python -m benchmarks.large_batch --batch-size 64,128,256,512 --optimizer texp,torch --plot large_batch.png
    torchrun --standalone --nproc-per-node 4 -m benchmarks.large_batch --batch-size 512 --amp bf16 --channels-last

The LR grows linearly with the batch size (Goyal et al., 2017, arXiv 1706.02677), after a linear warm-up. It is that
of plain SGD, whichever optimizer trains: texp.SGD in exponential form visits the same functions, and texp.LARS
multiplies it by a ratio for each tensor. Biases and norms have no weight decay. Gradients can be clipped, in the step
or, for torch, before it. What trains is in benchmarks/large_batch_training.py, what is reported in
large_batch_report.py; this file is the command: options, the sweep over batch sizes, and checkpoints.
"""

import itertools
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import torch.distributed as dist
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import texp
from benchmarks import large_batch_report
from benchmarks.large_batch_training import AMP, GROUPS, OPTIMIZERS, Training, device_of, local_world, rank, world
from texp import backends
from texp.bench.step_time import cpu_model
from texp.cli.common import EXTRA, UsageError, check_writable, make_console
from texp.cli.digits import load_digits

CHOICES = {
    "optimizer": OPTIMIZERS,
    "model": ("bn", "gn"),
    "schedule": ("cosine", "step"),
    "device": ("cpu", "cuda"),
    "amp": tuple(AMP),
}

app = typer.Typer(name="large_batch", add_completion=False, pretty_exceptions_enable=False)


@app.command()
@dataclass(frozen=True)
class Options:
    """Trains scikit-learn's digits with large batches, once for each batch size and optimizer.

    Under torchrun each process takes its share of every batch; the batches are those of one process.
    """

    optimizer: Annotated[str, typer.Option(help="texp, torch (fused), lars; texp,torch: one after the other.")] = (
        "texp"
    )
    backend: Annotated[str | None, typer.Option(help="Of texp.SGD, as texp info lists; default: automatic.")] = None
    batch_size: Annotated[str, typer.Option(help="Over all processes; several are a sweep, as in 64,128.")] = "64"
    epochs: Annotated[int, typer.Option(min=1, help="Epochs for each batch size.")] = 20
    base_lr: Annotated[float, typer.Option(help="LR for --base-batch; linear in the batch size.")] = 0.05
    base_batch: Annotated[int, typer.Option(min=1, help="Batch size whose LR is --base-lr.")] = 64
    warmup: Annotated[float, typer.Option(help="Epochs in which the LR rises linearly from 0.")] = 5.0
    schedule: Annotated[str, typer.Option(help="cosine to 0, or step: a tenth at 1/2, again at 3/4.")] = "cosine"
    momentum: Annotated[float, typer.Option(help="γ; Nesterov momentum.")] = 0.9
    weight_decay: Annotated[float, typer.Option(help="λ, except for biases and norms.")] = 5e-4
    clip: Annotated[float | None, typer.Option(help="Norm that gradients are clipped to; default: no clipping.")] = (
        None
    )
    trust_coeff: Annotated[float, typer.Option(help="Of LARS.")] = 0.02
    label_smoothing: Annotated[float, typer.Option(help="Share of the label spread over all classes.")] = 0.1
    accumulate: Annotated[int, typer.Option(min=1, help="Micro-batches for each batch.")] = 1
    model: Annotated[str, typer.Option(help="bn or gn: BatchNorm over a process's micro-batch, or GroupNorm.")] = "bn"
    width: Annotated[int, typer.Option(min=1, help=f"Channels of the first stage, a multiple of {GROUPS}.")] = 8
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu"
    amp: Annotated[str, typer.Option(help="off, bf16 or fp16: autocast; fp16 with a GradScaler.")] = "off"
    channels_last: Annotated[bool, typer.Option("--channels-last", help="For images and weights.")] = False
    float64: Annotated[bool, typer.Option("--float64", help="With eps ≈ 0 in the norms, to compare runs.")] = False
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Random seed.")] = 0
    csv: Annotated[Path | None, typer.Option(help="Where to write every epoch, at the end.")] = None
    plot: Annotated[Path | None, typer.Option(help="Where to draw the sweep, at the end.")] = None
    checkpoint: Annotated[Path | None, typer.Option(help="Written after every epoch; resumed from if there.")] = None
    tensorboard: Annotated[Path | None, typer.Option(help="Folder to log to.")] = None

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            given = self.optimizers if name == "optimizer" else [getattr(self, name)]
            if not set(given) <= set(choices):
                _refuse(f"--{name} must be {' or '.join(choices)}, got {getattr(self, name)}")
        if self.clip is not None and not 0 <= self.clip < math.inf:
            _refuse(f"--clip must be at least 0 and finite, got {self.clip}")
        below = {"base_lr": math.inf, "weight_decay": math.inf, "trust_coeff": math.inf}
        below |= {"momentum": 1, "label_smoothing": 1}
        for name, most in below.items():
            value = getattr(self, name)
            positive = name in ("base_lr", "momentum")  # Nesterov needs some
            if not (0 < value < most or (value == 0 and not positive)):
                above = "greater than 0" if positive else "at least 0"
                _refuse(f"--{name.replace('_', '-')} must be {above} and below {most}, got {value}")
        if not 0 <= self.warmup < self.epochs:
            _refuse(f"--warmup must be at least 0 and below --epochs {self.epochs}, got {self.warmup}")
        if self.width % GROUPS:
            _refuse(f"--width must be a multiple of {GROUPS}, got {self.width}")
        if self.float64 and self.amp != "off":
            _refuse(f"--float64 computes nothing in lower precision: it does not go with --amp {self.amp}")
        if self.device == "cuda" and not torch.cuda.is_available():
            _refuse("--device cuda was asked for, but torch sees no CUDA device")
        if self.device == "cuda" and torch.cuda.device_count() < local_world():
            sees = f"torch sees {torch.cuda.device_count()} CUDA devices"
            _refuse(f"--device cuda needs one device for each of {local_world()} processes, but {sees}")
        if self.backend is not None:
            backends.core()  # is built if need be
            state = backends.available().get(self.backend, "there is no such backend")
            if self.optimizer == "torch" or state != backends.OK:
                why = state if self.optimizer != "torch" else "it is for --optimizer texp and lars"
                _refuse(f"--backend {self.backend} was asked for, but {why}")
        _ = self.batch_sizes  # refuses what it cannot be

    @property
    def optimizers(self) -> list[str]:
        """Of the sweep: for each batch size one after the other, so that their times can be compared."""
        return self.optimizer.split(",")

    @property
    def batch_sizes(self) -> list[int]:
        """Of the sweep, each once."""
        shares = world() * self.accumulate
        try:
            sizes = list(dict.fromkeys(int(size) for size in self.batch_size.split(",")))
        except ValueError:
            _refuse(f"--batch-size must be numbers separated by commas, got {self.batch_size}")
        for size in sizes:
            if size < 1 or size % shares:
                what = f"{world()} processes × --accumulate {self.accumulate}"
                _refuse(f"--batch-size must be a multiple of {what}, got {size}")
        return sizes

    def peak_lr(self, batch_size: int) -> float:
        """LR after the warm-up."""
        return self.base_lr * batch_size / self.base_batch

    def of_the_run(self) -> dict[str, Any]:
        """All that the curve depends on, as a checkpoint has it."""
        made = {k: v for k, v in asdict(self).items() if k not in ("csv", "plot", "checkpoint", "tensorboard")}
        return {**made, "processes": world()}


def _refuse(message: str) -> None:
    raise typer.BadParameter(message)


@contextmanager
def _processes(options: Options) -> Iterator[None]:
    """Those of torchrun, joined; with gloo until `leave`."""
    if options.device == "cuda":
        torch.cuda.set_device(device_of(options))
    if world() == 1:
        yield
        return
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    try:
        yield
    finally:
        if dist.get_backend() != "gloo":
            dist.destroy_process_group()


def load_checkpoint(path: Path | None, options: Options) -> dict[str, Any]:
    """Rows of the CSV so far, and the state of the batch size that is being trained; empty if there is no file.

    Raises BadParameter for a file that is something else, or of a run with other options.
    """
    if path is None or not path.exists():
        return {"rows": [], "state": None}
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        was = dict(saved["options"])
    except Exception:  # torch.load raises nearly anything
        _refuse(f"--checkpoint {path} is damaged, or not one of this command")
    for name, value in options.of_the_run().items():
        if was.get(name) != value:
            _refuse(f"--checkpoint {path} is of another run: {name} was {was.get(name)}, and is {value} now")
    return saved


def save_checkpoint(path: Path, options: Options, rows: list[dict], state: dict[str, Any]) -> None:
    """An interruption leaves either the old file or the new one."""
    unfinished = path.with_name(path.name + ".unfinished")
    torch.save({"options": options.of_the_run(), "rows": rows, "state": state}, unfinished)
    unfinished.replace(path)


def sweep(options: Options) -> list[dict[str, Any]]:
    """Trains with each batch size and optimizer in turn, from the checkpoint on. Returns the rows of the CSV, one an
    epoch."""
    chief = rank() == 0  # who reads, reports and saves: another machine need not have the files
    received = [None]
    if chief:
        check_writable(options.csv)
        check_writable(options.plot, figure=True)
        check_writable(options.checkpoint)
        received = [load_checkpoint(options.checkpoint, options)]
    data = load_digits()
    if max(options.batch_sizes) > len(data.train_x):
        _refuse(f"--batch-size must be at most {len(data.train_x)}, got {max(options.batch_sizes)}")
    if options.tensorboard is not None:
        from torch.utils.tensorboard import SummaryWriter

        if chief:
            options.tensorboard.mkdir(parents=True, exist_ok=True)  # or says now that it cannot
    console = make_console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with _processes(options), Progress(*columns, console=console, disable=not chief) as progress:
        if dist.is_initialized():
            dist.broadcast_object_list(received)
        (saved,) = received
        rows = saved["rows"]
        for size, optimizer in itertools.product(options.batch_sizes, options.optimizers):
            done = sum((row["optimizer"], row["batch_size"]) == (optimizer, size) for row in rows)
            steps = len(data.train_x) // size
            name = f"{optimizer}, batch {size}"
            task = progress.add_task(name, total=options.epochs * steps, completed=done * steps)
            if done == options.epochs:
                continue
            training = Training(options, optimizer, size, data)
            if done:
                training.load_state_dict(saved["state"])
            log = None
            if options.tensorboard is not None and chief:
                log = SummaryWriter(str(options.tensorboard / f"{optimizer}-{size}"), purge_step=done)
            for epoch in range(done, options.epochs):
                made = training.epoch(lambda task=task: progress.advance(task))
                if epoch == options.epochs - 1:
                    training.fold()
                of_run = {"optimizer": optimizer, "batch_size": size, "epoch": epoch}
                rows.append({**of_run, **made, **_where(options)})
                if not chief:
                    continue
                progress.console.print(
                    f"{name}, epoch {epoch + 1}: train loss {made['train_loss']:.4f}, "
                    f"test accuracy {made['test_accuracy']:.2%}, {made['samples_per_s']:,.0f} samples/s",
                    highlight=False,
                )
                if log is not None:
                    for field, value in made.items():
                        log.add_scalar(field, value, epoch)
                if options.checkpoint is not None:
                    save_checkpoint(options.checkpoint, options, rows, training.state_dict())
            if log is not None:
                log.close()
    if chief:
        report(options, rows)
    return rows


def _where(options: Options) -> dict[str, Any]:
    return {
        "device": options.device,
        "processor": torch.cuda.get_device_name() if options.device == "cuda" else cpu_model(),
        "processes": world(),
        "threads": torch.get_num_threads(),
        "amp": options.amp,
        "torch": str(torch.__version__),
        "texp": texp.__version__,
    }


def report(options: Options, rows: list[dict[str, Any]]) -> None:
    runs = large_batch_report.summaries(rows)
    make_console().print(large_batch_report.table(runs, options.peak_lr))
    print(*(large_batch_report.share(run) for run in runs), sep="\n")
    if options.csv is not None:
        large_batch_report.write_csv(rows, options.csv)
        print(options.csv.resolve())
    if options.plot is not None:
        large_batch_report.plot(runs, options.plot)
        print(options.plot.resolve())


def run(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit code: 2, with one line on stderr, for bad arguments."""
    try:
        options = app(arguments, prog_name="large_batch", standalone_mode=False)
        if isinstance(options, Options):  # and not what --help returns
            sweep(options)
        return 0
    except UsageError as error:
        return _fail(2, error.format_message())
    except ModuleNotFoundError as error:
        library = {**EXTRA, "tensorboard": "tensorboard"}.get((error.name or "").split(".")[0])
        if library is None:
            raise
        extra = "tensorboard" if library == "tensorboard" else "demo"
        return _fail(
            1,
            f'this needs {library}: install texp with the extra "{extra}", as in pip install ".[{extra}]"',
        )
    except OSError as error:
        return _fail(1, str(error))
    except (typer.Abort, KeyboardInterrupt):
        return _fail(130, "interrupted")


def leave(code: int) -> NoReturn:
    """Ends this process. One of several that talk by gloo goes at once: gloo's own end now and then aborts a process
    that is done (torch 2.13), and its exit code is lost.
    """
    if dist.is_available() and dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _fail(code: int, message: str) -> int:
    # Bad arguments are those of every process; what is missing may be so on one machine alone.
    if rank() == 0 or code == 1:
        print(f"large_batch: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    leave(run())

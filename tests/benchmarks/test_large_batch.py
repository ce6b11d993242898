"""The recipe for large batches, run as its users would."""

import csv
import functools
import itertools
import json
import math
import os
import re
import socket
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import texp
from benchmarks import large_batch, large_batch_report, large_batch_training
from benchmarks.large_batch import run
from tests.benchmarks.test_large_batch_training import training
from tests.conftest import relative_error, same_bits
from texp.bench.step_time import cpu_model

ROOT = Path(__file__).parents[2]
SMALL = ["--width", "4", "--epochs", "3", "--warmup", "1", "--batch-size", "360", "--device", "cpu"]
EXACT = [*SMALL, "--model", "gn", "--float64"]  # GroupNorm: its statistics are of one image


def rows_of(path: Path) -> list[dict]:
    return list(csv.DictReader(path.read_text().splitlines()))


def curve(rows: list[dict]) -> list[tuple]:
    """What is the same in each run; times are not. A float is written so that it is read back as it was."""
    return [(row["batch_size"], row["epoch"], row["lr"], row["train_loss"], row["test_accuracy"]) for row in rows]


def losses(rows: list[dict]) -> list[float]:
    return [float(row["train_loss"]) for row in rows]


def trained(folder: Path, *arguments: str) -> tuple[list[dict], dict]:
    """The rows of the CSV, and the model's state dict at the end."""
    table, checkpoint = folder / "epochs.csv", folder / "checkpoint.pt"
    folder.mkdir(exist_ok=True)
    assert run([*arguments, "--csv", str(table), "--checkpoint", str(checkpoint)]) == 0
    return rows_of(table), torch.load(checkpoint, weights_only=True)["state"]["model"]


def test_the_sweep(tmp_path, capsys):
    """Also in bf16 and channels_last, with the weights of a run in float32 nearby."""
    table = tmp_path / "sweep.csv"
    sweep = [*SMALL, "--batch-size", "180,360,180"]
    assert run([*sweep, "--csv", str(table)]) == 0
    out = capsys.readouterr().out
    made = rows_of(table)
    assert [(row["batch_size"], row["epoch"]) for row in made] == [(b, e) for b in ("180", "360") for e in "012"]
    assert {(row["optimizer"], row["device"], row["processes"], row["amp"]) for row in made} == {
        ("texp", "cpu", "1", "off")
    }
    for row in made:
        assert row["processor"] == cpu_model()
        assert 0 < float(row["optimizer_ms"]) < float(row["step_ms"])
        assert 0 < float(row["optimizer_share"]) < 1
        assert float(row["samples_per_s"]) > 0
        assert 0 <= float(row["test_accuracy"]) <= 1
    assert losses(made)[2] < losses(made)[0] < 3
    # Of the first steps: in the warm-up of an epoch, after it, and half-way down; batches of 180 make 7 steps.
    factors = {"180": (1 / 8, 1, 0.5), "360": (1 / 4, 1, 0.5)}
    expected = [0.05 * int(size) / 64 * factor for size in factors for factor in factors[size]]
    assert [float(row["lr"]) for row in made] == pytest.approx(expected)
    for size, lr in (("180", "0.140625"), ("360", "0.28125")):
        assert re.search(rf"texp +│ +{size} │ +{lr}", out)
        assert re.search(rf"batch {size}: texp's optimizer step takes [\d.]+ ms of [\d.]+ ms, [\d.]+%", out)
    assert run([*sweep, "--csv", str(table), "--amp", "bf16", "--channels-last"]) == 0
    # Eight bits of a bf16 number: 0.4 % for each of a dozen roundings in a row, of which few add up.
    assert losses(rows_of(table)) == pytest.approx(losses(made), rel=0.02)


def test_both_optimizers_in_one_sweep_and_its_figure(tmp_path, capsys, monkeypatch):
    """Drawn once more from the checkpoint alone."""
    arguments = [*SMALL, "--optimizer", "texp,torch", "--batch-size", "180,360"]
    plot, figures = tmp_path / "sweep.png", []
    monkeypatch.setattr("matplotlib.pyplot.close", figures.append)
    rows, _ = trained(tmp_path, *arguments, "--plot", str(plot))
    runs = [(row["batch_size"], row["optimizer"]) for row in rows[::3]]
    assert runs == [("180", "texp"), ("180", "torch"), ("360", "texp"), ("360", "torch")]
    capsys.readouterr()
    plot.unlink()
    again, _ = trained(tmp_path, *arguments, "--plot", str(plot))
    assert again == rows
    assert plot.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "epoch 1" not in out
    for optimizer in ("texp", "torch"):
        assert f"batch 360: {optimizer}'s optimizer step takes" in out
    for figure in figures:
        lines = [(axes.get_title(), line) for axes in figure.axes for line in axes.lines]
        curves = {(title, line.get_label()): line.get_xydata().tolist() for title, line in lines}
        assert len(curves) == 4 * 2
        for optimizer, label in (("texp", "texp.SGD"), ("torch", "torch.optim.SGD")):
            last = [row for row in rows[2::3] if row["optimizer"] == optimizer]
            for name in ("train_loss", "test_accuracy"):
                points = [[float(row["batch_size"]), float(row[name])] for row in last]
                assert curves[f"{name.replace('_', ' ')}, last epoch", label] == points


def test_a_summary():
    """Of the last epoch what was learned, the median of how long they took; one for each run."""
    names = ("train_loss", "test_accuracy", "samples_per_s", "step_ms", "optimizer_ms", "optimizer_share")
    runs = list(itertools.product((64, 128), ("texp", "torch")))
    rows = [
        {"batch_size": size, "optimizer": optimizer, **dict.fromkeys(names, value)}
        for size, optimizer in runs
        for value in (3.0, 9.0, 5.0, 0.0)
    ]
    made = large_batch_report.summaries(rows)
    assert [(of["batch_size"], of["optimizer"]) for of in made] == runs
    for of in made:
        assert [of[name] for name in names] == [0.0, 0.0, 4.0, 4.0, 4.0, 4.0]


def test_the_same_seed_is_the_same_run(tmp_path):
    (first, weights), (again, same) = trained(tmp_path / "a", *SMALL), trained(tmp_path / "b", *SMALL)
    assert curve(again) == curve(first)
    assert all(same_bits(same[name], weights[name]) for name in weights)
    other, _ = trained(tmp_path / "c", *SMALL, "--seed", "1")
    assert losses(other) != losses(first)


@pytest.mark.parametrize("schedule", ["cosine", "step"])
@pytest.mark.parametrize("model", ["bn", "gn"])
def test_texp_visits_the_functions_of_torch(tmp_path, model, schedule):
    """The weights at the end as well: texp.SGD is folded then. Weight decay is strong enough for P to pass 2."""
    arguments = [*EXACT, "--model", model, "--schedule", schedule, "--weight-decay", "0.03", "--epochs", "12"]
    (one, weights), (other, same) = (
        trained(tmp_path / name, *arguments, "--optimizer", name) for name in ("texp", "torch")
    )
    for a, b in zip(one, other, strict=True):
        for name in ("lr", "train_loss", "test_accuracy"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-9)
    assert float(one[-1]["log10_lr"]) > float(other[-1]["log10_lr"])  # it did take the exponential form
    for name, weight in weights.items():
        assert relative_error(weight, same[name]) < 1e-9


def test_clipped_gradients(tmp_path):
    """texp.SGD clips in the step, at θ; for torch, clip_grad_norm_ does before it."""
    arguments = [*EXACT, "--weight-decay", "0.03", "--clip", "0.5"]
    (one, weights), (other, same) = (
        trained(tmp_path / name, *arguments, "--optimizer", name) for name in ("texp", "torch")
    )
    assert losses(one) == pytest.approx(losses(other), rel=1e-9)
    assert all(relative_error(weight, same[name]) < 1e-9 for name, weight in weights.items())
    unclipped, _ = trained(tmp_path / "unclipped", *EXACT, "--weight-decay", "0.03", "--optimizer", "torch")
    assert losses(unclipped) != pytest.approx(losses(one), rel=1e-3)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    """Up to the order of a sum in float64, which some steps of training enlarge."""
    (whole, weights), (parts, same) = (
        trained(tmp_path / n, *EXACT, "--accumulate", n) for n in ("1", "3")
    )  # fmt: skip
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-9)
    assert all(relative_error(same[name], weights[name]) < 1e-9 for name in weights)


def environment(**changes: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "error", **changes}


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", "benchmarks.large_batch", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=300)


@pytest.mark.slow
def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    """Up to the order of a sum in float64, which some steps of training enlarge."""
    arguments = [*EXACT, "--accumulate", "2"]
    table, checkpoint = tmp_path / "two.csv", tmp_path / "two.pt"
    done = torchrun(2, *arguments, "--csv", str(table), "--checkpoint", str(checkpoint))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("batch 360, epoch 3") == 1  # only the first process reports
    two, (one, weights) = rows_of(table), trained(tmp_path / "one", *arguments, "--accumulate", "1")
    assert {row["processes"] for row in two} == {"2"}
    assert losses(two) == pytest.approx(losses(one), rel=1e-9)
    assert [row["test_accuracy"] for row in two] == [row["test_accuracy"] for row in one]
    same = torch.load(checkpoint, weights_only=True)["state"]["model"]
    assert all(relative_error(same[name], weights[name]) < 1e-9 for name in weights)


def by_hand(folders: list[Path], *command: str) -> list[int]:
    """One process in each folder; returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {
            "WORLD_SIZE": str(len(folders)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
        }
    processes = []
    for rank, folder in enumerate(folders):
        folder.mkdir(exist_ok=True)
        env = environment(RANK=str(rank), LOCAL_RANK="0", **shared)
        processes.append(subprocess.Popen([sys.executable, *command], cwd=folder, env=env))
    return [process.wait(timeout=300) for process in processes]


@pytest.mark.slow
def test_two_processes_resume(tmp_path):
    """Each in a folder of its own, as on two machines: only the first needs the checkpoint."""
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    arguments = [*SMALL, "--checkpoint", "checkpoint.pt", "--csv", "epochs.csv"]
    first, second, whole = (tmp_path / name for name in ("first", "second", "whole"))
    assert by_hand([first, second], str(script), *arguments) == [130, 130]
    assert by_hand([first, second], "-m", "benchmarks.large_batch", *arguments) == [0, 0]
    assert by_hand([whole, second], "-m", "benchmarks.large_batch", *arguments) == [0, 0]
    assert list(second.iterdir()) == []
    assert curve(rows_of(first / "epochs.csv")) == curve(rows_of(whole / "epochs.csv"))
    weights, same = (torch.load(of / "checkpoint.pt", weights_only=True)["state"]["model"] for of in (first, whole))
    assert all(same_bits(same[name], weights[name]) for name in weights)
    # Both evaluated with the running statistics of the first, which are those in the checkpoint.
    made = training()
    made.model.load_state_dict(weights)
    assert made.accuracy() == float(rows_of(first / "epochs.csv")[-1]["test_accuracy"])


# In the middle of the second epoch: one has three steps.
INTERRUPTED = """
from benchmarks import large_batch, large_batch_training

def backward(self, batch, real=large_batch_training.Training._backward):
    if self.schedule.last_epoch == 4:
        raise KeyboardInterrupt
    return real(self, batch)

large_batch_training.Training._backward = backward
large_batch.leave(large_batch.run())
"""


@contextmanager
def interrupted_after(steps: int, monkeypatch) -> Iterator[None]:
    def backward(self, batch, real=large_batch_training.Training._backward):
        nonlocal steps
        if steps == 0:
            raise KeyboardInterrupt
        steps -= 1
        return real(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(large_batch_training.Training, "_backward", backward)
        yield


@pytest.mark.parametrize(("optimizer", "amp"), [("texp", "fp16"), ("torch", "off"), ("lars", "off")])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, monkeypatch, capsys, optimizer, amp):
    """In the middle of an epoch of the sweep's second batch size, and again after the end. The factor of the loss in
    fp16 doubles so often that it reaches where steps are skipped."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, growth_interval=1))
    arguments = [*SMALL, "--optimizer", optimizer, "--batch-size", "180,360", "--amp", amp]
    arguments += ["--weight-decay", "0.03"]
    whole, weights = trained(tmp_path / "whole", *arguments)
    checkpoint = tmp_path / "parts" / "checkpoint.pt"
    checkpoint.parent.mkdir()
    with interrupted_after(3 * 7 + 3 + 1, monkeypatch):
        assert run([*arguments, "--checkpoint", str(checkpoint)]) == 130
    assert capsys.readouterr().err == "large_batch: interrupted\n"
    assert len(torch.load(checkpoint, weights_only=True)["rows"]) == 3 + 1
    for _ in range(2):
        parts, same = trained(checkpoint.parent, *arguments)
        assert curve(parts) == curve(whole)
        assert all(same_bits(same[name], weights[name]) for name in weights)
    assert {path.name for path in checkpoint.parent.iterdir()} == {"checkpoint.pt", "epochs.csv"}


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(b"old")

    def full(state, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        large_batch.save_checkpoint(checkpoint, large_batch.Options(), [], {})
    assert checkpoint.read_bytes() == b"old"


def test_the_tensorboard(tmp_path, monkeypatch):
    """That it is told; what it makes of it is its own affair."""
    told = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            self.name = Path(folder).name
            told.append((self.name, "from", purge_step))

        def add_scalar(self, name, value, epoch):
            assert math.isfinite(value)
            told.append((self.name, name, epoch))

        def close(self):
            told.append((self.name, "closed"))

    module = types.ModuleType("tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    arguments = [*SMALL, "--tensorboard", str(tmp_path / "logs"), "--checkpoint", str(tmp_path / "checkpoint.pt")]
    with interrupted_after(2 * 3 + 1, monkeypatch):
        assert run(arguments) == 130
    assert run(arguments) == 0
    for name in ("train_loss", "test_accuracy", "lr", "log10_lr"):
        assert [event[2] for event in told if event[1] == name] == [0, 1, 2]
    assert [event for event in told if event[1] == "from"] == [("texp-360", "from", first) for first in (0, 2)]
    assert told[-1] == ("texp-360", "closed")


def test_what_the_tensorboard_makes_of_an_interruption(tmp_path, monkeypatch):
    """With two epochs logged of which one is in the checkpoint."""
    name = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = pytest.importorskip(name, reason="tensorboard is not installed")
    monkeypatch.chdir(tmp_path)
    checkpoint = Path("checkpoint.pt")
    arguments = [*SMALL, "--tensorboard", "logs", "--checkpoint", str(checkpoint), "--csv", "epochs.csv"]
    with interrupted_after(3 + 1, monkeypatch):
        assert run(arguments) == 130
    early = checkpoint.read_bytes()
    with interrupted_after(3 + 1, monkeypatch):
        assert run(arguments) == 130
    checkpoint.write_bytes(early)
    assert run(arguments) == 0
    events = accumulator.EventAccumulator("logs/texp-360")
    events.Reload()
    for name in ("train_loss", "test_accuracy", "lr", "step_ms"):
        scalars = events.Scalars(name)
        assert [event.step for event in scalars] == [0, 1, 2]
        expected = [float(row[name]) for row in rows_of(Path("epochs.csv"))]
        assert [event.value for event in scalars] == pytest.approx(expected, rel=1e-6)  # float32


def test_a_folder_of_the_tensorboard_that_cannot_be(tmp_path, monkeypatch, capsys):
    """Is said before there is anything to see, and before other processes are joined."""
    module = types.ModuleType("tensorboard")
    module.SummaryWriter = None
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    (tmp_path / "file").touch()
    assert run([*SMALL, "--tensorboard", str(tmp_path / "file" / "logs")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"large_batch: .*Not a directory.*\n", captured.err)


def test_without_tensorboard(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert run([*SMALL, "--tensorboard", str(tmp_path / "logs")]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert 'needs tensorboard: install texp with the extra "tensorboard"' in captured.err


ERRORS = {
    "optimizer": (["--optimizer", "adam"], "--optimizer must be texp or torch or lars, got adam"),
    "optimizers": (["--optimizer", "texp;torch"], "--optimizer must be texp or torch or lars, got texp;torch"),
    "clip": (["--clip", "-1"], "--clip must be at least 0 and finite, got -1.0"),
    "trust": (["--trust-coeff", "nan"], "--trust-coeff must be at least 0 and below inf, got nan"),
    "schedule": (["--schedule", "linear"], "--schedule must be cosine or step, got linear"),
    "amp": (["--amp", "fp8"], "--amp must be off or bf16 or fp16, got fp8"),
    "model": (["--model", "ln"], "--model must be bn or gn, got ln"),
    "device": (["--device", "tpu"], "--device must be cpu or cuda, got tpu"),
    "batch sizes": (["--batch-size", "64;128"], "separated by commas, got 64;128"),
    "no batch": (["--batch-size", "64,0"], "multiple of 1 processes × --accumulate 1, got 0"),
    "a batch in parts": (["--batch-size", "64", "--accumulate", "3"], "1 processes × --accumulate 3, got 64"),
    "too large a batch": (["--batch-size", "64,2048"], "--batch-size must be at most 1437, got 2048"),
    "no epochs": (["--epochs", "0"], "epochs"),
    "all warm-up": (["--epochs", "4", "--warmup", "4"], "--warmup must be at least 0 and below --epochs 4, got 4"),
    "endless LR": (["--base-lr", "inf"], "--base-lr must be greater than 0 and below inf, got inf"),
    "no number": (["--weight-decay", "nan"], "--weight-decay must be at least 0 and below inf, got nan"),
    "momentum": (["--momentum", "0"], "--momentum must be greater than 0 and below 1, got 0"),
    "smoothing": (["--label-smoothing", "1"], "--label-smoothing must be at least 0 and below 1, got 1"),
    "width": (["--width", "6"], "--width must be a multiple of 4, got 6"),
    "no backend": (["--backend", "gpu"], "--backend gpu was asked for, but there is no such backend"),
    "backend of torch": (["--backend", "cpu", "--optimizer", "torch"], "but it is for --optimizer texp and lars"),
    "both": (["--float64", "--amp", "bf16"], "it does not go with --amp bf16"),
    "no figure": (["--plot", "a.csv"], "cannot write a figure to a.csv: its name must end in .png or .pdf or .svg"),
    "no folder": (["--csv", "no/such/folder/a.csv"], "No such file or directory"),
    "a folder": (["--checkpoint", "."], "cannot write .: Is a directory"),
    "no such option": (["--bach-size", "64"], "--bach-size"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_arguments_get_one_line_and_exit_code_2(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, message = ERRORS[case]
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("large_batch: ")
    assert re.search(message, captured.err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu(capsys):
    assert run(["--device", "cuda"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_more_processes_than_gpus(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert run(["--device", "cuda"]) == 2
    assert "one device for each of 2 processes, but torch sees 1 CUDA devices" in capsys.readouterr().err


def test_which_process_says_what_is_wrong(capsys, monkeypatch):
    """The first what is wrong everywhere, and each what is wrong with itself."""

    def missing():
        raise OSError("No such file or directory: 'digits'")

    monkeypatch.setattr(large_batch, "load_digits", missing)
    for rank, arguments, said in (("0", ["--width", "6"], 1), ("1", ["--width", "6"], 0), ("1", SMALL, 1)):
        monkeypatch.setenv("RANK", rank)
        assert run(arguments) in (1, 2)
        assert capsys.readouterr().err.count("large_batch: ") == said


def test_checkpoints_of_something_else(tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint.pt"
    _ = trained(tmp_path, *SMALL)
    capsys.readouterr()
    assert run([*SMALL, "--epochs", "4", "--checkpoint", str(checkpoint)]) == 2
    assert "is of another run: epochs was 3, and is 4 now" in capsys.readouterr().err
    whole = checkpoint.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"a text", json.dumps({}).encode()):
        checkpoint.write_bytes(damaged)
        assert run([*SMALL, "--checkpoint", str(checkpoint)]) == 2
        err = capsys.readouterr().err
        assert "is damaged, or not one of this command" in err
        assert err.count("\n") == 1
        assert checkpoint.read_bytes() == damaged
    torch.save({"model": texp.__version__}, checkpoint)
    assert run([*SMALL, "--checkpoint", str(checkpoint)]) == 2


def test_help(capsys):
    assert run(["--help"]) == 0
    assert "--label-smoothing" in capsys.readouterr().out

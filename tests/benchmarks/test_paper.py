"""The experiments of benchmarks/paper: how they train, go on after an interruption, and answer on the command line.

What they measure is asserted by `make paper`."""

import csv
import io
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.paper import (
    data,
    models,
    pool,
    results,
    step_decay,
    toy,
    training,
)
from benchmarks.paper.__main__ import EXPERIMENTS, run
from benchmarks.paper.setup import CIFAR10, DIGITS

ROOT = Path(__file__).parents[2]


class TestCheckpoints:
    setup = DIGITS.shortened(20)  # of 11 steps an epoch

    @pytest.fixture(scope="class")
    @staticmethod
    def digits():
        return data.load(DIGITS)

    @pytest.mark.parametrize("name", ["step-sgd", "step-texp-corrected", "step-texp-sgd"])
    def test_an_interrupted_run_has_the_same_bytes(self, tmp_path, digits, name):
        """Interrupted twice: before its first checkpoint, and in the middle of the second epoch."""
        method = step_decay.runs(self.setup)[name]
        files = []
        for folder, stops in (("whole", []), ("interrupted", [4, 15])):
            setup = replace(self.setup, out=tmp_path / folder)
            for stop in stops:
                for t in training.train(name, method, setup, 0, digits):
                    if t == stop:
                        break
            taken = list(training.train(name, method, setup, 0, digits))
            assert taken == list(range(11 if stops else 0, 20))
            files.append(training.path_of(name, setup, 0).read_bytes())
            with training.path_of(name, setup, 0).open("a") as file:
                file.write("20,0.5")  # as if a later line had been interrupted
            assert list(training.train(name, method, setup, 0, digits)) == []
            assert training.path_of(name, setup, 0).read_bytes() == files[-1]
        assert files[0] == files[1]
        lines = list(csv.DictReader(io.StringIO(files[0].decode())))
        assert [line["step"] for line in lines] == [str(t) for t in range(21)]
        assert [bool(line["test_error"]) for line in lines] == [t in (0, 11, 20) for t in range(21)]

    def test_batches_differ_from_epoch_to_epoch_and_seed_to_seed(self, digits):
        firsts = []
        for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0)):
            images, labels = training._Run(step_decay.sgd(self.setup), self.setup, seed, digits).batches(epoch)
            firsts.append((next(images), next(labels)))
        (x, y), (same_x, same_y), *others = firsts
        assert torch.equal(x, same_x)
        assert torch.equal(y, same_y)
        for other_x, other_y in others:
            assert not torch.equal(x, other_x)
            assert not torch.equal(y, other_y)

    def test_a_checkpoint_of_another_run_is_refused(self, tmp_path, digits):
        setup = replace(self.setup, out=tmp_path, steps=2)
        list(training.train("run", step_decay.sgd(setup), setup, 0, digits))
        others = replace(setup, weight_decay=1e-3), replace(setup, batch_size=64), replace(setup, gamma=0.5)
        for other, seed in (*((other, 0) for other in others), (setup, 1)):
            training.path_of("run", setup, 0).with_suffix(".pt").replace(
                training.path_of("run", setup, seed).with_suffix(".pt")
            )
            with pytest.raises(training.CheckpointError, match="other settings: remove it, or give another --out"):
                list(training.train("run", step_decay.sgd(other), other, seed, digits))

    def test_a_run_may_be_moved(self, tmp_path, digits):
        setup = replace(self.setup, out=tmp_path / "here", steps=2)
        list(training.train("run", step_decay.sgd(setup), setup, 0, digits))
        setup.out.rename(tmp_path / "there")
        moved = replace(setup, out=tmp_path / "there")
        renamed = replace(step_decay.sgd(moved), label="by another name")
        assert list(training.train("run", renamed, moved, 0, digits)) == []

    def test_the_test_error_is_the_share_of_wrong_answers(self, digits):
        run = training._Run(step_decay.sgd(self.setup), self.setup, 0, digits)
        wrong = run.model(digits.test_x).argmax(1) != digits.test_y
        assert run.test_error() == wrong.double().mean().item()

    DAMAGES = {  # how the file's name ends
        "cut off": (".pt", lambda x: x[:3000], "run-seed0.pt is not a checkpoint, or damaged"),
        "empty": (".pt", lambda _: b"", "run-seed0.pt is not a checkpoint, or damaged"),
        "other": (".pt", lambda _: b"hello\n", "run-seed0.pt is not a checkpoint, or damaged"),
        "lines": (".csv", lambda x: x[:-1], "run-seed0.csv lacks lines that its checkpoint counts on"),
        "all lines": (".csv", None, "run-seed0.csv lacks lines that its checkpoint counts on"),
    }

    @pytest.mark.parametrize("case", DAMAGES)
    def test_what_is_damaged_is_said_in_one_line(self, tmp_path, digits, case):
        suffix, damage, message = self.DAMAGES[case]
        setup = replace(self.setup, out=tmp_path, steps=2)
        list(training.train("run", step_decay.sgd(setup), setup, 0, digits))
        path = training.path_of("run", setup, 0).with_suffix(suffix)
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(training.CheckpointError, match=message) as raised:
            list(training.train("run", step_decay.sgd(setup), setup, 0, digits))
        assert "\n" not in str(raised.value)

    def test_what_is_read(self, tmp_path, digits):
        setup = replace(self.setup, out=tmp_path, steps=2)
        list(training.train("run", step_decay.sgd(setup), setup, 0, digits))
        path = training.path_of("run", setup, 0)
        *lines, last = csv.DictReader(path.read_text().splitlines())
        found = results.read(path)
        assert found.loss == [float(line["loss"]) for line in lines]
        assert found.log10_lr == [-1.0, -1.0]
        norm2 = [sum(float(v) ** 2 for k, v in line.items() if k.startswith("norm ")) for line in lines]
        assert found.norm2_over_lr == pytest.approx([value / DIGITS.lr for value in norm2])
        assert found.test_error == {0: float(lines[0]["test_error"]), 2: float(last["test_error"])}

    def test_what_is_written_at_every_step(self, tmp_path, digits):
        """The functions are the same and so is the intrinsic LR, up to α; weights are those of SGD times P."""
        # With a decay that makes P pass 2.
        setup, lines = replace(DIGITS, weight_decay=2e-2, milestones=(40, 45), steps=50, out=tmp_path), {}
        for name, method in step_decay.runs(setup).items():
            list(training.train(name, method, setup, 0, digits))
            with training.path_of(name, setup, 0).open() as file:
                lines[name] = [line for line in csv.DictReader(file) if line["loss"]]
        norms = [column for column in lines["step-sgd"][0] if column.startswith("norm ")]
        assert len(norms) == 9
        assert lines["step-texp-sgd"][-1]["halvings"] != "0"
        for name in ("step-texp-sgd", "step-texp-corrected"):
            for line, sgd in zip(lines[name], lines["step-sgd"], strict=True):
                P, alpha = 10 ** float(line["log10_P"]), float(line["alpha"])
                assert float(line["loss"]) == pytest.approx(float(sgd["loss"]), rel=1e-9)
                assert float(line["intrinsic_lr"]) * alpha == pytest.approx(float(sgd["intrinsic_lr"]), rel=1e-9)
                assert float(line["log10_lr"]) == pytest.approx(
                    float(sgd["log10_lr"]) + math.log10(P * P / alpha), abs=1e-9
                )
                for norm in norms:
                    assert float(line[norm]) * 2 ** int(line["halvings"]) == pytest.approx(
                        P * float(sgd[norm]), rel=1e-9
                    )


def test_on_a_gpu_convolutions_are_deterministic_and_in_float32(monkeypatch):
    """As they are told: there may be no GPU."""
    cudnn, told = torch.backends.cudnn, []

    def train(*_):
        told.append((cudnn.enabled, cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32))
        yield 0

    monkeypatch.setattr(pool, "train", train)
    pool._train("run", step_decay.sgd(DIGITS), DIGITS, seed=0, threads=1)
    assert told == [(True, True, False, False)]


@pytest.mark.parametrize("cifar10", [False, True])
@pytest.mark.parametrize("name", models.MODELS)
def test_the_whole_loss_of_a_model_is_scale_invariant(name, cifar10):
    setup = replace(CIFAR10 if cifar10 else DIGITS, dtype=torch.float64)
    model, size = models.make(name, setup, 0), (3, 32, 32) if cifar10 else (1, 8, 8)
    x = torch.randn(4, *size, generator=torch.Generator().manual_seed(0)).double()
    before = model(x)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p *= 2
    assert torch.equal(model(x), before)
    if name == "resnet" and cifar10:
        # 31 convolutions and the head; the 1×1 ones of the shortcuts are not counted.
        layers = [p for name, p in model.named_parameters() if "shortcut" not in name]
        assert len(layers) == 32
        assert {len(p) for p in layers[:-1]} == {16, 32, 64}


@pytest.mark.parametrize(("norm", "groups"), [("gn", [2, 2, 4, 8]), ("ln", [1, 1, 1, 1]), ("in", [8, 8, 16, 32])])
def test_the_norms_of_the_vgg(norm, groups):
    assert [norm.num_groups for norm in models.make(f"vgg-{norm}", DIGITS, 0).norms] == groups


@pytest.mark.parametrize("name", models.MODELS)
def test_an_initialisation_is_that_of_its_seed(name):
    first, same, other = (
        torch.cat([p.flatten() for p in models.make(name, DIGITS, s).parameters()]) for s in (0, 0, 1)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def kill(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class TestCommand:
    def test_one_experiment_with_two_seeds(self, tmp_path, capsys):
        out = tmp_path / "out"
        arguments = ["cosine", "--steps", "12", "--seeds", "2", "--out", str(out), "--jobs", "1"]
        assert run(arguments) == 0
        printed = capsys.readouterr().out
        assert printed.count("exponential form against SGD") == 1
        assert (out / "cosine.png").read_bytes().startswith(b"\x89PNG")
        checks = list(csv.DictReader((out / "checks.csv").read_text().splitlines()))
        assert [(check["experiment"], check["holds"]) for check in checks] == [("cosine", "True")] * 2
        summary = list(csv.DictReader((out / "summary.csv").read_text().splitlines()))
        assert len(summary) == 3 * 2  # methods, epochs
        before = {path: path.stat().st_mtime_ns for path in (out / "steps").iterdir()}
        assert len(before) == 3 * 2 * 2  # methods, seeds, a CSV and its checkpoint
        assert run(arguments) == 0

    def test_all_as_a_module_in_two_processes(self, tmp_path):
        command = [sys.executable, "-m", "benchmarks.paper", "all", "--steps", "4", "--seeds", "1", "--jobs", "2"]
        done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert {path.stem for path in tmp_path.glob("*.png")} == set(EXPERIMENTS)
        assert "412" in done.stdout  # of the toy example
        toys = list(csv.DictReader((tmp_path / "steps" / "toy.csv").read_text().splitlines()))
        assert len(toys) == 3 * toy.STEPS
        assert (float(toys[0]["loss"]), float(toys[0]["intrinsic_lr"])) == (0.5, 0.05)

    def test_an_interruption(self, tmp_path):
        """As by Ctrl-C in a terminal, after the first checkpoint; also where these tests run in the background, and
        processes are started to ignore it."""
        heeding = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        as_module = "runpy.run_module('benchmarks.paper', run_name='__main__', alter_sys=True)"
        command = [sys.executable, "-c", f"{heeding}; {as_module}", "norms", "--seeds", "1", "--jobs", "2"]
        process = subprocess.Popen(
            [*command, "--out", str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 50
        while not list(tmp_path.glob("steps/*.pt")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
        assert process.returncode == 130
        assert error == "benchmarks.paper: interrupted: the same command goes on from the last checkpoints\n"

    def test_a_process_that_is_killed(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(pool, "_train", kill)
        assert run(["cosine", "--steps", "4", "--seeds", "1", "--jobs", "2", "--out", str(tmp_path)]) == 1
        assert capsys.readouterr().err.startswith("benchmarks.paper: a process was killed, perhaps as ")

    def test_a_shape_that_does_not_hold(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(toy, "checks", lambda *_: [results.at_most("the loss", 2.0, 1.0)])
        assert run(["toy", "--out", str(tmp_path)]) == 1
        captured = capsys.readouterr()
        assert captured.err == "benchmarks.paper: 1 of 1 shapes do not hold: toy: the loss\n"
        assert re.search(r"the loss .* NO", captured.out)
        assert (tmp_path / "checks.csv").read_text().endswith("the loss,2,-inf,1,False\n")
        # Of fewer seeds, or shorter runs, it is measured and not asserted.
        assert run(["toy", "--out", str(tmp_path), "--seeds", "2"]) == 0
        assert run(["toy", "--out", str(tmp_path), "--steps", "1500"]) == 0

    ERRORS = {
        "no name": ([], 2, "Missing argument .name."),
        "name": (["sine"], 2, "NAME must be among fixed, step-decay, .* and all, got sine"),
        "data": (["toy", "--data", "mnist"], 2, "--data must be digits or cifar10, got mnist"),
        "no root": (["toy", "--data", "cifar10"], 2, "--root DIR goes with --data cifar10"),
        "root of digits": (["toy", "--root", "."], 2, "--root DIR goes with --data cifar10"),
        "empty root": (
            ["toy", "--data", "cifar10", "--root", "."],
            1,
            "no CIFAR-10 in .: expected cifar-10-batches-bin/",
        ),
        "device": (["toy", "--device", "tpu"], 2, "--device must be cpu or cuda, got tpu"),
        "seeds": (["toy", "--seeds", "0"], 2, "--seeds"),
        "out": (["toy", "--out", "/dev/null/out"], 1, "/dev/null/out"),
    }

    @pytest.mark.parametrize("case", ERRORS)
    def test_errors_are_one_line(self, case, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        arguments, code, message = self.ERRORS[case]
        assert run(arguments) == code
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert captured.err.startswith("benchmarks.paper: ")
        assert re.search(message, captured.err)


def test_the_values_in_its_readme_are_those_that_were_measured():
    """Also that there is a figure of every experiment, and that it is shown."""
    folder = ROOT / "benchmarks" / "paper"
    readme = (folder / "README.md").read_text()
    for check in csv.DictReader((folder / "results" / "checks.csv").read_text().splitlines()):
        assert f"| {check['experiment']} | {check['what']} | {float(check['value']):.4g} |" in readme
        assert check["holds"] == "True"
    for name in EXPERIMENTS:
        assert (folder / "results" / f"{name}.png").exists()
        assert f"](results/{name}.png)" in readme

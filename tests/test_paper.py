"""The experiments of benchmarks/paper: how they train, read data and go on after an interruption.

What they measure is asserted by `make paper`."""

import csv
import io
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR

from benchmarks.paper import (
    cosine,
    data,
    fixed,
    instant_decay,
    models,
    no_instant_decay,
    norms,
    pool,
    results,
    step_decay,
    toy,
    training,
    ways,
)
from benchmarks.paper.__main__ import EXPERIMENTS, run
from benchmarks.paper.setup import CIFAR10, DIGITS, EPOCH
from texp.demo import load_digits
from texp.schedules import EXP, TEXP
from texp.theory import alpha_star

ROOT = Path(__file__).parent.parent
RECORDS = 6  # in each file of the small CIFAR-10


def quiet_sgd(lr: float = DIGITS.lr) -> torch.optim.SGD:
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.zeros(2)
    return torch.optim.SGD([p], lr, DIGITS.momentum)


def scheduled(make, steps: int) -> list[float]:
    optimizer = quiet_sgd()
    scheduler = make(optimizer)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


class TestWays:
    setup = DIGITS.shortened(30)

    def test_the_lrs_are_those_of_torchs_schedulers(self):
        milestones, steps = list(self.setup.milestones), self.setup.steps
        assert milestones == [10, 20]
        step = scheduled(lambda optimizer: MultiStepLR(optimizer, milestones, DIGITS.gamma), steps)
        cosine = scheduled(lambda optimizer: CosineAnnealingLR(optimizer, steps), steps)
        assert ways.step_decay(self.setup) == pytest.approx(step, rel=1e-12)
        assert ways.cosine(self.setup) == pytest.approx(cosine, rel=1e-12)

    @pytest.mark.parametrize("instant_decay", [True, False])
    @pytest.mark.parametrize("taper", [True, False])
    def test_texp_is_that_of_texp_schedules(self, instant_decay, taper):
        switches = {"instant_decay": instant_decay, "taper": taper}
        expected = scheduled(
            lambda optimizer: TEXP(
                optimizer, self.setup.milestones, DIGITS.gamma, weight_decay=DIGITS.weight_decay, **switches
            ),
            self.setup.steps,
        )
        assert ways.texp(self.setup, "", **switches).lrs == pytest.approx(expected, rel=1e-12)

    def test_exp_is_that_of_texp_schedules(self):
        expected = scheduled(lambda optimizer: EXP(optimizer, weight_decay=DIGITS.weight_decay), self.setup.steps)
        assert ways.texp(self.setup, "", ()).lrs == pytest.approx(expected, rel=1e-12)

    def test_growth_and_lr_belong_together(self):
        """η̃_t = P_t·P_{t+1}·η_t, and P_{t+1} = P_t/α_t."""
        etas = ways.step_decay(self.setup)
        for way in (ways.texp(self.setup, ""), ways.translated(self.setup, etas, "")):
            for eta, lr, growth in zip(etas, way.lrs, way.growth, strict=True):
                assert lr == pytest.approx(eta * 10 ** (2 * growth.log10_P) / growth.alpha, rel=1e-12)


class TestCheckpoints:
    setup = DIGITS.shortened(20)  # of 11 steps an epoch

    @pytest.fixture(scope="class")
    @staticmethod
    def digits():
        return data.load(DIGITS)

    @pytest.mark.parametrize("name", ["step-sgd", "step-texp-corrected", "step-texp-sgd"])
    def test_an_interrupted_run_has_the_same_bytes(self, tmp_path, digits, name):
        """Interrupted twice: before its first checkpoint, and in the middle of the second epoch."""
        way = step_decay.runs(self.setup)[name]
        files = []
        for folder, stops in (("whole", []), ("interrupted", [4, 15])):
            setup = replace(self.setup, out=tmp_path / folder)
            for stop in stops:
                for t in training.train(name, way, setup, 0, digits):
                    if t == stop:
                        break
            taken = list(training.train(name, way, setup, 0, digits))
            assert taken == list(range(11 if stops else 0, 20))
            files.append(training.path_of(name, setup, 0).read_bytes())
            with training.path_of(name, setup, 0).open("a") as file:
                file.write("20,0.5")  # as if a later line had been interrupted
            assert list(training.train(name, way, setup, 0, digits)) == []
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
        for name, way in step_decay.runs(setup).items():
            list(training.train(name, way, setup, 0, digits))
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


def curve(loss: list[float], norm2_over_lr: list[float] | None = None) -> results.Curve:
    return results.Curve(loss, [0.0] * len(loss), norm2_over_lr or [1.0] * len(loss), {})


def values(module, setup, **curves: results.Curve) -> list[float]:
    """What an experiment measures; curves: by the names of its runs, with _ for -."""
    named = {name.replace("_", "-"): [each] for name, each in curves.items()}
    assert list(named) == list(module.runs(setup))
    return [check.value for check in module.checks(named, setup)]


class TestMeasured:
    """Of curves made by hand, with phases of 100 steps."""

    setup = DIGITS.shortened(300)
    flat = curve([1.0] * 300)
    off = curve([1.0] * 299 + [1.5])

    def test_a_check(self):
        held = [results.Check("", value, 1.0, 2.0).holds for value in (0.9, 1.0, 2.0, 2.1, math.nan)]
        assert held == [False, True, True, False, False]

    def test_means_and_differences(self):
        a, b = curve([1.0, 2.0], [3.0, 4.0]), curve([3.0, 6.0], [5.0, 8.0])
        assert results.average([a, b]) == curve([2.0, 4.0], [4.0, 6.0])
        assert results.largest_difference([a, b], [a, a]) == 4.0
        falling = curve([4.0] * 50 + [2.0] * 50)
        assert results.averaged_difference(falling, curve([4.0] * 50 + [2.5] * 50)) == pytest.approx(0.2)
        assert results.averaged_difference(falling, falling) == 0

    def test_fixed(self):
        norms = [10.0] * 50 + [2.0] * 49 + [3.0] + [10.0] * 200
        growth, texp_sgd, corrected, *varied = values(
            fixed,
            self.setup,
            fixed_sgd=self.flat,
            fixed_exp=curve(self.flat.loss, norms),
            fixed_exp_corrected=curve([1.25] + [1.0] * 299),
            fixed_texp_sgd=self.off,
        )
        assert growth == pytest.approx(1.4812, abs=5e-5)
        assert (texp_sgd, corrected, varied) == (0.5, 0.25, [0.0, 0.5])

    def test_step_decay(self):
        assert values(
            step_decay,
            self.setup,
            step_sgd=self.flat,
            step_texp=curve([1.0] * 250 + [0.875] * 50),
            step_texp_corrected=self.off,
            step_texp_sgd=curve([1.25] + [1.0] * 299),
        ) == [0.125, 0.5, 0.25]

    def test_instant_decay(self):
        sgd, instant = curve([4.0] * 100 + [3.0] * 200), curve([4.0] * 100 + [1.0] * 50 + [5.0] * 150)
        assert values(instant_decay, self.setup, step_sgd=sgd, instant_only=instant) == [0.25, 0.25]

    def test_phases_shorter_than_the_window_of_a_mean(self):
        setup = DIGITS.shortened(100)
        assert setup.milestones == (33, 67)
        both = curve([2.0] * 33 + [1.0] * 67)
        instant, sgd = values(instant_decay, setup, step_sgd=both, instant_only=both)
        assert instant == pytest.approx((16 * 2 + 34 * 1) / 50 / 2 - 1)
        assert sgd == -instant

    def test_no_instant_decay(self):
        slow = curve([9.0] * 100 + [1.5] * 50 + [1.0] * 150)
        assert values(no_instant_decay, self.setup, step_sgd=self.flat, no_instant=slow) == [0.25]

    def test_cosine(self):
        other = curve([1.25] + [1.0] * 299)
        curves = {"cosine_sgd": self.flat, "cosine_translated": self.off, "cosine_texp_sgd": other}
        assert values(cosine, self.setup, **curves) == [0.5, 0.25]

    def test_norms(self):
        off = {"gn": 1.5, "ln": 1.25, "in": 3.0}
        curves = {}
        for norm, value in off.items():
            curves |= {f"{norm}_sgd": self.flat, f"{norm}_texp_sgd": curve([value] + [1.0] * 299)}
        assert values(norms, self.setup, **curves) == [0.5, 0.25, 2.0]

    def test_the_growing_schedules_that_are_compared(self):
        """The factor of the LR within the first two phases, and from one to the other."""
        factors = {}
        for module in (fixed, instant_decay, no_instant_decay):
            for name, way in module.runs(self.setup).items():
                factors[name] = [way.lrs[t + 1] / way.lrs[t] for t in (50, 150, 99)]
        fast, slow = (
            alpha_star(lr, DIGITS.weight_decay, DIGITS.momentum) ** -2 for lr in (DIGITS.lr, DIGITS.lr / 10)
        )
        assert factors["fixed-exp"] == pytest.approx([fast, fast, fast])
        assert factors["instant-only"] == pytest.approx([fast, fast, fast / 10])
        assert factors["no-instant"] == pytest.approx([fast, slow, math.sqrt(fast * slow)])


def test_on_a_gpu_convolutions_are_deterministic_and_in_float32(monkeypatch):
    """As they are told: there may be no GPU."""
    cudnn, told = torch.backends.cudnn, []

    def train(*_):
        told.append((cudnn.enabled, cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32))
        yield 0

    monkeypatch.setattr(pool, "train", train)
    pool._train("run", step_decay.sgd(DIGITS), DIGITS, seed=0, threads=1)
    assert told == [(True, True, False, False)]


def batches(kind: str) -> dict[str, bytes]:
    """The files of a small CIFAR-10, by name."""
    generator = np.random.default_rng(0)
    files = {}
    for part in (*data.PARTS, "test_batch"):
        images = generator.integers(0, 256, (RECORDS, data.PIXELS), dtype=np.uint8)
        labels = generator.integers(0, 10, RECORDS, dtype=np.uint8)
        if kind == "binary":
            files[f"{part}.bin"] = np.hstack([labels[:, None], images]).tobytes()
        else:
            files[part] = pickle.dumps(
                {b"data": images, b"labels": labels.tolist(), b"batch_label": b"one of six"}, protocol=2
            )
    return files


def archive(files: dict[str, bytes], kind: str, folder):
    with tarfile.open(folder / f"cifar-10-{kind}.tar.gz", "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{data.KINDS[kind][0]}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return folder


def folder_of(files: dict[str, bytes], folder):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


class TestCifar10:
    @pytest.mark.parametrize("place", ["folder", "parent", "archive", "parent of the archive"])
    @pytest.mark.parametrize("kind", data.KINDS)
    def test_both_versions_wherever_they_are(self, tmp_path, kind, place):
        if "archive" in place:
            root = archive(batches(kind), kind, tmp_path)
            root = root / f"cifar-10-{kind}.tar.gz" if place == "archive" else root
        else:
            root = folder_of(batches(kind), tmp_path / data.KINDS[kind][0])
            root = root.parent if place == "parent" else root
        loaded = data.load_cifar10(root, RECORDS)
        assert loaded.train_x.shape == (5 * RECORDS, 3, 32, 32)
        assert loaded.test_x.shape == (RECORDS, 3, 32, 32)
        assert (loaded.margin, loaded.flips) == (4, True)
        assert loaded.train_x.mean((0, 2, 3)).abs().max() < 1e-5
        assert loaded.train_x.std((0, 2, 3)) == pytest.approx(torch.ones(3), abs=1e-5)
        raw = np.frombuffer(batches("binary")["test_batch.bin"], np.uint8).reshape(RECORDS, -1)
        assert loaded.test_y.tolist() == raw[:, 0].tolist()
        train = [batches("binary")[f"{part}.bin"] for part in data.PARTS]
        assert loaded.train_y.tolist() == [part[i * (1 + data.PIXELS)] for part in train for i in range(RECORDS)]
        # Standardised by channel with two numbers, which any two pixels give away.
        pixels = torch.tensor(raw[:, 1:].reshape(RECORDS, 3, -1), dtype=torch.float32)
        mine = loaded.test_x.flatten(2)
        for c in range(3):
            slope = (mine[0, c, 1] - mine[0, c, 0]) / (pixels[0, c, 1] - pixels[0, c, 0])
            torch.testing.assert_close(mine[:, c] - mine[0, c, 0], (pixels[:, c] - pixels[0, c, 0]) * slope)

    DAMAGES = {
        "missing": ("binary", "data_batch_3.bin", None, "data_batch_3.bin of CIFAR-10 .binary.* cannot be read"),
        "cut off": ("binary", "test_batch.bin", lambda x: x[:-7], r"has 18431 bytes: expected 18438, 6 records"),
        "label": ("binary", "test_batch.bin", lambda x: b"\x0b" + x[1:], "labels that are not integers from 0 to 9"),
        "negative label": (
            "python",
            "data_batch_1",
            lambda x: pickle.dumps({**pickle.loads(x), b"labels": [-1] * RECORDS}, protocol=2),
            "labels that are not integers from 0 to 9",
        ),
        "missing, python": ("python", "data_batch_3", None, "data_batch_3 of CIFAR-10 .python.* cannot be read"),
        "cut off, python": ("python", "data_batch_1", lambda x: x[:-7], "data_batch_1 is not a batch of CIFAR-10"),
        "not a pickle": ("python", "data_batch_1", lambda _: b"<html>\n", "is not a batch of CIFAR-10"),
        "no dict": (
            "python",
            "data_batch_1",
            lambda _: pickle.dumps([1, 2]),
            "a pickle of a dict with data and labels",
        ),
        "code": ("python", "data_batch_1", lambda _: pickle.dumps(print), "it asks for builtins.print"),
        "shape": (
            "python",
            "data_batch_1",
            lambda _: pickle.dumps({b"data": np.zeros((2, 3), np.uint8), b"labels": [1, 2]}, protocol=2),
            r"images of shape \(2, 3\) .* expected \(6, 3072\)",
        ),
    }

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("case", DAMAGES)
    def test_what_is_damaged_is_said_in_one_line(self, tmp_path, case, packed):
        kind, name, damage, message = self.DAMAGES[case]
        files = batches(kind)
        content = files.pop(name)
        if damage is not None:
            files[name] = damage(content)
        root = archive(files, kind, tmp_path) if packed else folder_of(files, tmp_path / "cifar")
        with pytest.raises(data.DataError, match=message) as raised:
            data.load_cifar10(root, RECORDS)
        assert "\n" not in str(raised.value)
        assert str(root) in str(raised.value)

    def test_an_archive_that_is_cut_off(self, tmp_path):
        path = archive(batches("binary"), "binary", tmp_path) / "cifar-10-binary.tar.gz"
        path.write_bytes(path.read_bytes()[:30_000])
        with pytest.raises(data.DataError, match="cannot be read"):
            data.load_cifar10(path, RECORDS)

    @pytest.mark.parametrize("kind", data.KINDS)
    def test_an_archive_with_one_wrong_byte(self, tmp_path, kind):
        """Wherever it is: in the pixels, nothing but the checksum tells."""
        path = archive(batches(kind), kind, tmp_path) / f"cifar-10-{kind}.tar.gz"
        content = path.read_bytes()
        for position in range(40, len(content), len(content) // 50):  # after the name of the file
            path.write_bytes(content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :])
            with pytest.raises(data.DataError) as raised:
                data.load_cifar10(path, RECORDS)
            assert "\n" not in str(raised.value)

    def test_crops_and_flips_are_of_the_image(self):
        """Every image is its own with a margin of zeros, shifted, and flipped or not; the same for the same seed."""
        x = torch.rand(64, 3, 32, 32) + 1
        loaded = data.Data(x, x, x, x, margin=4, flips=True)
        batch = torch.arange(63, -1, -1)
        made = loaded.augmented(batch, torch.Generator().manual_seed(0))
        assert torch.equal(made, loaded.augmented(batch, torch.Generator().manual_seed(0)))
        padded = torch.nn.functional.pad(x[batch], (4,) * 4)
        shifts = set()
        for image, margin in zip(made, padded, strict=True):
            found = [
                (dy, dx, flip)
                for dy in range(9)
                for dx in range(9)
                for flip in (False, True)
                if torch.equal(image.flip(2) if flip else image, margin[:, dy : dy + 32, dx : dx + 32])
            ]
            assert len(found) == 1
            shifts.add(found[0])
        assert len(shifts) > 30
        assert {flip for _, _, flip in shifts} == {False, True}

    def test_an_epoch_is_that_of_the_paper(self):
        x = torch.empty(50_000)
        assert training.steps_per_epoch(data.Data(x, x, x, x), CIFAR10) == EPOCH == 391
        assert (CIFAR10.lr, CIFAR10.momentum, CIFAR10.weight_decay, CIFAR10.batch_size) == (0.1, 0.9, 5e-4, 128)
        assert [t / EPOCH for t in (*CIFAR10.milestones, CIFAR10.steps)] == [80, 120, 160]
        assert training.steps_per_epoch(data.Data(*load_digits()), DIGITS) == 11

    def test_the_images_of_digits_are_shifted_by_a_pixel(self):
        digits = data.load(DIGITS)
        assert (digits.margin, digits.flips) == (1, False)

    def test_a_run(self, tmp_path, monkeypatch, capsys):
        """From the command line, with the paper's network; two steps."""
        root = folder_of(batches("binary"), tmp_path / "cifar-10-batches-bin")
        monkeypatch.setattr(data.load_cifar10, "__defaults__", (RECORDS,))
        out = tmp_path / "out"
        arguments = ["instant-decay", "--data", "cifar10", "--root", str(root), "--out", str(out), "--steps", "4"]
        assert run([*arguments, "--jobs", "1"]) == 0
        assert {path.name for path in out.iterdir()} == {"steps", "instant-decay.png", "checks.csv", "summary.csv"}
        # The shapes are measured but not asserted.
        assert "instant decay only" in capsys.readouterr().out


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
        assert len(summary) == 3 * 2  # ways, epochs
        before = {path: path.stat().st_mtime_ns for path in (out / "steps").iterdir()}
        assert len(before) == 3 * 2 * 2  # ways, seeds, a CSV and its checkpoint
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

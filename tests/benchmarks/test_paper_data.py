"""CIFAR-10 as users have it, in small files of the same formats, whole and damaged."""

import io
import pickle
import tarfile

import numpy as np
import pytest
import torch

from benchmarks.paper import (
    data,
    training,
)
from benchmarks.paper.__main__ import run
from benchmarks.paper.setup import CIFAR10, DIGITS, EPOCH
from texp.cli.digits import load_digits

RECORDS = 6  # in each file of the small CIFAR-10


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

"""Data that a user has: scikit-learn's digits, or CIFAR-10 as it is published. Nothing is downloaded."""

import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.paper.setup import Setup
from texp.cli.digits import load_digits

RECORDS = 10_000  # images in each file of CIFAR-10
PIXELS = 3 * 32 * 32

PARTS = tuple(f"data_batch_{number}" for number in range(1, 6))
KINDS = {  # of CIFAR-10: the folder in the archive, how its files end
    "binary": ("cifar-10-batches-bin", ".bin"),
    "python": ("cifar-10-batches-py", ""),
}


class DataError(Exception):
    """Data that is missing or damaged; the message is one line."""


class Data(NamedTuple):
    """Images of shape (n, channels, h, w), standardised, and labels of shape (n,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    margin: int = 0  # pixels that training images are shifted by, at most
    flips: bool = False  # whether they are mirrored, half of the time

    def augmented(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Images of the training set by their numbers, shifted and mirrored at random."""
        x = self.train_x[batch]
        n, channels, size, _ = x.shape
        shifts = torch.randint(2 * self.margin + 1, (2, n, 1), generator=generator)
        flipped = (torch.rand(n, 1, generator=generator) < 0.5) & self.flips
        pixels = torch.arange(size)
        rows = (shifts[0] + pixels)[:, None, :, None].to(x.device)
        columns = (shifts[1] + torch.where(flipped, size - 1 - pixels, pixels))[:, None, None, :].to(x.device)
        which = torch.arange(n, device=x.device)[:, None, None, None]
        channel = torch.arange(channels, device=x.device)[None, :, None, None]
        return pad(x, (self.margin,) * 4)[which, channel, rows, columns]


def load(setup: Setup) -> Data:
    """The data of a setup, on its device and in its dtype. Raises DataError."""
    data = Data(*load_digits(), margin=1) if setup.data == "digits" else load_cifar10(setup.root)
    x = [x.to(setup.device, setup.dtype) for x in (data.train_x, data.test_x)]
    y = [y.to(setup.device) for y in (data.train_y, data.test_y)]
    return data._replace(train_x=x[0], train_y=y[0], test_x=x[1], test_y=y[1])


def load_cifar10(root: Path, records: int = RECORDS) -> Data:
    """CIFAR-10, standardised by channel.

    Args:
        root: cifar-10-binary.tar.gz or cifar-10-python.tar.gz, the folder it unpacks to, or the one that holds any of
            these.
        records: images in each file.

    Raises DataError where a file is missing, cut off or of another kind.
    """
    kind, name, read = _found(Path(root))
    parts = []
    for part in (*PARTS, "test_batch"):
        file = part + KINDS[kind][1]
        where = f"{name}/{file}"
        try:
            content = read(file)
        except (OSError, KeyError, EOFError, tarfile.TarError, zlib.error) as error:
            raise DataError(f"{where} of CIFAR-10 ({kind} version) cannot be read: {_line(error)}") from None
        parts.append((_binary if kind == "binary" else _python)(content, where, records))
    images = [torch.from_numpy(images.copy()).view(-1, 3, 32, 32).float() for images, _ in parts]
    labels = [torch.from_numpy(labels.astype(np.int64)) for _, labels in parts]
    train_x, test_x = torch.cat(images[:-1]), images[-1]
    mean, std = (f(train_x, dim=(0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
    return Data(
        (train_x - mean) / std, torch.cat(labels[:-1]), (test_x - mean) / std, labels[-1], margin=4, flips=True
    )


def _found(root: Path) -> tuple[str, str, Callable[[str], bytes]]:
    """Which version is there, where, and what reads a file of it."""
    for kind, (folder, suffix) in KINDS.items():
        for path in (root, root / folder):
            if any((path / (part + suffix)).exists() for part in (*PARTS, "test_batch")):
                return kind, str(path), lambda file, path=path: (path / file).read_bytes()
        archive = f"cifar-10-{kind}.tar.gz"
        path = root if root.name == archive else root / archive
        if path.is_file():
            return kind, str(path), lambda file, path=path, folder=folder: _member(path, f"{folder}/{file}")
    raise DataError(
        f"no CIFAR-10 in {root}: expected cifar-10-batches-bin/ or cifar-10-batches-py/ with data_batch_1 to 5 and "
        "test_batch, or cifar-10-binary.tar.gz or cifar-10-python.tar.gz, from https://www.cs.toronto.edu/~kriz/cifar.html"
    )


def _member(path: Path, name: str) -> bytes:
    with tarfile.open(path) as archive:
        file = archive.extractfile(name)
        if file is None:
            raise KeyError(f"{name} is not a file")
        content = file.read()
        # To the end of the archive, where its checksum is.
        while archive.fileobj.read(1 << 20):
            pass
        return content


def _binary(content: bytes, where: str, records: int) -> tuple[np.ndarray, np.ndarray]:
    """Records of a label and 3·32·32 pixels, a byte each."""
    size = records * (1 + PIXELS)
    if len(content) != size:
        raise DataError(
            f"{where} has {len(content)} bytes: expected {size}, {records} records of a label and {PIXELS} pixels"
        )
    table = np.frombuffer(content, np.uint8).reshape(records, 1 + PIXELS)
    return _checked(table[:, 1:], table[:, 0], where, records)


def _python(content: bytes, where: str, records: int) -> tuple[np.ndarray, np.ndarray]:
    """A pickle of a dict with b"data" and b"labels"."""
    try:
        batch = _Unpickler(content).load()
        images, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
    except Exception as error:  # whatever a damaged pickle may lead to
        raise DataError(
            f"{where} is not a batch of CIFAR-10 (a pickle of a dict with data and labels): {_line(error)}"
        ) from None
    return _checked(images, labels, where, records)


def _checked(images: np.ndarray, labels: np.ndarray, where: str, records: int) -> tuple[np.ndarray, np.ndarray]:
    if images.shape != (records, PIXELS) or images.dtype != np.uint8 or labels.shape != (records,):
        raise DataError(
            f"{where} holds images of shape {images.shape} ({images.dtype}) and labels of shape {labels.shape}: "
            f"expected ({records}, {PIXELS}) (uint8) and ({records},)"
        )
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > 9:
        raise DataError(f"{where} holds labels that are not integers from 0 to 9")
    return images, labels


class _Unpickler(pickle.Unpickler):
    """Makes arrays and nothing else: a pickle could otherwise run any code."""

    MADE = {  # noqa: RUF012
        "_reconstruct": np.zeros(1).__reduce__()[0],
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        "encode": lambda text, encoding: text.encode(encoding),  # how Python 3 writes bytes for Python 2
    }

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] not in ("numpy", "_codecs") or name not in self.MADE:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.MADE[name]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

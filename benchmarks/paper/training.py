"""One run: trained, written down at every step, and taken up from its last checkpoint after an interruption."""

import csv
import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import texp
from benchmarks.paper import models
from benchmarks.paper.data import Data
from benchmarks.paper.methods import NONE, Method
from benchmarks.paper.setup import Setup
from texp import theory
from texp.step import groups

# One line a step; then ‖w‖ of every layer. All are of the weights that the step begins with.
COLUMNS = (
    "step",
    "loss",  # of the batch
    "test_error",  # from 0 to 1, at the first step of an epoch; at the end of the run it is in a line of its own
    "intrinsic_lr",  # η̃/‖w‖² over all trained weights, of equivalent runs the same but for the factor α
    "log10_lr",  # of the paper's η̃, or of η where there is weight decay
    "log10_P",  # of the paper's P; 0 where there is weight decay
    "alpha",
    "halvings",  # texp.SGD stores weights divided by 2 to this power
)


class CheckpointError(Exception):
    """A checkpoint that its run cannot go on from; the message is one line."""


def path_of(name: str, setup: Setup, seed: int) -> Path:
    """The CSV of a run; beside it, as .pt, is its checkpoint."""
    return setup.out / "steps" / f"{name}-seed{seed}.csv"


def steps_per_epoch(data: Data, setup: Setup) -> int:
    """A last batch that would be less than half full is left out."""
    return max(1, round(len(data.train_x) / setup.batch_size))


def train(name: str, method: Method, setup: Setup, seed: int, data: Data) -> Iterator[int]:
    """Trains from the initialisation and the batches of `seed`, or goes on from the checkpoint if there is one.

    Yields the number of each step taken. There is a checkpoint at the end of every epoch.

    Raises CheckpointError where the checkpoint is damaged, without its CSV, or of a run with other settings.
    """
    run = _Run(method, setup, seed, data)
    path = path_of(name, setup, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = path.with_suffix(".pt")
    epoch, size = run.load(checkpoint) if checkpoint.exists() else (0, 0)
    if size and (not path.exists() or path.stat().st_size < size):
        raise CheckpointError(
            f"{path} lacks lines that its checkpoint counts on: remove {checkpoint} to start this run again"
        )
    with path.open("r+" if size else "w", newline="") as file:
        writer = csv.writer(file)
        # Lines after the checkpoint are of steps that will be taken again.
        file.truncate(size)
        file.seek(size)
        if not size:
            writer.writerow([*COLUMNS, *(f"norm {name}" for name in run.weights)])
        per_epoch = steps_per_epoch(data, setup)
        steps = len(method.lrs)
        while epoch * per_epoch < steps:
            first = epoch * per_epoch
            for t, x, y in zip(range(first, min(first + per_epoch, steps)), *run.batches(epoch), strict=False):
                writer.writerow(run.step(t, x, y, run.test_error() if t == first else ""))
                yield t
            epoch += 1
            if epoch * per_epoch >= steps:
                writer.writerow([steps, "", run.test_error()])
            file.flush()
            run.save(checkpoint, epoch, file.tell())


class _Run:
    """Model and optimizer, and what can be said of them at a step."""

    def __init__(self, method: Method, setup: Setup, seed: int, data: Data) -> None:
        self.method, self.setup, self.seed, self.data = method, setup, seed, data
        # What it is called, where it is kept, and on which device it goes on, do not make it another run.
        what = replace(method, label=""), replace(setup, out=None, root=None, device=""), seed
        self.settings = hashlib.sha256(repr(what).encode())
        self.model = models.make(method.model, setup, seed)
        self.weights = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        params, arguments = self.weights.values(), {"momentum": setup.momentum, "weight_decay": method.weight_decay}
        if method.scale_invariant:
            self.optimizer = texp.SGD(params, method.lrs[0], scale_invariant=True, **arguments)
        else:
            self.optimizer = torch.optim.SGD(params, method.lrs[0], **arguments)

    def batches(self, epoch: int) -> tuple[Iterator[Tensor], Iterator[Tensor]]:
        """Images and labels; the same for every run of this seed, whichever epoch it begins with."""
        # A generator of the CPU takes no more than 32 bits of its seed.
        generator = torch.Generator().manual_seed(self.seed * 2**16 + epoch)
        order = torch.randperm(len(self.data.train_x), generator=generator)
        chosen = order.split(self.setup.batch_size)
        images = (self.data.augmented(batch, generator) for batch in chosen)
        return images, (self.data.train_y[batch] for batch in chosen)

    def step(self, t: int, x: Tensor, y: Tensor, test_error: float | str) -> list:
        """Takes a step; returns its line."""
        self.optimizer.param_groups[0]["lr"] = self.method.lrs[t]
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(x), y)
        loss.backward()
        line = [t, loss.item(), test_error, *self._scales(t)]
        if t in self.method.corrections:
            self._correct(self.method.corrections[t])
        self.optimizer.step()
        return line

    def _scales(self, t: int) -> list[float]:
        group = self.optimizer.param_groups[0]
        if self.method.scale_invariant:
            scale, halvings = groups.scale_of(group), group["scale_exponent"]
            growth = (scale.log10(), theory.advance(scale, groups.hyperparameters(group), first=t == 0).alpha)
            log10_lr = self.optimizer.log10_lr()[0]
        else:
            growth, halvings = (self.method.growth[t] if self.method.growth else NONE), 0
            log10_lr = math.log10(group["lr"])
        norms = torch.stack([w.detach().double().norm() for w in self.weights.values()]).tolist()
        norm2 = sum(norm * norm for norm in norms)
        # What halving took out of the weights is taken out of η̃ as well: the number itself may overflow.
        intrinsic_lr = 10 ** (log10_lr - 2 * halvings * math.log10(2)) / norm2
        return [intrinsic_lr, log10_lr, *growth, halvings, *norms]

    @torch.no_grad()
    def _correct(self, correction: float) -> None:
        for p in self.weights.values():
            state = self.optimizer.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            state["momentum_buffer"].add_(p, alpha=correction)

    @torch.no_grad()
    def test_error(self) -> float:
        """With the statistics of the test batch where the norm is over a batch."""
        self.model.eval()
        pairs = zip(self.data.test_x.split(1000), self.data.test_y.split(1000), strict=True)
        wrong = sum((self.model(x).argmax(1) != y).sum().item() for x, y in pairs)
        self.model.train()
        return wrong / len(self.data.test_y)

    def save(self, path: Path, epoch: int, size: int) -> None:
        """size: bytes of the CSV so far."""
        state = {
            "settings": self.settings.hexdigest(),
            "epoch": epoch,
            "size": size,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        # Whenever it is interrupted, there is one whole checkpoint.
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, path: Path) -> tuple[int, int]:
        """Returns the epoch to go on with and the bytes of the CSV that belong to it."""
        try:
            state = torch.load(path, map_location=self.setup.device, weights_only=True)
            settings = state["settings"]
        except OSError:
            raise
        except Exception as error:  # whatever a damaged file may lead to
            raise CheckpointError(
                f"{path} is not a checkpoint, or damaged ({type(error).__name__}): remove it to start this run again"
            ) from None
        if settings != self.settings.hexdigest():
            raise CheckpointError(f"{path} is of a run with other settings: remove it, or give another --out")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return state["epoch"], state["size"]

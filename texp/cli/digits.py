"""The demo: one network, trained in three ways that the paper says are one.

scikit-learn's digits, a small pre-activation ResNet whose whole loss is scale-invariant: the scale and bias of
its batch norms and its last layer are fixed, as in the paper. Then the same network with everything trainable, where
texp.param_groups finds what is scale-invariant. Everything is in float64 with an eps that does not count, so that
what differs between the runs is the optimizer and not rounding.
"""

import csv
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR

from texp.bench.report import pyplot
from texp.invariance.audit import param_groups
from texp.schedules import TEXP
from texp.sgd import SGD

LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-3
GAMMA = 0.1  # the LR is divided by ten, at a half and at three quarters of the epochs
BATCH_SIZE = 128


class Digits(NamedTuple):
    """Images of shape (n, 1, 8, 8), standardised, and labels of shape (n,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_digits() -> Digits:
    """scikit-learn's 1,797 handwritten digits, 80 % to train on and 20 % to test on."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    x, y = load(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.2, random_state=0, stratify=y)
    mean, std = train_x.mean(), train_x.std()
    images = [torch.from_numpy((x - mean) / std).view(-1, 1, 8, 8) for x in (train_x, test_x)]
    return Digits(images[0], torch.from_numpy(train_y), images[1], torch.from_numpy(test_y))


class PreActBlock(nn.Module):
    """norm, ReLU, conv, norm, ReLU, conv, added to the input, or where the shape changes to a 1×1 conv of the
    first ReLU: what is added then scales with the weights as the input does, to the first power."""

    def __init__(self, channels_in: int, channels: int, stride: int, affine: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(channels_in, affine), _norm(channels, affine)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        same = stride == 1 and channels_in == channels
        self.shortcut = None if same else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return shortcut + self.conv2(relu(self.norm2(self.conv1(y))))


class PreActResNet(nn.Module):
    """Images (n, channels, h, w) to logits (n, 10). Its output does not change when all convolutions are multiplied
    by the same number. The defaults are for digits.

    Args:
        width: channels of the first of three stages; each of the others has twice as many at half the resolution.
        blocks: in each stage.
        all_trainable: norms have a trainable scale and bias, and running statistics, and the last layer is trainable
            as well; otherwise the convolutions alone are.
    """

    def __init__(self, width: int = 8, blocks: int = 1, channels: int = 1, *, all_trainable: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        sizes = [width] + [width * 2**stage for stage in range(3) for _ in range(blocks)]
        self.blocks = nn.Sequential(
            *(PreActBlock(a, b, 1 if a == b else 2, all_trainable) for a, b in itertools.pairwise(sizes))
        )
        self.norm = _norm(4 * width, all_trainable)
        self.head = nn.Linear(4 * width, 10, bias=False).requires_grad_(all_trainable)
        nn.init.normal_(self.head.weight, std=0.15)  # wide enough that a fixed head can separate the classes

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.norm(self.blocks(self.stem(x))))
        return self.head(x.mean((2, 3)))


def _norm(channels: int, affine: bool) -> nn.Module:
    # Without running statistics, evaluation uses those of the batch, whatever the scale of the weights.
    return nn.BatchNorm2d(channels, eps=1e-30, affine=affine, track_running_stats=affine)


@dataclass
class Run:
    """One way of training, and what came of it: one value a step in each list."""

    name: str
    make: Callable[[PreActResNet], torch.optim.Optimizer]
    schedule: Callable[[torch.optim.Optimizer, list[int], float], LRScheduler] = MultiStepLR
    like: "Run | None" = None  # the run that it repeats, or comes near to
    all_trainable: bool = False
    loss: list[float] = field(default_factory=list)
    log10_lr: list[float] = field(default_factory=list)  # of the paper's η̃; of η for plain SGD
    norm2_over_lr: list[float] = field(default_factory=list)  # ‖w‖²/η̃, the inverse of the intrinsic LR
    test_accuracy: float = math.nan
    weight_norm: float = math.nan  # of the convolutions, as they are stored

    def train(self, data: Digits, epochs: int, seed: int) -> Iterator[None]:
        """Trains from the initialisation and the batches of `seed`; yields after each step."""
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = PreActResNet(all_trainable=self.all_trainable).double()
        weights = [p for p in model.parameters() if p.dim() == 4]
        steps = len(data.train_x) // BATCH_SIZE
        optimizer = self.make(model)
        schedule = self.schedule(optimizer, [epochs // 2 * steps, epochs * 3 // 4 * steps], GAMMA)
        for _ in range(epochs):
            order = torch.randperm(len(data.train_x), generator=generator)
            for batch in order.split(BATCH_SIZE)[:steps]:
                optimizer.zero_grad()
                loss = cross_entropy(model(data.train_x[batch]), data.train_y[batch])
                loss.backward()
                self._record(loss.item(), optimizer, weights)
                optimizer.step()
                schedule.step()
                yield
        model.eval()
        with torch.no_grad():
            self.test_accuracy = (model(data.test_x).argmax(1) == data.test_y).double().mean().item()
        self.weight_norm = _norm2(weights) ** 0.5

    def _record(self, loss: float, optimizer: torch.optim.Optimizer, weights: list[nn.Parameter]) -> None:
        group = optimizer.param_groups[0]
        log10_lr = optimizer.log10_lr()[0] if isinstance(optimizer, SGD) else math.log10(group["lr"])
        # 4^exponent is taken out of both ‖w‖² and η̃: it is not in the stored weights, and could overflow.
        stored_log10_lr = log10_lr - 2 * group.get("scale_exponent", 0) * math.log10(2)
        self.loss.append(loss)
        self.log10_lr.append(log10_lr)
        self.norm2_over_lr.append(_norm2(weights) / 10**stored_log10_lr)


def _norm2(weights: list[nn.Parameter]) -> float:
    return sum(w.detach().square().sum().item() for w in weights)


def make_runs() -> list[Run]:
    """The three ways: step decay with weight decay, the same in exponential form, and TEXP without decay. Then the
    first two with everything trainable."""

    def one_group(optimizer, **options):
        return lambda model: optimizer([p for p in model.parameters() if p.requires_grad], LR, MOMENTUM, **options)

    def groups(model):
        return SGD(param_groups(model, torch.randn(4, 1, 8, 8).double(), **decay), LR, MOMENTUM)

    decay = {"weight_decay": WEIGHT_DECAY}
    sgd, exponential = one_group(torch.optim.SGD, **decay), one_group(SGD, **decay, scale_invariant=True)
    one = Run("torch.optim.SGD, step decay, weight decay", sgd)
    all_ = Run("everything trainable: torch.optim.SGD, as above", sgd, all_trainable=True)
    return [
        one,
        Run("texp.SGD, the same arguments, exponential form", exponential, like=one),
        Run("torch.optim.SGD, TEXP schedule, no decay", one_group(torch.optim.SGD), partial(TEXP, **decay), like=one),
        all_,
        Run("everything trainable: texp.SGD, groups by texp.param_groups", groups, like=all_, all_trainable=True),
    ]


def largest_difference(run: Run, other: Run) -> float:
    """The largest difference of the loss at any step."""
    return max(abs(a - b) for a, b in zip(run.loss, other.loss, strict=True))


def write_csv(runs: list[Run], path: Path) -> None:
    """One line a step and run: run, step, loss, log10_lr, norm2_over_lr."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "step", "loss", "log10_lr", "norm2_over_lr"])
        for run in runs:
            for step, values in enumerate(zip(run.loss, run.log10_lr, run.norm2_over_lr, strict=True)):
                writer.writerow([run.name, step, *values])


def plot(runs: list[Run], epochs: int, path: Path) -> None:
    """A PNG with the loss, the LR and ‖w‖²/η̃ of every run against the epoch."""
    plt = pyplot()
    figure, (loss, lr, norm) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    styles = [
        {"lw": 3.5, "color": "0.75"},
        {"lw": 1.3, "color": "C0"},
        {"lw": 1.3, "color": "C1", "ls": "--"},
        {"lw": 3.5, "color": "#b8dfb8"},
        {"lw": 1.3, "color": "C2"},
    ]
    for run, style in zip(runs, styles, strict=True):
        per_epoch = len(run.loss) // epochs
        epoch = [step / per_epoch for step in range(len(run.loss))]
        means = [sum(run.loss[i : i + per_epoch]) / per_epoch for i in range(0, len(run.loss), per_epoch)]
        loss.plot([i + 0.5 for i in range(epochs)], means, **style, label=run.name)
        lr.plot(epoch, run.log10_lr, **style)
        norm.plot(epoch, run.norm2_over_lr, **style)
    loss.set(title="train loss, mean of an epoch", ylim=(0, None))
    lr.set(title=r"$\log_{10}$ of the learning rate")
    norm.set(title=r"$\|w\|^2$ / learning rate", yscale="log")
    for axes in (loss, lr, norm):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)

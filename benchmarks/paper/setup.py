"""How the experiments train: data, hyperparameters, lengths. Steps are optimizer steps everywhere."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from texp.cli import digits


@dataclass(frozen=True)
class Setup:
    """What all runs of an experiment have in common; symbols as in texp.theory."""

    data: str  # "digits" or "cifar10"
    lr: float  # η, of the first phase
    momentum: float  # γ, heavy ball
    weight_decay: float  # λ
    gamma: float  # factor of the LR at a milestone
    milestones: tuple[int, ...]  # first steps of the later phases
    steps: int  # of a run
    batch_size: int
    dtype: torch.dtype
    out: Path = Path("build/paper")  # for every step of every run, checkpoints, figures and summaries
    root: Path | None = None  # where CIFAR-10 is
    device: str = "cpu"
    seeds: int = 1  # that the shapes are averaged over
    is_asserted: bool = True  # the shapes that `checks` measure are known to hold for digits at full length

    def shortened(self, steps: int) -> "Setup":
        """The same with phases in the same proportion, for a look; its shapes are measured, not asserted."""
        milestones = tuple(round(milestone * steps / self.steps) for milestone in self.milestones)
        return replace(self, steps=steps, milestones=milestones, is_asserted=False)


DIGITS = Setup(
    data="digits",
    lr=digits.LR,
    momentum=digits.MOMENTUM,
    weight_decay=digits.WEIGHT_DECAY,
    gamma=digits.GAMMA,
    milestones=(500, 1000),
    steps=1500,
    batch_size=digits.BATCH_SIZE,
    dtype=torch.float64,
    seeds=3,
)

EPOCH = 391  # steps: 50,000 images in batches of 128

CIFAR10 = Setup(
    data="cifar10",
    lr=0.1,
    momentum=0.9,
    weight_decay=5e-4,
    gamma=0.1,
    milestones=(80 * EPOCH, 120 * EPOCH),
    steps=160 * EPOCH,
    batch_size=128,
    dtype=torch.float32,
    is_asserted=False,
)

SETUPS = {"digits": DIGITS, "cifar10": CIFAR10}

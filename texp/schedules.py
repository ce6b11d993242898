"""The paper's schedules as torch LR schedulers, for any optimizer that computes p ← p − lr·buf with heavy-ball
momentum: torch.optim.SGD, texp.SGD and others. They replace weight decay, so the optimizer must have none.
"""

from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from texp import theory


class TEXP(LRScheduler):
    """The tapered exponential schedule, the paper's counterpart of a step decay (MultiStepLR) with weight decay.

    Call `step()` once after every optimizer step, not every epoch. The group's LR at construction is η of the
    first phase, its momentum γ and dampening τ are read from the group; the LR that is set is the paper's η̃. It
    grows without bound, and the weights grow with it: `texp.SGD(scale_invariant=True)` takes the same steps in
    range.

    Args:
        optimizer: every group has weight_decay 0, lr > 0, 0 ≤ dampening ≤ 1, and no Nesterov momentum (the
            theorem is of the heavy ball).
        milestones: first steps of the later phases, ascending, in optimizer steps.
        gamma: factor of the LR at each milestone, default 0.1.
        weight_decay: λ of the SGD run to match, ≥ 0.
        instant_decay: False leaves out the factor `gamma` itself (the paper's "TEXP−−"). Default True.
        taper: False keeps the growth of the first phase throughout ("instant decay only"). Default True.
        last_epoch: as for any torch scheduler; the number of steps taken, minus 1.

    Raises ValueError for an optimizer as above, and for values outside the theorem's range
    η·λ ≤ (1 − √γ)²; `step()` raises OverflowError where the LR leaves float64's range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Sequence[int],
        gamma: float = 0.1,
        *,
        weight_decay: float,
        instant_decay: bool = True,
        taper: bool = True,
        last_epoch: int = -1,
    ) -> None:
        for index, group in enumerate(optimizer.param_groups):
            _check_group(index, group)
        self.milestones, self.gamma = list(milestones), gamma
        self.instant_decay, self.taper = instant_decay, taper
        self.momenta = [float(group.get("momentum", 0)) for group in optimizer.param_groups]
        # Dampening scales what enters the momentum, decay included.
        self.weight_decays = [
            weight_decay * (1 - group.get("dampening", 0) if momentum else 1)
            for group, momentum in zip(optimizer.param_groups, self.momenta, strict=True)
        ]
        # All errors of the schedule come now, before the optimizer is touched.
        for index, group in enumerate(optimizer.param_groups):
            self._lr(index, group.get("initial_lr", group["lr"]), 0)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        """η̃ of the step to come, one float a group."""
        return [self._lr(index, base_lr, self.last_epoch) for index, base_lr in enumerate(self.base_lrs)]

    def _lr(self, index: int, base_lr: float, t: int) -> float:
        decay, momentum = self.weight_decays[index], self.momenta[index]
        switches = {"instant_decay": self.instant_decay, "taper": self.taper}
        return theory.texp_lr(t, float(base_lr), decay, momentum, self.milestones, self.gamma, **switches)


class EXP(TEXP):
    """The exponential schedule η̃_t = η·α^(−2t−1), the paper's counterpart of a constant LR with weight decay.

    Arguments, requirements and errors as for `TEXP`.
    """

    def __init__(self, optimizer: Optimizer, *, weight_decay: float, last_epoch: int = -1) -> None:
        super().__init__(optimizer, (), weight_decay=weight_decay, last_epoch=last_epoch)


def _check_group(index: int, group: dict) -> None:
    if group.get("weight_decay", 0) != 0:
        raise ValueError(
            f"parameter group {index} has weight_decay = {group['weight_decay']}: the schedule replaces weight "
            "decay, so give it to the schedule and set the optimizer's to 0"
        )
    if group.get("nesterov", False):
        raise ValueError(
            f"parameter group {index} has nesterov=True: the paper's schedules are those of heavy-ball momentum "
            "(texp.SGD with scale_invariant=True covers Nesterov)"
        )
    if not 0 <= group.get("dampening", 0) <= 1:
        raise ValueError(f"parameter group {index} has dampening = {group['dampening']}: it must be from 0 to 1")

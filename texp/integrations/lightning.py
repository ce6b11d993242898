"""For Lightning: checkpoints that hold the weights of torch.optim.SGD."""

from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from texp.integrations.wrapped import has_exponential_groups, texp_sgd
from texp.optimizer import FusedOptimizer

# What averages weights, also under the names of callbacks that others have written.
AVERAGING = (StochasticWeightAveraging, WeightAveraging)
AVERAGING_NAMES = ("EMA", "SWA", "WeightAverag", "ExponentialMovingAverage")


class FoldCallback(Callback):
    """Lets checkpoints of a run with texp.SGD hold θ and the momentum of torch.optim.SGD, where its exponential
    groups train Pθ: weights and optimizer states that fit each other, and that either optimizer can go on from. After
    the fit the model holds θ, too, or what a callback that averages has put there.

    A callback that averages θ is one of a subclass that calls what it inherits inside of
    ``with trainer.optimizers[0].folded():``.

    Training itself is not touched: it goes on in the exponential form. Validation needs nothing, since Pθ computes
    the functions of θ.

    Args:
        warn: at the start of a fit, of callbacks that would average Pθ, for a P that grows from step to step, and of
            a ModelCheckpoint with save_weights_only=True: for its checkpoints Lightning calls no callback, and they
            hold Pθ. False where that has been seen to, as by averaging inside of `with optimizer.folded():`.
    """

    def __init__(self, warn: bool = True) -> None:
        self.warn = warn

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.warn or not self._exponential(trainer):
            return
        for name in self._averaging(trainer):
            rank_zero_warn(
                f"{name} averages the parameters, which in exponential groups of texp.SGD are Pθ with a P that "
                "grows: later weights count more, and weights of other groups do not. Average inside of "
                "`with optimizer.folded():`, where they are θ"
            )
        if any(isinstance(each, ModelCheckpoint) and each.save_weights_only for each in trainer.callbacks):
            rank_zero_warn(
                "for a checkpoint of ModelCheckpoint(save_weights_only=True) Lightning calls no callback: it will "
                "hold Pθ, the same function as θ at another scale. Save inside of `with optimizer.folded():`, or all"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lightning has put in what is there now, Pθ: both parts are collected once more, as θ."""
        optimizers = self._exponential(trainer)
        if not optimizers:
            return
        # Lightning's WeightAveraging, if it was called before, has put its average in the place of the weights.
        weights = "current_model_state" if "current_model_state" in checkpoint else "state_dict"
        with ExitStack() as folded:
            for optimizer in optimizers:
                folded.enter_context(optimizer.folded())
            checkpoint[weights] = _cloned(trainer.strategy.lightning_module_state_dict())
            if "optimizer_states" in checkpoint:
                states = map(trainer.strategy.optimizer_state, trainer.optimizers)
                checkpoint["optimizer_states"] = _cloned(list(states))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._averaging(trainer):
            for optimizer in self._exponential(trainer):
                optimizer.fold()

    @staticmethod
    def _averaging(trainer: Trainer) -> list[str]:
        """Names of the callbacks that average weights."""
        return [
            name
            for callback in trainer.callbacks
            if any(part in (name := type(callback).__name__) for part in AVERAGING_NAMES)
            or isinstance(callback, AVERAGING)
        ]

    @staticmethod
    def _exponential(trainer: Trainer) -> list[FusedOptimizer]:
        found = (texp_sgd(optimizer) for optimizer in trainer.optimizers)
        return [optimizer for optimizer in found if optimizer is not None and has_exponential_groups(optimizer)]


def _cloned(tree: Any) -> Any:
    """The tensors of a state dict share the memory of the parameters, which soon hold Pθ again."""
    if isinstance(tree, torch.Tensor):
        return tree.clone()
    if isinstance(tree, dict):
        return {key: _cloned(value) for key, value in tree.items()}
    return [_cloned(value) for value in tree] if isinstance(tree, list) else tree

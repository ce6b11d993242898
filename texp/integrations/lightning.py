"""For Lightning: checkpoints that hold the weights of torch.optim.SGD."""

import warnings
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch.utils._pytree import tree_map

from texp.integrations.wrapped import has_exponential_groups, texp_sgd
from texp.optimizer import SGD

# What averages weights, also under the names of callbacks that others have written.
AVERAGING = (StochasticWeightAveraging, WeightAveraging)
AVERAGING_NAMES = ("EMA", "SWA", "WeightAverag", "ExponentialMovingAverage")


class FoldCallback(Callback):
    """Lets checkpoints of a run with texp.SGD hold θ and the momentum of torch.optim.SGD, where its exponential
    groups train Pθ: weights and optimizer states that fit each other, and that either optimizer can go on from. After
    the fit the model holds θ, too.

    Training itself is not touched: it goes on in the exponential form. Validation needs nothing, since Pθ computes
    the functions of θ.

    At the start of a fit it warns of callbacks that would average Pθ, for a P that grows from step to step, and of a
    ModelCheckpoint with save_weights_only=True: for such checkpoints Lightning calls no callback, and they hold Pθ.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._exponential(trainer):
            return
        for callback in trainer.callbacks:
            name = type(callback).__name__
            if isinstance(callback, AVERAGING) or any(part in name for part in AVERAGING_NAMES):
                warnings.warn(
                    f"{name} averages the parameters, which in exponential groups of texp.SGD are Pθ with a P that "
                    "grows: later weights count more, and weights of other groups do not. Average inside of "
                    "`with optimizer.folded():`, where they are θ",
                    stacklevel=2,
                )
            if isinstance(callback, ModelCheckpoint) and callback.save_weights_only:
                warnings.warn(
                    "for a checkpoint of ModelCheckpoint(save_weights_only=True) Lightning calls no callback: it "
                    "will hold Pθ, the same function as θ at another scale. Save inside of "
                    "`with optimizer.folded():`, or save all of it",
                    stacklevel=2,
                )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lightning has put in what is there now, Pθ: both parts are collected once more, as θ."""
        optimizers = self._exponential(trainer)
        if not optimizers:
            return
        with ExitStack() as folded:
            for optimizer in optimizers:
                folded.enter_context(optimizer.folded())
            strategy = trainer.strategy
            checkpoint["state_dict"] = _cloned(strategy.lightning_module_state_dict())
            if "optimizer_states" in checkpoint:
                checkpoint["optimizer_states"] = [
                    _cloned(strategy.optimizer_state(each)) for each in trainer.optimizers
                ]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in self._exponential(trainer):
            optimizer.fold()

    @staticmethod
    def _exponential(trainer: Trainer) -> list[SGD]:
        found = (texp_sgd(optimizer) for optimizer in trainer.optimizers)
        return [optimizer for optimizer in found if optimizer is not None and has_exponential_groups(optimizer)]


def _cloned(tree: Any) -> Any:
    """The tensors of a state dict share the memory of the parameters, which soon hold Pθ again."""
    return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, tree)

"""For transformers' Trainer: checkpoints that hold the weights of torch.optim.SGD."""

from typing import Any

from transformers import TrainerCallback

from texp.integrations.wrapped import has_exponential_groups, texp_sgd


class FoldCallback(TrainerCallback):
    """Lets checkpoints of a run with texp.SGD hold θ and the momentum of torch.optim.SGD, where its exponential
    groups train Pθ: a model and an optimizer state that fit each other, and that either optimizer can go on from.
    From the end of the last epoch on, the model holds θ, too, for `Trainer.save_model` and for the best model that
    `load_best_model_at_end` puts there.

    The Trainer itself calls `optimizer.eval()`, after which the parameters are θ, before an evaluation, but not when
    it saves; `optimizer.train()` it calls in the next training step.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if control.should_save:
            self._fold(optimizer)

    def on_epoch_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Also where nothing is to be saved: it may be the last epoch."""
        self._fold(optimizer)

    @staticmethod
    def _fold(optimizer: Any) -> None:
        sgd = texp_sgd(optimizer)
        if sgd is not None and has_exponential_groups(sgd):
            sgd.eval()

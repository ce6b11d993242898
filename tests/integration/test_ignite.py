"""ignite's engines, schedules, checkpoints and averages."""

import contextlib

import pytest
import torch
from torch import nn

from tests.integration.training import EXPONENTIAL, FORMS, TORCH, Form, copied, fold, ids, loader, network

engine = pytest.importorskip("ignite.engine", reason="pytorch-ignite is not installed")
handlers = pytest.importorskip("ignite.handlers", reason="pytorch-ignite is not installed")
Events = engine.Events


class Run:
    def __init__(self, form: Form, **options) -> None:
        self.model = network()
        self.optimizer = form.optimizer(self.model)
        self.trainer = engine.create_supervised_trainer(self.model, self.optimizer, nn.CrossEntropyLoss(), **options)
        self.schedule = handlers.CosineAnnealingScheduler(self.optimizer, "lr", 0.1, 0.01, cycle_size=20)
        self.trainer.add_event_handler(Events.ITERATION_STARTED, self.schedule)

    def parts(self) -> dict:
        return {"model": self.model, "optimizer": self.optimizer, "trainer": self.trainer, "schedule": self.schedule}

    def train(self, epochs: int = 5) -> "Run":
        self.trainer.run(loader(), max_epochs=epochs)
        return self

    def weights(self) -> dict[str, torch.Tensor]:
        fold(self.optimizer)
        return copied(self.model)


@pytest.mark.parametrize("form", FORMS, ids=ids)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_supervised_trainer(form, accumulated):
    form.check(*(Run(f, gradient_accumulation_steps=accumulated).train().weights() for f in (form, TORCH)))


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_a_checkpoint(form, tmp_path):
    first = Run(form)
    saving = handlers.Checkpoint(first.parts(), str(tmp_path), filename_pattern="checkpoint.pt")
    first.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=8), saving)
    first.train(3)
    second = Run(form)
    handlers.Checkpoint.load_objects(second.parts(), torch.load(tmp_path / "checkpoint.pt", weights_only=False))
    assert second.trainer.state.iteration == 8
    form.check(second.train().weights(), Run(TORCH).train().weights())


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_moving_average(form):
    """In the exponential form, of the weights inside of folded()."""

    def trained(f):
        run = Run(f)
        ema = handlers.EMAHandler(run.model, momentum=0.1, handle_buffers="update")

        def update(trainer):
            with run.optimizer.folded() if f is EXPONENTIAL else contextlib.nullcontext():
                ema._update_ema_model(trainer, "momentum")

        run.trainer.add_event_handler(Events.ITERATION_COMPLETED, update)
        run.trainer.state.momentum = 0.1
        run.train()
        return copied(ema.ema_model)

    form.check(trained(form), trained(TORCH))

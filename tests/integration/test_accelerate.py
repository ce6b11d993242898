"""accelerate's Accelerator."""

import pytest
import torch
from torch.nn.functional import cross_entropy

import texp
from tests.integration.training import (
    EXPONENTIAL,
    FORMS,
    ORDINARY,
    REFERENCE,
    TORCH,
    Form,
    copied,
    ids,
    loader,
    network,
)

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("accelerate.accelerator", reason="accelerate is not installed")

from texp.integrations.wrapped import texp_sgd  # noqa: E402


@pytest.fixture(autouse=True)
def _fresh_state():
    """Accelerators share what they know of the process, mixed precision among it."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class Run:
    def __init__(self, form: Form, dtype: torch.dtype = torch.float64, scaler=None, sgd=None, **options) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        self.accelerator.scaler = scaler  # it makes one itself only for mixed precision on GPUs
        self.model = network(dtype=dtype)
        optimizer = form.optimizer(self.model, **(sgd or {}))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
        self.raw = self.model
        self.model, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            self.model, optimizer, loader(dtype), schedule
        )
        self.skipped = []

    def train(self, epochs: int, clip=None, factor=1.0) -> "Run":
        for _ in range(epochs):
            for x, y in self.loader:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(cross_entropy(self.model(x), y) * factor)
                    if clip is not None and self.accelerator.sync_gradients:
                        clip(self)
                    self.optimizer.step()
                    self.skipped.append(self.optimizer.step_was_skipped)
                    self.schedule.step()
                    self.optimizer.zero_grad()
        return self

    def weights(self) -> dict[str, torch.Tensor]:
        if (sgd := texp_sgd(self.optimizer)) is not None:
            sgd.fold()
        return copied(self.raw)


@pytest.mark.parametrize("form", FORMS, ids=ids)
@pytest.mark.parametrize("accumulated", [1, 3])
def test_prepared(form, accumulated):
    found, expected = (Run(f, gradient_accumulation_steps=accumulated).train(5) for f in (form, TORCH))
    assert found.schedule.get_last_lr()[0] == expected.schedule.get_last_lr()[0] < 0.1
    form.check(found.weights(), expected.weights())


def clip(run: Run) -> None:
    sgd = texp_sgd(run.optimizer)
    if sgd is not None and sgd.param_groups[0].get("scale_invariant"):
        run.accelerator.unscale_gradients(run.optimizer)
        texp.clip_grad_norm_(sgd, 0.1)
    else:
        run.accelerator.clip_grad_norm_(run.model.parameters(), 0.1)


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_clipped(form):
    form.check(*(Run(f).train(5, clip).weights() for f in (form, TORCH)))


@pytest.mark.parametrize("form", FORMS, ids=ids)
@pytest.mark.parametrize("clip", [None, clip], ids=["", "clipped"])
def test_a_grad_scaler_that_overflows(form, clip):
    """step_was_skipped says so, and the prepared schedule waits, for an optimizer that leaves unscaling to the
    scaler. The first scales take the loss beyond float32."""
    found, expected = (
        Run(f, torch.float32, torch.amp.GradScaler("cpu", init_scale=2.0**127)).train(8, clip, factor=4.0)
        for f in (form, TORCH)
    )
    assert found.skipped == expected.skipped
    assert 0 < sum(found.skipped) < 5
    assert found.schedule.get_last_lr()[0] == expected.schedule.get_last_lr()[0]
    form.check(found.weights(), expected.weights())


@pytest.mark.parametrize("fused", ["torch", "texp"])
def test_a_fused_optimizer_hides_that_its_step_was_skipped(fused):
    """From accelerate, which looks whether step() was called: of torch and of texp alike. texp.SGD knows it."""
    form = Form("torch", 0, TORCH.groups, {}) if fused == "torch" else ORDINARY
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    run = Run(form, torch.float32, scaler, {"fused": True})
    before = copied(run.raw)
    x, y = next(iter(run.loader))
    run.accelerator.backward(cross_entropy(run.model(x), y) * 4.0)
    run.optimizer.step()
    assert not run.optimizer.step_was_skipped
    if fused == "texp":
        assert texp_sgd(run.optimizer).step_was_skipped
    assert all(torch.equal(p, before[name]) for name, p in run.raw.named_parameters())


@pytest.mark.parametrize(
    ("saved", "form"), [*((form, form) for form in FORMS), (TORCH, REFERENCE), (TORCH, ORDINARY)], ids=ids
)
def test_save_state_and_load_state(saved, form, tmp_path):
    expected = Run(TORCH).train(5)
    first = Run(saved).train(2)
    first.accelerator.save_state(tmp_path)
    second = Run(form)
    second.accelerator.load_state(tmp_path)
    form.check(second.train(3).weights(), expected.weights())


@pytest.mark.parametrize("form", [EXPONENTIAL, ORDINARY], ids=ids)
def test_eval_and_train_of_the_prepared_optimizer(form, tmp_path):
    """As for schedule-free optimizers: weights, running statistics and momentum of torch.optim.SGD in between, and a
    state saved then is one of torch.optim.SGD."""
    ours, theirs = Run(form), Run(TORCH)
    for epoch in range(3):
        ours.train(1)
        theirs.train(1)
        ours.optimizer.eval()
        form.check(copied(ours.raw), copied(theirs.raw))
        ours.accelerator.save_state(tmp_path / str(epoch))
        ours.optimizer.train()
    resumed = Run(form)
    resumed.accelerator.load_state(tmp_path / "1")
    for run in (resumed, theirs):
        run.train(2 if run is resumed else 1)
    form.check(resumed.weights(), theirs.weights())

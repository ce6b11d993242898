"""Lightning's Trainer, and texp.integrations.lightning."""

import contextlib
import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import texp
from tests.integration.training import (
    EXPONENTIAL,
    FORMS,
    ORDINARY,
    REFERENCE,
    TORCH,
    Form,
    batches,
    copied,
    fold,
    ids,
    loader,
    network,
)

pytest.importorskip("lightning", reason="lightning is not installed")
pl_fabric = pytest.importorskip("lightning.fabric", reason="lightning is not installed")
pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
from lightning.pytorch.callbacks import (  # noqa: E402
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

from texp.integrations.lightning import FoldCallback  # noqa: E402
from texp.integrations.wrapped import texp_sgd  # noqa: E402

pytestmark = [
    # Advice on the number of workers, on validation, on where checkpoints are.
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # where a run is resumed
    # Of torch, which Lightning still calls so.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:DeprecationWarning"),
]


class Module(pl.LightningModule):
    def __init__(self, form: Form, dtype: torch.dtype = torch.float64, **arguments) -> None:
        super().__init__()
        self.form, self.arguments, self.model = form, arguments, network(dtype=dtype)
        self.example_dtype = dtype

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, index):
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("val", cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = self.form.optimizer(self.model, **self.arguments)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)]


class WithOurClipping(Module):
    """Where gradients are those at Pθ."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        if self.form is EXPONENTIAL and gradient_clip_val:
            texp.clip_grad_norm_(texp_sgd(optimizer), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)


def trainer(tmp_path: Path, **options) -> pl.Trainer:
    return pl.Trainer(
        **{
            "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "max_epochs": 5,
            "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": tmp_path, **options,
        }
    )  # fmt: skip


def fit(tmp_path: Path, module: pl.LightningModule, ckpt_path=None, **options) -> dict[str, torch.Tensor]:
    """The weights after it, as torch.optim.SGD holds them."""
    this = trainer(tmp_path, **options)
    dtype = module.example_dtype
    this.fit(
        module, loader(dtype), loader(dtype), ckpt_path=ckpt_path, **({"weights_only": False} if ckpt_path else {})
    )
    fold(this.optimizers[0])
    return copied(module.model)


@pytest.mark.parametrize("form", FORMS, ids=ids)
@pytest.mark.parametrize("accumulated", [1, 3])
def test_accumulated_batches(form, accumulated, tmp_path):
    found, expected = (fit(tmp_path, Module(f), accumulate_grad_batches=accumulated) for f in (form, TORCH))
    form.check(found, expected)


@pytest.mark.parametrize("form", FORMS, ids=ids)
@pytest.mark.parametrize("precision", ["64-true", "32-true"])
def test_clipped_gradients(form, precision, tmp_path):
    dtype = torch.float64 if precision == "64-true" else torch.float32
    options = {"precision": precision, "gradient_clip_val": 0.3}
    found, expected = (fit(tmp_path, WithOurClipping(f, dtype), **options) for f in (form, TORCH))
    form.check(found, expected)
    with pytest.raises(AssertionError):  # that it clips
        form.check(found, fit(tmp_path, Module(TORCH, dtype), precision=precision))


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_clipped_gradients_in_bf16_mixed(form, tmp_path):
    options = {"precision": "bf16-mixed", "gradient_clip_val": 0.3, "max_epochs": 2}
    found, expected = (fit(tmp_path, WithOurClipping(f, torch.float32), **options) for f in (form, TORCH))
    exact = fit(tmp_path, Module(TORCH, torch.float32), **{**options, "precision": "32-true"})
    form.check_in_mixed_precision(found, expected, exact)


@pytest.mark.parametrize("form", FORMS, ids=ids)
@pytest.mark.parametrize("clip", [None, 0.3])
def test_a_grad_scaler_that_overflows(form, clip, tmp_path):
    """Trainer(precision="16-mixed") is bf16-mixed on CPUs; its plugin takes a GradScaler there. The first scale
    overflows fp16, so that steps are skipped."""

    def trained(f, autocast=True):
        torch.manual_seed(0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        if not autocast:
            plugin.autocast_context_manager = contextlib.nullcontext
        with warnings.catch_warnings():
            # Of torch, when the scaler skips the first step: "lr_scheduler.step() before optimizer.step()".
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            weights = fit(
                tmp_path, WithOurClipping(f, torch.float32), plugins=[plugin], max_epochs=12, gradient_clip_val=clip
            )
        return weights, scaler.get_scale()

    (found, scale), (expected, expected_scale) = trained(form), trained(TORCH)
    assert scale == expected_scale < 2.0**40
    form.check_in_mixed_precision(found, expected, trained(TORCH, autocast=False)[0])


class Resumable(torch.utils.data.DataLoader):
    """One that says at which batch it is, so that Lightning goes on in the middle of an epoch."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.taken, self.resumed = 0, 0

    def __iter__(self):
        start, self.resumed = self.resumed, 0
        for index, batch in enumerate(super().__iter__()):
            self.taken = index + 1
            if index >= start:
                yield batch

    def state_dict(self):
        return {"taken": self.taken}

    def load_state_dict(self, state):
        self.resumed = state["taken"] % len(self)


def interrupted(tmp_path: Path, form: Form, callbacks=()) -> tuple[dict, dict]:
    """Stopped in the middle of the second epoch, and resumed in another trainer; and the checkpoint."""
    tmp_path = tmp_path / form.name

    def for_steps(number: int) -> pl.Trainer:
        saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1)
        return trainer(
            tmp_path, max_steps=number, enable_checkpointing=True, callbacks=[*map(copy.deepcopy, callbacks), saving]
        )

    batch_size = loader().batch_size
    for_steps(6).fit(Module(form), Resumable(loader().dataset, batch_size))
    path = tmp_path / "step=6.ckpt"
    second, module = for_steps(20), Module(form)
    second.fit(module, Resumable(loader().dataset, batch_size), ckpt_path=path, weights_only=False)
    assert second.global_step == 20
    fold(second.optimizers[0])
    return copied(module.model), torch.load(path, weights_only=False)


@pytest.mark.parametrize("form", [TORCH, *FORMS], ids=ids)
def test_a_run_resumed_in_the_middle_of_an_epoch(form, tmp_path):
    form.check(interrupted(tmp_path, form)[0], fit(tmp_path, Module(TORCH)))


class Manual(Module):
    """Which folds, through Lightning's wrapper of the optimizer, in the way that it is told."""

    def __init__(self, form, how):
        super().__init__(form)
        self.automatic_optimization, self.how = False, how

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        assert texp_sgd(optimizer) is (None if self.form is TORCH else self.trainer.optimizers[0])
        optimizer.zero_grad()
        self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
        if self.form is not TORCH and self.trainer.global_step % 6 == 3:
            FOLDED[self.how](optimizer)
        optimizer.step()
        if self.form is not TORCH and self.how == "eval":
            optimizer.train()

    def configure_optimizers(self):
        return self.form.optimizer(self.model)


def look_inside(optimizer):
    with optimizer.folded():
        assert all(group.get("scale", 1.0) == 1.0 for group in optimizer.param_groups)


FOLDED = {
    "fold": lambda optimizer: optimizer.fold(),
    "folded": look_inside,
    "eval": lambda optimizer: optimizer.eval(),  # and a step before train(), which goes on from θ
}


@pytest.mark.parametrize("how", FOLDED)
@pytest.mark.parametrize("form", [ORDINARY, EXPONENTIAL], ids=ids)
def test_manual_optimization(form, how, tmp_path):
    form.check(*(fit(tmp_path, Manual(f, how)) for f in (form, TORCH)))


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_fabric(form, tmp_path):
    """Its wrapper is saved, loaded and folded."""

    def trained(f, interrupted):
        fabric = pl_fabric.Fabric(accelerator="cpu", devices=1)
        model, optimizer = set_up(fabric, f)
        for index, (x, y) in enumerate(batches()):
            if interrupted and index == 10:
                fabric.save(tmp_path / "checkpoint", {"model": model, "optimizer": optimizer})
                model, optimizer = set_up(fabric, f)
                fabric.load(tmp_path / "checkpoint", {"model": model, "optimizer": optimizer})
            optimizer.zero_grad()
            fabric.backward(cross_entropy(model(x), y))
            fabric.clip_gradients(model, optimizer, max_norm=100.0)
            optimizer.step()
        if f is not TORCH:
            optimizer.fold()
        return copied(model)

    def set_up(fabric, f):
        model = network()
        return fabric.setup(model, f.optimizer(model))

    form.check(trained(form, interrupted=True), trained(TORCH, interrupted=False))


@pytest.mark.parametrize("form", [REFERENCE, ORDINARY], ids=ids)
def test_stochastic_weight_averaging(form, tmp_path):
    found, expected = (
        fit(tmp_path, Module(f), callbacks=[StochasticWeightAveraging(0.05, swa_epoch_start=2)], max_epochs=6)
        for f in (form, TORCH)
    )
    form.check(found, expected)
    with pytest.raises(AssertionError):  # that it averages
        form.check(found, fit(tmp_path, Module(TORCH), max_epochs=6))


def test_a_checkpoint_of_the_callback_is_one_of_torch(tmp_path):
    """Weights, running statistics and optimizer state, and training goes on from it by either optimizer."""
    weights, checkpoint = interrupted(tmp_path, EXPONENTIAL, [FoldCallback()])
    expected_weights, expected = interrupted(tmp_path, TORCH)
    EXPONENTIAL.check(weights, expected_weights)
    EXPONENTIAL.check(checkpoint["state_dict"], expected["state_dict"])
    (ours,), (theirs,) = checkpoint["optimizer_states"], expected["optimizer_states"]
    module = Module(EXPONENTIAL)
    (optimizer,), _ = module.configure_optimizers()
    optimizer.load_state_dict(ours)
    names = [names_of(module)[p] for group in optimizer.param_groups for p in group["params"]]
    order = [name for name, _ in module.model.named_parameters()]
    EXPONENTIAL.check(
        {name: ours["state"][index]["momentum_buffer"] for index, name in enumerate(names)},
        {name: theirs["state"][order.index(name)]["momentum_buffer"] for name in names},
    )
    assert all(group.get("scale", 1.0) == 1.0 for group in ours["param_groups"])


def names_of(module: Module) -> dict[nn.Parameter, str]:
    return {p: name for name, p in module.model.named_parameters()}


def test_training_goes_on_in_the_exponential_form_after_a_checkpoint(tmp_path):
    """And the weights after the fit are θ."""
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    this = trainer(tmp_path, enable_checkpointing=True, callbacks=[FoldCallback(), saving])
    seen = []

    class Observed(Module):
        def on_train_batch_start(self, batch, index):
            seen.append(self.optimizers().param_groups[0]["scale"])

    module = Observed(EXPONENTIAL)
    this.fit(module, loader())
    assert len(set(seen)) > 10
    EXPONENTIAL.check(copied(module.model), fit(tmp_path, Module(TORCH)))


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (lambda: StochasticWeightAveraging(0.05), r"StochasticWeightAveraging averages.*optimizer\.folded\(\)"),
        (lambda: EMAWeightAveraging(), r"EMAWeightAveraging averages.*optimizer\.folded\(\)"),
        (lambda: ModelCheckpoint(save_weights_only=True), "save_weights_only=True.*calls no callback"),
    ],
    ids=["SWA", "EMA", "weights only"],
)
def test_the_callback_warns_of_what_would_average_or_save_scaled_weights(callback, said, tmp_path):
    for form in (EXPONENTIAL, ORDINARY):
        with pytest.warns(UserWarning, match=said) if form is EXPONENTIAL else contextlib.nullcontext():
            callbacks = [FoldCallback(), callback()]
            fit(tmp_path / form.name, Module(form), max_steps=1, callbacks=callbacks, enable_checkpointing=True)
    callbacks = [FoldCallback(warn=False), callback()]
    fit(tmp_path / "said", Module(EXPONENTIAL), max_steps=1, callbacks=callbacks, enable_checkpointing=True)


@pytest.mark.parametrize("order", [1, -1])
def test_the_callback_leaves_an_average_alone(order, tmp_path):
    """In the checkpoint, where the weights stand beside it, and in the model after the fit; here it is one inside of
    folded()."""

    class Averaging(WeightAveraging):
        def on_train_batch_end(self, trainer, *args):
            optimizer = texp_sgd(trainer.optimizers[0])
            with optimizer.folded() if optimizer is not None else contextlib.nullcontext():
                super().on_train_batch_end(trainer, *args)

    found = []
    for form in (EXPONENTIAL, TORCH):
        saving = ModelCheckpoint(tmp_path / form.name, "{step}", every_n_train_steps=6, save_top_k=-1)
        callbacks = [FoldCallback(warn=False), Averaging()][::order]
        this = trainer(tmp_path, max_steps=8, enable_checkpointing=True, callbacks=[*callbacks, saving])
        module = Module(form)
        this.fit(module, loader())
        checkpoint = torch.load(tmp_path / form.name / "step=6.ckpt", weights_only=False)
        found.append([copied(module.model), checkpoint["state_dict"], checkpoint["current_model_state"]])
    for ours, theirs in zip(*found, strict=True):
        EXPONENTIAL.check(ours, theirs)
    with pytest.raises(AssertionError):  # that there is an average
        EXPONENTIAL.check(*found[0][1:])

"""transformers' Trainer, and texp.integrations.transformers."""

from pathlib import Path

import pytest
import torch

import texp
from tests.integration.training import (
    ARGUMENTS,
    EXPONENTIAL,
    FORMS,
    ORDINARY,
    REFERENCE,
    TORCH,
    Form,
    copied,
    fold,
    ids,
)

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate, which transformers' Trainer needs, is not installed")
safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
# The rest of it is imported on first use, with warnings of its own.
Trainer = pytest.importorskip("transformers.trainer", reason="transformers is not installed").Trainer

from texp.integrations.transformers import FoldCallback  # noqa: E402
from texp.integrations.wrapped import texp_sgd  # noqa: E402

VOCABULARY, LENGTH, SAMPLES = 13, 6, 24


def model(dtype: torch.dtype = torch.float64) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=LENGTH, num_labels=3, layer_norm_eps=1e-30, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).to(dtype)


def dataset() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=generator)
    labels = torch.randint(3, (SAMPLES,), generator=generator)
    return [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels, strict=True)]


def trainer(tmp_path: Path, form: Form, callbacks=(), dtype=torch.float64, **options) -> Trainer:
    """Of 12 steps, four an epoch, with an evaluation after every fifth."""
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 3,
            "num_train_epochs": 3, "per_device_train_batch_size": 6, "learning_rate": 0.05, "weight_decay": 0.05,
            "lr_scheduler_type": "cosine", "warmup_steps": 2, "max_grad_norm": 0.0, "logging_strategy": "no",
            "eval_strategy": "steps", "eval_steps": 5, "save_strategy": "no", **options,
        }
    )  # fmt: skip
    this = model(dtype)
    kwargs = {"momentum": ARGUMENTS["momentum"], "nesterov": True, **form.options}
    if form is EXPONENTIAL:
        kwargs["params"] = texp.param_groups(
            this, dataset()[0]["input_ids"][None], no_decay=no_decay_of(this), weight_decay=0.05
        )
        for group in kwargs["params"]:
            group.setdefault("weight_decay", 0.05)
    return Trainer(
        this, arguments, train_dataset=dataset(), eval_dataset=dataset(), callbacks=list(callbacks),
        optimizer_cls_and_kwargs=(torch.optim.SGD if form is TORCH else texp.SGD, kwargs),
    )  # fmt: skip


def no_decay_of(of: transformers.PreTrainedModel):
    """The Trainer's own choice of what is not decayed."""
    decayed = Trainer.get_decay_parameter_names(None, of)
    return lambda name, p: name not in decayed


def trained(
    tmp_path: Path, form: Form, resume: str | None = None, callbacks=(), **options
) -> dict[str, torch.Tensor]:
    this = trainer(tmp_path, form, callbacks, **options)
    this.train(resume_from_checkpoint=resume)
    fold(texp_sgd(this.optimizer))
    return copied(this.model)


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_trainer(form, tmp_path):
    form.check(trained(tmp_path, form), trained(tmp_path, TORCH))


@pytest.mark.parametrize("form", [REFERENCE, ORDINARY], ids=ids)
def test_clipped_and_accumulated(form, tmp_path):
    options = {"max_grad_norm": 0.1, "gradient_accumulation_steps": 2}
    form.check(trained(tmp_path, form, **options), trained(tmp_path, TORCH, **options))


class Clip(transformers.TrainerCallback):
    """In place of max_grad_norm, which sees the gradients at Pθ."""

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        texp.clip_grad_norm_(texp_sgd(optimizer), self.max_norm)


def test_clipped_in_the_exponential_form(tmp_path):
    found = trained(tmp_path, EXPONENTIAL, callbacks=[Clip(0.1)])
    EXPONENTIAL.check(found, trained(tmp_path, TORCH, max_grad_norm=0.1))


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_bf16(form, tmp_path):
    options = {"dtype": torch.float32, "num_train_epochs": 1}
    found, expected = (trained(tmp_path, f, bf16=True, **options) for f in (form, TORCH))
    form.check_in_mixed_precision(found, expected, trained(tmp_path, TORCH, **options))


@pytest.mark.parametrize("callbacks", [(), (FoldCallback,)], ids=["", "folded"])
@pytest.mark.parametrize("form", [TORCH, *FORMS], ids=ids)
def test_a_run_that_is_resumed(form, callbacks, tmp_path):
    """In the middle of the second epoch, in another Trainer, from a checkpoint of texp.SGD or torch.optim.SGD."""
    options = {"save_strategy": "steps", "save_steps": 6}
    expected = trained(tmp_path / "whole", TORCH)
    first = trainer(tmp_path / "first", form, [made() for made in callbacks], **options)
    first.train()
    resumed = trained(
        tmp_path / "second", form, str(tmp_path / "first" / "checkpoint-6"), [made() for made in callbacks], **options
    )
    form.check(resumed, expected)


def momentum(sgd: torch.optim.Optimizer, of: torch.nn.Module) -> dict[str, torch.Tensor]:
    names = {p: name for name, p in of.named_parameters()}
    return {names[p]: sgd.state[p]["momentum_buffer"] for group in sgd.param_groups for p in group["params"]}


def loaded(tmp_path: Path, form: Form) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and momentum of a checkpoint."""
    this = trainer(tmp_path, form)
    this.create_optimizer_and_scheduler(12)
    folder = tmp_path / "checkpoint-6"
    sgd = texp_sgd(this.optimizer) or this.optimizer
    sgd.load_state_dict(torch.load(folder / "optimizer.pt"))
    assert all(group.get("scale", 1.0) == 1.0 for group in sgd.param_groups)
    return safetensors.load_file(folder / "model.safetensors"), momentum(sgd, this.model)


@pytest.mark.parametrize("evaluated", [6, 5, 100], ids=["evaluated", "evaluated before", "not evaluated"])
def test_a_checkpoint_of_the_callback_is_one_of_torch(evaluated, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 6, "eval_steps": evaluated}
    for form in (TORCH, EXPONENTIAL):
        trained(tmp_path / form.name, form, callbacks=[FoldCallback()], **options)
    found, expected = (loaded(tmp_path / form.name, form) for form in (EXPONENTIAL, TORCH))
    for part in range(2):
        EXPONENTIAL.check(found[part], expected[part])


def test_the_model_after_training_is_that_of_torch(tmp_path):
    """And training goes on from it in the exponential form, in the same Trainer."""
    options = {"eval_strategy": "no"}
    this, theirs = trainer(tmp_path, EXPONENTIAL, [FoldCallback()], **options), trainer(tmp_path, TORCH, **options)
    for _ in range(2):
        for each in (this, theirs):
            each.train()
        EXPONENTIAL.check(copied(this.model), copied(theirs.model))
    sgd = texp_sgd(this.optimizer)
    sgd.train()
    assert sgd.param_groups[0]["scale"] != 1.0


def test_the_best_model_is_loaded_as_it_is(tmp_path):
    """Where the optimizer's P is another one by then; and neither folding nor going on training loses it."""
    options = {
        "save_strategy": "steps", "save_steps": 3, "eval_steps": 3, "load_best_model_at_end": True,
        "metric_for_best_model": "loss", "greater_is_better": True, "num_train_epochs": 4,
    }  # fmt: skip
    this, theirs = (trainer(tmp_path / f.name, f, [FoldCallback()], **options) for f in (EXPONENTIAL, TORCH))
    for each in (this, theirs):
        each.train()
    assert this.state.best_global_step == theirs.state.best_global_step < 16
    EXPONENTIAL.check(copied(this.model), copied(theirs.model))
    sgd = texp_sgd(this.optimizer)
    sgd.train()
    sgd.fold()
    EXPONENTIAL.check(copied(this.model), copied(theirs.model))

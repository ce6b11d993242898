"""timm's factory of optimizers, its schedulers, averages and checkpoints."""

import contextlib
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

import texp
from tests.integration.training import (
    ARGUMENTS,
    EXPONENTIAL,
    FORMS,
    ORDINARY,
    REFERENCE,
    TORCH,
    Form,
    batches,
    copied,
    example,
    fold,
    ids,
    network,
)

timm = pytest.importorskip("timm", reason="timm is not installed")
optim = pytest.importorskip("timm.optim", reason="timm is not installed")
scheduler = pytest.importorskip("timm.scheduler", reason="timm is not installed")
utils = pytest.importorskip("timm.utils", reason="timm is not installed")
factory = pytest.importorskip("timm.optim._optim_factory", reason="timm is not installed")


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    """texp.SGD under a name of its own."""
    monkeypatch.setattr(factory.default_registry, "_optimizers", dict(factory.default_registry._optimizers))
    factory.default_registry.register(
        factory.OptimInfo(
            name="texp", opt_class=texp.SGD, description="texp.SGD", has_eps=False, has_momentum=True,
            defaults={"nesterov": True},
        )
    )  # fmt: skip


def made(model: torch.nn.Module, form: Form, **options) -> torch.optim.Optimizer:
    """By timm's factory, without decay of biases and norms."""
    if form is EXPONENTIAL:
        options["param_group_fn"] = partial(groups, weight_decay=ARGUMENTS["weight_decay"])
    return optim.create_optimizer_v2(
        model, "sgd" if form is TORCH else "texp", lr=ARGUMENTS["lr"], weight_decay=ARGUMENTS["weight_decay"],
        momentum=0.9, **form.options, **options,
    )  # fmt: skip


def groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    return texp.param_groups(model, example(), no_decay="bias_and_norm", weight_decay=weight_decay)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: list[torch.Tensor]) -> None:
    optimizer.zero_grad()
    cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def weights(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    fold(optimizer)
    return copied(model)


SCHEDULES = {
    "cosine": lambda o: scheduler.CosineLRScheduler(o, t_initial=4, warmup_t=2, warmup_lr_init=0.01, cycle_limit=2),
    "step": lambda o: scheduler.StepLRScheduler(o, decay_t=2, decay_rate=0.5),
    "multistep": lambda o: scheduler.MultiStepLRScheduler(o, decay_t=[2, 4], noise_range_t=3, noise_pct=0.3),
    "poly": lambda o: scheduler.PolyLRScheduler(o, t_initial=6, t_in_epochs=False),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_factory_and_schedulers(form, schedule):
    def trained(f):
        model = network()
        optimizer = made(model, f)
        this = SCHEDULES[schedule](optimizer)
        for index, batch in enumerate(batches(epochs=6)):
            step(model, optimizer, batch)
            this.step_update(index + 1)
            if index % 4 == 3:
                this.step(index // 4 + 1, metric=0.0)
        return weights(model, optimizer), [group["lr"] for group in optimizer.param_groups]

    (found, lrs), (expected, expected_lrs) = trained(form), trained(TORCH)
    assert lrs[0] == expected_lrs[0] != ARGUMENTS["lr"]
    form.check(found, expected)


def test_param_groups_weight_decay():
    """The groups of timm, as they are; a scale-invariant group decays the same tensors, and no others."""
    found = network()
    for form in (ORDINARY, REFERENCE):
        sizes = [(len(g["params"]), g["weight_decay"]) for g in made(network(), form).param_groups]
        assert sizes == [(len(g["params"]), g["weight_decay"]) for g in made(network(), TORCH).param_groups]
    decayed = {id(p) for g in made(found, EXPONENTIAL).param_groups if g["weight_decay"] for p in g["params"]}
    expected = optim.param_groups_weight_decay(found, ARGUMENTS["weight_decay"])
    assert decayed == {id(p) for g in expected if g["weight_decay"] for p in g["params"]}


@pytest.mark.parametrize("form", [REFERENCE, ORDINARY], ids=ids)
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_layer_decay_of_a_model_of_timm(form, name):
    """Its groups have lr_scale, by which timm's schedulers multiply the lr."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 64, 64, generator=generator)

    def trained(f):
        torch.manual_seed(0)
        size = {"img_size": 64} if name == "test_vit" else {}
        model = timm.create_model(name, num_classes=3, **size)
        optimizer = made(model, f, layer_decay=0.7)
        this = scheduler.CosineLRScheduler(optimizer, t_initial=8)
        for epoch in range(4):
            step(model, optimizer, [images, torch.tensor([0, 1, 2, 0])])
            this.step(epoch + 1)
        assert len({group["lr"] for group in optimizer.param_groups}) > 3
        return weights(model, optimizer)

    form.check(trained(form), trained(TORCH))


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_model_ema(form):
    """In the exponential form, of the weights inside of folded()."""

    def trained(f):
        model = network()
        optimizer = made(model, f)
        ema = utils.ModelEmaV3(model, decay=0.9, use_warmup=True)
        for index, batch in enumerate(batches()):
            step(model, optimizer, batch)
            with optimizer.folded() if f is EXPONENTIAL else contextlib.nullcontext():
                ema.update(model, step=index)
        return copied(ema.module)

    form.check(trained(form), trained(TORCH))


@pytest.mark.parametrize(
    ("form", "folded"),
    [(REFERENCE, False), (ORDINARY, False), (EXPONENTIAL, False), (EXPONENTIAL, True)],
    ids=["reference", "ordinary", "exponential", "folded"],
)
def test_checkpoint_saver(form, folded, tmp_path):
    """Resumed by timm, from a checkpoint of what is trained or, inside of folded(), of torch.optim.SGD."""

    def trained(f, interrupted):
        model = network()
        optimizer = made(model, f)
        saver = utils.CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
        for index, batch in enumerate(batches()):
            if interrupted and index == 10:
                with optimizer.folded() if folded else contextlib.nullcontext():
                    saver.save_checkpoint(epoch=2, metric=0.5)
                    saved = copied(model)
                model = network()
                optimizer = made(model, f)
                timm.models.resume_checkpoint(model, str(tmp_path / "last.pth.tar"), optimizer, log_info=False)
                assert all(torch.equal(x, saved[name]) for name, x in model.state_dict().items())
            step(model, optimizer, batch)
        return weights(model, optimizer)

    form.check(trained(form, interrupted=True), trained(TORCH, interrupted=False))


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("trust_clip", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_lars(nesterov, trust_clip, foreach, backend):
    """texp.LARS against timm's, in float64 over 200 steps, the second half from timm's state dict."""
    options = {"momentum": 0.9, "nesterov": nesterov, "trust_clip": trust_clip, "trust_coeff": 0.02}
    both = [[torch.nn.Parameter(p.clone()) for p in network().double().parameters()] for _ in range(2)]
    groups = [
        [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.01},
            {"params": [p for p in params if p.ndim < 2]},
        ]
        for params in both
    ]
    theirs = optim.Lars(groups[0], lr=0.1, foreach=foreach, **options)
    ours = texp.LARS(groups[1], lr=0.1, backend=backend, **options)
    generator = torch.Generator().manual_seed(0)
    for t in range(200):
        for p, q in zip(*both, strict=True):
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype) * (1 + t % 3)
            p.grad, q.grad = p.detach() + noise, q.detach() + noise
        theirs.step()
        ours.step()
        if t == 99:
            ours.load_state_dict(theirs.state_dict())
    for p, q in zip(*both, strict=True):
        assert (p - q).norm() <= 1e-12 * p.norm()

"""SAM of pytorch-optimizer around texp.SGD."""

import dataclasses

import pytest
import torch
from torch.nn.functional import cross_entropy

import texp
from tests.integration.training import (
    ARGUMENTS,
    EXPONENTIAL,
    ORDINARY,
    REFERENCE,
    TORCH,
    Form,
    batches,
    copied,
    fold,
    ids,
    network,
)

SAM = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed").SAM


def train(model: torch.nn.Module, optimizer: SAM, start: int = 0, stop: int = 20, scaled: bool = False) -> None:
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 8, 0.5)
    for index, (x, y) in enumerate(batches()):
        if not start <= index < stop:
            continue

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        closure()
        if scaled:  # the neighbourhood of Pθ that is P times as large
            optimizer.param_groups[0]["rho"] = 0.05 * optimizer.param_groups[0]["scale"]
        optimizer.step(closure)
        if start == 0 and stop == 20:
            schedule.step()


def made(form: Form, model: torch.nn.Module, **options) -> SAM:
    base = torch.optim.SGD if form is TORCH else texp.SGD
    return SAM(form.groups(model), base, rho=0.05, **ARGUMENTS, **form.options, **options)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("form", [REFERENCE, ORDINARY], ids=ids)
def test_sam(form, adaptive):
    results = []
    for f in (form, TORCH):
        model = network()
        train(model, made(f, model, adaptive=adaptive))
        results.append(copied(model))
    form.check(*results)


@pytest.mark.parametrize("saved", [TORCH, None], ids=["saved by torch", "saved by itself"])
@pytest.mark.parametrize("form", [REFERENCE, ORDINARY], ids=ids)
def test_resumed(form, saved):
    """SAM loads a state dict past the base optimizer's own load_state_dict."""
    results = []
    for first, second in ((saved or form, form), (TORCH, TORCH)):
        model = network()
        optimizer = made(first, model)
        train(model, optimizer, stop=10)
        resumed = network()
        resumed.load_state_dict(model.state_dict())
        fresh = made(second, resumed)
        fresh.load_state_dict(optimizer.state_dict())
        train(resumed, fresh, start=10, stop=19)
        results.append(copied(resumed))
    form.check(*results)


def test_the_exponential_form():
    """Where all that is trained is scale-invariant: at Pθ the radius is P times as large, the gradient's direction is
    that at θ, and so is the point, up to the scale."""
    results = []
    for form in (EXPONENTIAL, TORCH):
        model = network()
        groups = EXPONENTIAL.groups(model)
        trained = groups[0]
        for p in {*model.parameters()}.difference(trained["params"]):
            p.requires_grad_(False)
        if form is TORCH:
            optimizer = SAM(trained["params"], torch.optim.SGD, rho=0.05, perturb_eps=0.0, **ARGUMENTS)
        else:
            optimizer = SAM([trained], texp.SGD, rho=0.05, perturb_eps=0.0, **ARGUMENTS)
        train(model, optimizer, scaled=form is EXPONENTIAL)
        fold(optimizer.base_optimizer)
        results.append(copied(model))
    # SAM squares the norm of the gradient in float32, for whatever dtype.
    dataclasses.replace(EXPONENTIAL, roundings=64 * 2.0**-23 / 2.0**-52).check(*results)

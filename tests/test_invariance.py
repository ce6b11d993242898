"""texp.audit finds what is scale-invariant in models whose answer is known, and training with the groups of
texp.param_groups visits the functions of torch.optim.SGD, running statistics included."""

import contextlib
import copy
import random
import subprocess
import sys
from fnmatch import fnmatch

import numpy as np
import pytest
import torch
from torch import nn

import texp
from tests.conftest import relative_error
from tests.models import CASES, Case, vgg
from texp.invariance import bias_or_norm
from texp.probe import Probe

STEPS = 100
# λη = 0.002 is within the theorem's range of 0.0026 for γ = 0.9: P passes 2 some three times in these steps.
OPTIONS = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}


def groups_of(case: Case, model: nn.Module, no_decay: str | None, **options) -> list[dict]:
    empty = not case.invariant(model, no_decay is not None)
    with pytest.warns(UserWarning, match="no parameters are scale-invariant") if empty else contextlib.nullcontext():
        return texp.param_groups(model, case.batch(0)[0], no_decay=no_decay, **options)


@pytest.mark.parametrize("no_decay", [None, "bias_and_norm"], ids=["all", "bias_and_norm"])
@pytest.mark.parametrize("name", CASES)
class TestKnownAnswers:
    def test_the_set(self, name, no_decay):
        case, model = CASES[name], CASES[name].model(eps=None)
        found = texp.audit(model, case.batch(0)[0], hold=no_decay and bias_or_norm)
        assert set(found.invariant) == case.invariant(model, no_decay is not None)
        trainable = [n for n, p in model.named_parameters() if p.requires_grad]
        assert sorted(found.invariant + found.rest) == sorted(trainable)
        expected = [n for n in trainable if any(fnmatch(n, x) for x in case.without_effect)]
        assert found.without_effect == expected
        assert sorted(sum(found.sets, [])) == sorted(found.invariant)
        assert found.gap > 1e6
        assert found.deviation < 1e-12
        assert "singular gap" in str(found)
        assert all(n in str(found) for n in found.rest)

    def test_training(self, name, no_decay):
        """100 steps with everything trainable: the loss of each step, and evaluation every tenth."""
        case = CASES[name]
        expected, actual = case.model(), case.model()
        groups = groups_of(case, actual, no_decay, **OPTIONS)
        optimizers = [torch.optim.SGD(plain_groups(expected, no_decay), **OPTIONS), texp.SGD(groups)]
        differences = differing(case, [expected, actual], optimizers)
        assert max(differences) < 1e-9
        if groups[0]["scale_invariant"]:
            assert groups[0]["scale_exponent"] >= 2
        optimizers[1].fold()
        for p, q in zip(actual.parameters(), expected.parameters(), strict=True):
            assert relative_error(p, q) < 1e-6 or q.norm() < 1e-9


def plain_groups(model: nn.Module, no_decay: str | None) -> list[dict]:
    """As one would write them for torch.optim.SGD."""
    still = [p for n, p in model.named_parameters() if no_decay and bias_or_norm(n, p)]
    ids = {id(p) for p in still}
    moving = [p for p in model.parameters() if id(p) not in ids]
    return [{"params": params, **extra} for params, extra in ((moving, {}), (still, {"weight_decay": 0.0})) if params]


def differing(case: Case, models: list[nn.Module], optimizers: list, steps: int = STEPS) -> list[float]:
    """Relative differences of the loss at every step, and of outputs in evaluation at every tenth."""
    differences = []
    for t in range(steps):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss = case.loss(model, t)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        differences.append(abs(losses[1] / losses[0] - 1))
        if t % 10 == 9:
            with torch.no_grad():
                outputs = [model.eval()(case.batch(1000)[0]) for model in models]
            outputs = [out["probabilities"] if isinstance(out, dict) else out for out in outputs]
            differences.append(relative_error(outputs[1], outputs[0]))
            for model in models:
                model.train()
    return differences

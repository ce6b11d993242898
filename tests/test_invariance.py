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


BIASED = CASES["VGG, biases before norms"]


class TestGroups:
    @pytest.mark.parametrize("no_decay", [None, "bias_and_norm"])
    def test_every_backend_scales_what_must_grow(self, swift_target, no_decay):
        """Running statistics, and without decay also the biases that they see."""
        expected, actual = BIASED.model(), BIASED.model().to(swift_target.device)
        groups = texp.param_groups(actual, BIASED.batch(0)[0], no_decay=no_decay, **OPTIONS, nesterov=True)
        optimizer = swift_target.sgd(groups)
        plain = torch.optim.SGD(plain_groups(expected, no_decay), **OPTIONS, nesterov=True)
        actual.cpu() if swift_target.device == "cpu" else expected.to(swift_target.device)
        assert max(differing(BIASED, [expected, actual], [plain, optimizer], 60)) < 1e-9

    def test_what_is_in_them(self):
        model = BIASED.model()
        groups = texp.param_groups(model, BIASED.batch(0)[0], no_decay="bias_and_norm", lr=0.3, weight_decay=0.1)
        scaled, rest, still = groups
        assert [g["scale_invariant"] for g in groups] == [True, False, False]
        assert [g["weight_decay"] for g in groups] == [0.1, 0.1, 0.0]
        assert [g["lr"] for g in groups] == [0.3] * 3
        assert scaled["params"] == [model[i].weight for i in (0, 4 - 1, 7)]
        assert rest["params"] == [model[11].weight]
        assert {id(p) for p in still["params"]} == {id(p) for i in (1, 4, 8) for p in model[i].parameters()} | {
            id(model[11].bias)
        }
        stats = {id(tensor): power for tensor, power in scaled["norm_stats"]}
        for norm in (model[1], model[4], model[8]):
            assert stats.pop(id(norm.running_mean)) == 1
            assert stats.pop(id(norm.running_var)) == 2
        # No group of their own: they have no gradient, and grow as the statistics that cancel them.
        assert stats == {id(model[i].bias): 1 for i in (0, 3, 7)}

    def test_no_decay_by_name(self):
        case, model = CASES["VGG"], CASES["VGG"].model()
        groups = texp.param_groups(model, case.batch(0)[0], no_decay=lambda name, p: name.startswith("3."))
        assert [len(g["params"]) for g in groups] == [6, 4, 1]
        assert groups[2]["params"][0] is model[3].weight
        with pytest.raises(ValueError, match="bias_and_norm"):
            texp.param_groups(model, case.batch(0)[0], no_decay="biases")

    def test_frozen_parameters_stay_in_an_ordinary_group(self):
        case, model = CASES["unused"], CASES["unused"].model()
        groups = texp.param_groups(model, case.batch(0)[0])
        assert any(p is model.frozen.weight for p in groups[1]["params"])

    def test_a_wrong_group_diverges(self):
        """The head, which the audit leaves out, marked by hand."""
        case = CASES["VGG"]
        expected, actual = case.model(), case.model()
        groups = texp.param_groups(actual, case.batch(0)[0], **OPTIONS)
        assert (
            max(
                differing(
                    case, [expected, actual], [torch.optim.SGD(expected.parameters(), **OPTIONS), texp.SGD(groups)]
                )
            )
            < 1e-9
        )
        expected, actual = case.model(), case.model()
        groups = texp.param_groups(actual, case.batch(0)[0], **OPTIONS)
        groups[0]["params"].append(actual[11].weight)
        groups[1]["params"] = [p for p in groups[1]["params"] if p is not actual[11].weight]
        assert (
            max(
                differing(
                    case, [expected, actual], [torch.optim.SGD(expected.parameters(), **OPTIONS), texp.SGD(groups)]
                )
            )
            > 1e-3
        )

    def test_without_statistics_evaluation_is_wrong(self):
        case = CASES["ResNet"]
        expected, actual = case.model(), case.model()
        groups = texp.param_groups(actual, case.batch(0)[0], **OPTIONS)
        groups[0]["norm_stats"] = []
        assert (
            max(
                differing(
                    case, [expected, actual], [torch.optim.SGD(expected.parameters(), **OPTIONS), texp.SGD(groups)]
                )
            )
            > 1e-3
        )


def everything(model: nn.Module) -> list:
    """All that an audit must leave as it is, as bytes or values."""
    hooks = [list(vars(m)[key]) for m in model.modules() for key in vars(m) if key.endswith("_hooks")]
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return [
        [(id(t), t._version, t.requires_grad, t.detach().numpy().tobytes()) for t in tensors],
        [(m.training, getattr(m, "eps", None), getattr(m, "momentum", None)) for m in model.modules()],
        hooks,
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        (torch.get_default_dtype(), torch.is_grad_enabled()),
    ]


class Fails(nn.Sequential):
    """After so many calls of any copy, counted here."""

    calls = 0

    def forward(self, x):
        Fails.calls += 1
        if Fails.calls > 5:
            raise OSError("out of luck")
        random.random(), np.random.rand(), torch.rand(())
        return super().forward(x)


class TestLeavesNoTrace:
    @pytest.mark.parametrize("name", CASES)
    def test_nothing_changes(self, name):
        case, model = CASES[name], CASES[name].model(eps=None).float()
        case.loss(model.double(), 0).backward()
        for i, module in enumerate(model.modules()):
            module.training = bool(i % 2)
        before = everything(model)
        with torch.no_grad():
            texp.audit(model, case.batch(0)[0])
            assert not torch.is_grad_enabled()
        assert everything(model) == before

    def test_not_even_when_it_fails(self):
        model = Fails(*vgg())
        before = everything(model)
        with pytest.raises(OSError, match="out of luck"):
            texp.audit(model, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
        assert Fails.calls == 6
        assert everything(model) == before

    def test_it_is_a_function_of_its_seed(self):
        case = CASES["pre-activation ResNet"]
        audits = []
        for i, seed in enumerate((1, 1, 2)):
            torch.manual_seed(i)
            audits.append(texp.audit(case.model(), case.batch(0)[0], seed=seed))
        assert audits[0] == audits[1]
        assert audits[2].gap != audits[0].gap
        assert audits[2].invariant == audits[0].invariant

    def test_scipy_is_imported_when_it_is_needed(self):
        code = "import sys, texp; assert 'scipy' not in sys.modules; sys.modules['scipy'] = None\n"
        code += "try: texp.audit(None)\nexcept ImportError as error: print(error)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "pip install scipy" in done.stdout

"""Training with the groups of texp.param_groups visits what torch.optim.SGD visits, running statistics included."""

import contextlib

import pytest
import torch
from torch import nn

import texp
from tests.conftest import relative_error
from tests.invariance.models import CASES, Case
from texp.invariance.audit import bias_or_norm

STEPS = 100
# λη = 0.002 is within the theorem's range of 0.0026 for γ = 0.9: P passes 2 some three times in these steps.
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02}


def groups_of(case: Case, model: nn.Module, no_decay: str | None, **options) -> list[dict]:
    told = "no parameters are scale-invariant" if not case.invariant(model, no_decay is not None) else ""
    told = told or ("no input that was tried reaches" if case.unreached else "")
    with pytest.warns(UserWarning, match=told) if told else contextlib.nullcontext():
        return texp.param_groups(model, case.batch(0)[0], no_decay=no_decay, **options)


@pytest.mark.parametrize("no_decay", [None, "bias_and_norm"], ids=["all", "bias_and_norm"])
@pytest.mark.parametrize("name", CASES)
def test_training(name, no_decay):
    """100 steps with everything trainable: the loss of each step, and evaluation every tenth."""
    case = CASES[name]
    expected, actual = case.model(), case.model()
    groups = groups_of(case, actual, no_decay, **OPTIONS)
    optimizers = [torch.optim.SGD(plain_groups(expected, no_decay), **OPTIONS), texp.SGD(groups)]
    differences = differing(case, [expected, actual], optimizers)
    assert max(differences) < 1e-9
    if groups[0].get("scale_invariant"):
        assert optimizers[1].param_groups[0]["scale_exponent"] >= 2
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
        losses = case.step(models, optimizers, t)
        differences.append(abs(losses[1] / losses[0] - 1))
        if t % 10 == 9:
            outputs = [case.evaluate(model) for model in models]
            differences.append(relative_error(outputs[1], outputs[0]))
    return differences


def against_sgd(case: Case, change=lambda groups, model: None) -> float:
    """The largest difference when `change` was made to the groups."""
    expected, actual = case.model(), case.model()
    groups = texp.param_groups(actual, case.batch(0)[0], **OPTIONS)
    change(groups, actual)
    optimizers = [torch.optim.SGD(expected.parameters(), **OPTIONS), texp.SGD(groups)]
    return max(differing(case, [expected, actual], optimizers))


BIASED = CASES["VGG, biases before norms"]


class TestGroups:
    @pytest.mark.parametrize("no_decay", [None, "bias_and_norm"])
    def test_every_backend_scales_what_must_grow(self, swift_target, no_decay):
        """Running statistics, and without decay also the biases that they see."""
        expected, actual = (BIASED.model().to(swift_target.device) for _ in range(2))
        groups = texp.param_groups(actual, BIASED.batch(0)[0], no_decay=no_decay, **OPTIONS, nesterov=True)
        optimizer = swift_target.sgd(groups)
        plain = torch.optim.SGD(plain_groups(expected, no_decay), **OPTIONS, nesterov=True)
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
        stats = {id(stat.find()): stat.power for stat in scaled["norm_stats"]}
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
        groups = groups_of(case, model, None)
        assert any(p is model.frozen.weight for p in groups[1]["params"])

    def test_a_wrong_group_diverges(self):
        """The head, which the audit leaves out, marked by hand."""

        def mark_the_head(groups, model):
            head = model[11].weight
            groups[0]["params"].append(head)
            groups[1]["params"] = [p for p in groups[1]["params"] if p is not head]

        assert against_sgd(CASES["VGG"]) < 1e-9
        assert against_sgd(CASES["VGG"], mark_the_head) > 1e-3

    def test_without_statistics_evaluation_is_wrong(self):
        assert against_sgd(CASES["ResNet"], lambda groups, model: groups[0].update(norm_stats=[])) > 1e-3


def test_a_large_eps_is_warned_of():
    """The set is that of the model without eps; how much eps spoils is said."""
    x = CASES["VGG"].batch(0)[0]
    texp.param_groups(CASES["VGG"].model(eps=1e-5), x)
    with pytest.warns(UserWarning, match="eps of the model's norms is large"):
        texp.param_groups(CASES["VGG"].model(eps=0.5), x)

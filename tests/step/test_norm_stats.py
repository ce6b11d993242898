"""Statistics that grow with the weights, wherever the model goes; and groups of which a process holds nothing."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import texp
from tests.batch_norm_run import (
    ARGUMENTS,
    CLOSE,
    KEYS,
    SCALE,
    expected,
    network,
    pair,
    trained,
)
from tests.conftest import same_bits
from tests.states import param


class TestNormStatsFollowTheModel:
    def convert(self, model: nn.Module, how: str) -> None:
        if how == "double":
            model.double()
        elif how == "assigned":
            model.double()
            model[1].running_mean = model[1].running_mean.clone()
            model[1].running_var = model[1].running_var.clone()
        elif how == "load_state_dict, assign":
            model.double()
            buffers = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
            model.load_state_dict({**model.state_dict(keep_vars=True), **buffers}, assign=True)
        elif how == "to_empty":
            saved = {name: value.double() for name, value in model.state_dict().items()}
            model.double().to_empty(device=model[0].weight.device).load_state_dict(saved)

    @pytest.mark.parametrize("how", ["double", "assigned", "load_state_dict, assign", "to_empty"])
    def test_a_model_that_is_converted_after_the_optimizer_was_made(self, target, how):
        model, optimizer = pair(target, network(torch.float32, target.device))
        self.convert(model, how)
        plain = network(torch.float32)
        other = torch.optim.SGD(plain.parameters(), foreach=False, **ARGUMENTS)
        plain.double()
        if how == "to_empty":
            other.param_groups[0]["params"] = list(plain.parameters())
        outputs = trained(plain, other), trained(model, optimizer)
        assert torch.allclose(*outputs, **CLOSE)

    def test_param_groups_names_them(self, swift_target):
        model = network(torch.float32, swift_target.device)
        groups = texp.param_groups(model, torch.randn(32, 4, device=swift_target.device), **ARGUMENTS)
        optimizer = swift_target.sgd(groups)
        model.double()
        plain = network(torch.float32, swift_target.device)
        other = torch.optim.SGD(plain.parameters(), foreach=False, **ARGUMENTS)
        assert torch.allclose(trained(plain.double(), other), trained(model, optimizer), **CLOSE)

    def test_groups_that_are_given_to_two_optimizers(self, target):
        """The second has the statistics too, and the first keeps its own scale."""
        model = network(device=target.device)
        stats = [(model[1], "running_mean", 1), (model[1], "running_var", 2)]
        given = [{"params": [model[0].weight], "scale_invariant": True, "norm_stats": stats}]
        optimizers = [target.sgd(given, **ARGUMENTS) for _ in range(2)]
        assert [len(optimizer.norm_stats[0]) for optimizer in optimizers] == [2, 2]
        model[0].weight.grad = torch.ones_like(model[0].weight)
        optimizers[0].step()
        optimizers[0].step()
        assert optimizers[1].param_groups[0]["scale"] == 1 < optimizers[0].param_groups[0]["scale"]

    def test_that_are_given_before_a_state_dict_is_loaded(self, target):
        made = pair(target)
        trained(*made, steps=range(4))
        model = network(device=target.device)
        rest = [*model[1].parameters(), *model[3].parameters()]
        group = {"params": [model[0].weight], "scale_invariant": True}
        optimizer = target.sgd([group, {"params": rest}], **ARGUMENTS)
        optimizer.param_groups[0]["norm_stats"] = [(model[1], "running_mean", 1), (model[1], "running_var", 2)]
        assert "norm_stats" not in optimizer.state_dict()["param_groups"][0]
        model.load_state_dict(made[0].state_dict())
        optimizer.load_state_dict(made[1].state_dict())
        assert torch.allclose(trained(model, optimizer, steps=range(4, 16)), expected(), **CLOSE)

    def test_of_groups_that_somebody_copied(self, target):
        model, optimizer = pair(target)
        trained(model, optimizer, steps=range(4))
        optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
        assert torch.allclose(trained(model, optimizer, steps=range(4, 16)), expected(), **CLOSE)

    def test_by_a_function(self, target):
        model = network(device=target.device)
        group = {
            "params": [model[0].weight],
            "scale_invariant": True,
            "norm_stats": [(lambda: model[1].running_mean, 1), (lambda: model[1].running_var, 2)],
        }
        others = [p for name, p in model.named_parameters() if name != "0.weight"]
        optimizer = target.sgd([group, {"params": others}], **ARGUMENTS)
        model[1].running_var = model[1].running_var.clone()
        assert torch.allclose(trained(model, optimizer), expected(), **CLOSE)

    def test_a_module_without_a_name(self):
        with pytest.raises(ValueError, match=r"must be a list of \(module, name, power\)"):
            texp.SGD([{"params": [param()], "norm_stats": [(nn.BatchNorm1d(3), 1)]}])

    def test_a_tensor_that_its_module_no_longer_holds_is_noticed(self, target):
        model = network(device=target.device)
        stats = [(model[1].running_mean, 1), (model[1].running_var, 2)]
        optimizer = target.sgd(
            [{"params": [model[0].weight], "scale_invariant": True, "norm_stats": stats}], **ARGUMENTS
        )
        del stats
        trained(model, optimizer, steps=range(2))
        model.float().double()
        before = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        model[0].weight.grad = torch.ones_like(model[0].weight)
        for call in (optimizer.step, optimizer.fold, optimizer.eval):
            with pytest.raises(ValueError, match=r"group 0: a tensor of shape \(6,\), .* the model has replaced it"):
                call()
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[0][name])
        assert optimizer.state_dict()["param_groups"] == before[1]["param_groups"]
        optimizer.param_groups[0]["norm_stats"] = [(model[1], "running_mean", 1), (model[1], "running_var", 2)]
        optimizer.step()

    def test_a_module_that_is_gone(self, target):
        """Its tensors are followed as long as another module holds them, as after convert_sync_batchnorm."""
        model, optimizer = pair(target)
        trained(model, optimizer, steps=range(4))
        mean, var, weight, bias = model[1].running_mean, model[1].running_var, model[1].weight, model[1].bias
        model[1] = nn.BatchNorm1d(6, eps=1e-30, device=target.device)
        model[1].running_mean, model[1].running_var, model[1].weight, model[1].bias = mean, var, weight, bias
        del mean, var
        assert torch.allclose(trained(model, optimizer, steps=range(4, 16)), expected(), **CLOSE)
        model[1] = nn.BatchNorm1d(6, device=target.device)
        model[0].weight.grad = torch.ones_like(model[0].weight)
        with pytest.raises(
            ValueError, match=r"running_mean of BatchNorm1d \(.*\), one of norm_stats, can no longer be found"
        ):
            optimizer.step()

    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    def test_copies_of_model_and_optimizer_belong_together(self, target, how):
        """In either order."""
        for order in (0, 1):
            made = pair(target)
            trained(*made, steps=range(4))
            given = made if order == 0 else made[::-1]
            copied = copy.deepcopy(given) if how == "deepcopy" else pickle.loads(pickle.dumps(given))
            copied = copied if order == 0 else copied[::-1]
            before = made[0][1].running_var.clone()
            result = trained(*copied, steps=range(4, 16))
            assert torch.equal(made[0][1].running_var, before)
            assert torch.allclose(result, expected(), **CLOSE)

    def test_a_copy_of_the_optimizer_alone(self, target):
        model, optimizer = pair(target)
        trained(model, optimizer, steps=range(4))
        clone = copy.deepcopy(optimizer)
        before = model[1].running_var.clone()
        for group in clone.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        clone.step()
        assert torch.equal(model[1].running_var, before)

    def test_a_wrapper_that_restores_the_state_dict_of_the_base_class(self, target):
        """As the SAM of pytorch-optimizer does, which calls torch.optim.Optimizer.load_state_dict itself."""
        made, fresh = pair(target), pair(target)
        trained(*made, steps=range(4))
        fresh[0].load_state_dict(made[0].state_dict())
        saved = copy.deepcopy(torch.optim.Optimizer.state_dict(made[1]))
        torch.optim.Optimizer.load_state_dict(fresh[1], saved)
        assert torch.allclose(trained(*fresh, steps=range(4, 16)), expected(), **CLOSE)

    def test_groups_that_are_stepped_one_at_a_time(self, target):
        """As DeepSpeed's ZeRO does, which shows one group after the other."""
        model, optimizer = pair(target)
        groups = optimizer.param_groups

        class OneAtATime:
            def zero_grad(self):
                optimizer.zero_grad()

            def step(self):
                for group in groups:
                    optimizer.param_groups = [group]
                    optimizer.step()
                optimizer.param_groups = groups

        assert torch.allclose(trained(model, OneAtATime()), expected(), **CLOSE)


class TestGroupsWithoutParametersHere:
    """As under ZeroRedundancyOptimizer and where shards are empty: P, κ and statistics advance on every rank."""

    def rank(self, target, own: list, **options):
        var, w = torch.ones(4, device=target.device), param(1.0, device=target.device)
        group = {"params": own, "scale_invariant": True, "norm_stats": [(var, 2)], **options}
        optimizer = target.sgd([group, {"params": [w]}], lr=0.5, momentum=0.9, weight_decay=0.05, dampening=0.25)
        scales = []
        for t in range(8):
            for p in [*own, w]:
                p.grad = torch.zeros_like(p)
            optimizer.param_groups[0]["lr"] = 0.0 if t in (0, 1, 5) else 0.5 / (1 + t)
            if t == 5:
                optimizer.fold()
            optimizer.step()
            scales.append([optimizer.param_groups[0][key] for key in sorted(SCALE)])
        optimizer.fold()
        return scales, var.tolist()

    @pytest.mark.parametrize("options", [{}, {"nesterov": True, "dampening": 0.0}, {"momentum": 0.0}], ids=str)
    def test_the_scale_is_the_same(self, target, options):
        with_params = self.rank(target, [param(device=target.device)], **options)
        assert self.rank(target, [], **options) == with_params
        assert with_params[0][-1] != [0.0, 1.0, 0, True]

    def test_where_steps_may_be_skipped(self, target):
        """The scale is then on the device; the first step is skipped, and later ones."""
        ends = []
        for own in ([param(device=target.device)], []):
            var, w = torch.ones(4, device=target.device), param(1.0, device=target.device)
            group = {"params": own, "scale_invariant": True, "norm_stats": [(var, 2)]}
            arguments = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.05, "dampening": 0.25}
            optimizer = target.sgd([group, {"params": [w]}], fused=True, **arguments)
            scaler = torch.amp.GradScaler(target.device, init_scale=4.0)
            for t in range(7):
                for p in [*own, w]:
                    p.grad = torch.full_like(p, float("inf") if t in (0, 3) else 0.0)
                scaler.scale(torch.ones((), device=target.device))
                scaler.step(optimizer)
                scaler.update()
                if t == 4:
                    optimizer.state_dict()  # brings back what is on the device
            saved = optimizer.state_dict()["param_groups"][0]
            ends.append([var.tolist(), *(saved[key] for key in sorted(SCALE))])
        assert ends[0] == ends[1]
        assert ends[0][0] != [1.0] * 4

    def test_an_ordinary_group_stays_as_it_is(self, target):
        p = param(device=target.device)
        optimizer = target.sgd([{"params": []}, {"params": [p]}], lr=0.5, weight_decay=0.05)
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert all(group.keys() == KEYS for group in optimizer.param_groups)


def test_norm_stats_survive_torch_save(target):
    """A state dict holds numbers and tensors only: it is read with weights_only."""
    made, fresh = pair(target), pair(target)
    trained(*made, steps=range(8))
    file = io.BytesIO()
    torch.save((made[0].state_dict(), made[1].state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    fresh[0].load_state_dict(weights)
    fresh[1].load_state_dict(state)
    assert same_bits(*(trained(*run, steps=range(8, 16)) for run in (made, fresh)))

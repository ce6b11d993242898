"""texp.SGD as a torch optimizer: everything torch.optim.SGD does, and its errors."""

import copy
import math
import pickle
import re

import pytest
import torch
from torch import nn

import texp
from tests.conftest import profiler, relative_error, same_bits
from tests.states import assert_unchanged, param, snapshot
from texp.optimizer import FusedOptimizer
from texp.step import groups


class TestTheInterfaceOfTorch:
    def test_signature(self):
        import inspect

        ours = inspect.signature(texp.SGD.__init__).parameters
        for name, theirs in inspect.signature(torch.optim.SGD.__init__).parameters.items():
            assert ours[name].default == theirs.default
            assert ours[name].kind == theirs.kind

    @pytest.mark.parametrize(
        "arguments",
        [
            {"lr": -0.1},
            {"lr": torch.tensor([0.1, 0.2])},
            {"momentum": -0.9},
            {"weight_decay": -1.0},
            {"nesterov": True},
            {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
            {"fused": True, "differentiable": True},
            {"fused": True, "foreach": True},
        ],
        ids=str,
    )
    def test_the_same_errors(self, arguments):
        with pytest.raises((ValueError, RuntimeError)) as theirs:
            torch.optim.SGD([param()], **arguments)
        with pytest.raises(type(theirs.value)) as ours:
            texp.SGD([param()], **arguments)
        assert str(ours.value) == str(theirs.value)

    @pytest.mark.parametrize(
        "params", [[], torch.ones(3), [1.0], [param() * 2]], ids=["none", "tensor", "float", "leaf"]
    )
    def test_the_same_errors_for_params(self, params):
        with pytest.raises((ValueError, TypeError)) as theirs:
            torch.optim.SGD(params)
        with pytest.raises(type(theirs.value)) as ours:
            texp.SGD(params)
        assert str(ours.value) == str(theirs.value)

    def test_closure(self, target):
        p = param(device=target.device)
        optimizer = target.sgd([p], lr=0.1)

        def closure():
            optimizer.zero_grad()
            loss = (p * p).sum()
            loss.backward()
            return loss

        with torch.no_grad():
            assert optimizer.step(closure).item() == 14.0
        assert torch.allclose(p.detach().cpu(), torch.tensor([0.8, -1.6, 2.4], dtype=torch.float64))
        assert optimizer.step() is None

    def test_hooks_and_profiler(self, target):
        p = param(device=target.device)
        p.grad = torch.ones_like(p)
        optimizer = target.sgd([p], lr=0.1)
        calls = []
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))
        with profiler(torch.profiler.ProfilerActivity.CPU) as profile:
            optimizer.step()
        assert calls == ["pre", "post"]
        assert any(event.key == "Optimizer.step#SGD.step" for event in profile.key_averages())

    def test_a_tensor_lr_follows_its_scheduler(self, target):
        p, q = param(device=target.device), param(device=target.device)
        optimizers = [target.sgd([p], lr=torch.tensor(0.1)), torch.optim.SGD([q], lr=torch.tensor(0.1))]
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in optimizers]
        for _ in range(3):
            for x, optimizer, scheduler in zip((p, q), optimizers, schedulers, strict=True):
                x.grad = torch.ones_like(x)
                optimizer.step()
                scheduler.step()
        assert torch.equal(p, q)
        assert optimizers[0].param_groups[0]["lr"].item() == pytest.approx(0.0125)

    def test_add_param_group(self, target):
        optimizer = target.sgd([param()], lr=0.1, momentum=0.9)
        optimizer.add_param_group({"params": [param()], "lr": 0.5, "scale_invariant": True})
        group = optimizer.param_groups[1]
        assert (group["lr"], group["momentum"], group["scale"]) == (0.5, 0.9, 1.0)
        assert "scale" not in optimizer.param_groups[0]
        assert optimizer.norm_stats == [[], []]

    def test_named_parameters(self, target):
        model = nn.Linear(2, 2)
        assert target.sgd(model.named_parameters()).param_groups[0]["param_names"] == ["weight", "bias"]

    def test_the_users_dict_is_the_group(self):
        group = {"params": [param()]}
        optimizer = texp.SGD([group], lr=0.1)
        group["lr"] = 7.0
        assert optimizer.param_groups[0]["lr"] == 7.0

    @pytest.mark.parametrize("scale_invariant", [False, True])
    def test_a_scheduler_that_ends_a_little_below_0(self, target, scale_invariant):
        """LinearLR down to 0 ends at −3e-18 by rounding."""
        p, q = param(device=target.device), param(device=target.device)
        arguments = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
        ours = target.sgd([p], scale_invariant=scale_invariant, **arguments)
        optimizers = ours, torch.optim.SGD([q], **arguments)
        schedulers = [torch.optim.lr_scheduler.LinearLR(o, 1 / 3, 0.0, 10) for o in optimizers]
        for t in range(14):
            g = torch.full_like(p, math.cos(t))
            p.grad, q.grad = g / ours.param_groups[0].get("scale", 1.0), g
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                optimizer.step()
                scheduler.step()
        assert ours.param_groups[0]["lr"] < 0
        assert math.isnan(ours.log10_lr()[0])
        ours.fold()
        assert relative_error(p, q) < 1e-14
        assert relative_error(ours.state[p]["momentum_buffer"], optimizers[1].state[q]["momentum_buffer"]) < 1e-14

    @pytest.mark.parametrize("scale_invariant", [False, True])
    def test_torch_compile(self, target, scale_invariant):
        p, q = param(device=target.device), param(device=target.device)
        arguments = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "scale_invariant": scale_invariant}
        plain, traced = target.sgd([p], **arguments), target.sgd([q], **arguments)
        compiled = torch.compile(lambda: traced.step(), backend="eager")
        for t in range(4):
            p.grad, q.grad = torch.full_like(p, math.cos(t)), torch.full_like(q, math.cos(t))
            plain.step()
            compiled()
        assert same_bits(p, q)

    def test_idle_tensors_of_ordinary_groups_are_not_touched(self, target):
        p, q = param(device=target.device), param(device=target.device)
        optimizer = target.sgd([p, q], lr=0.1, momentum=0.9, weight_decay=0.1)
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        optimizer.step()
        q.grad, version = None, q._version
        optimizer.step()
        assert q._version == version

    def test_complex_parameters(self, general):
        torch.manual_seed(0)
        for dtype in (torch.complex64, torch.complex128):
            start, grads = torch.randn(4, dtype=dtype), torch.randn(3, 4, dtype=dtype)
            p, q = (nn.Parameter(start.clone().to(general.device)) for _ in range(2))
            ours = general.sgd([p], lr=0.1, momentum=0.9, weight_decay=0.1)
            theirs = torch.optim.SGD([q], lr=0.1, momentum=0.9, weight_decay=0.1)
            for g in grads:
                p.grad, q.grad = g.clone().to(general.device), g.clone().to(general.device)
                ours.step()
                theirs.step()
            assert torch.equal(p, q)

    def test_maximize_in_a_scale_invariant_group(self, target):
        p, q = param(device=target.device), param(device=target.device)
        arguments = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
        ours = target.sgd([p], scale_invariant=True, maximize=True, **arguments)
        theirs = torch.optim.SGD([q], maximize=True, **arguments)
        for t in range(20):
            g = torch.full_like(p, math.sin(t))
            q.grad, p.grad = g, g / ours.param_groups[0]["scale"]
            ours.step()
            theirs.step()
        ours.fold()
        assert relative_error(p, q) < 1e-14

    def test_a_group_without_any_grad_does_not_step(self, target):
        p = param(device=target.device)
        optimizer = target.sgd([p], lr=0.1, momentum=0.9, weight_decay=0.1, scale_invariant=True)
        before = snapshot(optimizer)
        optimizer.step()
        assert_unchanged(optimizer, before)
        assert not optimizer.state

    def test_pickle_and_deepcopy(self):
        p = param()
        optimizer = texp.SGD([p], lr=0.1, momentum=0.9, weight_decay=0.1, scale_invariant=True, backend="reference")
        p.grad = torch.ones_like(p)
        optimizer.step()
        for clone in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            (q,) = clone.param_groups[0]["params"]
            q.grad = torch.ones_like(q)
            clone.step()
            assert clone.param_groups[0]["scale"] > optimizer.param_groups[0]["scale"]
            assert clone.step_was_skipped is False
            assert clone._backend == "reference"


class TestDifferentiable:
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    @pytest.mark.parametrize(
        "extra",
        [{}, {"maximize": True}, {"nesterov": True}, {"dampening": 0.5}],
        ids=["plain", "maximize", "nesterov", "dampening"],
    )
    def test_the_gradient_of_a_step_is_that_of_torch(self, momentum, extra):
        """With respect to the start and, without momentum (where torch can), to the LR."""

        def meta_gradient(make):
            lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=momentum == 0)
            start = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
            p = start.clone()
            arguments = {"lr": lr, "momentum": momentum, "weight_decay": 0.1, **extra}
            if momentum == 0:
                arguments["nesterov"] = False
            optimizer = make([p], differentiable=True, **arguments)
            with torch.no_grad():  # step() turns gradients on by itself
                for t in range(3):
                    with torch.enable_grad():
                        p.grad = (t + 1) * start**3
                    optimizer.step()
            return torch.autograd.grad(p.sum(), (start, lr) if lr.requires_grad else (start,))

        try:
            expected = meta_gradient(torch.optim.SGD)
        except TypeError as error:  # torch 2.6 cannot yet with respect to the LR
            with pytest.raises(TypeError, match=re.escape(str(error))):
                meta_gradient(texp.SGD)
            return
        for ours, theirs in zip(meta_gradient(texp.SGD), expected, strict=True):
            assert ours.abs().min() > 0
            assert torch.equal(ours, theirs)

    def test_sparse_gradients(self):
        p, q = param(1.0, 2.0, 3.0), param(1.0, 2.0, 3.0)
        for x, make in ((p, texp.SGD), (q, torch.optim.SGD)):
            x.grad = torch.sparse_coo_tensor([[1]], [1.0], (3,), dtype=torch.float64, check_invariants=True)
            with torch.no_grad():
                x.copy_(torch.tensor([1.0, 2.0, 3.0]))
            optimizer = make([x.requires_grad_(False)], lr=0.1, differentiable=True)
            optimizer.step()
        assert torch.equal(p, q)
        assert p[1] == 1.9

    def test_not_for_scale_invariant_groups(self):
        with pytest.raises(ValueError, match="scale_invariant group cannot be differentiable"):
            texp.SGD([param()], differentiable=True, scale_invariant=True)
        p = param().detach()
        optimizer = texp.SGD([p], differentiable=True)
        p.grad = torch.ones_like(p)
        optimizer.param_groups[0]["scale_invariant"] = True
        before = snapshot(optimizer)
        with pytest.raises(RuntimeError, match="group 0 is scale_invariant: its step cannot be differentiable"):
            optimizer.step()
        assert_unchanged(optimizer, before)
        saved = texp.SGD([param()], scale_invariant=True).state_dict()
        with pytest.raises(ValueError, match=r"group 0 of the state dict is scale_invariant.* fold\(\)"):
            texp.SGD([param()], differentiable=True).load_state_dict(saved)


MISSING = [name for name, reason in texp.backends.available().items() if reason != texp.backends.OK]


class TestErrors:
    CASES = {
        "nan lr": ({"lr": math.nan}, ValueError, "Invalid learning rate: nan"),
        "infinite decay": ({"weight_decay": math.inf}, ValueError, "Invalid weight_decay value: inf"),
        "unknown backend": ({"backend": "cudnn"}, ValueError, "one of 'cuda', 'cpu', .*, got 'cudnn'"),
        **{
            f"missing {name}": ({"backend": name}, RuntimeError, f"'{name}' was requested, but .*; available here: ")
            for name in MISSING
        },
        "capturable": ({"capturable": True}, RuntimeError, "capturable=True was .* but no parameter is on a GPU"),
        "differentiable": (
            {"differentiable": True, "backend": "cpu"}, RuntimeError, "backend='cpu' .* differentiable step is torch"
        ),
    }  # fmt: skip

    @pytest.mark.parametrize("case", CASES)
    def test_of_the_constructor(self, case):
        arguments, error, message = self.CASES[case]
        with pytest.raises(error, match=message):
            texp.SGD([param()], **arguments)

    def test_a_scale_invariant_group_with_a_parameter_twice(self):
        p = param()
        with pytest.raises(ValueError, match="holds a parameter twice"):
            texp.SGD([{"params": [p, p], "scale_invariant": True}], lr=0.1)

    GROUPS = {
        "lr": ({"lr": -1.0}, "lr must be a finite number of at least 0, got -1.0"),
        "dampening": ({"dampening": math.nan}, "dampening must be a finite number, got nan"),
        "scale": ({"scale": 2.5}, r"scale must be in \[1, 2\) .* got 2.5"),
        "carried decay": ({"carried_decay": -1.0}, "carried_decay must be .* got -1.0"),
        "scale exponent": ({"scale_exponent": math.inf}, "scale_exponent an integer, got 1.0 and inf"),
        "norm_stats": ({"norm_stats": [torch.ones(3)]}, r"norm_stats must be a list of \(module, name, power\)"),
        "norm_stats, none": ({"norm_stats": None}, "norm_stats must be a list .* got None"),
        "norm_stats, power": ({"norm_stats": [(torch.ones(3), math.nan)]}, "norm_stats must be a list"),
        "norm_stats, text": ({"norm_stats": [(torch.ones(3), "2")]}, "norm_stats must be a list"),
        "norm_stats, integers": ({"norm_stats": [(torch.ones(3, dtype=torch.long), 1)]}, "norm_stats must be a list"),
    }

    @pytest.mark.parametrize("case", GROUPS)
    def test_of_a_group(self, case):
        extra, message = self.GROUPS[case]
        optimizer = texp.SGD([param()])
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [param()], **extra})
        assert len(optimizer.param_groups) == 1

    @pytest.mark.parametrize(("key", "value"), [("lr", math.nan), ("momentum", -0.9), ("weight_decay", math.inf)])
    def test_a_bad_hyperparameter_in_the_last_group_changes_nothing(self, target, key, value):
        p, q = param(device=target.device), param(device=target.device)
        groups = [{"params": [p], "scale_invariant": True}, {"params": [q]}]
        optimizer = target.sgd(groups, lr=0.1, momentum=0.9, weight_decay=0.1)
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        optimizer.step()
        optimizer.param_groups[1][key] = value
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match=f"parameter group 1: {key} must be a finite number.*got {value}"):
            optimizer.step()
        assert_unchanged(optimizer, before)

    @pytest.mark.parametrize("fault", ["shape", "layout"])
    def test_a_buffer_that_does_not_fit_changes_nothing(self, target, fault):
        p, q = param(device=target.device), param(device=target.device)
        optimizer = target.sgd([{"params": [p]}, {"params": [q]}], lr=0.1, momentum=0.9)
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        optimizer.step()
        buf = torch.ones(4, device=target.device) if fault == "shape" else torch.zeros_like(p).to_sparse()
        optimizer.state[q]["momentum_buffer"] = buf
        before = p.detach().clone(), q.detach().clone()
        with pytest.raises(RuntimeError, match=r"parameter group 1: .* cannot have a momentum buffer of shape"):
            optimizer.step()
        assert same_bits(p, before[0])
        assert same_bits(q, before[1])

    def test_capturable_later(self):
        p = param()
        optimizer = texp.SGD([p], lr=0.1)
        p.grad = torch.ones_like(p)
        optimizer.capturable = True
        with pytest.raises(RuntimeError, match="capturable=True was requested"):
            optimizer.step()
        optimizer.capturable = False
        optimizer.param_groups[0]["capturable"] = True  # as torch.compile writes it there, for any optimizer
        optimizer.step()
        assert torch.equal(p, param() - 0.1)


def test_log10_lr_of_an_ordinary_group():
    optimizer = texp.SGD([{"params": [param()], "lr": 0.01}, {"params": [param()], "lr": 0.0}])
    assert optimizer.log10_lr() == [-2.0, -math.inf]


def test_log10_lr_of_the_first_step():
    """PyTorch starts the buffer without dampening, so the first step decays by λ, later ones by γκ + (1 − τ)λ."""
    p = param()
    optimizer = texp.SGD([p], lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.2, scale_invariant=True)
    assert optimizer.log10_lr() == [pytest.approx(math.log10(0.1 / (1 - 0.1 * 0.2)))]
    p.grad = torch.ones_like(p)
    optimizer.step()
    alphas = 1 - 0.1 * 0.2, 1 - 0.1 * (0.9 * 0.2 / (1 - 0.1 * 0.2) + 0.5 * 0.2)
    assert optimizer.log10_lr() == [pytest.approx(math.log10(0.1 / alphas[0] ** 2 / alphas[1]))]


@pytest.mark.parametrize("foreach", [None, False, True])
def test_foreach_changes_nothing(foreach):
    params = [[param(), param(4.0, 5.0, dtype=torch.float32), param(6.0)] for _ in range(2)]
    arguments = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "scale_invariant": True}
    optimizers = texp.SGD(params[0], **arguments), texp.SGD(params[1], foreach=foreach, **arguments)
    for t in range(12):
        for ps, optimizer in zip(params, optimizers, strict=True):
            for i, p in enumerate(ps):
                p.grad = torch.full_like(p, math.cos(t)) if (t + i) % 3 else None
            optimizer.step()
    assert all(same_bits(p, q) for p, q in zip(*params, strict=True))


class HeavyBall(FusedOptimizer):
    """Another optimizer, as small as one can be: its hyperparameters, and what it refuses of them."""

    def __init__(self, params, lr: float, backend: str | None = None) -> None:
        defaults = {"lr": lr, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.1, **groups.TORCH_DEFAULTS}
        super().__init__(params, defaults, backend=backend, capturable=False, momentum_dtype=None)

    def _check_hyperparameters(self, group) -> None:
        super()._check_hyperparameters(group)
        if group["momentum"] == 0:
            raise ValueError("a heavy ball needs momentum")


def test_another_optimizer_is_its_hyperparameters(general):
    runs = []
    for make in (
        lambda p: HeavyBall([p], 0.1, general.backend),
        lambda p: general.sgd([p], lr=0.1, momentum=0.9, weight_decay=0.1),
    ):
        p = param()
        optimizer = make(p)
        for t in range(4):
            if t == 2:
                optimizer = pickle.loads(pickle.dumps(optimizer))
                (p,) = optimizer.param_groups[0]["params"]
                optimizer.param_groups[0]["scale_invariant"] = True
            p.grad = torch.full_like(p, 0.5)
            optimizer.step()
        optimizer.fold()
        runs.append((p, optimizer))
    assert same_bits(runs[0][0], runs[1][0])
    assert type(runs[0][1]) is HeavyBall
    with pytest.raises(ValueError, match="a heavy ball needs momentum"):
        runs[0][1].add_param_group({"params": [param()], "momentum": 0.0})
    assert len(runs[0][1].param_groups) == 1

"""texp.SGD as a torch optimizer: everything torch.optim.SGD does, and its errors."""

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import texp
from tests.conftest import relative_error, same_bits


def param(*values, dtype=torch.float64, device="cpu") -> nn.Parameter:
    return nn.Parameter(torch.tensor(values or (1.0, -2.0, 3.0), dtype=dtype, device=device))


def snapshot(optimizer) -> list:
    """Everything that a failed or skipped step must leave alone."""
    groups = [
        {key: value for key, value in group.items() if key not in ("params", "norm_stats")}
        for group in optimizer.param_groups
    ]
    tensors = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    tensors += [stat.clone() for group in optimizer.param_groups for stat, _ in group.get("norm_stats", [])]
    tensors += [values["momentum_buffer"].clone() for values in optimizer.state.values()]
    return [copy.deepcopy(groups), *tensors]


def assert_unchanged(optimizer, before: list) -> None:
    groups, *tensors = snapshot(optimizer)
    assert groups == before[0]
    assert len(tensors) == len(before) - 1
    assert all(same_bits(a, b) for a, b in zip(tensors, before[1:], strict=True))


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
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
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
        assert (group["lr"], group["momentum"], group["scale"], group["norm_stats"]) == (0.5, 0.9, 1.0, [])
        assert group["norm_stats"] is not optimizer.param_groups[0]["norm_stats"]

    def test_named_parameters(self, target):
        model = nn.Linear(2, 2)
        assert target.sgd(model.named_parameters()).param_groups[0]["param_names"] == ["weight", "bias"]

    def test_complex_parameters(self, target):
        torch.manual_seed(0)
        for dtype in (torch.complex64, torch.complex128):
            start, grads = torch.randn(4, dtype=dtype), torch.randn(3, 4, dtype=dtype)
            p, q = (nn.Parameter(start.clone().to(target.device)) for _ in range(2))
            ours = target.sgd([p], lr=0.1, momentum=0.9, weight_decay=0.1)
            theirs = torch.optim.SGD([q], lr=0.1, momentum=0.9, weight_decay=0.1)
            for g in grads:
                p.grad, q.grad = g.clone().to(target.device), g.clone().to(target.device)
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


class TestDifferentiable:
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_the_gradient_of_a_step_is_that_of_torch(self, momentum):
        """With respect to the start and, without momentum (where torch can), to the LR."""

        def meta_gradient(make):
            lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=momentum == 0)
            start = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
            p = start.clone()
            optimizer = make([p], lr=lr, momentum=momentum, weight_decay=0.1, differentiable=True)
            with torch.no_grad():  # step() turns gradients on by itself
                for t in range(3):
                    with torch.enable_grad():
                        p.grad = (t + 1) * start**3
                    optimizer.step()
            return torch.autograd.grad(p.sum(), (start, lr) if lr.requires_grad else (start,))

        for ours, theirs in zip(meta_gradient(texp.SGD), meta_gradient(torch.optim.SGD), strict=True):
            assert ours.abs().min() > 0
            assert torch.equal(ours, theirs)

    def test_not_for_scale_invariant_groups(self):
        with pytest.raises(ValueError, match="scale_invariant group cannot be differentiable"):
            texp.SGD([param()], differentiable=True, scale_invariant=True)

    def test_a_grad_scaler_unscales_for_it(self):
        assert texp.SGD([param()], differentiable=True)._step_supports_amp_scaling is False
        assert texp.SGD([param()])._step_supports_amp_scaling is True


class TestSparse:
    ROWS = 6

    def grad(self, *rows: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.arange(1.0, 3 * len(rows) + 1, dtype=torch.float64).view(-1, 3) / scale
        return torch.sparse_coo_tensor([rows], values, (self.ROWS, 3), check_invariants=True)

    def table(self, device="cpu") -> nn.Parameter:
        torch.manual_seed(0)
        return nn.Parameter(torch.randn(self.ROWS, 3, dtype=torch.float64).to(device))

    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    @pytest.mark.parametrize("nesterov", [False, True])
    def test_as_in_torch(self, target, momentum, nesterov):
        tables = self.table(target.device), self.table(target.device)
        arguments = {"lr": 0.1, "momentum": momentum, "nesterov": nesterov and momentum > 0}
        optimizers = target.sgd([tables[0]], **arguments), torch.optim.SGD([tables[1]], **arguments)
        for rows in ((0, 2), (2, 3, 2), (5,)):
            for p, optimizer in zip(tables, optimizers, strict=True):
                p.grad = self.grad(*rows).to(target.device)
                optimizer.step()
        assert torch.equal(*tables)

    def test_weight_decay_without_touching_rows_that_have_no_gradient(self, target):
        """The decay goes into P: a row without a gradient keeps its bits from step to step, except that the whole
        table is halved, exactly, whenever P passes 2. SGD with a dense decay is matched."""
        lr, decay = 0.1, 0.5
        p, q = self.table(target.device), self.table(target.device)
        ours = target.sgd([p], lr=lr, weight_decay=decay, scale_invariant=True)
        theirs = torch.optim.SGD([q], lr=lr, weight_decay=decay)
        for t in range(40):
            rows = (t % 3, 4)
            untouched = [row for row in range(self.ROWS) if row not in rows]
            before, exponent = p.detach().clone(), ours.param_groups[0]["scale_exponent"]
            p.grad = self.grad(*rows, scale=ours.param_groups[0]["scale"]).to(target.device)
            q.grad = self.grad(*rows).to_dense().to(target.device)
            ours.step()
            theirs.step()
            halved = 2.0 ** (exponent - ours.param_groups[0]["scale_exponent"])
            assert halved in (1.0, 0.5)
            assert same_bits(p[untouched], before[untouched] * halved)
        assert ours.param_groups[0]["scale_exponent"] >= 2
        ours.fold()
        assert relative_error(p, q) < 1e-13

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"weight_decay": 0.1}, "need a scale_invariant group without momentum"),
            ({"weight_decay": 0.1, "momentum": 0.9, "scale_invariant": True}, "need a scale_invariant group without"),
            ({"weight_decay": 9.0, "scale_invariant": True}, r"at most 0\.5 .* lr = 0\.1, weight_decay = 9\.0"),
        ],
        ids=["ordinary", "momentum", "too strong"],
    )
    def test_other_weight_decay_is_refused_before_anything_changes(self, target, arguments, message):
        dense, p = param(device=target.device), self.table(target.device)
        dense.grad, p.grad = torch.ones_like(dense), self.grad(1).to(target.device)
        optimizer = target.sgd(
            [{"params": [dense], "scale_invariant": True, "weight_decay": 0.1}, {"params": [p], **arguments}], lr=0.1
        )
        before = snapshot(optimizer)
        with pytest.raises(RuntimeError, match=f"parameter group 1: .*{message}"):
            optimizer.step()
        assert_unchanged(optimizer, before)


class TestErrors:
    CASES = {
        "nan lr": ({"lr": math.nan}, ValueError, "Invalid learning rate: nan"),
        "infinite decay": ({"weight_decay": math.inf}, ValueError, "Invalid weight_decay value: inf"),
        "unknown backend": ({"backend": "cudnn"}, ValueError, "one of 'cuda', 'triton', .*, got 'cudnn'"),
        "missing backend": ({"backend": "cuda"}, RuntimeError, r"backend='cuda' was requested, but .*no C\+\+ core"),
        "capturable": ({"capturable": True}, RuntimeError, "capturable=True was requested, but the reference"),
        "differentiable": (
            {"differentiable": True, "backend": "cpu"}, RuntimeError, "backend='cpu' .* differentiable step is torch"
        ),
    }  # fmt: skip

    @pytest.mark.parametrize("case", CASES)
    def test_of_the_constructor(self, case):
        arguments, error, message = self.CASES[case]
        with pytest.raises(error, match=message):
            texp.SGD([param()], **arguments)

    GROUPS = {
        "lr": ({"lr": -1.0}, "lr must be a finite number of at least 0, got -1.0"),
        "dampening": ({"dampening": math.nan}, "dampening must be a finite number, got nan"),
        "scale": ({"scale": 2.5}, r"scale must be in \[1, 2\) .* got 2.5"),
        "carried decay": ({"carried_decay": -1.0}, "carried_decay must be .* got -1.0"),
        "norm_stats": ({"norm_stats": [torch.ones(3)]}, r"norm_stats must be a list of pairs \(tensor, power"),
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


class TestNormStats:
    """Running statistics before which d factors of the group lie: means scale with P^d, variances with P^2d."""

    def optimizer(self, target):
        stats = torch.ones(3, device=target.device), torch.ones(3, device=target.device)
        p = param(device=target.device)
        group = {"params": [p], "scale_invariant": True, "norm_stats": [(stats[0], 1), (stats[1], 2)]}
        return p, stats, target.sgd([group], lr=0.5, weight_decay=0.5)

    def test_they_scale_with_the_weights_and_fold_with_them(self, target):
        p, stats, optimizer = self.optimizer(target)
        for _ in range(10):
            p.grad = torch.zeros_like(p)
            optimizer.step()
            scale = optimizer.param_groups[0]["scale"]
            assert stats[0].cpu() == pytest.approx(torch.full((3,), scale), rel=1e-5)
            assert stats[1].cpu() == pytest.approx(torch.full((3,), scale**2), rel=1e-5)
        assert optimizer.param_groups[0]["scale_exponent"] > 0
        optimizer.fold()
        assert torch.stack(stats).cpu() == pytest.approx(torch.ones(2, 3), rel=1e-5)

    def test_they_stay_out_of_state_dicts(self, target):
        p, _, optimizer = self.optimizer(target)
        p.grad = torch.ones_like(p)
        optimizer.step()
        state_dict = optimizer.state_dict()
        assert "norm_stats" not in state_dict["param_groups"][0]
        _, other_stats, other = self.optimizer(target)
        other.load_state_dict(state_dict)
        assert [stat for stat, _ in other.param_groups[0]["norm_stats"]] == [*other_stats]
        assert all(a is b for (a, _), b in zip(other.param_groups[0]["norm_stats"], other_stats, strict=True))
        assert all((stat == 1).all() for stat in other_stats)


class TestStateDicts:
    def trained(self, make, **extra):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(5, dtype=torch.float64))
        optimizer = make([p], lr=0.1, momentum=0.9, weight_decay=0.01, **extra)
        for _ in range(3):
            p.grad = torch.randn(5, dtype=torch.float64)
            optimizer.step()
        return p, optimizer

    def test_torch_loads_ours_after_fold(self):
        _, optimizer = self.trained(texp.SGD, scale_invariant=True)
        optimizer.fold()
        p, theirs = self.trained(torch.optim.SGD)
        theirs.load_state_dict(optimizer.state_dict())
        (buf,) = (values["momentum_buffer"] for values in theirs.state.values())
        (ours,) = (values["momentum_buffer"] for values in optimizer.state.values())
        assert torch.equal(buf, ours)
        p.grad = torch.ones_like(p)
        theirs.step()

    def test_fold_twice_is_fold_once(self):
        _, optimizer = self.trained(texp.SGD, scale_invariant=True)
        optimizer.fold()
        before = snapshot(optimizer)
        optimizer.fold()
        assert_unchanged(optimizer, before)

    def test_hooks_see_what_is_loaded(self):
        """A user's pre-hook may replace the state dict, a post-hook sees buffers in the dtype that was saved."""
        p = param(dtype=torch.bfloat16)
        optimizer = texp.SGD([p], lr=0.1, momentum=0.9)
        state_dict = optimizer.state_dict()
        seen = []

        def pre(_, loaded):
            return {**loaded, "state": {0: {"momentum_buffer": torch.ones(3)}}}

        optimizer.register_load_state_dict_pre_hook(pre)
        optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[p]["momentum_buffer"].dtype))
        optimizer.load_state_dict(state_dict)
        optimizer.load_state_dict(state_dict)
        assert seen == [torch.float32, torch.float32]

    CASES = {
        "groups": (lambda s: s["param_groups"].append(s["param_groups"][0]), "different number of parameter groups"),
        "params": (
            lambda s: s["param_groups"][0].update(params=[0, 1]),
            "doesn't match the size of optimizer's group",
        ),
        "shape": (lambda s: s["state"][0].update(momentum_buffer=torch.ones(7)), r"shape \(7,\) for .* shape \(5,\)"),
        "scale": (lambda s: s["param_groups"][0].update(scale=math.nan), "scale must be a finite number.*got nan"),
        "exponent": (lambda s: s["param_groups"][0].update(scale_exponent=0.5), "scale_exponent an integer.*0.5"),
    }

    @pytest.mark.parametrize("case", CASES)
    def test_one_that_does_not_fit_changes_nothing(self, case):
        spoil, message = self.CASES[case]
        _, optimizer = self.trained(texp.SGD, scale_invariant=True)
        state_dict = copy.deepcopy(optimizer.state_dict())
        spoil(state_dict)
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state_dict)
        assert_unchanged(optimizer, before)

    def test_one_of_an_old_torch(self):
        """Without keys that came later, and with the None that once stood for a missing buffer."""
        p, optimizer = param(), None
        optimizer = texp.SGD([p], lr=0.1, momentum=0.9)
        group = {"lr": 0.2, "momentum": 0.9, "dampening": 0, "weight_decay": 0, "params": [0]}
        optimizer.load_state_dict({"state": {0: {"momentum_buffer": None}}, "param_groups": [group]})
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert torch.equal(optimizer.state[p]["momentum_buffer"], torch.ones(3, dtype=torch.float64))

    @given(
        dtypes=st.lists(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), min_size=1, max_size=4),
        invariant=st.booleans(),
        momentum=st.sampled_from([0.0, 0.9]),
        with_grad=st.lists(st.booleans(), min_size=4, max_size=4),
        steps=st.integers(0, 5),
    )
    def test_a_round_trip_changes_nothing(self, dtypes, invariant, momentum, with_grad, steps):
        """Through bytes that load with weights_only: what follows has the same bits as without the round trip."""

        def take(optimizer, params, t):
            for p, has in zip(params, with_grad, strict=False):
                p.grad = torch.full_like(p, math.cos(t)) if has or t % 2 else None
            optimizer.step()

        def make(params):
            half = [params[:1], params[1:]]
            groups = [{"params": ps, "scale_invariant": invariant} for ps in half if ps]
            return texp.SGD(groups, lr=0.3, momentum=momentum, weight_decay=0.9)

        params = [nn.Parameter(torch.linspace(1, 2, 3).to(dtype)) for dtype in dtypes]
        optimizer = make(params)
        for t in range(steps):
            take(optimizer, params, t)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        copies = [nn.Parameter(p.detach().clone()) for p in params]
        restored = make(copies)
        restored.load_state_dict(torch.load(file, weights_only=True))
        for t in range(steps, steps + 3):
            take(optimizer, params, t)
            take(restored, copies, t)
        assert all(same_bits(p, q) for p, q in zip(params, copies, strict=True))
        assert snapshot(optimizer)[0] == snapshot(restored)[0]


class TestGradScaler:
    def scaler(self, device: str, **arguments) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(device, init_scale=2.0**10, **arguments)

    @pytest.mark.parametrize("scale_invariant", [False, True])
    @pytest.mark.parametrize("overflows", [(), (0,), (0, 1, 4), (3,)], ids=str)
    def test_a_skipped_step_changes_nothing_and_says_so(self, target, scale_invariant, overflows):
        """Also the very first one, and the schedule does not move."""
        expected_p, p = param(device=target.device), param(device=target.device)
        arguments = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "dampening": 0.5}
        plain = target.sgd([expected_p], scale_invariant=scale_invariant, **arguments)
        optimizer = target.sgd([p], scale_invariant=scale_invariant, **arguments)
        scaler = self.scaler(target.device)
        for t in range(6):
            optimizer.zero_grad()
            scaler.scale((p * math.cos(t)).sum()).backward()
            if t in overflows:
                p.grad[1] = math.inf
                before = snapshot(optimizer)
            scaled = p.grad.clone()
            scaler.step(optimizer)
            assert optimizer.step_was_skipped is (t in overflows)
            assert same_bits(p.grad, scaled)
            if t in overflows:
                assert_unchanged(optimizer, before)
            else:
                expected_p.grad = torch.full_like(p, math.cos(t))
                plain.step()
            scaler.update()
        # Scales are powers of two: unscaling is exact.
        assert same_bits(p, expected_p)
        assert snapshot(optimizer)[0] == snapshot(plain)[0]

    def test_grads_unscaled_by_the_user(self, target):
        p, q = param(device=target.device), param(device=target.device)
        optimizer, plain = target.sgd([p], lr=0.1), target.sgd([q], lr=0.1)
        scaler = self.scaler(target.device)
        scaler.scale((p * p).sum()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([p], 1.0)
        scaler.step(optimizer)
        (q * q).sum().backward()
        torch.nn.utils.clip_grad_norm_([q], 1.0)
        plain.step()
        assert same_bits(p, q)
        assert optimizer.step_was_skipped is False

    def test_a_step_without_a_scaler_is_not_skipped(self, target):
        p = param(device=target.device)
        optimizer = target.sgd([p], lr=0.1)
        optimizer.found_inf = torch.tensor(1.0)
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert optimizer.step_was_skipped is True
        del optimizer.found_inf
        optimizer.step()
        assert optimizer.step_was_skipped is False


def test_log10_lr_of_an_ordinary_group():
    optimizer = texp.SGD([{"params": [param()], "lr": 0.01}, {"params": [param()], "lr": 0.0}])
    assert optimizer.log10_lr() == [-2.0, -math.inf]


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

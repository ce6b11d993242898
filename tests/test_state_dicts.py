"""Saving, loading and folding."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import texp
from tests.conftest import same_bits
from tests.states import assert_unchanged, param, snapshot


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
        assert optimizer.param_groups[0]["scale_exponent"] == 0
        assert torch.stack(stats).cpu() == pytest.approx(torch.ones(2, 3), rel=1e-5)

    def test_they_stay_out_of_state_dicts(self, target):
        p, _, optimizer = self.optimizer(target)
        p.grad = torch.ones_like(p)
        optimizer.step()
        state_dict = optimizer.state_dict()
        assert "norm_stats" not in state_dict["param_groups"][0]
        _, other_stats, other = self.optimizer(target)
        other.load_state_dict(state_dict)
        assert all(a.find() is b for a, b in zip(other.norm_stats[0], other_stats, strict=True))
        assert all((stat == 1).all() for stat in other_stats)

    def test_post_hooks_find_them(self, target):
        _, stats, optimizer = self.optimizer(target)

        def post(loaded):
            loaded.fold()
            raise RuntimeError("a hook that fails")

        optimizer.register_load_state_dict_post_hook(post)
        with pytest.raises(RuntimeError, match="a hook that fails"):
            optimizer.load_state_dict(optimizer.state_dict())
        assert all(a.find() is b for a, b in zip(optimizer.norm_stats[0], stats, strict=True))

    def test_bad_ones_put_there_later_change_nothing(self, target):
        p, _, optimizer = self.optimizer(target)
        p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.param_groups[0]["norm_stats"] = [(torch.ones(3), "2")]
        before = snapshot(optimizer)
        for call in (optimizer.step, optimizer.fold):
            with pytest.raises(ValueError, match="parameter group 0: norm_stats must be a list"):
                call()
            assert_unchanged(optimizer, before)
        del optimizer.param_groups[0]["norm_stats"]
        optimizer.step()


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

    @pytest.mark.parametrize("flatten", [False, True])
    def test_distributed_checkpoints(self, flatten):
        """Which read a state dict back key by key."""
        from torch.distributed.checkpoint import state_dict as dcp

        options = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)
        runs = []
        for _ in range(2):
            torch.manual_seed(0)
            model = nn.Linear(3, 2)
            group = {"params": model.parameters(), "scale_invariant": True, "norm_stats": [(model, "bias", 1)]}
            runs.append((model, texp.SGD([group], lr=0.1, momentum=0.9, weight_decay=0.1)))
        model, optimizer = runs[0]
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        saved = dcp.get_optimizer_state_dict(model, optimizer, options=options)
        dcp.set_optimizer_state_dict(*runs[1], saved, options=options)
        for p, q in zip(model.parameters(), runs[1][0].parameters(), strict=True):
            assert torch.equal(optimizer.state[p]["momentum_buffer"], runs[1][1].state[q]["momentum_buffer"])
        for key in ("scale", "carried_decay", "scale_invariant"):
            assert optimizer.param_groups[0][key] == runs[1][1].param_groups[0][key]

    def test_a_narrow_buffer_of_a_wide_parameter_is_widened(self):
        p = param(dtype=torch.float32)
        optimizer = texp.SGD([p], lr=0.1, momentum=0.9)
        group = optimizer.state_dict()["param_groups"][0]
        state = {0: {"momentum_buffer": torch.ones(3, dtype=torch.bfloat16)}}
        optimizer.load_state_dict({"state": state, "param_groups": [group]})
        assert optimizer.state[p]["momentum_buffer"].dtype == torch.float32

    def test_fold_where_only_the_momentum_carries_decay(self):
        """After steps with a LR of 0: P is 1 and κ is not 0."""
        p, q = param(), param()
        ours = texp.SGD([p], lr=0.0, momentum=0.9, weight_decay=0.1, scale_invariant=True)
        theirs = torch.optim.SGD([q], lr=0.0, momentum=0.9, weight_decay=0.1)
        for x, optimizer in ((p, ours), (q, theirs)):
            x.grad = torch.ones_like(x)
            optimizer.step()
            optimizer.step()
        assert ours.param_groups[0]["carried_decay"] > 0
        ours.fold()
        assert torch.allclose(
            ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"], rtol=1e-15, atol=0
        )

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

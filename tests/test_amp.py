"""texp.SGD under a GradScaler."""

import copy
import math
import pickle

import pytest
import torch

import texp
from tests.conftest import same_bits
from tests.states import assert_unchanged, param, snapshot


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
        optimizer = target.sgd([p], scale_invariant=scale_invariant, fused=True, **arguments)
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
        plain.param_groups[0]["fused"] = True
        assert snapshot(optimizer)[0] == snapshot(plain)[0]

    def test_after_an_error_the_scale_is_not_applied_twice(self, target):
        p = param(device=target.device)
        optimizer = target.sgd([p], lr=0.1, fused=True)
        scaler = self.scaler(target.device)
        scaler.scale(p.sum()).backward()
        optimizer.param_groups[0]["lr"] = math.nan
        with pytest.raises(ValueError, match="lr must be a finite number"):
            scaler.step(optimizer)
        assert "grad_scale" not in optimizer.__dict__
        optimizer.param_groups[0]["lr"] = 0.1
        scaler.step(optimizer)
        assert torch.allclose(p.detach().cpu(), param().detach() - 0.1)

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


class TestWithoutFused:
    """As with torch.optim.SGD: a GradScaler unscales the gradients itself, and calls no step that it skips."""

    @pytest.mark.parametrize("scale_invariant", [False, True])
    def test_hooks_see_true_gradients(self, target, scale_invariant):
        seen = []
        for make in (torch.optim.SGD, target.sgd):
            p = param(device=target.device)
            optimizer = make([p], lr=0.1, momentum=0.9)
            if scale_invariant and make is not torch.optim.SGD:
                optimizer.param_groups[0]["scale_invariant"] = True

            def clip(*_, p=p, seen=seen):
                seen.append(torch.nn.utils.clip_grad_norm_(p, 1.0).item())

            optimizer.register_step_pre_hook(clip)
            scaler = torch.amp.GradScaler(target.device, init_scale=2.0**10)
            for overflows in (False, True, False):
                optimizer.zero_grad()
                scaler.scale((p * 10).sum()).backward()
                if overflows:
                    p.grad[1] = math.inf
                scaler.step(optimizer)
                scaler.update()
            seen += p.tolist()
        assert seen[:5] == pytest.approx(seen[5:], rel=4e-16)  # two ulp: of two sums, Triton's interpreter fuses none
        assert seen[0] == pytest.approx(10 * math.sqrt(3))

    @pytest.mark.parametrize("fused", [None, False, True])
    def test_what_asks_for_scaled_gradients(self, fused):
        """An attribute, as torch.optim.SGD has it, that may be set and that copies keep."""
        optimizer = texp.SGD([param()], lr=0.1, fused=fused)
        assert optimizer._step_supports_amp_scaling is bool(fused)
        for clone in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert clone._step_supports_amp_scaling is bool(fused)
        optimizer._step_supports_amp_scaling = True
        assert copy.deepcopy(optimizer)._step_supports_amp_scaling is True
        optimizer.load_state_dict(texp.SGD([param()], lr=0.1).state_dict())
        assert optimizer._step_supports_amp_scaling is True

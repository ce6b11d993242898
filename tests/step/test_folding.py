"""Working on θ for a while: folded(), eval() and train(), clipping, averaging."""

import copy

import pytest
import torch
from torch import nn

import texp
from tests.batch_norm_run import (
    ARGUMENTS,
    CLOSE,
    FORMS,
    KEYS,
    assert_same_state,
    expected,
    network,
    pair,
    trained,
)
from tests.conftest import same_bits
from tests.states import param


class TestFolded:
    def norm(self, model: nn.Module) -> float:
        return model[0].weight.detach().norm().item()

    def test_it_holds_what_torch_holds(self, target):
        plain, model = network(device=target.device), network(device=target.device)
        other = torch.optim.SGD(plain.parameters(), foreach=False, **ARGUMENTS)
        model, optimizer = pair(target, model)
        for run in ((plain, other), (model, optimizer)):
            trained(*run, steps=range(10))
        assert optimizer.param_groups[0]["scale"] > 1
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        with optimizer.folded():
            for (name, a), b in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
                assert torch.allclose(a, b, **CLOSE), name
            bufs = [
                (optimizer.state[p], other.state[q])
                for p, q in zip(model.parameters(), plain.parameters(), strict=True)
            ]
            assert all(torch.allclose(a["momentum_buffer"], b["momentum_buffer"], **CLOSE) for a, b in bufs)
            assert optimizer.param_groups[0]["scale"] == 1
        assert_same_state((model.state_dict(), optimizer.state_dict()), before)
        assert torch.allclose(trained(model, optimizer, steps=range(10, 16)), expected(), **CLOSE)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_the_exponential_form_comes_back_bit_for_bit(self, target, dtype):
        """Also with numbers that rounding to θ and back would change, with infinities and NaN."""
        torch.manual_seed(0)
        params = [
            nn.Parameter(torch.randn(size, device=target.device).to(dtype)) for size in ((40, 5), (3,), (), (0,))
        ]
        optimizer = target.sgd(params, lr=0.1, momentum=0.9, weight_decay=0.1, scale_invariant=True)
        for _ in range(5):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        params[0].data[0, :3] = torch.tensor([float("inf"), float("nan"), -0.0], device=target.device)
        before = copy.deepcopy((params, optimizer.state_dict()))
        theta = params[0].detach() / optimizer.param_groups[0]["scale"]
        with optimizer.folded(), optimizer.folded():
            assert torch.allclose(params[0].float(), theta.float(), rtol=1e-2, equal_nan=True)
        assert_same_state((dict(enumerate(params)), optimizer.state_dict()), (dict(enumerate(before[0])), before[1]))

    def test_what_is_changed_inside_is_kept(self, target):
        """Momentum that is set to 0, weights that are clipped or rolled back: as in the SGD run."""

        def reset(t, model, optimizer):
            if t == 6:
                for values in optimizer.state.values():
                    values["momentum_buffer"].zero_()
            if t == 8:
                model[0].weight.data.clamp_(-0.3, 0.3)
            if t == 10:
                model[0].weight.data[0] = 0.5

        model, optimizer = pair(target)

        def folded(t):
            with optimizer.folded():
                reset(t, model, optimizer)

        assert torch.allclose(trained(model, optimizer, folded), expected(reset), **CLOSE)

    def test_momentum_that_is_taken_away(self, target):
        def forget(t, optimizer):
            if t == 6:
                optimizer.state.clear()

        model, optimizer = pair(target)

        def folded(t):
            with optimizer.folded():
                forget(t, optimizer)

        result = trained(model, optimizer, folded)
        assert torch.allclose(result, expected(lambda t, _, optimizer: forget(t, optimizer)), **CLOSE)

    def test_after_an_exception(self, target):
        model, optimizer = pair(target)
        trained(model, optimizer, steps=range(4))
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        with pytest.raises(KeyboardInterrupt), optimizer.folded():
            raise KeyboardInterrupt
        assert_same_state((model.state_dict(), optimizer.state_dict()), before)

    def test_a_model_that_is_converted_inside(self, target):
        """As for an export in half precision: θ is rounded then, and what is read back is that, also statistics."""
        plain = network(device=target.device)
        other = torch.optim.SGD(plain.parameters(), foreach=False, **ARGUMENTS)

        def convert(model, t):
            if t == 5:
                model.half().double()
            if t == 9:
                model[1].running_var = model[1].running_var.clone()

        model, optimizer = pair(target)

        def folded(t):
            with optimizer.folded():
                convert(model, t)

        # θ is the same to 1e-15, so that it is rounded to the same numbers.
        outputs = trained(plain, other, lambda t: convert(plain, t)), trained(model, optimizer, folded)
        assert torch.allclose(*outputs, **CLOSE)

    def test_momentum_that_is_narrower_than_it_is_to_be(self, target):
        """It is folded as it is; also after a step of another optimizer that wants wide buffers."""
        p, q = (nn.Parameter(torch.ones(4, dtype=torch.bfloat16, device=target.device)) for _ in range(2))
        optimizer = target.sgd([p], lr=0.1, momentum=0.9, weight_decay=0.1, scale_invariant=True)
        other = target.sgd([q], lr=0.1, momentum=0.9, momentum_dtype=torch.float64)
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        optimizer.step()
        other.step()
        p.grad, p.data = None, p.data.float()
        P = optimizer.param_groups[0]["scale"]
        with optimizer.folded():
            assert torch.allclose(p, torch.full_like(p, 0.89), rtol=0.01)
        optimizer.fold()
        assert P > 1 == optimizer.param_groups[0]["scale"]
        assert optimizer.state[p]["momentum_buffer"].dtype == torch.bfloat16

    @pytest.mark.parametrize("what", ["gradient", "buffer"])
    def test_what_cannot_be_folded_changes_nothing(self, target, what):
        model, optimizer = pair(target)
        trained(model, optimizer, steps=range(3))
        weight = model[0].weight
        if what == "gradient":
            weight.grad = torch.ones(1, 1, dtype=weight.dtype, device=target.device).expand(weight.shape)
        else:
            optimizer.state[weight]["momentum_buffer"] = torch.ones(2, dtype=weight.dtype, device=target.device)
        before, scale = copy.deepcopy(model.state_dict()), optimizer.param_groups[0]["scale"]
        for call in (optimizer.fold, optimizer.eval):
            with pytest.raises(RuntimeError, match="parameter group 0"):
                call()
        assert all(same_bits(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
        assert optimizer.param_groups[0]["scale"] == scale

    def test_groups_that_come_and_go_inside(self, target):
        """Each keeps its own scale, wherever it stands."""
        params = [param(device=target.device) for _ in range(3)]
        groups = [{"params": [p], "lr": lr} for p, lr in zip(params[:2], (0.1, 0.5), strict=True)]
        optimizer = target.sgd(groups, weight_decay=0.1, scale_invariant=True)
        for p in params[:2]:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        scales, stored = [group["scale"] for group in optimizer.param_groups], [p.tolist() for p in params]
        assert len(set(scales)) == 2
        with optimizer.folded():
            optimizer.param_groups.reverse()
            optimizer.param_groups[0]["params"].append(params[2])
        assert [group["scale"] for group in optimizer.param_groups] == scales[::-1]
        assert [p.tolist() for p in params[:2]] == stored[:2]
        assert params[2].tolist() == pytest.approx([x * scales[1] for x in stored[2]])

    def test_one_gradient_of_two_parameters(self, target):
        params = [param(device=target.device) for _ in range(2)]
        optimizer = target.sgd(params, lr=0.5, weight_decay=0.5, scale_invariant=True)
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        params[0].grad = params[1].grad = torch.ones_like(params[0])
        with optimizer.folded():
            assert params[0].grad.tolist() == [optimizer.intrinsic_scales()[0] * 4 / 3] * 3
        assert params[0].grad.tolist() == [1.0] * 3

    def test_a_step_inside_that_is_refused(self, target):
        model, optimizer = pair(target)
        trained(model, optimizer, steps=range(3))
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        with optimizer.folded():
            optimizer.param_groups[0]["lr"] = float("nan")
            with pytest.raises(ValueError, match="lr must be a finite number"):
                optimizer.step()
            optimizer.param_groups[0]["lr"] = ARGUMENTS["lr"]
        assert_same_state((model.state_dict(), optimizer.state_dict()), before)

    def test_a_step_inside_goes_on_from_there(self, target):
        """So does a state dict that is loaded, and fold()."""
        model, optimizer = pair(target)

        def at(t):
            if t == 3:
                optimizer.eval()  # and the step that follows ends it
            if t == 6:
                with optimizer.folded():
                    optimizer.fold()
                assert optimizer.param_groups[0]["scale"] == 1
            if t == 10:
                with optimizer.folded():
                    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                assert optimizer.param_groups[0]["scale"] == 1

        assert torch.allclose(trained(model, optimizer, at), expected(), **CLOSE)

    def test_eval_and_train(self, target):
        """As transformers and accelerate call them: any number of times, in any order."""
        model, optimizer = pair(target)
        optimizer.train()
        trained(model, optimizer, steps=range(4))
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        stored = self.norm(model)
        for _ in range(2):
            optimizer.eval()
            assert self.norm(model) < stored
        with optimizer.folded():
            optimizer.train()
            assert self.norm(model) < stored
            optimizer.eval()
        assert self.norm(model) < stored
        optimizer.train()
        optimizer.train()
        assert_same_state((model.state_dict(), optimizer.state_dict()), before)

    def test_ordinary_groups_are_left_alone(self, target):
        p = param(device=target.device)
        optimizer = target.sgd([p], lr=0.1, momentum=0.9)
        p.grad = torch.ones_like(p)
        optimizer.step()
        version = p._version
        with optimizer.folded():
            optimizer.fold()
        assert p._version == version
        assert optimizer.param_groups[0].keys() == KEYS

    def test_torch_loads_what_is_saved_inside(self, target):
        model, optimizer = pair(target)
        trained(model, optimizer, steps=range(8))
        with optimizer.folded():
            weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        plain = network(device=target.device)
        plain.load_state_dict(weights)
        groups = [{"params": [plain[0].weight]}, {"params": [*plain[1].parameters(), *plain[3].parameters()]}]
        other = torch.optim.SGD(groups, **ARGUMENTS)
        other.load_state_dict(state)
        assert torch.allclose(trained(plain, other, steps=range(8, 16)), expected(), **CLOSE)

    @pytest.mark.parametrize("copied", [lambda p: [p.flatten()], lambda p: [p.float()], lambda p: []])
    def test_a_wrapper_that_steps_copies(self, target, copied):
        """As DeepSpeed's ZeRO does: the group then holds other tensors than the model."""
        model, optimizer = pair(target)
        trained(model, optimizer, steps=range(5))
        optimizer.param_groups[0]["params"] = copied(model[0].weight.detach().clone())
        before = dict(optimizer.param_groups[0])
        for call in (optimizer.fold, optimizer.eval):
            with pytest.raises(RuntimeError, match="group 0 cannot be folded: 1 of the parameters"):
                call()
        assert optimizer.param_groups[0] == before


class TestClipping:
    @pytest.mark.parametrize("norm_type", [2.0, 1.0, 0.0, float("inf")])
    def test_by_the_norm_at_theta(self, target, norm_type):
        norms = []

        def clip(t, model, optimizer):
            if isinstance(optimizer, texp.SGD):
                norm = texp.clip_grad_norm_(optimizer, 0.05, norm_type)
            else:
                norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05, norm_type)
            norms.append(norm.item())

        model, optimizer = pair(target)
        result = trained(model, optimizer, lambda t: clip(t, model, optimizer))
        assert torch.allclose(result, expected(clip), **CLOSE)
        assert norms[:16] == pytest.approx(norms[16:], rel=1e-9)
        assert any(norm > 0.05 for norm in norms)

    def test_of_ordinary_groups_it_is_that_of_torch(self, target):
        clipped = []
        for clip in (
            texp.clip_grad_norm_,
            lambda o, *rest: nn.utils.clip_grad_norm_(o.param_groups[0]["params"], *rest),
        ):
            torch.manual_seed(0)
            params = [nn.Parameter(torch.randn(7, device=target.device)) for _ in range(5)]
            for p in params[1:]:
                p.grad = torch.randn(7, device=target.device)
            clipped.append([clip(target.sgd(params), 1.0), *(p.grad for p in params[1:])])
        assert all(same_bits(a, b) for a, b in zip(*clipped, strict=True))

    @FORMS
    def test_a_norm_that_is_not_finite(self, target, exponential):
        p = param(device=target.device)
        optimizer = target.sgd([p], lr=0.1, weight_decay=0.1, scale_invariant=exponential)
        p.grad = torch.ones_like(p)
        optimizer.step()
        p.grad = torch.full_like(p, float("inf"))
        with pytest.raises(RuntimeError, match="non-finite"):
            texp.clip_grad_norm_(optimizer, 1.0, error_if_nonfinite=True)
        assert p.grad.isinf().all()

    def test_what_is_no_optimizer_of_texp(self):
        for wrong in ([param()], torch.optim.SGD([param()])):
            with pytest.raises(TypeError, match=r"takes the texp.SGD .* got .*; for parameters"):
                texp.clip_grad_norm_(wrong, 1.0)

    @pytest.mark.parametrize("max_norm", [-1.0, float("nan")])
    def test_a_bad_max_norm(self, max_norm):
        with pytest.raises(ValueError, match="max_norm must be at least 0"):
            texp.clip_grad_norm_(texp.SGD([param()]), max_norm)

    def test_without_gradients(self, target):
        optimizer = target.sgd([param(device=target.device)], scale_invariant=True)
        optimizer.param_groups[0]["scale"] = 1.5
        assert texp.clip_grad_norm_(optimizer, 1.0).item() == 0
        assert texp.clip_grad_norm_(target.sgd([param()]), 1.0).item() == 0


class TestAveraging:
    def test_swalr_is_warned_of(self, target):
        model, optimizer = pair(target)
        trained(model, optimizer, steps=range(1))
        torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.1)
        with pytest.warns(UserWarning, match=r"optimizer.folded\(\)"):
            trained(model, optimizer, steps=range(1, 2))

    def test_of_ordinary_groups_nothing_is_said(self, target):
        p = param(device=target.device)
        optimizer = target.sgd([p], lr=0.1)
        torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.1)
        p.grad = torch.ones_like(p)
        optimizer.step()

    def test_inside_folded_averages_are_those_of_torch(self, target):
        def averaging(model):
            averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
            return averaged, lambda t: averaged.update_parameters(model) if t % 5 == 4 else None

        plain = network(device=target.device)
        other = torch.optim.SGD(plain.parameters(), foreach=False, **ARGUMENTS)
        average, update = averaging(plain)
        trained(plain, other, update)
        model, optimizer = pair(target)
        ours, update_ours = averaging(model)

        def folded(t):
            with optimizer.folded():
                update_ours(t)

        trained(model, optimizer, folded)
        for (name, a), b in zip(ours.state_dict().items(), average.state_dict().values(), strict=True):
            assert torch.allclose(a, b, **CLOSE), name

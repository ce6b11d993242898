"""What frameworks, checkpoints and public bug reports ask of a drop-in for torch.optim.SGD."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import texp
from tests.batch_norm_run import (
    ARGUMENTS,
    CLOSE,
    FORMS,
    KEYS,
    SCALE,
    network,
    pair,
    trained,
)
from tests.conftest import same_bits
from tests.states import param


class TestGroups:
    """That frameworks read, copy, compare, dump and save."""

    @FORMS
    def test_their_keys(self, target, exponential):
        params = [param(device=target.device) for _ in range(2)]
        for p in params:
            p.grad = torch.ones_like(p)
        group = {"params": params[:1], "lr": 0.5, "scale_invariant": exponential}
        optimizer = target.sgd([group, {"params": params[1:], "scale_invariant": False}], momentum=0.9)
        optimizer.step()
        for groups in (optimizer.param_groups, optimizer.state_dict()["param_groups"]):
            assert groups[0].keys() == (KEYS | SCALE if exponential else KEYS)
            assert groups[1].keys() == KEYS

    def test_an_ordinary_group_where_the_default_is_the_exponential_form(self, target):
        optimizer = target.sgd(
            [{"params": [param()]}, {"params": [param()], "scale_invariant": False}], scale_invariant=True
        )
        assert [group["scale_invariant"] for group in optimizer.param_groups] == [True, False]
        assert "scale" not in optimizer.param_groups[1]

    def test_they_hold_no_tensors(self, target):
        model, optimizer = pair(target)
        trained(model, optimizer, steps=range(3))
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        assert json.loads(json.dumps(groups)) == groups
        assert len(repr(optimizer)) < 700
        assert [len(stats) for stats in optimizer.norm_stats] == [2, 0]

    def test_pickles_are_small(self):
        """Of a state dict: no statistics. Of an optimizer: the norms that hold them, but not the model."""
        model = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(100)), nn.Linear(2, 100_000))
        stats = [stat for norm in model[:-1] for stat in ((norm, "running_mean", 1), (norm, "running_var", 2))]
        group = {"params": [nn.Parameter(torch.ones(3))], "scale_invariant": True, "norm_stats": stats}
        optimizer = texp.SGD([group], lr=0.1)
        assert len(pickle.dumps(torch.optim.Optimizer.state_dict(optimizer))) < 1000
        assert len(repr(optimizer)) < 500
        assert len(pickle.dumps(optimizer)) < 400_000

    @FORMS
    @pytest.mark.parametrize("reread", [False, True])
    def test_options_copied_out_of_a_state_dict(self, target, exponential, reread):
        results = []
        for copied in (False, True):
            model = network(device=target.device)
            optimizer = pair(target, model)[1] if exponential else target.sgd(model.parameters(), **ARGUMENTS)

            def copy_options(t, optimizer=optimizer):
                saved = optimizer.state_dict()["param_groups"]
                saved = json.loads(json.dumps(saved)) if reread else saved
                for group, options in zip(optimizer.param_groups, saved, strict=True):
                    group.update({k: v for k, v in options.items() if k != "params"})

            results.append(trained(model, optimizer, copy_options if copied else lambda t: None))
        assert same_bits(*results)

    @FORMS
    def test_an_optimizer_that_is_made_again_from_its_defaults(self, target, exponential):
        optimizer = target.sgd([param()], lr=0.1, momentum=0.9, scale_invariant=exponential)
        again = target.sgd([param()], **optimizer.defaults)
        assert again.defaults == optimizer.defaults
        assert again.param_groups[0].keys() == optimizer.param_groups[0].keys()


def dcp_round_trip(
    flatten: bool, cpu_offload: bool, full: bool, made, fresh, tmp_path, partial: bool = False
) -> None:
    """Saves (model, optimizer) `made` in a distributed checkpoint and loads it into `fresh`."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as dcp_state

    options = dcp_state.StateDictOptions(
        flatten_optimizer_state_dict=flatten, cpu_offload=cpu_offload, full_state_dict=full
    )
    get = lambda model, optimizer: dict(  # noqa: E731
        zip("mo", dcp_state.get_state_dict(model, optimizer, options=options), strict=True)
    )
    dcp.save(get(*made), checkpoint_id=tmp_path)
    state = get(*fresh)
    planner = dcp.DefaultLoadPlanner(allow_partial_load=partial)
    dcp.load(state, checkpoint_id=tmp_path, planner=planner)
    dcp_state.set_state_dict(*fresh, model_state_dict=state["m"], optim_state_dict=state["o"], options=options)


@pytest.mark.filterwarnings(
    "ignore:.*torch.distributed is (unavailable|disabled).*:UserWarning",
    "ignore:TypedStorage is deprecated:UserWarning",  # of torch 2.6, about itself
)
class TestDistributedCheckpoints:
    WAYS = pytest.mark.parametrize(
        ("flatten", "cpu_offload", "full"),
        [(False, False, False), (True, False, False), (True, True, False), (False, False, True)],
        ids=["plain", "flattened", "flattened, cpu_offload", "full"],
    )

    def sgd(self, which, target):
        model = network()
        make = {"torch": torch.optim.SGD, "texp": target.sgd}[which]
        return model, make(model.parameters(), **ARGUMENTS)

    @WAYS
    @pytest.mark.parametrize(("source", "to"), [("torch", "texp"), ("texp", "torch"), ("texp", "texp")])
    def test_of_ordinary_groups(self, general, source, to, flatten, cpu_offload, full, tmp_path):
        made, fresh = self.sgd(source, general), self.sgd(to, general)
        trained(*made, steps=range(5))
        dcp_round_trip(flatten, cpu_offload, full, made, fresh, tmp_path)
        ends = [trained(*run, steps=range(5, 10)) for run in (made, fresh)]
        assert torch.allclose(*ends, **CLOSE)

    @WAYS
    def test_of_groups_in_exponential_form(self, general, flatten, cpu_offload, full, tmp_path):
        made, fresh = pair(general), pair(general)
        trained(*made, steps=range(8))
        assert made[1].param_groups[0]["scale"] != 1
        dcp_round_trip(flatten, cpu_offload, full, made, fresh, tmp_path)
        assert all(same_bits(*run) for run in zip(made[0].buffers(), fresh[0].buffers(), strict=True))
        assert same_bits(*(trained(*run, steps=range(8, 16)) for run in (made, fresh)))

    @pytest.mark.parametrize("flatten", [False, True])
    def test_of_ordinary_groups_into_the_exponential_form(self, general, flatten, tmp_path):
        """The scale is not in it: it has to be allowed to be partial, and P = 1."""
        names = [[0], [1, 3]]
        model = network()
        groups = [{"params": [p for i in its for p in model[i].parameters()]} for its in names]
        made = model, torch.optim.SGD(groups, **ARGUMENTS)
        fresh = pair(general)
        trained(*made, steps=range(8))
        dcp_round_trip(flatten, False, False, made, fresh, tmp_path, partial=True)
        group = fresh[1].param_groups[0]
        assert (group["scale_invariant"], group["scale"], group["carried_decay"]) == (True, 1.0, 0.0)
        assert torch.allclose(*(trained(*run, steps=range(8, 16)) for run in (made, fresh)), **CLOSE)


HALF = [torch.bfloat16, torch.float16]
needs_grad_dtype = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch keeps gradients in the dtype of their parameters"
)


class TestDtypes:
    @needs_grad_dtype
    @FORMS
    @pytest.mark.parametrize(
        ("of_param", "of_grad"),
        [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)],
        ids=str,
    )
    def test_a_gradient_of_another_dtype(self, target, of_param, of_grad, exponential):
        """As with grad_dtype, and main gradients of large-batch training: momentum is as wide as both together."""
        p = nn.Parameter(torch.zeros(4, dtype=of_param, device=target.device))
        p.grad_dtype = of_grad
        optimizer = target.sgd([p], lr=0.0, momentum=0.999, scale_invariant=exponential)
        for t in range(200):
            p.grad = torch.full_like(p, float(t == 0), dtype=of_grad)
            optimizer.step()
        buf = optimizer.state[p]["momentum_buffer"]
        assert buf.dtype == torch.float32
        # 199 roundings to float32, each of at most half an ulp.
        assert buf.tolist() == pytest.approx([0.999**199] * 4, rel=200 * 2**-24)

    @FORMS
    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_weights_that_were_widened(self, target, dtype, exponential):
        """model.float() after steps in half precision: the buffer is narrower than its parameter, and follows."""
        weights = []
        for make in (torch.optim.SGD, target.sgd):
            model = nn.Linear(3, 2, bias=False, dtype=dtype, device=target.device)
            nn.init.ones_(model.weight)
            # torch's foreach takes no mix of dtypes.
            extra = {"foreach": False} if make is torch.optim.SGD else {"scale_invariant": exponential}
            optimizer = make(model.parameters(), lr=0.25, momentum=0.5, **extra)
            for _ in range(2):
                for wide in (dtype, torch.float32):
                    model.to(wide)
                    model.weight.grad = torch.ones_like(model.weight)
                    optimizer.step()
                model.to(torch.float32)
                dtype_of_buffer = optimizer.state[model.weight]["momentum_buffer"].dtype
            weights.append(model.weight.detach())
            assert make is torch.optim.SGD or dtype_of_buffer == torch.float32
        assert torch.equal(*weights)  # all numbers are short sums of powers of two

    @pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
    @pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_momentum_dtype(self, target, dtype, momentum_dtype):
        p = nn.Parameter(torch.ones(5, dtype=dtype, device=target.device))
        optimizer = target.sgd([p], lr=0.5, momentum=0.5, momentum_dtype=momentum_dtype)
        b, weight = torch.zeros(5), torch.ones(5)
        for t in range(4):
            g = torch.full((5,), 1.0 + t / 4).to(dtype)
            p.grad = g.to(target.device)
            optimizer.step()
            u = 0.5 * b + g.float()
            weight, b = weight - 0.5 * u, u
        buf = optimizer.state[p]["momentum_buffer"]
        assert buf.dtype == momentum_dtype
        # All numbers are short sums of powers of two, which each of the dtypes holds; test_mixed_dtypes.py rounds.
        assert torch.equal(buf.float().cpu(), b)
        assert torch.equal(p.detach().float().cpu(), weight)
        loaded = target.sgd([p], lr=0.5, momentum=0.5, momentum_dtype=momentum_dtype)
        saved = optimizer.state_dict()
        saved["state"][0]["momentum_buffer"] = saved["state"][0]["momentum_buffer"].to(torch.float64)
        loaded.load_state_dict(saved)
        assert loaded.state[p]["momentum_buffer"].dtype == momentum_dtype
        assert copy.deepcopy(loaded).momentum_dtype == momentum_dtype

    def test_a_momentum_dtype_that_is_none(self):
        with pytest.raises(ValueError, match=r"momentum_dtype must be None or one of .* got torch.int64"):
            texp.SGD([param()], momentum_dtype=torch.int64)


class TestLoading:
    @FORMS
    def test_two_optimizers_that_load_one_state_dict(self, target, exponential):
        a, b = param(0.0, 0.0, device=target.device), param(0.0, 0.0, device=target.device)
        first, second = (target.sgd([p], momentum=0.9, scale_invariant=exponential) for p in (a, b))
        a.grad = torch.ones_like(a)
        first.step()
        second.load_state_dict(first.state_dict())
        b.grad = torch.full_like(b, 100.0)
        second.step()
        assert first.state[a]["momentum_buffer"].tolist() == [1.0, 1.0]

    def test_a_state_dict_of_torch_into_the_exponential_form(self, target):
        model, optimizer = pair(target)
        plain = network(device=target.device)
        groups = [{"params": [plain[0].weight]}, {"params": [*plain[1].parameters(), *plain[3].parameters()]}]
        other = torch.optim.SGD(groups, **ARGUMENTS)
        trained(plain, other, steps=range(8))
        model.load_state_dict(plain.state_dict())
        optimizer.load_state_dict(other.state_dict())
        assert optimizer.param_groups[0]["scale"] == 1
        results = [trained(*run, steps=range(8, 16)) for run in ((plain, other), (model, optimizer))]
        assert torch.allclose(*results, **CLOSE)


@pytest.mark.filterwarnings("ignore:::torch")  # torch.compile warns of what it does itself
class TestCompile:
    def compiled(self, function):
        torch._dynamo.reset()
        return torch.compile(function, backend="eager")

    @FORMS
    def test_a_train_step_that_writes_the_lr(self, general, exponential):
        weights = []
        for make in (torch.optim.SGD, general.sgd):
            torch.manual_seed(0)
            model, x = (
                nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(4, 1e-30, False)).double(),
                torch.randn(8, 4),
            )
            optimizer = make(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
            if exponential and make is not torch.optim.SGD:
                optimizer.param_groups[0]["scale_invariant"] = True

            def train_step(lr, model=model, optimizer=optimizer, x=x):
                optimizer.param_groups[0]["lr"] = lr
                loss = (model(x.double()) - x.sin()).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                return loss

            step = self.compiled(train_step)
            for lr in (0.05, 0.05, 0.1):
                step(lr)
            if exponential and make is not torch.optim.SGD:
                assert optimizer.param_groups[0]["scale"] > 1
                optimizer.fold()
            weights.append(model[0].weight.detach())
        assert torch.allclose(*weights, **CLOSE)

    def test_an_optimizer_made_in_a_compiled_function(self, general):
        w = nn.Parameter(torch.ones(3))

        def f(x):
            optimizer = general.sgd([w], lr=0.1)
            (w * x).sum().backward()
            optimizer.step()
            return optimizer

        optimizer = self.compiled(f)(torch.ones(3))
        assert torch.allclose(w.detach(), torch.full((3,), 0.9))
        assert optimizer.param_groups[0]["lr"] == 0.1


class TestFused:
    """The errors of torch for what a fused step cannot take."""

    CASES = {
        "meta": lambda: nn.Parameter(torch.ones(3, device="meta")),
        "complex": lambda: nn.Parameter(torch.ones(3, dtype=torch.complex64)),
        "sparse": lambda: nn.Parameter(torch.ones(3)),
    }

    @pytest.mark.parametrize("name", CASES)
    def test_what_it_refuses(self, general, name):
        errors = []
        for make in (torch.optim.SGD, general.sgd):
            p = self.CASES[name]()
            p.grad = torch.ones_like(p).to_sparse() if name == "sparse" else torch.ones_like(p)
            with pytest.raises(RuntimeError) as error:
                make([p], lr=0.1, fused=True).step()
            errors.append(str(error.value))
        assert errors[0] == errors[1]

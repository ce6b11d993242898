"""What frameworks, checkpoints and public bug reports ask of a drop-in for torch.optim.SGD."""

import copy
import io
import json
import pickle

import pytest
import torch
from torch import nn

import texp
from tests.conftest import same_bits
from tests.states import param

FORMS = pytest.mark.parametrize("exponential", [False, True], ids=["ordinary", "exponential"])
KEYS = torch.optim.SGD([torch.ones(1)]).param_groups[0].keys()
SCALE = {"scale_invariant", "scale", "scale_exponent", "carried_decay"}


def network(dtype: torch.dtype = torch.float64, device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, eps=1e-30), nn.Tanh(), nn.Linear(6, 2))
    return model.to(device, dtype)


ARGUMENTS = {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.02}


def trained(model: nn.Module, optimizer, at=lambda t: None, steps=range(16)) -> torch.Tensor:
    """An output in evaluation, on the CPU, after steps before each of which at(t) is called."""
    device = model[0].weight.device
    generator = torch.Generator().manual_seed(1)
    batches = torch.randn(16, 32, 4, generator=generator, dtype=torch.float64).to(device)
    model.train()
    for t in steps:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(batches[t]), batches[t, :, :2].sin()).backward()
        at(t)
        optimizer.step()
    return model.eval()(torch.ones(1, 4, dtype=torch.float64, device=device)).detach().cpu()


def pair(target, model: nn.Module | None = None, **arguments):
    """A network in exponential form, and its optimizer."""
    model = network(device=target.device) if model is None else model
    group = {
        "params": [model[0].weight],
        "scale_invariant": True,
        "norm_stats": [(model[1], "running_mean", 1), (model[1], "running_var", 2)],
    }
    rest = {"params": [*model[1].parameters(), *model[3].parameters()]}
    return model, target.sgd([group, rest], **ARGUMENTS, **arguments)


def expected(at=lambda t, model, optimizer: None, **arguments) -> torch.Tensor:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), foreach=False, **ARGUMENTS, **arguments)
    return trained(model, optimizer, lambda t: at(t, model, optimizer))


CLOSE = {"rtol": 1e-9, "atol": 1e-12}  # 16 steps in float64; the exponential form differs by rounding alone


class TestGroups:
    """That frameworks read, copy, compare, dump and save."""

    @FORMS
    def test_their_keys(self, target, exponential):
        group = {"params": [param()], "lr": 0.5, "scale_invariant": exponential, "capturable": False}
        del group["capturable"]
        optimizer = target.sgd([group, {"params": [param()], "scale_invariant": False}], momentum=0.9)
        for p in (group["params"][0], optimizer.param_groups[1]["params"][0]):
            p.grad = torch.ones_like(p)
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
            extra = {"scale_invariant": True} if exponential and make is not torch.optim.SGD else {}
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

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
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


def assert_same_state(now, before) -> None:
    weights, state = now
    for (name, a), b in zip(weights.items(), before[0].values(), strict=True):
        assert same_bits(a, b), name
    assert state["param_groups"] == before[1]["param_groups"]
    for key, values in before[1]["state"].items():
        assert same_bits(state["state"][key]["momentum_buffer"], values["momentum_buffer"])


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

"""What torch tests its own optimizers with, of texp.SGD beside torch.optim.SGD: the inputs and errors of
torch.testing._internal.common_optimizers, and what torch's test/test_optim.py asks of every optimizer.
"""

import copy
import io
import itertools
import pickle
from collections.abc import Iterable
from unittest import mock

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import texp
from tests.conftest import INTERPRETED, Target, same_bits, targets
from tests.states import snapshot

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest, which is not installed")
with mock.patch("torch.backends.disable_global_flags"):  # would be for all tests that follow
    from torch.testing._internal import common_optimizers

INFO = next(info for info in common_optimizers.optim_db if info.optim_cls is torch.optim.SGD)
NAMES = [given.desc for given in INFO.optim_inputs_func("cpu")]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
IMPLEMENTATIONS = {
    "default": {},
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
STEPS = 5

DEFAULT = pytest.param(Target(None, "cpu"), id="default-cpu")
each_target = pytest.mark.parametrize("target", [DEFAULT, *targets()])
each_swift_target = pytest.mark.parametrize("target", [DEFAULT, *targets(interpreted=False)])
each_input = pytest.mark.parametrize("name", NAMES)
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def arguments_of(name: str) -> dict:
    """New ones: schedulers write to an LR that is a tensor."""
    return next(given.kwargs for given in INFO.optim_inputs_func("cpu") if given.desc == name)


def copies(tensors: list[torch.Tensor], device: str = "cpu") -> list[nn.Parameter]:
    return [nn.Parameter(x.detach().to(device, copy=True)) for x in tensors]


def run(optimizer: torch.optim.Optimizer, grads: list[list[torch.Tensor | None]]) -> None:
    """A step for each list of gradients, which are left as they are."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for of_step in grads:
        for p, g in zip(params, of_step, strict=True):
            p.grad = None if g is None else g.to(p.device, copy=True)
        optimizer.step()
        assert all(g is None or same_bits(p.grad.cpu(), g) for p, g in zip(params, of_step, strict=True))


def buffers(optimizer: torch.optim.Optimizer) -> list[torch.Tensor | None]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [optimizer.state.get(p, {}).get("momentum_buffer") for p in params]


def bounds(arguments: dict, start: torch.Tensor, grads: Iterable, dtype: torch.dtype, ulps: float = 0.5):
    """How far param and buf of any implementation of torch.optim.SGD may be from exact ones after these steps.

    Whatever is rounded, to `dtype` or to what the arithmetic is in, is wrong by at most `ulps`·eps of it. g + λp is
    rounded up to three times: the product, the sum, the scalar; so are γb + (1 − τ)·(g + λp), with another product,
    what Nesterov adds, and p − η·d. Sizes are summed from absolute values. Errors of what goes into a step are
    carried on by its scalars, which are below 1, and no error grows by more than a hundredth by its own errors.
    """
    numbers = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "lr": 1e-3, "nesterov": False, **arguments}
    momentum, dampening, decay, lr = (float(numbers[key]) for key in ("momentum", "dampening", "weight_decay", "lr"))
    sign = -1 if arguments.get("maximize") else 1
    u, least = ulps * torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    p, b = start.double(), None
    error_p, error_b = torch.zeros_like(p), torch.zeros_like(p)
    for g in grads:
        if g is None:
            continue
        entering, size = sign * g.double() + decay * p, g.double().abs() + decay * p.abs()
        error = decay * error_p + 3 * u * size
        if momentum != 0:
            kept, new = (0.0, 1.0) if b is None else (momentum, 1 - dampening)
            size_b = new * size if b is None else kept * b.abs() + new * size
            b = new * entering if b is None else kept * b + new * entering
            error_b = kept * error_b + new * error + 4 * u * size_b + least
            if numbers["nesterov"]:
                entering, size = entering + momentum * b, size + momentum * size_b
                error = error + momentum * error_b + 3 * u * size
            else:
                entering, size, error = b, size_b, error_b
        error_p = error_p + lr * error + 3 * u * (p.abs() + lr * size) + least
        p = p - lr * entering
    return 1.01 * error_p, 1.01 * error_b


SHAPES = [(10, 5), (10,), (), (0, 3), (7,), (4,)]
LATE, IDLE = 4, 5  # the parameter that has no gradient in the first step, and the one that never has


def start_and_grads(dtype: torch.dtype, late: bool = True) -> tuple[list[torch.Tensor], list[list]]:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    grads = [[torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES] for _ in range(STEPS)]
    if late:
        grads[0][LATE] = None
    for of_step in grads:
        of_step[IDLE] = None
    return start, grads


class TestInputs:
    @pytest.mark.parametrize("target", [t for t in targets() if t.id.startswith("triton")])
    @each_input
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_of_triton(self, target, name, dtype):
        """In its interpreter too, which is slow; all implementations follow where it is not interpreted."""
        self.compare(target, name, dtype, "default")

    @each_swift_target
    @each_input
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @each_implementation
    def test_as_in_torch(self, target, name, dtype, implementation):
        self.compare(target, name, dtype, implementation)

    def compare(self, target: Target, name: str, dtype: torch.dtype, implementation: str) -> None:
        """Bit for bit in the reference, in float32 and float64: none of torch's inputs has dampening with weight
        decay, where the order of operations would be another. Elsewhere each may be as far from exact as its
        rounding takes it; Triton's interpreter truncates to bf16, by up to a whole ulp."""
        flags = IMPLEMENTATIONS[implementation]
        # With fused=True, torch.optim.SGD cannot begin with some momentum buffers and make the others later.
        start, grads = start_and_grads(dtype, late=implementation != "fused")
        arguments = arguments_of(name)
        ours = target.sgd(copies(start, target.device), **arguments, **flags)
        # On the CPU torch's fused kernel leaves most of a parameter in bf16 or fp16 as it is:
        # findings/torch_fused_sgd_leaves_bf16_as_it_is.sh.
        low = torch.finfo(dtype).eps > 1e-4
        broken = low and implementation == "fused" and target.device == "cpu"
        theirs = torch.optim.SGD(
            copies(start, target.device), **arguments, **({"foreach": False} if broken else flags)
        )
        for optimizer in (ours, theirs):
            run(optimizer, grads)
        if target.backend == "reference" and not low:
            peer = torch.optim.SGD(copies(start, target.device), foreach=False, **arguments)
            run(peer, grads)
            for a, b in zip(ours.param_groups[0]["params"], peer.param_groups[0]["params"], strict=True):
                assert same_bits(a, b)
            for a, b in zip(buffers(ours), buffers(peer), strict=True):
                assert (a is None and b is None) or same_bits(a, b)
        truncates = target.backend == "triton" and INTERPRETED and dtype == torch.bfloat16
        found = [zip(o.param_groups[0]["params"], buffers(o), strict=True) for o in (ours, theirs)]
        for start_of_it, grads_of_it, a, b in zip(start, zip(*grads, strict=True), *found, strict=True):
            of_theirs = bounds(arguments, start_of_it, grads_of_it, dtype)
            of_ours = bounds(arguments, start_of_it, grads_of_it, dtype, 1.0) if truncates else of_theirs
            assert all((x is None) == (y is None) for x, y in zip(a, b, strict=True))
            for x, y, *errors in zip(a, b, of_ours, of_theirs, strict=True):
                assert x is None or x.dtype == y.dtype == dtype
                assert x is None or ((x.double() - y.double()).abs().cpu() <= sum(errors)).all()

    @each_input
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_differentiable(self, general, name, dtype):
        """A differentiable step is torch's own: parameters and what flows back through five steps are the same."""
        start, grads = start_and_grads(dtype)
        told = []
        for make in (general.sgd, torch.optim.SGD):
            params = [x.clone() for x in start]
            optimizer = make(params, differentiable=True, **arguments_of(name))
            seen = []
            for of_step in grads:
                for p, g in zip(params, of_step, strict=True):
                    p.grad = None if g is None else g.clone().requires_grad_()
                    seen += [] if g is None else [p.grad]
                optimizer.step()
            sum(p.double().square().sum() for p in params if p.requires_grad).backward()
            told.append([x for x in (*params, *(g.grad for g in seen)) if x is not None])
        assert len(told[0]) == len(told[1]) > 2 * len(SHAPES)
        assert all(same_bits(a, b) for a, b in zip(*told, strict=True))


def error_of(call) -> tuple[type, str]:
    with pytest.raises(Exception) as error:  # noqa: PT011 - both are compared with torch's
        call()
    return type(error.value), str(error.value)


ERRORS = INFO.optim_error_inputs_func("cpu", torch.float32)
CONSTRUCTED = {
    # What torch's own tests of torch.optim.Optimizer ask for beside its error inputs.
    "no parameters": lambda make: make([]),
    "no parameters in an iterator": lambda make: make(iter(())),
    "not a tensor": lambda make: make([torch.ones(1, requires_grad=True), 5]),
    "not a leaf": lambda make: make([nn.Parameter(torch.ones(1)) * 2]),
    "a set of parameters": lambda make: make([{"params": {nn.Parameter(torch.ones(1))}}]),
    "a group without parameters": lambda make: make([{"lr": 0.1}]),
    "a group that is a list": lambda make: make([nn.Parameter(torch.ones(1))]).add_param_group([1]),
    "a negative lr": lambda make: make([nn.Parameter(torch.ones(1))], lr=-0.1),
    "a negative tensor for an lr": lambda make: make([nn.Parameter(torch.ones(1))], lr=torch.tensor(-0.5)),
    "a negative decay": lambda make: make([nn.Parameter(torch.ones(1))], weight_decay=-0.1),
    "nesterov without momentum": lambda make: make([nn.Parameter(torch.ones(1))], nesterov=True),
    "nesterov with dampening": lambda make: make(
        [nn.Parameter(torch.ones(1))], momentum=0.9, dampening=0.5, nesterov=True
    ),
    "fused and foreach": lambda make: make([nn.Parameter(torch.ones(1))], fused=True, foreach=True),
    "fused and differentiable": lambda make: make([nn.Parameter(torch.ones(1))], fused=True, differentiable=True),
    "an option that there is not": lambda make: make([nn.Parameter(torch.ones(1))], rho=0.1),
    "a state dict of more groups": lambda make: make([nn.Parameter(torch.ones(1))]).load_state_dict(
        make([{"params": [nn.Parameter(torch.ones(1))]} for _ in range(2)]).state_dict()
    ),
    "a state dict of more parameters": lambda make: make([nn.Parameter(torch.ones(1))]).load_state_dict(
        make([nn.Parameter(torch.ones(1)) for _ in range(2)]).state_dict()
    ),
}


def sparse_ones(p: torch.Tensor) -> torch.Tensor:
    return torch.sparse_coo_tensor([[0]], torch.ones(1, *p.shape[1:], dtype=p.dtype), p.shape, check_invariants=True)


class TestErrors:
    @each_swift_target
    @pytest.mark.parametrize("given", ERRORS, ids=[given.optimizer_error_input.desc for given in ERRORS])
    def test_of_torchs_error_inputs(self, target, given):
        """Also the warning about a parameter that is given twice, which is an error in these tests."""
        assert given.error_on is common_optimizers.OptimizerErrorEnum.CONSTRUCTION_ERROR

        def call(make):
            params = given.optimizer_error_input.params
            params = [nn.Parameter(torch.ones(1))] if params is None else params
            return make(params, **given.optimizer_error_input.kwargs)

        with pytest.raises(given.error_type, match=given.error_regex):
            call(torch.optim.SGD)
        assert error_of(lambda: call(target.sgd)) == error_of(lambda: call(torch.optim.SGD))

    @pytest.mark.parametrize("case", CONSTRUCTED)
    def test_of_optimizers(self, general, case):
        """In the same words but for the name of the class."""
        of_texp, of_torch = (
            error_of(lambda make=make: CONSTRUCTED[case](make)) for make in (texp.SGD, torch.optim.SGD)
        )
        assert of_texp == of_torch
        assert error_of(lambda: CONSTRUCTED[case](general.sgd)) == of_torch

    # Parameters and their gradients with which torch.optim.SGD(fused=True) refuses a step.
    FUSED = {
        "on meta": lambda: (torch.ones(3, device="meta"), torch.ones_like),
        "complex": lambda: (torch.ones(3, dtype=torch.complex64), torch.ones_like),
        "integers": lambda: (torch.ones(3, dtype=torch.int32), torch.ones_like),
        "a sparse gradient": lambda: (torch.ones(3, 2), sparse_ones),
    }

    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    @pytest.mark.parametrize("decay", [0.0, 0.1])
    @pytest.mark.parametrize("where", ["constructor", "group"])
    @pytest.mark.parametrize("case", FUSED)
    def test_of_a_fused_step(self, general, case, where, momentum, decay):
        """Before anything is changed, whether fused=True was given at first or is set in a group."""

        def refused(make) -> tuple[type, str]:
            tensor, grad = self.FUSED[case]()
            first, p = nn.Parameter(tensor.clone(), requires_grad=False), nn.Parameter(tensor, requires_grad=False)
            arguments = {"lr": 0.1, "momentum": momentum, "weight_decay": decay}
            optimizer = make([first, p], **arguments, fused=True if where == "constructor" else None)
            optimizer.param_groups[0]["fused"] = True
            first.grad, p.grad = grad(first), grad(p)
            error = error_of(optimizer.step)
            assert not any("momentum_buffer" in values for values in optimizer.state.values())
            assert p.is_meta or ((first == 1).all() and (p == 1).all())
            return error

        assert refused(general.sgd) == refused(torch.optim.SGD)

    def test_of_a_fused_step_in_a_later_group(self, general):
        """Here, unlike in torch, of nothing at all: the first group has not taken its step either."""
        dense, p = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, 2))
        optimizer = general.sgd([{"params": [dense]}, {"params": [p]}], lr=0.1, fused=True)
        dense.grad, p.grad = torch.ones(3), sparse_ones(p)
        assert error_of(optimizer.step) == (RuntimeError, "`_fused_sgd` does not support sparse gradients")
        assert (dense == 1).all()
        assert (p == 1).all()


class Model(nn.Module):
    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(10, 5, generator=generator, dtype=torch.float64).to(device))
        self.bias = nn.Parameter(torch.randn(10, generator=generator, dtype=torch.float64).to(device))
        self.x = torch.randn(5, generator=generator, dtype=torch.float64).to(device)

    def loss(self) -> torch.Tensor:
        return (self.weight.mv(self.x) + self.bias).square().sum()

    def closure(self) -> torch.Tensor:
        self.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss


def same_models(a: nn.Module, b: nn.Module) -> bool:
    """Within 1e-12, for runs in float64 whose losses shrink towards one minimum and errors with them."""
    return all(torch.allclose(p, q, rtol=0, atol=1e-12) for p, q in zip(a.parameters(), b.parameters(), strict=True))


class TestDirection:
    @each_swift_target
    @each_input
    @pytest.mark.parametrize("scheduled", range(-1, len(INFO.scheduler_inputs)))
    def test_of_steps_with_closures_and_schedulers(self, target, name, scheduled):
        """20 steps with each set of schedulers that torch tests SGD with, and with none."""
        models = Model(target.device), Model(target.device)
        makes = target.sgd, torch.optim.SGD
        optimizers = [
            make(model.parameters(), **arguments_of(name)) for make, model in zip(makes, models, strict=True)
        ]
        before = models[0].loss().item()
        for model, optimizer in zip(models, optimizers, strict=True):
            makers = [] if scheduled < 0 else INFO.scheduler_inputs[scheduled]
            schedulers = [make(optimizer) for make in makers]
            for _ in range(20):
                optimizer.step(model.closure)
                for scheduler in schedulers:
                    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                    scheduler.step(*([model.loss().item()] if plateau else []))
        assert (models[0].loss().item() > before) == arguments_of(name).get("maximize", False)
        assert float(optimizers[0].param_groups[0]["lr"]) == float(optimizers[1].param_groups[0]["lr"])
        assert same_models(*models)

    @pytest.mark.parametrize("foreach", [False, True])
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    @pytest.mark.parametrize("maximize", [False, True])
    def test_of_sparse_steps(self, general, maximize, momentum, foreach):
        """Descent along one coordinate of Rosenbrock's function at a time, with gradients that are not coalesced."""

        def gradient(x: torch.Tensor, row: int, sparse: bool) -> torch.Tensor:
            a, b = x.detach().tolist()
            value = (-400 * a * (b - a**2) - 2 * (1 - a), 200 * (b - a**2))[row]
            g = torch.sparse_coo_tensor(
                [[row, row]], torch.tensor([value / 4, value - value / 4]).double(), (2,), check_invariants=True
            )
            return g if sparse else g.to_dense()

        params = copies([torch.tensor([1.5, 1.5], dtype=torch.float64)] * 2)
        arguments = {"lr": 1e-4, "momentum": momentum, "maximize": maximize}
        ours = general.sgd(params[:1], foreach=foreach, **arguments)
        theirs = torch.optim.SGD(params[1:], **arguments)
        for t in range(60 if maximize else 400):
            # Maximizing it runs away; from the same place, then, in each step.
            for p, optimizer, sparse in zip(params, (ours, theirs), (True, False), strict=True):
                p.grad = gradient(params[1] if maximize else p, t % 2, sparse)
                p.grad = p.grad / 1e3 if maximize else p.grad
                optimizer.step()
        assert torch.allclose(*params, rtol=1e-9, atol=0)


class TestOptions:
    @each_target
    # A weight decay of one dimension is more than torch takes.
    @pytest.mark.parametrize(("key", "shape"), [("lr", ()), ("lr", (1,)), ("weight_decay", ())])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_a_tensor_is_as_good_as_a_float(self, target, key, shape, dtype):
        start, grads = start_and_grads(torch.float64)
        value = torch.full(shape, 0.1, dtype=dtype)
        runs = [target.sgd(copies(start, target.device), momentum=0.9, **{key: x}) for x in (value, value.item())]
        runs.append(torch.optim.SGD(copies(start, target.device), momentum=0.9, foreach=False, **{key: value}))
        for optimizer in runs:
            run(optimizer, grads)
        with_tensor, with_float, theirs = (optimizer.param_groups[0]["params"] for optimizer in runs)
        assert all(same_bits(a, b) for a, b in zip(with_tensor, with_float, strict=True))
        for i, (p, q) in enumerate(zip(with_tensor, theirs, strict=True)):
            of_param = [of_step[i] for of_step in grads]
            error, _ = bounds({"momentum": 0.9, key: value.item()}, start[i], of_param, torch.float64)
            assert ((p - q).abs().cpu() <= 2 * error).all()

    @each_target
    def test_groups_have_their_own(self, target):
        """An LR of 0 keeps its group where it is, and a decay shrinks only its own."""
        start, grads = start_and_grads(torch.float64)
        params = copies(start[:3], target.device)
        groups = [
            {"params": params[:1], "lr": 0.0},
            {"params": params[1:2], "weight_decay": 0.5},
            {"params": params[2:]},
        ]
        optimizer = target.sgd(groups, lr=0.1)
        grads = [[of_step[0], torch.zeros(SHAPES[1], dtype=torch.float64), of_step[2]] for of_step in grads]
        run(optimizer, grads)
        assert same_bits(params[0].cpu(), start[0])
        assert torch.allclose(params[1].cpu(), start[1] * 0.95**STEPS)
        assert torch.allclose(params[2].cpu(), start[2] - 0.1 * sum(of_step[2] for of_step in grads))

    @each_target
    @each_input
    def test_nothing_moves_without_gradients_or_with_gradients_of_zero(self, target, name):
        start, _ = start_and_grads(torch.float64)
        optimizer = target.sgd(copies(start, target.device), **arguments_of(name))
        run(optimizer, [[None] * len(SHAPES)] * 2)
        assert all(same_bits(p.cpu(), q) for p, q in zip(optimizer.param_groups[0]["params"], start, strict=True))
        assert buffers(optimizer) == [None] * len(SHAPES)
        if not arguments_of(name).get("weight_decay"):
            run(optimizer, [[torch.zeros_like(x) for x in start]] * 2)
            assert all(same_bits(p.cpu(), q) for p, q in zip(optimizer.param_groups[0]["params"], start, strict=True))

    @each_target
    @each_input
    @each_implementation
    def test_dtypes_in_one_group(self, target, name, implementation):
        flags = IMPLEMENTATIONS[implementation]
        generator = torch.Generator().manual_seed(3)
        dtypes = [dtype for dtype in DTYPES for _ in range(2)]
        start = [torch.randn(5, generator=generator).to(dtype) for dtype in dtypes]
        grads = [[torch.randn(5, generator=generator).to(dtype) for dtype in dtypes] for _ in range(3)]
        together = target.sgd(copies(start, target.device), **arguments_of(name), **flags)
        run(together, grads)
        for i, p in enumerate(together.param_groups[0]["params"]):
            alone = target.sgd(copies(start[i : i + 1], target.device), **arguments_of(name), **flags)
            run(alone, [[of_step[i]] for of_step in grads])
            assert same_bits(p, alone.param_groups[0]["params"][0])

    @pytest.mark.skipif(
        not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no gradients of another dtype"
    )
    @pytest.mark.parametrize("foreach", [False, True])
    @pytest.mark.parametrize(
        ("dtype", "of_grad"),
        [
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
            (torch.float16, torch.bfloat16),
            (torch.float32, torch.bfloat16),
            (torch.float32, torch.float64),
        ],
        ids=str,
    )
    def test_momentum_is_as_wide_as_weights_and_gradients(self, general, dtype, of_grad, foreach):
        """So that it decays: 0.999 of a bf16 number is that number again. Each of 50 steps rounds the product, and
        0.999 itself, by at most half of eps."""
        p = nn.Parameter(torch.zeros(4, dtype=dtype))
        p.grad_dtype = of_grad
        optimizer = general.sgd([p], lr=0.0, momentum=0.999, foreach=foreach)
        for t in range(51):
            p.grad = torch.full((4,), float(t == 0), dtype=of_grad)
            optimizer.step()
        buf = optimizer.state[p]["momentum_buffer"]
        assert buf.dtype == torch.promote_types(dtype, of_grad)
        assert ((buf.double() - 0.999**50).abs() <= 50 * torch.finfo(buf.dtype).eps).all()

    @each_input
    @pytest.mark.parametrize("foreach", [False, True])
    def test_weights_that_are_widened_between_steps(self, general, name, foreach):
        """model.float() after some steps in bf16: momentum may stay in bf16, and the rounding of that bounds all."""
        start, grads = start_and_grads(torch.bfloat16)
        runs = []
        for make in (general.sgd, torch.optim.SGD):
            optimizer = make(copies(start), foreach=foreach, **arguments_of(name))
            run(optimizer, grads[:2])
            for p in optimizer.param_groups[0]["params"]:
                p.grad = None
                p.data = p.data.float()
            run(optimizer, [[None if g is None else g.float() for g in of_step] for of_step in grads[2:]])
            runs.append(optimizer.param_groups[0]["params"])
        for p, q, start_of_it, grads_of_it in zip(*runs, start, zip(*grads, strict=True), strict=True):
            error, _ = bounds(arguments_of(name), start_of_it, grads_of_it, torch.bfloat16)
            assert p.dtype == q.dtype == torch.float32
            assert ((p.double() - q.double()).abs() <= 2 * error).all()

    @each_input
    @pytest.mark.parametrize("foreach", [False, True])
    @pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
    def test_complex_numbers_are_pairs_of_real_ones(self, general, name, dtype, foreach):
        generator = torch.Generator().manual_seed(4)
        p = torch.randn(5, 5, generator=generator, dtype=dtype)
        grads = [torch.randn(5, 5, generator=generator, dtype=dtype) for _ in range(STEPS)]
        ours = general.sgd(copies([p]), foreach=foreach, **arguments_of(name))
        parts = general.sgd(copies([p.real, p.imag]), foreach=foreach, **arguments_of(name))
        theirs = torch.optim.SGD(copies([p]), foreach=foreach, **arguments_of(name))
        run(ours, [[g] for g in grads])
        run(theirs, [[g] for g in grads])
        run(parts, [[g.real, g.imag] for g in grads])
        (actual,), (expected,) = ours.param_groups[0]["params"], theirs.param_groups[0]["params"]
        assert same_bits(torch.view_as_real(actual), torch.view_as_real(expected))
        for actual_part, start, of_part, part in zip(
            (actual.real, actual.imag),
            (p.real, p.imag),
            ([g.real for g in grads], [g.imag for g in grads]),
            parts.param_groups[0]["params"],
            strict=True,
        ):
            error, _ = bounds(arguments_of(name), start, of_part, part.dtype)
            assert ((actual_part.double() - part.double()).abs() <= 2 * error).all()

    def test_a_default_dtype_of_another_width(self, swift_target):
        start, grads = start_and_grads(torch.float32)
        runs = []
        for default in (torch.float32, torch.float64):
            optimizer = swift_target.sgd(copies(start, swift_target.device), momentum=0.9, weight_decay=0.1)
            torch.set_default_dtype(default)
            try:
                run(optimizer, grads)
            finally:
                torch.set_default_dtype(torch.float32)
            runs.append(optimizer.param_groups[0]["params"])
        assert all(same_bits(a, b) for a, b in zip(*runs, strict=True))

    @each_input
    @each_implementation
    def test_of_an_ordinary_optimizer_all_is_said_as_in_torch(self, general, name, implementation):
        """Options, state dicts and what is printed."""
        start, grads = start_and_grads(torch.float32, late=False)
        flags = IMPLEMENTATIONS[implementation]
        ours = general.sgd(copies(start), **arguments_of(name), **flags)
        theirs = torch.optim.SGD(copies(start), **arguments_of(name), **flags)
        assert ours.param_groups[0].keys() == theirs.param_groups[0].keys()
        assert all(ours.defaults[key] == value for key, value in theirs.defaults.items())
        assert repr(ours) == repr(theirs)
        for optimizer in (ours, theirs):
            run(optimizer, grads)
        of_texp, of_torch = ours.state_dict(), theirs.state_dict()
        assert of_texp["param_groups"] == of_torch["param_groups"]
        assert list(of_texp) == list(of_torch)
        with_momentum = {
            key for key, values in of_torch["state"].items() if values.get("momentum_buffer") is not None
        }
        assert {key for key, values in of_texp["state"].items() if values} == with_momentum

    @pytest.mark.parametrize(
        ("fused", "differentiable"), [(None, False), (False, False), (True, False), (None, True), (False, True)]
    )
    def test_a_scaler_is_told_what_torch_tells_it(self, general, fused, differentiable):
        makes = general.sgd, torch.optim.SGD
        optimizers = [
            make([nn.Parameter(torch.ones(1))], fused=fused, differentiable=differentiable) for make in makes
        ]
        ours, theirs = (getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in optimizers)
        assert ours == theirs == bool(fused)

    @pytest.mark.parametrize("fused", [None, True])
    def test_a_step_hook_under_a_scaler_sees_what_it_sees_in_torch(self, general, fused):
        """Gradients that are unscaled, unless fused=True, which unscales in the step."""
        told = []
        for make in (general.sgd, torch.optim.SGD):
            p = nn.Parameter(torch.zeros(3))
            optimizer, seen = make([p], lr=0.1, fused=fused), []
            optimizer.register_step_pre_hook(lambda o, a, k, p=p, seen=seen: seen.append(p.grad.clone()))
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            scaler.scale((p * 10).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            told.append([*seen, p.detach()])
        assert len(told[0]) == len(told[1]) == 2
        assert all(same_bits(a, b) for a, b in zip(*told, strict=True))
        assert told[0][0][0].item() == (10.0 * 1024 if fused else 10.0)

    @each_swift_target
    @each_input
    def test_a_fused_step_that_is_skipped(self, target, name):
        """found_inf given as a GradScaler gives it."""
        start, grads = start_and_grads(torch.float32, late=False)
        optimizer = target.sgd(copies(start, target.device), fused=True, **arguments_of(name))
        run(optimizer, grads[:2])
        before = snapshot(optimizer)
        optimizer.found_inf = torch.tensor(1.0, device=target.device)
        run(optimizer, grads[2:3])
        after = snapshot(optimizer)
        assert all(same_bits(a, b) for a, b in zip(after[1:], before[1:], strict=True))
        del optimizer.found_inf
        run(optimizer, grads[2:3])
        assert not same_bits(optimizer.param_groups[0]["params"][0].detach(), before[1])


class TestStateDicts:
    def trained(self, make, **arguments) -> tuple[Model, torch.optim.Optimizer]:
        model = Model()
        optimizer = make(model.parameters(), **arguments)
        for _ in range(3):
            optimizer.step(model.closure)
        return model, optimizer

    @each_input
    @pytest.mark.parametrize("loads", ["texp", "torch"])
    @pytest.mark.parametrize("saved", ["texp", "torch"])
    @pytest.mark.parametrize(
        ("before", "after"), [pair for pair in itertools.product(IMPLEMENTATIONS, repeat=2) if "for-loop" not in pair]
    )
    def test_round_trips(self, general, name, saved, loads, before, after):
        """Across implementations, and to and from torch.optim.SGD; the state dict stays as it was. (torch.optim.SGD
        shares what it loads with the optimizer that was saved.)"""
        makes = {"texp": general.sgd, "torch": torch.optim.SGD}
        model, optimizer = self.trained(makes[saved], **arguments_of(name), **IMPLEMENTATIONS[before])
        twin = Model()
        twin.load_state_dict(model.state_dict())
        other = makes[loads](twin.parameters(), **arguments_of(name), **IMPLEMENTATIONS[after])
        state_dict = optimizer.state_dict()
        kept = copy.deepcopy(state_dict)
        other.load_state_dict(state_dict)
        for group in other.param_groups:
            group.update({"foreach": None, "fused": None, **IMPLEMENTATIONS[after]})
        if loads == "torch":
            other.load_state_dict(copy.deepcopy(kept))
        for _ in range(3):
            other.step(twin.closure)
        assert all(
            same_bits(a["momentum_buffer"], b["momentum_buffer"])
            for a, b in zip(state_dict["state"].values(), kept["state"].values(), strict=True)
            if a.get("momentum_buffer") is not None
        )
        for _ in range(3):
            optimizer.step(model.closure)
        assert same_models(model, twin)

    def test_what_was_loaded_is_not_shared(self, general):
        _, optimizer = self.trained(general.sgd, momentum=0.9)
        twin = Model()
        other = general.sgd(twin.parameters(), momentum=0.9)
        other.load_state_dict(optimizer.state_dict())
        before = [b.clone() for b in buffers(optimizer)]
        other.step(twin.closure)
        assert all(same_bits(a, b) for a, b in zip(buffers(optimizer), before, strict=True))

    @each_input
    def test_older_ones_lack_what_was_added_since(self, general, name):
        model, optimizer = self.trained(general.sgd, **arguments_of(name))
        state_dict = copy.deepcopy(optimizer.state_dict())
        for group in state_dict["param_groups"]:
            for key in INFO.not_og_supported_flags:
                group.pop(key, None)
        optimizer.load_state_dict(state_dict)
        optimizer.step(model.closure)

    @pytest.mark.parametrize("named", list(itertools.product([False, True], repeat=2)), ids=str)
    def test_named_parameters(self, general, named):
        """Loaded from and to optimizers whose parameters have names, which remain those of the one that loads."""
        models = Model(), Model()
        optimizers = [
            general.sgd(model.named_parameters() if with_names else model.parameters(), momentum=0.9)
            for model, with_names in zip(models, named, strict=True)
        ]
        for _ in range(3):
            optimizers[0].step(models[0].closure)
        optimizers[1].load_state_dict(optimizers[0].state_dict())
        models[1].load_state_dict(models[0].state_dict())
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.step(model.closure)
        assert same_models(*models)
        names = optimizers[1].param_groups[0].get("param_names")
        assert names == (["weight", "bias"] if named[1] or named[0] else None)

    @each_input
    def test_saved_and_loaded_with_weights_only(self, general, name):
        model, optimizer = self.trained(general.sgd, **arguments_of(name))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        other = general.sgd(model.parameters(), **arguments_of(name))
        other.load_state_dict(loaded)
        assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
        for a, b in zip(buffers(other), buffers(optimizer), strict=True):
            assert (a is None and b is None) or same_bits(a, b)

    @each_input
    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deep", "pickled"]
    )
    def test_copies_go_on_alike(self, general, name, copied):
        model, optimizer = self.trained(general.sgd, **arguments_of(name))
        both = copied((model, optimizer))
        assert {key for key in both[1].__dict__ if key[0] != "_"} == {
            key for key in optimizer.__dict__ if key[0] != "_"
        }
        for m, o in ((model, optimizer), both):
            o.step(m.closure)
        assert same_models(model, both[0])
        assert both[0].weight is not model.weight

    def test_of_equal_optimizers_are_equal_in_order_too(self, general):
        """The state stands in the order of the parameters, whichever had a gradient first."""
        orders = []
        for first in (0, 1):
            model = Model()
            optimizer = general.sgd(model.parameters(), momentum=0.9)
            params = list(model.parameters())
            for p in (params[first], params[1 - first]):
                optimizer.zero_grad()
                p.grad = torch.ones_like(p)
                optimizer.step()
            orders.append([index for index, values in optimizer.state_dict()["state"].items() if values])
        theirs = torch.optim.SGD(params, momentum=0.9)
        assert orders[0] == [0, 1]
        assert sorted(orders[1]) == [0, 1]
        assert theirs.state_dict().keys() == optimizer.state_dict().keys()


class TestHooks:
    """Every kind, in the order in which torch calls them and with what it gives them."""

    def told(self, make) -> list:
        model = Model()
        optimizer, other = (make(model.parameters(), momentum=0.9) for _ in range(2))
        closure, told = model.closure, []

        def of_step(what: str):
            def hook(*given):
                o, args, kwargs = given
                told.append(
                    (what, o is optimizer, len(args), sorted(kwargs), [x in (optimizer, closure) for x in args])
                )

            return hook

        def of_state_dict(what: str):
            def hook(o, *given):
                told.append((what, o is optimizer, [sorted(x) for x in given]))

            return hook

        handles = [
            optimizer.register_step_pre_hook(of_step("pre")),
            optimizer.register_step_post_hook(of_step("post")),
            optimizer.register_step_pre_hook(of_step("second pre")),
            register_optimizer_step_pre_hook(of_step("global pre")),
            register_optimizer_step_post_hook(of_step("global post")),
            optimizer.register_state_dict_pre_hook(of_state_dict("state dict pre")),
            optimizer.register_state_dict_pre_hook(of_state_dict("state dict pre, prepended"), prepend=True),
            optimizer.register_state_dict_post_hook(of_state_dict("state dict post")),
            optimizer.register_state_dict_post_hook(of_state_dict("state dict post, prepended"), prepend=True),
            optimizer.register_load_state_dict_pre_hook(of_state_dict("load pre")),
            optimizer.register_load_state_dict_pre_hook(of_state_dict("load pre, prepended"), prepend=True),
            optimizer.register_load_state_dict_post_hook(of_state_dict("load post")),
            optimizer.register_load_state_dict_post_hook(of_state_dict("load post, prepended"), prepend=True),
        ]
        try:
            optimizer.step(closure)
            optimizer.step()
            other.step(closure)
            optimizer.load_state_dict(optimizer.state_dict())
        finally:
            for handle in handles:
                handle.remove()
        optimizer.step(closure)
        optimizer.state_dict()
        return told

    def test_as_in_torch(self, general):
        told = self.told(general.sgd)
        assert told == self.told(torch.optim.SGD)
        assert len(told) == 20

    def test_of_a_closure_that_is_given_by_name(self, general):
        def told(make) -> list:
            model, told = Model(), []
            optimizer = make(model.parameters())
            optimizer.register_step_pre_hook(lambda o, args, kwargs: told.append(("pre", len(args), sorted(kwargs))))
            optimizer.register_step_post_hook(
                lambda o, args, kwargs: told.append(("post", len(args), sorted(kwargs)))
            )
            optimizer.step(closure=model.closure)
            return told

        assert told(general.sgd) == told(torch.optim.SGD)

    def test_a_pre_hook_may_replace_the_closure(self, general):
        def losses(make) -> list[float]:
            model = Model()
            optimizer = make(model.parameters(), lr=0.1)
            optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 2 * model.closure()), {}))
            return [optimizer.step(model.closure).item(), model.loss().item()]

        assert losses(general.sgd) == losses(torch.optim.SGD)

    def test_a_state_dict_hook_may_replace_it(self, general):
        def loaded(make) -> tuple:
            model = Model()
            optimizer = make(model.parameters(), lr=0.1)

            def with_lr(o, state_dict):
                groups = [{**group, "lr": 0.5} for group in state_dict["param_groups"]]
                return {**state_dict, "param_groups": groups}

            optimizer.register_state_dict_post_hook(lambda o, state_dict: {**state_dict, "more": 1})
            optimizer.register_load_state_dict_pre_hook(with_lr)
            state_dict = optimizer.state_dict()
            optimizer.load_state_dict(state_dict)
            return state_dict["more"], optimizer.param_groups[0]["lr"]

        assert loaded(general.sgd) == loaded(torch.optim.SGD) == (1, 0.5)

"""The host side of a step, in C++ and in Python: what goes where, and that nothing is lost."""

import functools

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

import texp
from tests.conftest import relative_error, same_bits
from tests.states import param

core = texp.backends.core()
needs_core = pytest.mark.skipif(core is None, reason=f"without the C++ core: {texp.backends.available()['cpu']}")


def test_tensors_for_the_reference_do_not_hold_up_the_others():
    """Complex, sparse, a subclass and an ordinary parameter in one group, a late one in another."""

    class Tagged(nn.Parameter):
        pass

    def make(backend):
        torch.manual_seed(0)
        params = [
            nn.Parameter(torch.randn(4, dtype=torch.complex64)),
            nn.Parameter(torch.randn(5, 3)),
            Tagged(torch.randn(4)),
            nn.Parameter(torch.randn(4)),
            nn.Parameter(torch.randn(4)),
        ]
        groups = [{"params": params[:4]}, {"params": params[4:], "scale_invariant": True, "weight_decay": 0.5}]
        return params, texp.SGD(groups, lr=0.1, momentum=0.9, backend=backend)

    runs = []
    for backend in (None, "reference"):
        params, optimizer = make(backend)
        for t in range(8):
            torch.manual_seed(t)
            for i, p in enumerate(params):
                p.grad = torch.randn_like(p.detach())
                if i == 1:
                    p.grad = p.grad.to_sparse()
                if i == 4 and t in (0, 5):
                    p.grad = None
            optimizer.step()
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        assert (
            relative_error(
                torch.view_as_real(p) if p.is_complex() else p, torch.view_as_real(q) if q.is_complex() else q
            )
            < 1e-6
        )


@needs_core
def test_what_is_left_to_the_reference_can_be_batched(monkeypatch):
    params = [nn.Parameter(torch.ones(2, dtype=torch.complex64)) for _ in range(3)]
    for p in params:
        p.grad = torch.ones_like(p)
    batches = []
    monkeypatch.setattr(texp.step.fallback.reference, "apply", lambda row, entries, **_: batches.append(len(entries)))
    texp.SGD(params, lr=0.1, momentum=0.9).step()
    assert batches == [3]


@needs_core
def test_a_step_inside_the_check_of_another():
    """The check of what is left to the reference is Python, which may do anything, even step another optimizer."""
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.complex64))
    inner_p = nn.Parameter(torch.ones(3))
    p.grad, q.grad, inner_p.grad = torch.ones(3), torch.ones(3, dtype=torch.complex64), torch.ones(3)
    inner = texp.SGD([inner_p], lr=0.5)
    outer = texp.SGD([p, q], lr=0.5)
    of_outer = outer.param_groups, outer._norm_stats, outer.state, 1.0, None

    def check(left, grad_scale):
        inner.step()
        outer._stepper.step(*of_outer, lambda *_: None, None, None)  # even the same one

    assert outer._stepper.step(*of_outer, check, None, None) == core.Stepper.FALLBACK
    assert torch.equal(p.detach(), torch.zeros(3))
    assert torch.equal(inner_p.detach(), torch.full((3,), 0.5))


@needs_core
def test_hooks_run_once_and_are_seen_when_they_come_late():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = texp.SGD([p], lr=0.1, backend="cpu")
    optimizer.step()
    calls = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global")),
    ]
    optimizer.step()
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert calls == ["pre", "global"]


def test_hooks_of_a_subclass_run_once(general):
    class Noisy(texp.SGD):
        def step(self, closure=None):
            return super().step(closure)

    p, calls = param(), []
    p.grad = torch.ones_like(p)
    optimizer = Noisy([p], lr=0.1, backend=general.backend)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.step()
    optimizer.step(lambda: calls.append("closure"))
    assert calls == ["pre", "pre", "closure"]


def test_hooks_see_and_replace_the_closure():
    p, seen = param(), []
    p.grad = torch.ones_like(p)
    optimizer = texp.SGD([p], lr=0.1)
    handle = optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: seen.append((args, kwargs)))
    optimizer.step()
    optimizer.step(float)
    assert seen == [((optimizer,), {}), ((optimizer, float), {})]
    handle.remove()
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: ((optimizer, lambda: 7.0), kwargs))
    assert optimizer.step() == 7.0
    assert optimizer.step(float) == 7.0


@pytest.mark.parametrize("where", ["closure", "hook", "step"])
def test_what_a_scaler_left_does_not_outlive_an_error(where):
    p = param()
    p.grad = torch.ones_like(p)
    optimizer = texp.SGD([p], lr=0.1)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)

    def fail(*_):
        raise KeyboardInterrupt

    if where == "hook":
        optimizer.register_step_pre_hook(fail)
    if where == "step":
        optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError if where == "step" else KeyboardInterrupt):
        optimizer.step(fail if where == "closure" else None)
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


INFINITE = {
    "plain": {},
    "heavy ball": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.5},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "decay": {"momentum": 0.9, "weight_decay": 0.1},
}


@pytest.mark.parametrize("name", INFINITE)
def test_infinite_weights_stay_infinite(target, name):
    """As those of a mask do: a term that a step does not have makes no NaN of them."""
    p = param(1.0, -torch.inf, 2.0, torch.inf, 3.0, dtype=torch.float32, device=target.device)
    q = nn.Parameter(p.detach().clone())
    optimizers = [target.sgd([p], lr=0.1, **INFINITE[name]), torch.optim.SGD([q], lr=0.1, **INFINITE[name])]
    for t in range(3):
        p.grad = torch.tensor([1.0, 0.0, torch.inf if t == 1 else 0.0, 0.0, 1.0], device=target.device)
        q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(p, q, rtol=1e-6, atol=0, equal_nan=True)


def test_infinite_weights_have_no_decay_in_exponential_form(target):
    """Where torch makes NaN of them: it subtracts what has become infinite."""
    p = param(1.0, -torch.inf, device=target.device)
    optimizer = target.sgd([p], lr=0.1, momentum=0.9, weight_decay=0.1, scale_invariant=True)
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    optimizer.fold()
    assert p[0].isfinite()
    assert p[1] == -torch.inf


def _dropped_by_another(p):
    class Other(nn.Parameter):
        @property
        def grad(self):
            p.grad = None

    return Other(torch.ones(1))


def test_a_gradient_may_be_dropped_while_the_groups_are_read(general):
    """What runs when a subclass is asked for its gradient may change the optimizer's tensors."""
    p, q = nn.Parameter(torch.zeros(900_000)), param()
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer = texp.SGD([{"params": [p]}, {"params": [_dropped_by_another(p), q]}], lr=1.0, backend=general.backend)
    optimizer.step()
    assert p.grad is None
    assert (p == -1).all()
    assert torch.equal(q.detach(), torch.tensor([0.0, -3.0, 2.0], dtype=q.dtype))


@needs_core
def test_tensors_may_be_dropped_while_what_is_left_is_checked():
    p, q = nn.Parameter(torch.zeros(900_000)), nn.Parameter(torch.ones(3, dtype=torch.complex64))
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer = texp.SGD([{"params": [p]}, {"params": [q], "scale_invariant": True}], lr=1.0, momentum=0.9)
    optimizer.step()
    state = dict(optimizer.state)

    def drop(left, grad_scale):
        p.grad = q.grad = None
        optimizer.state.clear()
        optimizer.param_groups.clear()

    stepper, groups = optimizer._stepper, optimizer.param_groups
    stepper.step(groups, optimizer._norm_stats, optimizer.state, 1.0, None, drop, None, None)
    # The step that was under way goes on with what it had.
    assert torch.allclose(p, torch.tensor(-1 - 1.9))
    assert torch.allclose(state[p]["momentum_buffer"], torch.tensor(1.9))


class TestSharedMemory:
    """Weights that lie in one memory are stepped one after the other, as by torch, and by no two threads at once."""

    ARGUMENTS = {"lr": 0.25, "momentum": 0.5, "weight_decay": 0.25}

    def views(self, kind: str) -> list[nn.Parameter]:
        storage = torch.zeros(200_000)
        if kind == "one tensor, two parameters":
            return [nn.Parameter(storage), nn.Parameter(storage)]
        if kind == "overlapping slices":
            return [nn.Parameter(storage[:150_000]), nn.Parameter(storage[50_000:])]
        if kind == "every other element, twice":
            return [nn.Parameter(storage[::2]), nn.Parameter(storage[::2])]
        return [nn.Parameter(storage[::2]), nn.Parameter(storage[1::2])]  # interleaved

    @pytest.mark.parametrize(
        "kind", ["one tensor, two parameters", "overlapping slices", "every other element, twice", "interleaved"]
    )
    @pytest.mark.parametrize("foreach", [False, True])
    def test_of_parameters(self, general, kind, foreach):
        runs = []
        for make in (functools.partial(general.sgd, foreach=foreach), torch.optim.SGD):
            params = self.views(kind)
            optimizer = make([*params, param()], **self.ARGUMENTS)
            for _ in range(3):
                for p in params:
                    p.grad = torch.ones_like(p)
                optimizer.step()
            runs.append(params)
        assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))

    @needs_core
    def test_is_refused_by_a_backend_that_is_named(self):
        params = self.views("overlapping slices")
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = texp.SGD(params, backend="cpu", **self.ARGUMENTS)
        with pytest.raises(RuntimeError, match="in memory that another tensor of this step lies in"):
            optimizer.step()
        assert all((p == 0).all() for p in params)

    @pytest.mark.parametrize("foreach", [False, True])
    def test_of_groups_that_take_turns(self, general, foreach):
        """The first and the last have one row, and could be stepped in one batch: before the group between them."""
        runs = []
        for make in (functools.partial(general.sgd, foreach=foreach), torch.optim.SGD):
            of_no_kernel = nn.Parameter(torch.ones(5, dtype=torch.complex64))
            params = [of_no_kernel, *self.views("overlapping slices")]
            groups = [{"params": [p], "lr": lr} for p, lr in zip(params, (0.25, 0.5, 0.25), strict=True)]
            optimizer = make(groups, weight_decay=0.25)
            for _ in range(2):
                for i, p in enumerate(params):
                    p.grad = torch.full_like(p, 2.0**i)
                optimizer.step()
            runs.append(params)
        assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))

    @pytest.mark.parametrize("foreach", [False, True])
    @pytest.mark.parametrize("late", [False, True])
    def test_of_a_parameter_that_is_there_twice(self, general, late, foreach):
        """torch warns and steps it twice; so does texp."""
        runs = []
        for make in (torch.optim.SGD, functools.partial(general.sgd, foreach=foreach)):
            p = nn.Parameter(torch.ones(100_000))
            if late:
                optimizer = make([p], **self.ARGUMENTS)
                optimizer.param_groups[0]["params"].append(p)
            else:
                with pytest.warns(UserWarning, match="duplicate parameters"):
                    optimizer = make([p, p], **self.ARGUMENTS)
            for _ in range(3):
                p.grad = torch.ones_like(p)
                optimizer.step()
            runs.append(p)
        assert torch.equal(*runs)

    @pytest.mark.parametrize("foreach", [False, True])
    @pytest.mark.parametrize("strided", [False, True])
    def test_norm_stats_of_two_groups(self, target, strided, foreach):
        """A statistic behind two groups grows with both."""
        stat = torch.ones(6, device=target.device)[:: 2 if strided else 1]
        params = [param(device=target.device) for _ in range(2)]
        groups = [{"params": [p], "scale_invariant": True, "norm_stats": [(stat, 1)]} for p in params]
        optimizer = target.sgd(groups, lr=0.25, weight_decay=1.0, foreach=foreach)
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        grown = [group["scale"] for group in optimizer.param_groups]
        assert grown == [4 / 3, 4 / 3]
        assert torch.allclose(stat, torch.full_like(stat, 16 / 9))

    def test_norm_stats_have_the_same_bits_in_batches(self, general):
        """Of two groups, three times in one of them, and beside a statistic that is nobody else's."""
        runs = []
        for foreach in (False, True):
            shared, own = torch.linspace(0.1, 0.9, 7), torch.linspace(1, 2, 5)
            params = [param(), param()]
            stats = [[(shared, 1), (own, 1)], [(shared, 1), (shared[2:], 1), (shared, 2)]]
            groups = [
                {"params": [p], "scale_invariant": True, "norm_stats": its}
                for p, its in zip(params, stats, strict=True)
            ]
            optimizer = general.sgd(groups, lr=0.1, momentum=0.9, weight_decay=0.3, foreach=foreach)
            for _ in range(5):
                for p in params:
                    p.grad = torch.ones_like(p)
                optimizer.step()
            runs.append([shared, own])
        assert all(same_bits(x, y) for x, y in zip(*runs, strict=True))
        assert (runs[0][0] > torch.linspace(0.1, 0.9, 7)).all()


def test_the_parameters_of_a_group_may_be_a_tuple(general):
    p = param()
    p.grad = torch.ones_like(p)
    optimizer = general.sgd([p], lr=1.0)
    optimizer.param_groups[0]["params"] = (p,)
    optimizer.step()
    assert torch.equal(p.detach(), torch.tensor([0.0, -3.0, 2.0], dtype=p.dtype))


def test_a_parameter_with_a_hash_of_its_own(general):
    class Hashed(nn.Parameter):
        __eq__ = object.__eq__

        def __hash__(self):
            return 42

    p = Hashed(torch.ones(3))
    optimizer = general.sgd([p], lr=0.5, momentum=0.5)
    for _ in range(3):
        p.grad = torch.ones(3)
        optimizer.step()
    assert torch.equal(p.detach(), torch.full((3,), 1 - 0.5 * (1 + 1.5 + 1.75)))


def test_a_scale_that_was_read_does_not_change(target):
    """The step overwrites numbers in a group only where nobody else has them."""
    p = param(device=target.device)
    optimizer = target.sgd([p], lr=0.25, weight_decay=1.0, momentum=0.5, scale_invariant=True)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
        group, saved = optimizer.param_groups[0], optimizer.state_dict()
        kept, text = (group["scale"], group["carried_decay"]), repr((group["scale"], group["carried_decay"]))
        saved_text = repr(saved["param_groups"])
        optimizer.step()
        assert repr(kept) == text
        assert repr(saved["param_groups"]) == saved_text
        assert group["scale"] != kept[0]


@needs_core
def test_a_dispatch_mode_sees_the_operations():
    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen, p = [], param()
    p.grad = torch.ones_like(p)
    optimizer = texp.SGD([p], lr=0.1)
    with Operations():
        optimizer.step()
    assert any("add_" in name for name in seen)
    assert torch.allclose(p, param().detach() - 0.1)


def test_buffers_made_in_inference_mode_can_be_used_after_it(general):
    p = param()
    p.grad = torch.ones_like(p)
    optimizer = general.sgd([p], lr=0.1, momentum=0.9)
    with torch.inference_mode():
        optimizer.step()
    optimizer.step()
    assert relative_error(p, param() - 0.1 * (1 + 1.9)) < 1e-15

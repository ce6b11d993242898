"""The host side of a step, in C++ and in Python: what goes where, what is refused, and that nothing is lost."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

import texp
from tests.conftest import relative_error, same_bits
from tests.states import assert_unchanged, param, snapshot

core = texp.backends.core(None)
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
def test_state_that_is_edited_between_steps_is_seen():
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = texp.SGD([p, q], lr=1.0, momentum=0.5, backend="cpu")
    p.grad = q.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[p] = {"momentum_buffer": torch.full((3,), 10.0)}
    del optimizer.state[q]
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((3,), -6.0))  # 1 − 1 − (5 + 1)
    assert torch.equal(q.detach(), torch.full((3,), -1.0))  # 1 − 1 − 1
    torch.utils.swap_tensors(p, nn.Parameter(torch.zeros(3)))
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((3,), -4.0))  # 0 − (3 + 1)


@needs_core
def test_a_step_inside_the_check_of_another():
    """The check of what is left to the reference is Python, which may do anything, even step another optimizer."""
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.complex64))
    inner_p = nn.Parameter(torch.ones(3))
    p.grad, q.grad, inner_p.grad = torch.ones(3), torch.ones(3, dtype=torch.complex64), torch.ones(3)
    inner = texp.SGD([inner_p], lr=0.5)
    outer = texp.SGD([p, q], lr=0.5)
    core.step(outer.param_groups, outer.state, 1.0, lambda left: inner.step())
    assert torch.equal(p.detach(), torch.full((3,), 0.5))
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
    optimizer.step(closure=float)
    assert seen == [((optimizer,), {}), ((optimizer,), {"closure": float})]
    handle.remove()
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: (args, {"closure": lambda: 7.0}))
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

    def drop(left):
        p.grad = q.grad = None
        optimizer.state.clear()
        optimizer.param_groups.clear()

    core.step(optimizer.param_groups, optimizer.state, 1.0, drop)
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
    def test_of_parameters(self, general, kind):
        runs = []
        for make in (general.sgd, torch.optim.SGD):
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

    @pytest.mark.parametrize("late", [False, True])
    def test_of_a_parameter_that_is_there_twice(self, general, late):
        """torch warns and steps it twice; so does texp."""
        runs = []
        for make in (torch.optim.SGD, general.sgd):
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

    @pytest.mark.parametrize("strided", [False, True])
    def test_norm_stats_of_two_groups(self, target, strided):
        """A statistic behind two groups grows with both."""
        stat = torch.ones(6, device=target.device)[:: 2 if strided else 1]
        params = [param(device=target.device) for _ in range(2)]
        groups = [{"params": [p], "scale_invariant": True, "norm_stats": [(stat, 1)]} for p in params]
        optimizer = target.sgd(groups, lr=0.25, weight_decay=1.0)
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        grown = [group["scale"] for group in optimizer.param_groups]
        assert grown == [4 / 3, 4 / 3]
        assert torch.allclose(stat, torch.full_like(stat, 16 / 9))


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


def _integers(optimizer, q):
    optimizer.param_groups[1]["params"] = [nn.Parameter(torch.ones(3, dtype=torch.long), requires_grad=False)]
    optimizer.param_groups[1]["params"][0].grad = torch.ones(3, dtype=torch.long)


def _expanded(optimizer, q):
    q.data, q.grad = torch.ones(1, dtype=q.dtype).expand(3), torch.ones(3, dtype=q.dtype)


def _expanded_buffer(optimizer, q):
    optimizer.state[q]["momentum_buffer"] = torch.ones(1, dtype=q.dtype).expand(3)


def _inference(optimizer, q):
    with torch.inference_mode():
        optimizer.state[q]["momentum_buffer"] = torch.ones(3, dtype=q.dtype)


def _buffer(value):
    def edit(optimizer, q):
        optimizer.state[q]["momentum_buffer"] = value

    return edit


def _state(optimizer, q):
    optimizer.state[q] = [1]


def _option(**options):
    def edit(optimizer, q):
        optimizer.param_groups[1].update(options)

    return edit


BAD = {
    "integers": (_integers, RuntimeError, "dtype torch.int64 cannot take a step"),
    "expanded parameter": (_expanded, RuntimeError, "a parameter .* holds several elements in one place"),
    "expanded buffer": (_expanded_buffer, RuntimeError, "a momentum buffer .* holds several elements in one place"),
    "inference buffer": (_inference, RuntimeError, "a momentum buffer .* was made in inference mode"),
    "buffer, shape": (_buffer(torch.ones(4, dtype=torch.float64)), RuntimeError, "cannot have a momentum buffer"),
    "buffer, device": (_buffer(torch.ones(3, device="meta")), RuntimeError, "cannot have a momentum buffer"),
    "buffer, integers": (_buffer(torch.ones(3, dtype=torch.long)), RuntimeError, "cannot have a momentum buffer"),
    "buffer, narrower": (_buffer(torch.ones(3)), RuntimeError, "cannot have a momentum buffer"),
    "state": (_state, (TypeError, AttributeError), "dict|list"),
    "scale": (_option(scale=0.0), ValueError, r"parameter group 1: scale must be in \[1, 2\)"),
    "scale, text": (_option(scale="two"), TypeError, "str"),
    "exponent": (_option(scale_exponent=0.5), ValueError, "parameter group 1: .* scale_exponent an integer"),
    "carried decay": (_option(carried_decay=float("nan")), ValueError, "parameter group 1: carried_decay"),
    "lr": (_option(lr=float("inf")), ValueError, "parameter group 1: lr must be a finite number"),
    "lr, text": (_option(lr="0.1"), (TypeError, ValueError), "float|str|number"),
    "momentum": (_option(momentum=-0.5), ValueError, "parameter group 1: momentum must be"),
    "step": (_option(momentum=1e308, carried_decay=1e10), ValueError, "group 1: a step with .* leaves the range"),
    "norm_stats": (_option(norm_stats=((torch.ones(3), 1),)), ValueError, "group 1: norm_stats must be a list"),
    "norm_stats, None": (_option(norm_stats=None), ValueError, "group 1: norm_stats must be a list"),
    "norm_stats, pair": (_option(norm_stats=[torch.ones(3)]), ValueError, "group 1: norm_stats must be a list"),
    "norm_stats, power": (
        _option(norm_stats=[(torch.ones(3), float("nan"))]), ValueError, "group 1: norm_stats must be a list"
    ),
    "norm_stats, dtype": (
        _option(norm_stats=[(torch.ones(3, dtype=torch.long), 1)]), ValueError, "group 1: norm_stats must be a list"
    ),
    "params": (_option(params=7), TypeError, "list|iterable"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_changes_nothing(general, fault):
    """In the second of two groups, after steps that set their scales and buffers."""
    p, q = (param() for _ in range(2))
    groups = [{"params": [x], "scale_invariant": True, "weight_decay": 0.5} for x in (p, q)]
    optimizer = general.sgd(groups, lr=0.1, momentum=0.9)
    for _ in range(2):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        optimizer.step()
    edit, error, message = BAD[fault]
    edit(optimizer, q)
    before = [copy.deepcopy(optimizer.param_groups[0]["scale"]), p.detach().clone(), q.detach().clone()]
    buf = optimizer.state[p]["momentum_buffer"].clone()
    with pytest.raises(error, match=message):
        optimizer.step()
    assert optimizer.param_groups[0]["scale"] == before[0]
    assert same_bits(p, before[1])
    assert same_bits(q, before[2])
    assert same_bits(optimizer.state[p]["momentum_buffer"], buf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_step_that_leaves_the_range_of_the_arithmetic_changes_nothing(target, dtype):
    p = param(dtype=dtype, device=target.device)
    p.grad = torch.ones_like(p)
    optimizer = target.sgd([p], lr=0.1)
    optimizer.param_groups[0]["lr"] = 1e39
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=rf"range of the arithmetic of {dtype}"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_a_grad_scale_that_is_no_number_to_divide_by():
    p = param()
    p.grad = torch.ones_like(p)
    optimizer = texp.SGD([p], lr=0.1)
    for value in (0.0, float("nan"), float("inf")):
        optimizer.grad_scale = torch.tensor(value)
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match="grad_scale must be a finite number greater than 0"):
            optimizer.step()
        assert_unchanged(optimizer, before)


def test_buffers_made_in_inference_mode_can_be_used_after_it(general):
    p = param()
    p.grad = torch.ones_like(p)
    optimizer = general.sgd([p], lr=0.1, momentum=0.9)
    with torch.inference_mode():
        optimizer.step()
    optimizer.step()
    assert relative_error(p, param() - 0.1 * (1 + 1.9)) < 1e-15


@pytest.mark.parametrize("exponential", [True, False])
def test_a_capture_by_the_reference_backend(monkeypatch, exponential):
    """Of an ordinary group it is allowed, as with torch; the schedule of an exponential one would stand still."""
    p = param()
    p.grad = torch.ones_like(p)
    optimizer = texp.SGD([p], lr=0.1, weight_decay=0.1, scale_invariant=exponential, backend="reference")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    before = snapshot(optimizer)
    if exponential:
        with pytest.raises(RuntimeError, match="group 0 is scale_invariant: its step cannot be captured"):
            optimizer.step()
        assert_unchanged(optimizer, before)
    else:
        optimizer.step()
        assert not same_bits(p, before[1])

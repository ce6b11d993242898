"""What a step refuses, with the same error by either host side, and that nothing is changed then."""

import copy

import pytest
import torch
from torch import nn

import texp
from tests.conftest import same_bits
from tests.states import assert_unchanged, param, snapshot


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
    "state": (_state, (TypeError, AttributeError), "dict|list"),
    "scale": (_option(scale=0.0), ValueError, r"parameter group 1: scale must be in \[1, 2\)"),
    "scale, text": (_option(scale="two"), TypeError, "str"),
    "exponent": (_option(scale_exponent=0.5), ValueError, "parameter group 1: .* scale_exponent an integer"),
    "carried decay": (_option(carried_decay=float("nan")), ValueError, "parameter group 1: carried_decay"),
    "lr": (_option(lr=float("inf")), ValueError, "parameter group 1: lr must be a finite number"),
    "lr, text": (_option(lr="0.1"), (TypeError, ValueError), "float|str|number"),
    "momentum": (_option(momentum=-0.5), ValueError, "parameter group 1: momentum must be"),
    "step": (_option(momentum=1e308, carried_decay=1e10), ValueError, "group 1: a step with .* leaves the range"),
    "norm_stats": (_option(norm_stats={torch.ones(3): 1}), ValueError, "group 1: norm_stats must be a list"),
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

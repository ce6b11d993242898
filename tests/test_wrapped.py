"""texp.integrations.wrapped; with the wrappers themselves, tests/integration."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import texp
from texp.integrations.wrapped import KEPT_AS, has_exponential_groups, texp_sgd


def made(**arguments) -> texp.SGD:
    return texp.SGD([nn.Parameter(torch.ones(2))], lr=0.1, **arguments)


@pytest.mark.parametrize("name", KEPT_AS)
def test_one_that_is_wrapped(name):
    sgd = made()
    assert texp_sgd(sgd) is sgd
    assert texp_sgd(SimpleNamespace(**{name: sgd})) is sgd
    assert texp_sgd(SimpleNamespace(optimizer=SimpleNamespace(**{name: sgd}))) is sgd


def test_a_wrapper_of_the_same_class():
    """As those of Lightning are."""
    sgd, wrapper = made(), made()
    wrapper._optimizer = sgd
    assert texp_sgd(wrapper) is sgd


def test_none():
    other = torch.optim.SGD([nn.Parameter(torch.ones(2))])
    around_itself = SimpleNamespace()
    around_itself.optimizer = around_itself
    for optimizer in (None, other, SimpleNamespace(optimizer=other), around_itself, object()):
        assert texp_sgd(optimizer) is None


def test_exponential_groups():
    """Also of those that are so no longer, and hold Pθ until they are folded."""
    assert not has_exponential_groups(made())
    sgd = made(scale_invariant=True, weight_decay=0.1)
    assert has_exponential_groups(sgd)
    sgd.param_groups[0]["params"][0].grad = torch.ones(2)
    sgd.step()
    sgd.param_groups[0]["scale_invariant"] = False
    assert has_exponential_groups(sgd)
    sgd.fold()
    assert not has_exponential_groups(sgd)

"""A small network with a BatchNorm, trained by texp.SGD in exponential form and by torch.optim.SGD."""

import pytest
import torch
from torch import nn

from tests.conftest import same_bits

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


def assert_same_state(now, before) -> None:
    weights, state = now
    for (name, a), b in zip(weights.items(), before[0].values(), strict=True):
        assert same_bits(a, b), name
    assert state["param_groups"] == before[1]["param_groups"]
    for key, values in before[1]["state"].items():
        assert same_bits(state["state"][key]["momentum_buffer"], values["momentum_buffer"])

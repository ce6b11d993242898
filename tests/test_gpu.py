"""What a step of any kernel on a GPU must do."""

import copy

import pytest
import torch
from torch import nn

import texp
from tests.conftest import relative_error
from tests.gpu import needs


@pytest.fixture(params=[pytest.param(backend, marks=needs(backend)) for backend in ("cuda", "triton")])
def backend(request) -> str:
    return request.param


def test_grad_scaler(backend):
    """With overflows, the first step among them."""
    torch.manual_seed(0)
    model = nn.Linear(8, 4, device="cuda")
    twin = copy.deepcopy(model)
    arguments = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    optimizers = (
        texp.SGD(model.parameters(), backend=backend, **arguments),
        torch.optim.SGD(twin.parameters(), **arguments),
    )
    scales = []
    for net, optimizer in zip((model, twin), optimizers, strict=True):
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=3)
        for t in range(10):
            generator = torch.Generator().manual_seed(t)
            loss = net(torch.randn(16, 8, generator=generator).cuda()).square().mean()
            optimizer.zero_grad()
            scaler.scale(loss * (torch.inf if t in (0, 4) else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        scales.append(scaler.get_scale())
    assert scales[0] == scales[1]
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert relative_error(p, q) < 1e-6


def test_streams(backend):
    """The step runs on the stream that is current; the one before it has compiled what there is to compile."""
    p = nn.Parameter(torch.zeros(1000, device="cuda"))
    p.grad = torch.zeros_like(p)
    optimizer = texp.SGD([p], lr=1.0, backend=backend)
    optimizer.step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles; a step that did not wait would read a gradient of 0
        p.grad.fill_(1.0)
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    assert (p == -1).all()

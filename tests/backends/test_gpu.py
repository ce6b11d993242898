"""What a step of any kernel on a GPU must do."""

import copy

import pytest
import torch
from torch import nn

import texp
from tests.backends.gpu import needs
from tests.conftest import relative_error, same_bits
from texp import backends

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(params=[pytest.param(backend, marks=needs(backend)) for backend in ("cuda", "triton")])
def backend(request) -> str:
    return request.param


@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler(backend, fused):
    """With overflows, the first step among them."""
    torch.manual_seed(0)
    model = nn.Linear(8, 4, device="cuda")
    twin = copy.deepcopy(model)
    arguments = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    optimizers = (
        texp.SGD(model.parameters(), backend=backend, fused=fused, **arguments),
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


class TestTheDefault:
    pytestmark = needs_gpu

    def test_takes_the_best_kernel(self):
        """Also for a parameter that comes to the GPU after the optimizer was made, from its second step on."""
        best = backends.default_for("cuda")
        named, by_default, moved = (nn.Parameter(torch.ones(1000)) for _ in range(3))
        optimizers = []
        for p, backend in ((named, best), (by_default, None), (moved, None)):
            if p is not moved:
                p.data = p.data.cuda()
            optimizers.append(texp.SGD([p], lr=0.1, momentum=0.9, weight_decay=0.1, backend=backend))
        moved.data = moved.data.cuda()
        for _ in range(3):
            for p, optimizer in zip((named, by_default, moved), optimizers, strict=True):
                p.grad = torch.full_like(p, 0.3)
                optimizer.step()
        assert same_bits(named, by_default)
        assert relative_error(moved, named) < 1e-6
        if best != "reference":
            assert optimizers[1]._kernels.cuda is not False
            assert optimizers[2]._kernels.cuda is not False

    def test_of_an_ordinary_group_can_be_captured(self):
        """As that of torch.optim.SGD: its replays are the step of the capture."""
        p, q = (nn.Parameter(torch.ones(100, device="cuda")) for _ in range(2))
        arguments = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
        ours, theirs = texp.SGD([p], **arguments), torch.optim.SGD([q], **arguments)
        p.grad, q.grad = (torch.full_like(x, 0.3) for x in (p, q))
        ours.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ours.step()
        for _ in range(3):
            graph.replay()
        for _ in range(4):
            theirs.step()
        assert relative_error(p, q) < 1e-6

    def test_of_a_scale_invariant_group_cannot(self):
        p = nn.Parameter(torch.ones(100, device="cuda"))
        p.grad = torch.ones_like(p)
        optimizer = texp.SGD([p], lr=0.1, scale_invariant=True)
        optimizer.step()
        other = torch.zeros(1, device="cuda")
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            other.add_(1)  # an empty capture is warned of
            with pytest.raises(RuntimeError, match="capturable=True can"):
                optimizer.step()

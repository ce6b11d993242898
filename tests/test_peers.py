"""Known failures of torch.optim.SGD(fused=True) and of other fused optimizers, none of which may happen here."""

import os

import pytest
import torch
from torch import nn

import texp
from tests.conftest import same_bits
from texp.backends.reference import Entry, reduce

LOW = [torch.bfloat16, torch.float16]


def stepped(p, *grads, **arguments) -> torch.Tensor:
    optimizer = texp.SGD([p], **arguments)
    for g in grads:
        p.grad = g
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("size", [1, 7, 16, 64, 1000])
def test_low_precision_parameters_are_updated_in_every_element(target, dtype, size):
    """torch.optim.SGD(fused=True) leaves whole SIMD blocks as they were (pytorch #191763)."""
    torch.manual_seed(0)
    start, g = torch.randn(size).to(dtype) + 2, torch.ones(size, dtype=dtype)
    p = nn.Parameter(start.clone().to(target.device))
    p.grad = g.to(target.device)
    target.sgd([p], lr=0.5).step()
    assert same_bits(p.detach().cpu(), (start.double() - 0.5).to(dtype))
    assert not (p.detach().cpu() == start).any()


def test_an_overflow_on_the_very_first_step(target):
    """torch.optim.SGD(fused=True) then goes on with uninitialised momentum."""
    p = nn.Parameter(torch.ones(64, device=target.device))
    optimizer = target.sgd([p], lr=0.1, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler(target.device, init_scale=4.0)
    for factor in (torch.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale((p * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert torch.allclose(p.detach(), torch.full_like(p, 0.9))
    assert torch.equal(optimizer.state[p]["momentum_buffer"], torch.ones_like(p))


@pytest.mark.parametrize("scale_invariant", [False, True])
def test_a_parameter_whose_first_grad_comes_late(target, scale_invariant):
    """TypeError in torch.optim.SGD(fused=True); in apex a late last parameter resets every buffer."""
    early, late = (nn.Parameter(torch.ones(3, device=target.device)) for _ in range(2))
    optimizer = target.sgd([early, late], lr=0.1, momentum=0.9, dampening=0.5, scale_invariant=scale_invariant)
    early.grad = torch.ones(3, device=target.device)
    optimizer.step()
    late.grad = torch.ones(3, device=target.device)
    optimizer.step()
    assert torch.allclose(optimizer.state[early]["momentum_buffer"], torch.full_like(early, 0.9 + 0.5))
    assert torch.allclose(optimizer.state[late]["momentum_buffer"], torch.ones_like(late))


def test_a_checkpoint_without_fused_then_a_grad_scaler(target):
    """AssertionError in torch.optim.SGD(fused=True)."""
    p = nn.Parameter(torch.ones(3, device=target.device))
    saved = torch.optim.SGD([p], lr=0.1, momentum=0.9).state_dict()
    optimizer = target.sgd([p], lr=0.1, momentum=0.9, fused=True)
    optimizer.load_state_dict(saved)
    scaler = torch.amp.GradScaler(target.device, init_scale=4.0)
    scaler.scale(p.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.allclose(p.detach(), torch.full_like(p, 0.9))


def test_a_float32_buffer_of_a_bf16_parameter_stays_float32(target):
    """torch.optim casts it to bf16 when a state dict is loaded (pytorch #43706)."""
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16, device=target.device))
    optimizer = target.sgd([p], lr=0.1, momentum=0.9)
    buf = torch.tensor([1.0, 1.001, 1.002], device=target.device)
    optimizer.state[p]["momentum_buffer"] = buf
    fresh = target.sgd([p], lr=0.1, momentum=0.9)
    fresh.load_state_dict(optimizer.state_dict())
    assert same_bits(fresh.state[p]["momentum_buffer"], buf)
    p.grad = torch.zeros_like(p)
    fresh.step()
    assert torch.equal(
        fresh.state[p]["momentum_buffer"], torch.tensor([1.0, 1.001, 1.002], device=target.device) * 0.9
    )


def test_pure_decay_of_bf16_weights(swift_target):
    """lr·λ = 5e-5 is below half an ulp of bf16: torch.optim.SGD leaves a weight at exactly 1. In a scale-invariant
    group the decay is in P, which is a float64."""
    p = nn.Parameter(torch.ones(8, dtype=torch.bfloat16, device=swift_target.device))
    optimizer = swift_target.sgd([p], lr=0.1, weight_decay=5e-4, scale_invariant=True)
    p.grad = torch.zeros_like(p)
    for _ in range(10_000):
        optimizer.step()
    optimizer.fold()
    expected = torch.tensor((1 - 5e-5) ** 10_000).bfloat16()  # 0.607
    assert torch.equal(p.detach().cpu(), expected.expand(8))


@pytest.mark.parametrize("foreach", [False, True])
def test_empty_tensors_anywhere_in_the_list(target, foreach):
    """An empty one at the end once left pending work unlaunched (pytorch #100811, TransformerEngine #3207)."""
    sizes = [0, 3, 0, 5, 0]
    params = [nn.Parameter(torch.ones(size, device=target.device)) for size in sizes]
    for p in params:
        p.grad = torch.ones_like(p)
    target.sgd(params, lr=0.5, momentum=0.9, foreach=foreach).step()
    assert all((p == 0.5).all() for p in params)


@pytest.mark.parametrize("scale_invariant", [False, True])
def test_gradients_are_read_only(target, scale_invariant):
    """Fused steps of others write unscaled or decayed gradients back."""
    p = nn.Parameter(torch.ones(5, device=target.device))
    p.grad = torch.randn(5).to(target.device)
    before, version = p.grad.clone(), p.grad._version
    target.sgd(
        [p], lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True, maximize=True, scale_invariant=scale_invariant
    ).step()
    assert same_bits(p.grad, before)
    assert p.grad._version == version


def _sharded(rank: int, rendezvous: str) -> None:
    """On two processes: steps of sharded parameters against steps of whole ones."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, 3, generator=generator)
    for scale_invariant in (False, True):
        arguments = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
        whole = nn.Parameter(start.clone())
        sharded = nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(0)]))
        optimizers = [
            texp.SGD([whole], scale_invariant=scale_invariant, backend="reference", **arguments),
            texp.SGD([sharded], scale_invariant=scale_invariant, **arguments),
        ]
        for _ in range(12):
            g = torch.randn(7, 3, generator=generator)
            whole.grad, sharded.grad = g, distribute_tensor(g, mesh, [Shard(0)])
            for optimizer in optimizers:
                optimizer.step()
        assert torch.equal(sharded.full_tensor(), whole)
        sums = reduce([Entry(sharded, sharded.grad), Entry(distribute_tensor(whole.detach(), mesh, [Replicate()]))])
        expected = reduce([Entry(whole, whole.grad), Entry(whole)])
        assert torch.allclose(sums, expected, rtol=22 * 2.0**-53, atol=0)  # 21 squares, in another order
        for optimizer in optimizers:
            optimizer.fold()
        assert torch.equal(sharded.full_tensor(), whole)
    dist.barrier()  # neither goes while the other still talks to it
    os._exit(0)  # not by gloo's own end, whose threads now and then abort a process that is done


def test_sharded_parameters(tmp_path):
    """NotImplementedError for a DTensor in torch.optim.SGD(fused=True)."""
    torch.multiprocessing.spawn(_sharded, args=(tmp_path / "rendezvous",), nprocs=2)

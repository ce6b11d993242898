"""A ResNet with channels_last under autocast, with the groups of texp.param_groups: P stays in [1, 2), and so do the
activations stay in the range of bf16 and fp16, however much the weights of the paper would have grown."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import texp
from tests.invariance.models import resnet

OPTIONS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.05}  # at the limit of the theorem's range: P grows fast


def train(make, dtype: torch.dtype) -> tuple[dict[str, float], list[float], torch.optim.Optimizer]:
    """The largest activation of each layer over 100 steps, and the losses."""
    torch.manual_seed(0)
    model = resnet().to(memory_format=torch.channels_last)
    optimizer = make(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype == torch.float16)
    largest, losses = {}, []

    def watch(name: str):
        def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            largest[name] = max(largest.get(name, 0.0), output.detach().abs().max().item())

        return hook

    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(watch(name))
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        x = torch.randn(16, 3, 8, 8, generator=generator).to(memory_format=torch.channels_last)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = cross_entropy(model(x).float(), x.mean((2, 3)).argmax(1))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert not getattr(optimizer, "step_was_skipped", False)
        losses.append(loss.item())
    return largest, losses, optimizer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_resnet_under_autocast(dtype):
    """Activations before a norm grow with P or P², so by less than 4; twice that for runs whose rounding differs. The
    paper's P is above 16 in the end: without the range they would have grown by more than 16, or 256."""
    plain, losses, _ = train(lambda model: torch.optim.SGD(model.parameters(), **OPTIONS), dtype)
    scaled, losses_in_exponential_form, optimizer = train(
        lambda model: texp.SGD(texp.param_groups(model, torch.randn(16, 3, 8, 8)), **OPTIONS), dtype
    )
    assert optimizer.param_groups[0]["scale_exponent"] >= 4
    assert max(scaled[name] / plain[name] for name in plain) < 8
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    # The same training but for rounding: of bf16 with 8 bits, over 100 steps.
    assert sum(losses_in_exponential_form[-20:]) == pytest.approx(sum(losses[-20:]), rel=0.1)

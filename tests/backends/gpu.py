"""What the tests of the kernels on a GPU share: arguments of texp.SGD, tensors on both sides, layouts."""

import pytest
import torch
from torch import nn

import texp
from tests.conftest import INTERPRETED

ARGUMENTS = {
    "plain": {"lr": 0.1, "weight_decay": 0.1},
    "heavy ball": {"lr": 0.1, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.1},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    "exponential": {"lr": 0.1, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.1, "scale_invariant": True},
    "exponential nesterov": {
        "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "scale_invariant": True,
    },
}  # fmt: skip
SHAPES = [(33, 7), (4096,), (4097,), (), (0,), (3, 5, 2, 2), (100_001,)]


def needs(backend: str) -> list:
    """Marks of tests of a backend on a GPU."""
    reason = texp.backends.available()[backend]
    if backend == "triton" and INTERPRETED:
        reason = "TRITON_INTERPRET=1 runs kernels on the CPU"
    return [pytest.mark.gpu, pytest.mark.skipif(reason != texp.backends.OK, reason=f"backend {backend}: {reason}")]


def twins(dtype: torch.dtype) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    return params, [nn.Parameter(p.detach().cuda()) for p in params]


def set_grads(cpu: list, cuda: list, seed: int, missing: tuple = ()) -> None:
    generator = torch.Generator().manual_seed(seed)
    for i, (p, q) in enumerate(zip(cpu, cuda, strict=True)):
        g = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad, q.grad = (None, None) if i in missing else (g, g.cuda())


def static_grads(on_gpu: list, grads: list) -> None:
    """Puts gradients where a graph reads them."""
    for q, fixed in zip(on_gpu, grads, strict=True):
        fixed.copy_(q.grad)
        q.grad = fixed


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "with gaps": lambda x: torch.stack((x, x + 9), -1)[..., 0],
    "misaligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
}

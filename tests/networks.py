"""Small networks for tests of equivalence, and a way to train one with any optimizer, step by step."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

STEPS = 250
_EPS = 1e-30  # normalisation's eps is not scale-free; in float64 this one does not count


class ScaleInvariant(nn.Module):
    """conv, norm, ReLU, conv, norm, ReLU, fixed head: L(cθ) = L(θ) for the two convolutions together. The second
    has a bias, which the norm after it does not see when it is a batch norm; it shares their scale."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 4, 3, padding=1, bias=False), norm(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 6, 3, padding=1), norm(6)
        self.head = nn.Linear(6, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.norm1(self.conv1(x)))
        x = relu(self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


def batch_norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, eps=_EPS, affine=False, track_running_stats=False)


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(2, channels, eps=_EPS, affine=False)


NORMS = {"batch": batch_norm, "group": group_norm}


def network(norm: str = "batch", device: str = "cpu", size: float = 3.0) -> ScaleInvariant:
    """In float64; the initial weights are multiplied by `size`, so that what a step changes of them, which goes
    with 1/size², is small enough for training not to be chaotic: chaos would amplify rounding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ScaleInvariant(NORMS[norm]).double()
        for p in trainable(model):
            p.detach().mul_(size)
        return model.to(device)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def backward(model: nn.Module, t: int) -> Tensor:
    """Grads of step t, on a batch that depends on t alone; returns the loss. The class of an image is its
    brightest third."""
    generator = torch.Generator().manual_seed(t)
    x = torch.randn(8, 1, 5, 5, generator=generator, dtype=torch.float64)
    y = torch.stack([third.mean((1, 2, 3)) for third in (x[..., :2], x[..., 2:3], x[..., 3:])]).argmax(0)
    device = next(model.parameters()).device
    model.zero_grad()
    loss = cross_entropy(model(x.to(device)), y.to(device))
    loss.backward()
    return loss.detach()

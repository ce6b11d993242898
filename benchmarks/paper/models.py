"""Networks whose whole loss is scale-invariant: norms are not trainable, and the last layer is fixed."""

import itertools

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

from benchmarks.paper.setup import Setup
from texp.cli.digits import PreActResNet


class VGG(nn.Module):
    """Convolutions, each with a norm and a ReLU: images (n, channels, size, size) to logits (n, 10). Each of them is
    scale-invariant by itself.

    The last one sees 4×4 pixels. With 2×2, some channel before an InstanceNorm is always nearly constant, and
    dividing by its standard deviation magnifies rounding errors until nothing can be compared.

    Args:
        norm: "gn" in groups of four channels, "ln" over all channels and pixels, "in" for each channel.
        size: of the images, 8, 16 or 32.
    """

    def __init__(self, norm: str, width: int = 8, channels: int = 1, size: int = 8) -> None:
        super().__init__()
        sizes = [channels, width, width, 2 * width, 4 * width]
        self.halvings = (size // 4).bit_length() - 1
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in itertools.pairwise(sizes))
        # The theorem is about norms without eps.
        self.norms = nn.ModuleList(
            nn.GroupNorm({"gn": size // 4, "ln": 1, "in": size}[norm], size, eps=1e-30, affine=False)
            for size in sizes[1:]
        )
        # Of all pixels, not of their mean: that of an InstanceNorm says next to nothing.
        self.head = nn.Linear(4 * 4 * sizes[-1], 10, bias=False).requires_grad_(False)
        nn.init.normal_(self.head.weight, std=0.05)

    def forward(self, x: Tensor) -> Tensor:
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if index >= len(self.convs) - self.halvings:
                x = max_pool2d(x, 2)
            x = relu(norm(conv(x)))
        return self.head(x.flatten(1))


def narrow_resnet() -> PreActResNet:
    """For digits: half as wide as that of texp.cli.digits; its last layer lets it tell the classes apart as well.

    As in the paper's training, the noise of the gradient must not die out: a wider one fits every digit, and then
    behaves as the toy example does; a smaller last layer keeps the loss where it is, whatever the LR.
    """
    model = PreActResNet(width=4)
    nn.init.normal_(model.head.weight, std=0.25)
    return model


# By name; each takes whether it is for CIFAR-10. The resnet for CIFAR-10 is the paper's PreResNet32, 6·5 + 2 layers.
MODELS = {
    "resnet": lambda cifar10: PreActResNet(16, 5, 3) if cifar10 else narrow_resnet(),
    **{
        f"vgg-{norm}": lambda cifar10, norm=norm: VGG(norm, 32, 3, 32) if cifar10 else VGG(norm)
        for norm in ("gn", "ln", "in")
    },
}


def make(name: str, setup: Setup, seed: int) -> nn.Module:
    """The model with the initialisation of `seed`, which does not depend on the device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name](setup.data == "cifar10").to(setup.device, setup.dtype)

"""Small models of every kind that texp.audit must tell apart, from torch alone, with the parameters that are
scale-invariant in each, worked out by hand. Images are (n, 3, 8, 8), tokens (n, 6) below 11."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, relu, scaled_dot_product_attention, softplus

CLASSES, VOCABULARY = 3, 11


def conv(
    channels_in: int, channels: int, size: int = 3, stride: int = 1, bias: bool = False, groups: int = 1
) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, size, stride, size // 2, groups=groups, bias=bias)


class Head(nn.Linear):
    def __init__(self, features: int) -> None:
        super().__init__(features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean((2, 3)) if x.dim() == 4 else x)


def vgg(bias: bool = False, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, act=nn.ReLU) -> nn.Module:
    return nn.Sequential(
        conv(3, 8, bias=bias), norm(8), act(), conv(8, 8, bias=bias), norm(8), act(), nn.MaxPool2d(2),
        conv(8, 12, bias=bias), norm(12), act(), nn.Dropout(0.3), Head(12),
    )  # fmt: skip


class Wrapped(nn.Module):
    """`how` turns the VGG and the input into an output, or into something else."""

    def __init__(self, how: Callable, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.model, self.how = vgg(), how
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args) -> object:
        return self.how(self, *args)


class BasicBlock(nn.Module):
    """ResNet's: the scale of the last norm starts at zero, as in many recipes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels_in, channels, 3, stride), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv(channels, channels), nn.BatchNorm2d(channels)
        nn.init.zeros_(self.bn2.weight)
        self.down = None
        if stride != 1 or channels_in != channels:
            self.down = nn.Sequential(conv(channels_in, channels, 1, stride), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return relu(y + (x if self.down is None else self.down(x)))


def resnet() -> nn.Module:
    blocks = [BasicBlock(6, 6, 1), BasicBlock(6, 6, 1), BasicBlock(6, 8, 2), BasicBlock(8, 8, 1)]
    return nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), *blocks, Head(8))


class PreActBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels_in), conv(channels_in, channels, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), conv(channels, channels)
        same = stride == 1 and channels_in == channels
        self.shortcut = None if same else conv(channels_in, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.bn1(x))
        return self.conv2(relu(self.bn2(self.conv1(y)))) + (x if self.shortcut is None else self.shortcut(y))


def preact() -> nn.Module:
    blocks = [PreActBlock(6, 6, 1), PreActBlock(6, 6, 1), PreActBlock(6, 8, 2), PreActBlock(8, 8, 1)]
    return nn.Sequential(conv(3, 6), *blocks, nn.BatchNorm2d(8), nn.ReLU(), Head(8))


class PowerTwo(nn.Module):
    """Two convolutions in a row before a norm: its input grows with the square."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn, self.head = conv(3, 6), conv(6, 6, 1), nn.BatchNorm2d(6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(relu(self.bn(self.b(relu(self.a(x))))))


class DenseLayer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv(channels, 8, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv2(relu(self.bn2(self.conv1(relu(self.bn1(x))))))], 1)


def densenet() -> nn.Module:
    transition = [nn.BatchNorm2d(14), nn.ReLU(), conv(14, 6, 1), nn.AvgPool2d(2)]
    return nn.Sequential(
        conv(3, 6), DenseLayer(6), DenseLayer(10), *transition, DenseLayer(6), nn.BatchNorm2d(10), nn.ReLU(), Head(10)
    )


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = conv(channels, 4, 1, bias=True), conv(4, channels, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(relu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


def se_net() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.SiLU(), conv(8, 8, groups=8), nn.BatchNorm2d(8), nn.SiLU(),
        SqueezeExcitation(8), conv(8, 8, 1), nn.BatchNorm2d(8), Head(8),
    )  # fmt: skip


def weight_norm() -> nn.Module:
    normed = nn.utils.parametrizations.weight_norm
    return nn.Sequential(normed(conv(3, 8)), nn.ReLU(), normed(conv(8, 8, bias=True)), nn.ReLU(), Head(8))


class ChannelNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Its gates start at 1e-6; whole samples skip it, one in five (stochastic depth)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise, self.norm = conv(channels, channels, groups=channels, bias=True), nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.gate = nn.Parameter(torch.full((channels,), 1e-6))
        self.drop = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.drop((self.gate * self.down(gelu(self.up(y)))).permute(0, 3, 1, 2))


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(len(x), 1, 1, 1) < 0.8) if self.training else x


def convnext() -> nn.Module:
    blocks = [ConvNeXtBlock(6), ConvNeXtBlock(6), ChannelNorm(6), conv(6, 8, 2, 2, bias=True), ConvNeXtBlock(8)]
    return nn.Sequential(conv(3, 6, 1, bias=True), ChannelNorm(6), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.LayerNorm(8), Head(8))  # fmt: skip


class Attention(nn.Module):
    """With QK-norm, only the values have a bias."""

    def __init__(self, width: int, qk_norm: bool) -> None:
        super().__init__()
        self.q, self.k, self.proj = (nn.Linear(width, width, bias=not qk_norm) for _ in range(3))
        self.v = nn.Linear(width, width)
        self.q_norm, self.k_norm = (nn.LayerNorm(width // 2) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, is_causal=True)
        return self.proj(y.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, qk_norm: bool) -> None:
        super().__init__()
        self.ln1, self.attention, self.ln2 = nn.LayerNorm(width), Attention(width, qk_norm), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=not qk_norm)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.ln1(x)))
        return x + self.dropout(self.down(gelu(self.up(self.ln2(x)))))


class GPT(nn.Module):
    """Pre-norm; tokens (n, length) to logits (n, length, VOCABULARY)."""

    def __init__(self, tied: bool, qk_norm: bool = False, width: int = 8) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(6, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, qk_norm) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x)))


class UsedTwice(nn.Module):
    """One convolution before a norm and again at the end, where it is not invariant; one before two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = conv(3, 6), nn.BatchNorm2d(6)
        self.twice, self.bn1, self.bn2 = conv(6, 6), nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.shared, self.bn3, self.head = conv(6, 6, 1), nn.BatchNorm2d(6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.bn0(self.stem(x)))
        x = relu(self.bn2(self.twice(relu(self.bn1(self.twice(x))))))
        return self.head(self.shared(relu(self.bn3(self.shared(x)))))


class Unused(nn.Module):
    """A frozen convolution, one that nobody calls, and a scale-free bias on keys."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.conv, self.bn = conv(3, 6).requires_grad_(False), conv(6, 6), nn.BatchNorm2d(6)
        self.forgotten, self.shift, self.head = conv(6, 6), nn.Parameter(torch.ones(())), Head(6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.head(relu(self.bn(self.conv(softplus(self.frozen(x))))))
        return {"probabilities": (logits + self.shift).softmax(1), "labels": logits.argmax(1)}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), Head(8))


@dataclass(frozen=True)
class Case:
    """What is known of a model. Names are patterns as for files."""

    make: Callable[[], nn.Module]
    left_out: tuple[str, ...] = ()  # trainable parameters that are not scale-invariant, or
    scaled: tuple[str, ...] = ()  # those that are, whichever are fewer
    held: tuple[str, ...] = ()  # weights that are not, either, where biases and norms must not be scaled
    tokens: bool = False
    without_effect: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()  # of these, those without any gradient

    def invariant(self, model: nn.Module, no_decay: bool) -> set[str]:
        def some(patterns: tuple[str, ...]) -> set[str]:
            return {
                n for n, p in model.named_parameters() if p.requires_grad and any(fnmatch(n, x) for x in patterns)
            }

        if not no_decay:
            return some(self.scaled) if self.scaled else some(("*",)) - some(self.left_out)
        weights = {n for n in some(("*",)) if model.get_parameter(n).dim() > 1 and not n.endswith("bias")}
        return weights - some(self.held)

    def model(self, eps: float | None = 1e-30) -> nn.Module:
        """In float64, from seed 0, with this eps in its norms (None: their own)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.make().double()
        for module in model.modules():
            if eps is not None and hasattr(module, "eps"):
                module.eps = eps
        return model

    def batch(self, t: int, size: int = 6) -> tuple[Tensor, Tensor]:
        """Random images and their brightest colour, or tokens and their sums with the one before."""
        generator = torch.Generator().manual_seed(t)
        if self.tokens:
            x = torch.randint(0, VOCABULARY, (size, 6), generator=generator)
            return x, (x + x.roll(1, 1)) % VOCABULARY
        x = torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64)
        return x, x.mean((2, 3)).argmax(1)

    def step(self, models: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer], t: int) -> list[float]:
        """Trains each model on batch t; returns the losses."""
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss = self.loss(model, t)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def loss(self, model: nn.Module, t: int) -> Tensor:
        device = next(model.parameters()).device
        x, y = (tensor.to(device) for tensor in self.batch(t))
        with torch.random.fork_rng():
            torch.manual_seed(t)
            out = self.logits(model(x))
        return cross_entropy(out.flatten(0, -2), y.flatten())

    def evaluate(self, model: nn.Module) -> Tensor:
        """Outputs in eval mode; the model is in train mode after it."""
        with torch.no_grad():
            out = self.logits(model.eval()(self.batch(1000)[0].to(next(model.parameters()).device)))
        model.train()
        return out

    def logits(self, out: Tensor | dict[str, Tensor]) -> Tensor:
        return out["probabilities"].log() if isinstance(out, dict) else out


LAST = ("8.*", "11.*")  # the last norm and the head of `vgg`
VGG = {"left_out": LAST, "held": ("11.*",)}

CASES = {
    "VGG": Case(vgg, **VGG),
    # Scales would bring the input of the next norm to P², where the bias before it cannot follow.
    "VGG, biases before norms": Case(
        lambda: vgg(bias=True), ("1.*", "4.*", *LAST), held=("11.*",), without_effect=("0.bias", "3.bias", "7.bias")
    ),
    "VGG, GELU": Case(lambda: vgg(act=nn.GELU), ("1.*", "4.*", *LAST), held=("11.*",)),
    "GroupNorm": Case(lambda: vgg(norm=lambda n: nn.GroupNorm(2, n)), **VGG),
    "LayerNorm": Case(lambda: vgg(norm=ChannelNorm), **VGG),
    "InstanceNorm": Case(
        lambda: vgg(norm=lambda n: nn.InstanceNorm2d(n, affine=True, track_running_stats=True)), **VGG
    ),
    "InstanceNorm, biases before it": Case(
        lambda: vgg(bias=True, norm=lambda n: nn.InstanceNorm2d(n, affine=True)),
        ("0.bias", "3.bias", "7.bias", *LAST),
        held=("11.*",),
        without_effect=("0.bias", "3.bias", "7.bias"),
    ),
    "weight norm": Case(weight_norm, scaled=("*original1",), held=("4.*", "*original0")),
    "two in a row": Case(PowerTwo, ("bn.*", "head.*"), held=("head.*",)),
    "ResNet": Case(resnet, ("5.bn2.*", "5.down.1.*", "6.bn2.*", "7.*"), held=("7.*",)),
    # Both convolutions of a block end at the power of the stream; only after the first shortcut is that P².
    "pre-activation ResNet": Case(preact, ("[12].bn2.*", "5.*", "7.*"), held=("7.*",)),
    "DenseNet": Case(densenet, ("[12].bn2.*", "8.*", "10.*"), held=("10.*",)),
    "squeeze-and-excitation": Case(se_net, scaled=("[037].weight",), held=("6.*", "9.*")),
    # All that writes to the stream of a stage; biases that would have to grow with it are held without decay.
    "ConvNeXt": Case(convnext, scaled=("[015].*", "*.down.*", "*.depthwise.bias"), held=("*",)),
    "GPT": Case(
        lambda: GPT(tied=False),
        scaled=("tokens.*", "positions.*", "*.down.*", "*.v.*", "*.proj.bias"),
        held=("*",),
        tokens=True,
        without_effect=("*.k.bias",),
    ),
    "GPT, tied head": Case(lambda: GPT(tied=True), ("*",), held=("*",), tokens=True, without_effect=("*.k.bias",)),
    "GPT, QK-norm": Case(
        lambda: GPT(tied=False, qk_norm=True),
        scaled=("tokens.*", "positions.*", "*.down.*", "*.v.*", "*.[qk].weight"),
        held=("*.v.*", "*.up.*", "head.*"),
        tokens=True,
        without_effect=("*.k_norm.bias",),
    ),
    "used twice": Case(UsedTwice, ("shared.*", "bn3.*", "head.*"), held=("shared.*", "head.*")),
    "unused": Case(
        Unused,
        scaled=("conv.*",),
        held=("forgotten.*", "head.*"),
        without_effect=("forgotten.*", "shift"),
        unreached=("forgotten.*",),
    ),
    "no norm": Case(mlp, ("*",), held=("*",)),
}


def example(n: int = 4) -> Tensor:
    """Images for any of them; in float32."""
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))

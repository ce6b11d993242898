"""Parameter shapes of well-known models, for benchmarks: what an optimizer sees of them."""

Shape = tuple[int, ...]


def resnet32() -> list[Shape]:
    """ResNet-32 for CIFAR-10 (He et al. 2015), shortcuts without parameters."""
    shapes = _conv_norm(16, 3, 3)
    for stage, width in enumerate((16, 32, 64)):
        for block in range(5):
            first = width // 2 if stage > 0 and block == 0 else width
            shapes += _conv_norm(width, first, 3) + _conv_norm(width, width, 3)
    return [*shapes, (10, 64), (10,)]


def resnet50() -> list[Shape]:
    """ResNet-50 for ImageNet."""
    shapes, channels = _conv_norm(64, 3, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += _conv_norm(width, channels, 1) + _conv_norm(width, width, 3) + _conv_norm(4 * width, width, 1)
            if block == 0:
                shapes += _conv_norm(4 * width, channels, 1)
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def efficientnet_b0() -> list[Shape]:
    """EfficientNet-B0 (Tan & Le 2019)."""
    shapes, channels = _conv_norm(32, 3, 3), 32
    stages = (
        (1, 3, 16, 1),
        (6, 3, 24, 2),
        (6, 5, 40, 2),
        (6, 3, 80, 3),
        (6, 5, 112, 3),
        (6, 5, 192, 4),
        (6, 3, 320, 1),
    )
    for expansion, kernel, width, blocks in stages:
        for _ in range(blocks):
            inner, squeezed = channels * expansion, channels // 4
            if expansion != 1:
                shapes += _conv_norm(inner, channels, 1)
            shapes += _conv_norm(inner, 1, kernel)
            shapes += [(squeezed, inner, 1, 1), (squeezed,), (inner, squeezed, 1, 1), (inner,)]
            shapes += _conv_norm(width, inner, 1)
            channels = width
    return [*shapes, *_conv_norm(1280, 320, 1), (1000, 1280), (1000,)]


def vit_b() -> list[Shape]:
    """ViT-B/16 for ImageNet."""
    layer = [(768,), (768,), (3 * 768, 768), (3 * 768,), *_linear(768, 768), (768,), (768,)]
    layer += [*_linear(3072, 768), *_linear(768, 3072)]
    stem = [(1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,)]
    return [*stem, *layer * 12, (768,), (768,), *_linear(1000, 768)]


def bert_large() -> list[Shape]:
    """BERT-large, uncased, with its pooler."""
    norm = [(1024,), (1024,)]
    layer = [*_linear(1024, 1024) * 4, *norm, *_linear(4096, 1024), *_linear(1024, 4096), *norm]
    return [(30522, 1024), (512, 1024), (2, 1024), *norm, *layer * 24, *_linear(1024, 1024)]


def _conv_norm(channels: int, channels_in: int, kernel: int) -> list[Shape]:
    return [(channels, channels_in, kernel, kernel), (channels,), (channels,)]


def _linear(out: int, features: int) -> list[Shape]:
    return [(out, features), (out,)]


# By name: the shapes, and whether each tensor is a parameter group of its own.
MODELS: dict[str, tuple[list[Shape], bool]] = {
    "161 tiny tensors": ([(10,)] * 161, False),
    "465 tiny groups": ([(10,)] * 465, True),
    "ResNet-32": (resnet32(), False),
    "EfficientNet-B0": (efficientnet_b0(), False),
    "ResNet-50": (resnet50(), False),
    "one of 50 M": ([(50_000_000,)], False),
    "ViT-B": (vit_b(), False),
    "BERT-large": (bert_large(), False),
}

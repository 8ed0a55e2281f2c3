"""Ways from pixels to tokens that need no pretrained weights."""

import math

from torch import nn

from ..options import check_choice


def patch_grid(image_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """(H, W) in pixels -> (h, w) in patches.

    Raises:
        ValueError: the size is no multiple of the patch size.
    """
    if image_size[0] % patch_size or image_size[1] % patch_size:
        raise ValueError(f"image size {image_size} is not a multiple of patch size {patch_size}")
    return image_size[0] // patch_size, image_size[1] // patch_size


def build_stem(key: str, name: str, *, dim: int, patch_size: int, bias: bool = True) -> nn.Module:
    """Build a patch embedding (B, 3, H, W) -> (B, dim, h, w).

    Args:
        key: the config key that names it.
        name: patch, a linear map of each patch, or conv, see ``conv_stem``.
        bias: of the linear map.

    Raises:
        ValueError: for another name.
    """
    check_choice(key, name, ("patch", "conv"))
    if name == "conv":
        return conv_stem(dim=dim, patch_size=patch_size)
    return nn.Conv2d(3, dim, patch_size, patch_size, bias=bias)


def conv_stem(*, dim: int, patch_size: int) -> nn.Sequential:
    """Pairs of 3x3 convolutions, the first of each with stride 2, down to one token per patch.

    Ours: it replaces the linear patch embedding where no pretrained weights are used. It runs
    once per image, so that it is cheap beside the layers, which run once per expression.
    """
    steps = int(math.log2(patch_size))
    if 2**steps != patch_size:
        raise ValueError(f"the conv stem needs a power of two as patch size, not {patch_size}")
    layers, channels = [], 3
    for step in range(steps):
        width = dim >> max(2 - step, 0)  # d/4, d/2, d, d, ...
        for in_channels, stride in ((channels, 2), (width, 1)):
            layers += [
                nn.Conv2d(in_channels, width, 3, stride, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.GELU(),
            ]
        channels = width
    return nn.Sequential(*layers, nn.Conv2d(channels, dim, 1))

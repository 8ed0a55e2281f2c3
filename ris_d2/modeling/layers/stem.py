"""Ways from pixels to tokens that need no pretrained weights."""

import math

from torch import nn


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

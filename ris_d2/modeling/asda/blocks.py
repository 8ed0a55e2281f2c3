"""The convolution block that all of ASDA is made of."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.layers import get_norm
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Norm:
    """Makes normalisation layers.

    Attributes:
        name: BN, SyncBN, nnSyncBN, GN, ... as in detectron2.
        momentum: weight of the last batch in the running statistics; None = PyTorch's 0.1.
    """

    name: str
    momentum: float | None = None

    def __call__(self, channels: int) -> nn.Module:
        norm = get_norm(self.name, channels)
        if self.momentum is not None and hasattr(norm, "momentum"):
            norm.momentum = self.momentum
        return norm


class ConvBlock(nn.Sequential):
    """Convolution without bias, norm, LeakyReLU(0.1); the size stays."""

    def __init__(self, in_dim: int, out_dim: int, *, kernel: int, norm: Norm):
        super().__init__(
            nn.Conv2d(in_dim, out_dim, kernel, padding=kernel // 2, bias=False),
            norm(out_dim),
            nn.LeakyReLU(0.1, inplace=True),
        )


class UpsamplingBlock(ConvBlock):
    """x2 by nearest neighbours, then a ``ConvBlock`` with a 3x3 kernel."""

    def __init__(self, in_dim: int, out_dim: int, *, phases: bool, norm: Norm):
        """
        Args:
            phases: the same function with 4/9 of the multiply-adds: of the nine pixels that a kernel
                sees, only four differ, so that each of the four places in a pixel's successors is a
                2x2 convolution of the small map.
        """
        super().__init__(in_dim, out_dim, kernel=3, norm=norm)
        self.phases = phases

    def forward(self, x: Tensor) -> Tensor:
        """(E, in_dim, h, w) -> (E, out_dim, 2 h, 2 w)"""
        if not self.phases:
            return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"))
        height, width = x.shape[-2:]
        padded = F.pad(x, (1, 1, 1, 1))
        rows = []
        for i, kernels in enumerate(_halves(self[0].weight, 2)):
            row = [
                F.conv2d(padded[..., i : i + height + 1, j : j + width + 1], kernel)
                for j, kernel in enumerate(_halves(kernels, 3))
            ]
            # (E, h, w, C) twice -> (E, h, 2 w, C)
            rows.append(torch.stack([y.permute(0, 2, 3, 1) for y in row], 3).flatten(2, 3))
        large = torch.stack(rows, 2).flatten(1, 2).permute(0, 3, 1, 2)
        return self[2](self[1](large))


def _halves(kernel: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """A kernel's three taps along ``dim`` -> the two taps of even and of odd outputs."""
    first, middle, last = kernel.unbind(dim)
    return torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)

"""Feature Enhancement of RISAM (Eq. 1 and 2)."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import get_norm
from torch import Tensor, nn


class FeatureEnhancement(nn.Module):
    """Fuse shallow with middle features, and the result with deep ones.

    F^ = CBA([MLP(F_v1), MLP(F_v2)]),  F_v = CBA([MLP(F^), MLP(F_v3)])
    """

    def __init__(
        self, *, channels: Sequence[int], dim: int, mlp_layers: int, num_convs: int, norm: str
    ):
        """
        Args:
            channels: of F_v1, F_v2, F_v3.
            dim: C of the fused features. (The paper has one C for backbone and head, which would be
                59M parameters here instead of 6M in all.)
            mlp_layers: linear layers of an MLP, 1 or 2.
            num_convs: 3x3 convolutions in a CBA.
            norm: BN, SyncBN, GN, ...
        """
        super().__init__()
        shallow, middle, deep = channels
        self.shallow = _mlp(shallow, dim, mlp_layers)
        self.middle = _mlp(middle, dim, mlp_layers)
        self.early = _mlp(dim, dim, mlp_layers)
        self.deep = _mlp(deep, dim, mlp_layers)
        self.fuse_early = conv_norm_act(2 * dim, dim, num_convs, norm)
        self.fuse_deep = conv_norm_act(2 * dim, dim, num_convs, norm)

    def forward(self, features: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """F_v1, F_v2, F_v3 (B, C_i, h_i, w_i) -> F_v (B, dim, h, w); maps are brought to ``grid`` = (h, w)."""
        shallow, middle, deep = (channels_last(resize(x, grid)) for x in features)
        early = self.fuse_early(_concatenate(self.shallow(shallow), self.middle(middle)))
        return self.fuse_deep(_concatenate(self.early(channels_last(early)), self.deep(deep)))


def conv_norm_act(in_channels: int, channels: int, num_convs: int, norm: str) -> nn.Sequential:
    """Build the paper's CBA: 3x3 convolutions, one normalisation, GELU."""
    inputs = [in_channels] + [channels] * (num_convs - 1)
    convs = [nn.Conv2d(c, channels, 3, padding=1, bias=False) for c in inputs]
    return nn.Sequential(*convs, get_norm(norm, channels), nn.GELU())


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, where the map (B, C, h, w) has another size."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def _mlp(in_dim: int, dim: int, layers: int) -> nn.Sequential:
    dims = [in_dim] + [dim] * layers
    linears = [nn.Linear(a, b) for a, b in itertools.pairwise(dims)]
    return nn.Sequential(*[m for x in linears for m in (x, nn.GELU())][:-1])


def _concatenate(*channel_last: Tensor) -> Tensor:
    return channels_first(torch.cat(channel_last, -1))


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)

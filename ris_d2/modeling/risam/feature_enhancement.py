"""Feature Enhancement of RISAM (Eq. 1 and 2)."""

from collections.abc import Sequence

import torch
from detectron2.layers import get_norm
from torch import Tensor, nn

from ..layers import MLP, resize_maps


class FeatureEnhancement(nn.Module):
    """Fuse shallow with middle features, and the result with deep ones.

    F^ = CBA([MLP(F_v1), MLP(F_v2)]),  F_v = CBA([MLP(F^), MLP(F_v3)])

    An MLP has two linear layers, a CBA one convolution: what the paper leaves open.
    """

    def __init__(self, *, channels: Sequence[int], dim: int, norm: str):
        """
        Args:
            channels: of F_v1, F_v2, F_v3.
            dim: C of the fused features. (The paper has one C for backbone and head, which would be
                59M parameters here instead of 6M in all.)
            norm: BN, SyncBN, GN, ...
        """
        super().__init__()
        shallow, middle, deep = channels
        self.shallow = MLP(shallow, dim, dim)
        self.middle = MLP(middle, dim, dim)
        self.early = MLP(dim, dim, dim)
        self.deep = MLP(deep, dim, dim)
        self.fuse_early = conv_norm_act(2 * dim, dim, norm)
        self.fuse_deep = conv_norm_act(2 * dim, dim, norm)

    def forward(self, features: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """F_v1, F_v2, F_v3 (B, C_i, h_i, w_i), resized to ``grid`` (h, w) -> F_v (B, dim, h, w)."""
        shallow, middle, deep = (resize_maps(x, grid).movedim(1, -1) for x in features)
        early = torch.cat([self.shallow(shallow), self.middle(middle)], -1)
        early = self.fuse_early(early.movedim(-1, 1)).movedim(1, -1)
        fused = torch.cat([self.early(early), self.deep(deep)], -1)
        return self.fuse_deep(fused.movedim(-1, 1))


def conv_norm_act(in_dim: int, dim: int, norm: str) -> nn.Sequential:
    """Build the paper's CBA: a 3x3 convolution, normalisation, GELU."""
    conv = nn.Conv2d(in_dim, dim, 3, padding=1, bias=False)
    return nn.Sequential(conv, get_norm(norm, dim), nn.GELU())

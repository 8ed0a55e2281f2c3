"""What ASDA's tables swap in: other selection networks, other aggregators."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import MLP
from ..options import check_choice
from .afs import Selected
from .blocks import ConvBlock
from .sfa import ScaleWiseAggregator


def build_network(name: str, *, dim: int, candidates: int) -> nn.Module:
    """Build Phi_as: scores (E, K, dim) of Eq. 1 -> logits (E, K) (Table 5).

    - linear: one Linear(dim, 1) for every candidate, as released (its bias would cancel).
    - concat: Linear(K dim, K) on the concatenation, Eq. 2 to the letter.
    - conv: a convolution of width 3 over the candidates. Ours; nothing of it is released.
    - mlp: K dim -> 1024 -> 256 -> K on the concatenation; widths of a comment in the released code.

    Raises:
        ValueError: for an unknown name.
    """
    wide = candidates * dim
    check_choice("MODEL.ASDA.SELECTION.NETWORK", name, ("linear", "concat", "conv", "mlp"))
    if name == "linear":
        return nn.Sequential(nn.Linear(dim, 1, bias=False), nn.Flatten())
    if name == "concat":
        return nn.Sequential(nn.Flatten(), nn.Linear(wide, candidates))
    if name == "conv":
        return CandidateConv(dim=dim)
    return nn.Sequential(nn.Flatten(), *MLP(wide, 1024, 256, candidates, activation=nn.ReLU))


class CandidateConv(nn.Module):
    """Each candidate's logit sees its neighbours."""

    def __init__(self, *, dim: int):
        super().__init__()
        self.conv = nn.Conv1d(dim, 1, 3, padding=1, bias=False)

    def forward(self, scores: Tensor) -> Tensor:
        """(E, K, dim) -> (E, K)"""
        return self.conv(scores.transpose(1, 2)).squeeze(1)


def build_aggregator(name: str, *, vision_dim: int, dim: int, norm: str) -> nn.Module:
    """Build what MODEL.ASDA.AGGREGATOR names.

    Raises:
        ValueError: for an unknown name.
    """
    kinds = {"released": ScaleWiseAggregator, "concat": ConcatAggregator, "none": TopOnly}
    check_choice("MODEL.ASDA.AGGREGATOR", name, (*kinds, "paper"))
    if name == "paper":
        return DownscaleAggregator(vision_dim=vision_dim, dim=dim)
    return kinds[name](vision_dim=vision_dim, dim=dim, norm=norm)


class DownscaleAggregator(nn.Module):
    """The Scale-wise Feature Aggregator of Eq. 5: middle / 2, low / 4, summed from the bottom up.

    Eq. 5 does not say how levels shrink and grow: by average pooling (uneven rests kept, as 26 is
    no multiple of 4) and nearest neighbours.
    """

    def __init__(self, *, vision_dim: int, dim: int, lateral_dim: int = 32):
        super().__init__()
        self.low = nn.Conv2d(vision_dim, lateral_dim, 1)
        self.mid = nn.Sequential(nn.Conv2d(vision_dim, lateral_dim, 1), nn.ReLU())
        self.top = nn.Sequential(nn.Conv2d(vision_dim, lateral_dim, 1), nn.ReLU())
        self.out = nn.Conv2d(lateral_dim, dim, 3, padding=1)

    def forward(self, fused: Tensor, selected: dict[str, Selected]) -> Tensor:
        """As ``ScaleWiseAggregator``."""
        mid, low = selected["mid"], selected["low"]
        x = self.mid(F.avg_pool2d(mid.features, 2, ceil_mode=True))[mid.rows]
        bottom = self.low(F.avg_pool2d(low.features, 4, ceil_mode=True))[low.rows]
        x = x + F.interpolate(bottom, size=x.shape[-2:], mode="nearest")
        return self.out(self.top(fused) + F.interpolate(x, size=fused.shape[-2:], mode="nearest"))


class ConcatAggregator(nn.Module):
    """Concatenation and projection on one scale, after CRIS (Table 2 b and c)."""

    def __init__(self, *, vision_dim: int, dim: int, norm: str):
        super().__init__()
        self.mid = ConvBlock(vision_dim, vision_dim, kernel=1, norm=norm)
        self.mid_out = ConvBlock(2 * vision_dim, vision_dim, kernel=1, norm=norm)
        self.low = ConvBlock(vision_dim, vision_dim, kernel=1, norm=norm)
        self.low_out = ConvBlock(2 * vision_dim, dim, kernel=1, norm=norm)

    def forward(self, fused: Tensor, selected: dict[str, Selected]) -> Tensor:
        """As ``ScaleWiseAggregator``."""
        mid, low = selected["mid"], selected["low"]
        x = self.mid_out(torch.cat([fused, self.mid(mid.features)[mid.rows]], 1))
        return self.low_out(torch.cat([x, self.low(low.features)[low.rows]], 1))


class TopOnly(nn.Module):
    """F_G alone (Table 2 a)."""

    def __init__(self, *, vision_dim: int, dim: int, norm: str):
        super().__init__()
        self.project = ConvBlock(vision_dim, dim, kernel=1, norm=norm)

    def forward(self, fused: Tensor, selected: dict[str, Selected]) -> Tensor:
        """As ``ScaleWiseAggregator``; nothing is selected."""
        return self.project(fused)

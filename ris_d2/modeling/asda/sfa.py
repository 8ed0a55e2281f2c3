"""Fusion with the sentence and the Scale-wise Feature Aggregator (Eq. 4 and 5)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .afs import Selected
from .blocks import ConvBlock, Norm


class GlobalFusion(nn.Module):
    """F_G: the last layer's features times the sentence (Eq. 4).

    As released, both are projected to one width first (the features once per image, outside), which
    Eq. 4 leaves out (768 and 512 do not match), and the product is normalised.
    """

    def __init__(self, *, vision_dim: int, text_dim: int, norm: Norm):
        super().__init__()
        # Released with PyTorch's usual momentum, unlike all other norms.
        usual = Norm(name=norm.name)
        self.words = nn.Linear(text_dim, vision_dim)
        self.words_norm = usual(vision_dim)
        self.norm = usual(vision_dim)

    def forward(self, top: Tensor, sentence: Tensor, image_index: Tensor) -> Tensor:
        """
        Args:
            top: (B, C, h, w), the projected features.
            sentence: (E, D).
            image_index: int64 (E,).

        Returns:
            (E, C, h, w)

        Raises:
            ValueError: one expression in training, of which BatchNorm has no statistics.
        """
        if self.training and len(sentence) == 1 and isinstance(self.words_norm, nn.BatchNorm2d):
            raise ValueError(
                "ASDA's BatchNorm on sentences needs two expressions per process and step: raise "
                "SOLVER.IMS_PER_BATCH, or set MODEL.ASDA.NORM to SyncBN (several GPUs) or GN"
            )
        words = self.words_norm(self.words(sentence)[..., None, None])  # (E, C, 1, 1)
        product = top[image_index] * F.leaky_relu(words, 0.1)
        return F.leaky_relu(self.norm(product), 0.1, inplace=True)


class ScaleWiseAggregator(nn.Module):
    """The Scale-wise Feature Aggregator as released.

    Selected levels are enlarged (middle x2, low x4) and summed from the top down; the sum is pooled
    back to the input's grid. The paper's form is ``DownscaleAggregator``.
    """

    def __init__(self, *, vision_dim: int, dim: int, norm: Norm):
        super().__init__()
        half, quarter = vision_dim // 2, vision_dim // 4
        self.top = nn.Sequential(
            ConvBlock(vision_dim, dim, kernel=1, norm=norm),
            ConvBlock(dim, dim, kernel=3, norm=norm),
        )
        self.mid = nn.Sequential(
            nn.ConvTranspose2d(vision_dim, half, 2, 2),
            ConvBlock(half, dim, kernel=1, norm=norm),
            ConvBlock(dim, dim, kernel=3, norm=norm),
        )
        self.low = nn.Sequential(
            *(nn.ConvTranspose2d(vision_dim, half, 2, 2), norm(half), nn.GELU()),
            nn.ConvTranspose2d(half, quarter, 2, 2),
            ConvBlock(quarter, dim, kernel=1, norm=norm),
            ConvBlock(dim, dim, kernel=3, norm=norm),
        )
        self.lateral = nn.ModuleDict(
            {name: ConvBlock(dim, dim, kernel=1, norm=norm) for name in ("top", "mid", "low")}
        )
        self.out = ConvBlock(dim, dim, kernel=3, norm=norm)

    def forward(self, fused: Tensor, selected: dict[str, Selected]) -> Tensor:
        """F_coarse.

        Args:
            fused: (E, C, h, w), F_G.
            selected: "low" and "mid"; a map is enlarged once however many expressions chose it.

        Returns:
            (E, dim, h, w)
        """
        mid, low = selected["mid"], selected["low"]
        x = self.lateral["top"](self.top(fused))
        x = _double(x) + self.lateral["mid"](self.mid(mid.features))[mid.rows]
        x = _double(x) + self.lateral["low"](self.low(low.features))[low.rows]
        return F.max_pool2d(self.out(x), 4)


class DownscaleAggregator(nn.Module):
    """The Scale-wise Feature Aggregator of Eq. 5: middle / 2, low / 4, summed from the bottom up.

    Eq. 5 does not say how levels shrink and grow: by average pooling (uneven rests kept, as 26 is no
    multiple of 4) and nearest neighbours.
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

    def __init__(self, *, vision_dim: int, dim: int, norm: Norm):
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

    def __init__(self, *, vision_dim: int, dim: int, norm: Norm):
        super().__init__()
        self.project = ConvBlock(vision_dim, dim, kernel=1, norm=norm)

    def forward(self, fused: Tensor, selected: dict[str, Selected]) -> Tensor:
        """As ``ScaleWiseAggregator``; nothing is selected."""
        return self.project(fused)


def build_aggregator(name: str, *, vision_dim: int, dim: int, norm: Norm) -> nn.Module:
    """Build what MODEL.ASDA.AGGREGATOR names.

    Raises:
        ValueError: for an unknown name.
    """
    if name == "paper":
        return DownscaleAggregator(vision_dim=vision_dim, dim=dim)
    kinds = {"released": ScaleWiseAggregator, "concat": ConcatAggregator, "none": TopOnly}
    if name not in kinds:
        raise ValueError(
            f"MODEL.ASDA.AGGREGATOR is {name!r}, not one of {sorted((*kinds, 'paper'))}"
        )
    return kinds[name](vision_dim=vision_dim, dim=dim, norm=norm)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")

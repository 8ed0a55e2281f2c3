"""Fusion with the sentence and the Scale-wise Feature Aggregator (Eq. 4 and 5)."""

import torch.nn.functional as F
from detectron2.layers import get_norm
from torch import Tensor, nn

from .afs import Selected
from .blocks import ConvBlock


class GlobalFusion(nn.Module):
    """F_G: the last layer's features times the sentence (Eq. 4).

    As released, both are projected to one width first (the features once per image, outside), which
    Eq. 4 leaves out (768 and 512 do not match), and the product is normalised.
    """

    def __init__(self, *, vision_dim: int, text_dim: int, norm: str):
        super().__init__()
        self.words = nn.Linear(text_dim, vision_dim)
        self.words_norm = get_norm(norm, vision_dim)
        self.norm = get_norm(norm, vision_dim)

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
        if self.training and sentence.shape[0] == 1 and isinstance(self.words_norm, nn.BatchNorm2d):
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

    def __init__(self, *, vision_dim: int, dim: int, norm: str):
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
            *(nn.ConvTranspose2d(vision_dim, half, 2, 2), get_norm(norm, half), nn.GELU()),
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


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")

"""The Shared Mask Decoder of Shared-RIS (Eq. 8 to 11)."""

from typing import Any

from detectron2.layers import get_norm
from torch import Tensor, nn

from ..layers import MLP, mask_product
from ..layers.multiway import Streams, join, split
from .fusion import ResidualMLP
from .variants import build_fusion


class SharedMaskDecoder(nn.Module):
    """Transformer layers over both modalities, then the mask as pixels times sentence."""

    def __init__(
        self, *, dim: int, num_layers: int, grid: tuple[int, int], norm: str, **layer: Any
    ):
        """
        Args:
            dim: d_w.
            layer: see SharedLayer.
            num_layers: 0 leaves the mask head alone (Table III, "no decoder").
            grid: (H/p, W/p) of the visual tokens.
            norm: BN, SyncBN, GN, ... of the head's convolutions.
        """
        super().__init__()
        self.grid = tuple(grid)  # a LazyConfig gives a list of its own kind
        self.layers = nn.ModuleList(SharedLayer(dim=dim, **layer) for _ in range(num_layers))
        self.pixels = nn.Sequential(
            *_upsample(dim, norm), *_upsample(dim, norm), nn.Conv2d(dim, dim, 1)
        )
        self.sentence = MLP(dim, dim, dim, activation=nn.ReLU)

    def forward(self, streams: Streams, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Vision (E, 1+n, dim), text (E, T, dim) -> mask logits (E, 4H/p, 4W/p), t_cls (E, dim)."""
        for layer in self.layers:
            streams = layer(streams, text_mask)
        vision, text = streams
        feature_map = vision[:, 1:].transpose(1, 2).unflatten(2, self.grid)  # F_0, without [CLS]
        sentence = text[:, 0]  # t_cls
        logits = mask_product(self.pixels(feature_map), self.sentence(sentence))
        return logits, sentence  # Eq. 11, no scale, no bias


class SharedLayer(nn.Module):
    """Fusion, then one MLP for both modalities (Eq. 8 and 9)."""

    def __init__(self, *, dim: int, num_heads: int, fusion: str):
        super().__init__()
        self.fusion = build_fusion(fusion, dim=dim, num_heads=num_heads)
        self.mlp = ResidualMLP(dim=dim)

    def forward(self, streams: Streams, text_mask: Tensor) -> Streams:
        streams = self.fusion(streams, text_mask)
        return split(self.mlp(join(streams)), streams)


def _upsample(dim: int, norm: str) -> list[nn.Module]:
    """Bilinear x2, 3x3 convolution, norm, ReLU (Eq. 10)."""
    return [
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
        nn.Conv2d(dim, dim, 3, padding=1, bias=False),
        get_norm(norm, dim),
        nn.ReLU(),
    ]

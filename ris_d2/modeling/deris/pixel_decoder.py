"""Pixel decoder: a deformable transformer over three levels and one FPN step up to a quarter."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ..layers import MLP, Constants, resize_maps
from ..layers.deformable_attention import MultiScaleDeformableAttention
from ..layers.position import sine_position_2d

Size = tuple[int, int]
LEVELS = ("res5", "res4", "res3")  # as they lie in the sequence of tokens
FINEST = "res2"


class DeformableEncoderLayer(nn.Module):
    """Post-norm: tokens of all levels read each other at a few points, then an FFN."""

    def __init__(self, *, dim: int, num_heads: int, ffn_dim: int):
        super().__init__()
        self.attention = MultiScaleDeformableAttention(
            dim=dim, num_heads=num_heads, num_levels=len(LEVELS)
        )
        self.attention_norm = nn.LayerNorm(dim)
        self.ffn = MLP(dim, ffn_dim, dim, activation=nn.ReLU)
        self.ffn_norm = nn.LayerNorm(dim)
        for layer in (self.ffn[0], self.ffn[2]):
            nn.init.xavier_uniform_(layer.weight)

    def forward(
        self, tokens: Tensor, positions: Tensor, reference: Tensor, sizes: Sequence[Size]
    ) -> Tensor:
        """(B, N, dim) tokens, (N, dim) positions and (N, 2) reference points -> (B, N, dim)."""
        read = self.attention(tokens + positions, reference, tokens, sizes)
        tokens = self.attention_norm(tokens + read)
        return self.ffn_norm(tokens + self.ffn(tokens))


class PixelDecoder(nn.Module):
    """Mask2Former's, with the released DeRIS' ReLU and biases in the FPN step."""

    def __init__(
        self, *, input_shape: Mapping[str, ShapeSpec], dim: int, num_layers: int, **layer: int
    ):
        """
        Args:
            input_shape: of the backbone; needs "res2" ... "res5" at strides 4 ... 32.
            layer: see DeformableEncoderLayer.
        """
        super().__init__()
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(input_shape[name].channels, dim, 1), _group_norm(dim))
            for name in LEVELS
        )
        self.level_embed = nn.Parameter(torch.empty(len(LEVELS), dim).normal_())
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(dim=dim, **layer) for _ in range(num_layers)
        )
        self.lateral = nn.Sequential(
            nn.Conv2d(input_shape[FINEST].channels, dim, 1), _group_norm(dim), nn.ReLU()
        )
        self.output = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), _group_norm(dim), nn.ReLU())
        self.mask_features = nn.Conv2d(dim, dim, 1)
        self.level_positions = Constants(level_positions)
        for projection in self.input_proj:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)
        for conv in (self.lateral[0], self.output[0], self.mask_features):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Size], Tensor]:
        """
        Args:
            features: "res2" ... "res5", (B, C, h, w) each.

        Returns:
            tokens (B, h * w, dim) of res5, res4, res3; their (h, w); and f_h4, (B, dim, H/4, W/4).
        """
        maps = [project(features[name]) for project, name in zip(self.input_proj, LEVELS)]
        sizes = [tuple(x.shape[-2:]) for x in maps]
        lengths = [height * width for height, width in sizes]
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        reference, *sine = self.level_positions(
            tuple(sizes), tokens.shape[-1], device=tokens.device
        )
        positions = torch.cat([x + level for x, level in zip(sine, self.level_embed, strict=True)])
        for layer in self.layers:
            tokens = layer(tokens, positions, reference, sizes)
        levels = list(tokens.split(lengths, 1))
        finest = self.lateral(features[FINEST])
        coarser = levels[-1].transpose(1, 2).unflatten(2, sizes[-1])
        finest = finest + resize_maps(coarser, finest.shape[-2:])
        return levels, sizes, self.mask_features(self.output(finest))

    def layers_to_checkpoint(self) -> Iterable[nn.Module]:
        return self.layers


def level_positions(sizes: tuple[Size, ...], dim: int) -> list[Tensor]:
    """(x, y) in 0..1 of all levels' pixel centres, (N, 2); sine positions (h * w, dim) of each."""
    sine = [sine_position_2d(*size, dim, normalize=True).flatten(0, 1) for size in sizes]
    centres = []
    for height, width in sizes:
        rows = (torch.arange(height) + 0.5) / height
        columns = (torch.arange(width) + 0.5) / width
        grid = torch.meshgrid(rows, columns, indexing="ij")
        centres.append(torch.stack(grid[::-1], -1).flatten(0, 1))
    return [torch.cat(centres), *sine]


def _group_norm(dim: int) -> nn.GroupNorm:
    """32 groups, or as many as narrow maps allow."""
    return nn.GroupNorm(math.gcd(32, dim), dim)

"""From enhanced visual features and words to F_lav and F_val: RISAM's blocks, and Tables 2, 3 and 11."""

import torch
from torch import Tensor, nn

from ..layers import MLP, MultiheadAttention
from .feature_enhancement import conv_norm_act
from .mutual_aware_attention import MutualAwareAttention, MutualFeatures

# Names of MODEL.RISAM.FUSION that are attention blocks -> their direction.
_DIRECTIONS = {"ma": "mutual", "sdf": "vision", "bcm": "serial"}


class AttentionBlocks(nn.Module):
    """Mutual-Aware Attention blocks in sequence; each has its own weights."""

    def __init__(self, *, blocks: list[MutualAwareAttention]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(
        self, regions: Tensor, words: Tensor, text_mask: Tensor, grid: tuple[int, int]
    ) -> MutualFeatures:
        """Regions (E, h w, dim), words (E, L, word_dim), bool (E, L), (h, w) -> those of the last block."""
        features = MutualFeatures(regions, words)
        for block in self.blocks:
            features = block(features.regions, features.words, text_mask)
        return features


class ProjectedWords(nn.Module):
    """No fusion (Table 11): the words, projected."""

    def __init__(self, *, word_dim: int, dim: int):
        super().__init__()
        self.words = nn.Linear(word_dim, dim)

    def forward(
        self, regions: Tensor, words: Tensor, text_mask: Tensor, grid: tuple[int, int]
    ) -> MutualFeatures:
        return MutualFeatures(regions, self.words(words))


class ConvFusion(ProjectedWords):
    """Convolutions over the features and the tiled sentence (Table 2 #2).

    The sentence is the end token's; the paper gives neither the layers nor F_val: two CBA, and the
    projected words.
    """

    def __init__(self, *, word_dim: int, dim: int, norm: str):
        super().__init__(word_dim=word_dim, dim=dim)
        self.convs = nn.Sequential(
            conv_norm_act(2 * dim, dim, 1, norm), conv_norm_act(dim, dim, 1, norm)
        )

    def forward(
        self, regions: Tensor, words: Tensor, text_mask: Tensor, grid: tuple[int, int]
    ) -> MutualFeatures:
        words = self.words(words)
        end = text_mask.sum(1) - 1
        sentence = words[torch.arange(len(words), device=words.device), end]
        pixels = regions.transpose(1, 2).unflatten(2, grid)
        tiled = sentence[:, :, None, None].expand_as(pixels)
        fused = self.convs(torch.cat([pixels, tiled], 1))
        return MutualFeatures(fused.flatten(2).transpose(1, 2), words)


class TransformerEncoder(ProjectedWords):
    """Transformer layers over regions and words together (Table 3 #5, ReSTR).

    Kim et al., "ReSTR: Convolution-free Referring Image Segmentation Using Transformers", CVPR 2022.
    """

    def __init__(self, *, word_dim: int, dim: int, num_layers: int, num_heads: int):
        super().__init__(word_dim=word_dim, dim=dim)
        self.layers = nn.ModuleList(
            _EncoderLayer(dim=dim, num_heads=num_heads) for _ in range(num_layers)
        )

    def forward(
        self, regions: Tensor, words: Tensor, text_mask: Tensor, grid: tuple[int, int]
    ) -> MutualFeatures:
        count = regions.shape[1]
        tokens = torch.cat([regions, self.words(words)], 1)
        keep = torch.cat([text_mask.new_ones(regions.shape[:2]), text_mask], 1)
        for layer in self.layers:
            tokens = layer(tokens, keep)
        return MutualFeatures(tokens[:, :count], tokens[:, count:])


class _EncoderLayer(nn.Module):
    def __init__(self, *, dim: int, num_heads: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = MultiheadAttention(dim=dim, num_heads=num_heads)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = MLP(dim=dim, hidden_dim=4 * dim, out_dim=dim)

    def forward(self, tokens: Tensor, keep: Tensor) -> Tensor:
        normed = self.attention_norm(tokens)
        tokens = tokens + self.attention(normed, normed, keep)
        return tokens + self.mlp(self.mlp_norm(tokens))


def build_fusion(
    name: str,
    *,
    word_dim: int,
    dim: int,
    num_blocks: int,
    num_heads: int,
    tau: float,
    use_mask: bool,
    lga_norm: str,
    norm: str,
    words_are_read: bool,
) -> nn.Module:
    """Build MODEL.RISAM.FUSION: (regions, words, text_mask, grid) -> MutualFeatures.

    Args:
        words_are_read: whether the mask decoder reads F_val; the last block then does not make it.

    Raises:
        ValueError: for an unknown name, or less than one block.
    """
    if num_blocks < 1:
        raise ValueError(f"MODEL.RISAM.MA.NUM_BLOCKS is {num_blocks}, it must be at least 1")
    if name in _DIRECTIONS:
        directions = [_DIRECTIONS[name]] * num_blocks
        if name == "ma" and not words_are_read:
            directions[-1] = "vision"
        blocks = [
            MutualAwareAttention(
                word_dim=dim if i else word_dim,
                dim=dim,
                tau=tau,
                use_mask=use_mask,
                lga_norm=lga_norm,
                direction=direction,
            )
            for i, direction in enumerate(directions)
        ]
        return AttentionBlocks(blocks=blocks)
    if name == "te":
        return TransformerEncoder(
            word_dim=word_dim, dim=dim, num_layers=num_blocks, num_heads=num_heads
        )
    if name == "conv":
        return ConvFusion(word_dim=word_dim, dim=dim, norm=norm)
    if name == "none":
        return ProjectedWords(word_dim=word_dim, dim=dim)
    raise ValueError(
        f"MODEL.RISAM.FUSION is {name!r}, not one of {sorted([*_DIRECTIONS, 'te', 'conv', 'none'])}"
    )

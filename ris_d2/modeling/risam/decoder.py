"""The Mutual-Aware Mask Decoder of RISAM (Eq. 6 to 9)."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.layers import get_norm
from torch import Tensor, nn

from ..layers import MLP, MultiheadAttention, mask_product
from .mutual_aware_attention import MutualFeatures


class MutualAwareMaskDecoder(nn.Module):
    """Blocks over pixels and [multi-modal query token, words]; the mask is pixels times token."""

    def __init__(
        self,
        *,
        dim: int,
        num_blocks: int,
        elg: bool,
        up_dims: Sequence[int],
        norm: str,
        **block: Any,
    ):
        """
        Args:
            elg: False: without extra linguistic guidance (Table 5 #10). The query token is alone:
                it attends the pixels, which do not attend it (a softmax over one key is 1).
            up_dims: channels after each upsampling x2.
            norm: of the upsampling: BN, SyncBN, GN, ...
            block: see DecoderBlock.

        Raises:
            ValueError: less than one block.
        """
        super().__init__()
        if num_blocks < 1:
            raise ValueError(f"MODEL.RISAM.DEC.NUM_BLOCKS is {num_blocks}, it must be at least 1")
        self.elg = elg
        self.query = nn.Embedding(1, dim)  # F_m
        self.blocks = nn.ModuleList(
            DecoderBlock(dim=dim, elg=elg, **block) for _ in range(num_blocks)
        )
        widths = [dim, *up_dims]
        self.upsample = nn.Sequential()
        for width, narrower in itertools.pairwise(widths):
            self.upsample.append(nn.ConvTranspose2d(width, narrower, 2, 2))
            self.upsample.append(get_norm(norm, narrower))
        self.token_mlp = MLP(dim, dim, dim, widths[-1], activation=nn.ReLU)

    def forward(
        self, features: MutualFeatures, text_mask: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            features: regions (E, h w, dim), words (E, L, dim).
            text_mask: bool (E, L), True where a word may be attended.
            grid: (h, w).

        Returns:
            mask logits (E, 4h, 4w), and what an existence head reads (E, 2 dim), ours: of each
            channel the highest value among the pixels as they leave the last block, and the query
            token. The token alone sees the image only through words that know it.
        """
        pixels = features.regions
        tokens = self.query.weight.expand(pixels.shape[0], 1, -1)
        if self.elg:
            tokens = torch.cat([tokens, features.words], 1)  # F_c = [F_m, F_val]
            text_mask = torch.cat([text_mask.new_ones(text_mask.shape[0], 1), text_mask], 1)
        for block in self.blocks:
            pixels, tokens = block(pixels, tokens, text_mask)
        token = tokens[:, 0]
        evidence = torch.cat([pixels.amax(1), token], 1)
        pixels = self.upsample(pixels.transpose(1, 2).unflatten(2, grid))
        return mask_product(pixels, self.token_mlp(token)), evidence


class DecoderBlock(nn.Module):
    """Pixels and tokens attend themselves, then the pixels the tokens."""

    def __init__(
        self, *, dim: int, num_heads: int, elg: bool, toi_a: bool, layer_norm: bool, ffn_dim: int
    ):
        """
        Args:
            elg: see MutualAwareMaskDecoder.
            toi_a: the tokens attend the pixels, too (Table 5 #9).
            layer_norm: after each residual sum. The paper's equations have none.
            ffn_dim: hidden width of an MLP at the end of the block, for pixels and tokens apart; 0:
                none, as in the paper's equations.
        """
        super().__init__()

        def residual(layer: nn.Module) -> Residual:
            return Residual(layer, nn.LayerNorm(dim) if layer_norm else nn.Identity())

        def attention() -> Residual:
            return residual(MultiheadAttention(dim=dim, num_heads=num_heads))

        def ffn() -> nn.Module:
            if not ffn_dim:
                return nn.Identity()
            return residual(MLP(dim, ffn_dim, dim, activation=nn.ReLU))

        self.pixels_self = attention()  # Eq. 6
        self.tokens_self = attention() if elg else None  # Eq. 8
        self.tokens_from_pixels = attention() if toi_a or not elg else None
        self.tokens_ffn = ffn()
        self.pixels_from_tokens = attention() if elg else None  # Eq. 9
        self.pixels_ffn = ffn()

    def forward(self, pixels: Tensor, tokens: Tensor, attn_mask: Tensor) -> tuple[Tensor, Tensor]:
        pixels = self.pixels_self(pixels, pixels)
        if self.tokens_self is not None:
            tokens = self.tokens_self(tokens, tokens, attn_mask)
        if self.tokens_from_pixels is not None:
            tokens = self.tokens_from_pixels(tokens, pixels)
        tokens = self.tokens_ffn(tokens)
        if self.pixels_from_tokens is not None:
            pixels = self.pixels_from_tokens(pixels, tokens, attn_mask)
        return self.pixels_ffn(pixels), tokens


class Residual(nn.Module):
    """norm(x + layer(x, ...))"""

    def __init__(self, layer: nn.Module, norm: nn.Module):
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        return self.norm(x + self.layer(x, *context))

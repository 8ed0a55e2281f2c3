"""The Mutual-Aware Mask Decoder of RISAM (Eq. 6 to 9)."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
from detectron2.layers import get_norm
from torch import Tensor, nn

from ..layers import MLP, MultiheadAttention, mask_product
from .mutual_aware_attention import MutualFeatures


class MutualAwareMaskDecoder(nn.Module):
    """Decoder blocks over pixels and [multi-modal query token, words]; the mask is pixels times token."""

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        num_blocks: int,
        out_proj: bool,
        layer_norm: bool,
        ffn_dim: int,
        dropout: float,
        toi_a: bool,
        elg: bool,
        up_dims: Sequence[int],
        norm: str,
    ):
        """
        Args:
            out_proj: a fourth linear layer in each attention.
            layer_norm: after each residual sum. The paper's equations have none.
            ffn_dim: hidden width of an MLP at the end of each block, for pixels and tokens apart; 0:
                none, as in the paper's equations.
            dropout: of what attention and MLP add.
            toi_a: the tokens attend the pixels, too (Table 5 #9).
            elg: False: without extra linguistic guidance (Table 5 #10). The query token is alone, so it
                attends the pixels, and the pixels do not attend it: a softmax over one key is 1.
            up_dims: channels after each upsampling x2.
            norm: of the upsampling: BN, SyncBN, GN, ...

        Raises:
            ValueError: less than one block.
        """
        super().__init__()
        if num_blocks < 1:
            raise ValueError(f"MODEL.RISAM.DEC.NUM_BLOCKS is {num_blocks}, it must be at least 1")
        self.elg = elg
        self.query = nn.Embedding(1, dim)  # F_m

        residual = partial(Residual, dim=dim, dropout=dropout, layer_norm=layer_norm)

        def attention() -> Residual:
            return residual(MultiheadAttention(dim=dim, num_heads=num_heads, out_proj=out_proj))

        def ffn() -> Residual:
            return residual(MLP(dim=dim, hidden_dim=ffn_dim, out_dim=dim, activation=nn.ReLU))

        self.blocks = nn.ModuleList(
            DecoderBlock(attention=attention, ffn=ffn if ffn_dim else None, toi_a=toi_a, elg=elg)
            for _ in range(num_blocks)
        )
        widths = [dim, *up_dims]
        self.upsample = nn.Sequential()
        for width, narrower in itertools.pairwise(widths):
            self.upsample.append(nn.ConvTranspose2d(width, narrower, 2, 2))
            self.upsample.append(get_norm(norm, narrower))
        self.token_mlp = nn.Sequential(
            *(nn.Linear(dim, dim), nn.ReLU()),
            *(nn.Linear(dim, dim), nn.ReLU()),
            nn.Linear(dim, widths[-1]),
        )

    def forward(
        self, features: MutualFeatures, text_mask: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            features: regions (E, h w, dim), words (E, L, dim).
            text_mask: bool (E, L), True where a word may be attended.
            grid: (h, w).

        Returns:
            mask logits (E, 4h, 4w), and what an existence head reads (E, 2 dim), ours: of each channel
            the highest value among the pixels as they leave the last block, and the query token. The
            token alone sees the image only through words that know it.
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
        self,
        *,
        attention: Callable[[], "Residual"],
        ffn: Callable[[], "Residual"] | None,
        toi_a: bool,
        elg: bool,
    ):
        super().__init__()
        self.pixels_self = attention()  # Eq. 6
        self.tokens_self = attention() if elg else None  # Eq. 8
        self.tokens_from_pixels = attention() if toi_a or not elg else None
        self.tokens_ffn = ffn() if ffn else None
        self.pixels_from_tokens = attention() if elg else None  # Eq. 9
        self.pixels_ffn = ffn() if ffn else None

    def forward(self, pixels: Tensor, tokens: Tensor, attn_mask: Tensor) -> tuple[Tensor, Tensor]:
        pixels = self.pixels_self(pixels, pixels)
        if self.tokens_self is not None:
            tokens = self.tokens_self(tokens, tokens, attn_mask)
        if self.tokens_from_pixels is not None:
            tokens = self.tokens_from_pixels(tokens, pixels)
        if self.tokens_ffn is not None:
            tokens = self.tokens_ffn(tokens)
        if self.pixels_from_tokens is not None:
            pixels = self.pixels_from_tokens(pixels, tokens, attn_mask)
        if self.pixels_ffn is not None:
            pixels = self.pixels_ffn(pixels)
        return pixels, tokens


class Residual(nn.Module):
    """x + layer(x, ...), with dropout and LayerNorm where asked."""

    def __init__(self, layer: nn.Module, *, dim: int, dropout: float, layer_norm: bool):
        super().__init__()
        self.layer = layer
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim) if layer_norm else nn.Identity()

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        return self.norm(x + self.dropout(self.layer(x, *context)))

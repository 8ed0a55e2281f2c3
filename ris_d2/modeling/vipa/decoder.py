"""The segmentation decoder with visual informative part attention (Sec. III C)."""

from collections.abc import Sequence

import torch
from detectron2.layers import get_norm
from torch import Tensor, nn

from ..layers import resize_maps
from .attention import AttentionBlock


class VIPADecoder(nn.Module):
    """From F_4 to F_1: attend the expression (Eq. 8), upsample, concatenate, convolve."""

    def __init__(
        self,
        *,
        in_dims: Sequence[int],
        dim: int,
        num_heads: int,
        mlp_ratio: int = 4,
        attention_stages: Sequence[int] = (4, 3, 2, 1),
        num_convs: int = 2,
        norm: str = "BN",
    ):
        """
        Args:
            in_dims: C_1 ... C_4.
            dim: width of all stages and of the expression.
            attention_stages: i of the F_i at whose resolution the expression is attended.
            num_convs: 3x3 convolutions after each concatenation.
            norm: of the convolutions: BN, SyncBN, GN, ...

        Raises:
            ValueError: unless the attention stages are among 1 to 4, and there is a convolution.
        """
        super().__init__()
        if not attention_stages or not set(attention_stages) <= set(range(1, len(in_dims) + 1)):
            raise ValueError(
                f"MODEL.VIPA.DECODER.ATTENTION_STAGES is {tuple(attention_stages)}; it must name "
                "one or more of the stages 4, 3, 2, 1"
            )
        if num_convs < 1:
            raise ValueError(f"MODEL.VIPA.DECODER.NUM_CONVS must be at least 1, not {num_convs}")
        self.project = nn.Conv2d(in_dims[-1], dim, 1)
        self.attend = nn.ModuleDict(
            {
                str(stage): AttentionBlock(
                    dim=dim, num_heads=num_heads, mlp_ratio=mlp_ratio, context_dim=dim
                )
                for stage in sorted(attention_stages, reverse=True)  # as they run
            }
        )
        self.fuse = nn.ModuleList(
            nn.Sequential(
                *_conv(dim + in_dim, dim, norm),
                *(layer for _ in range(num_convs - 1) for layer in _conv(dim, dim, norm)),
            )
            for in_dim in in_dims[:-1]
        )
        self.head = nn.Conv2d(dim, 1, 1)

    def forward(
        self, maps: Sequence[Tensor], tokens: Tensor, attn_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            maps: F_1 ... F_4, each (E, C_i, h_i, w_i).
            tokens: (E, K, dim), the expression.
            attn_mask: bool (E, K), False where a token must not be attended; None = all may.

        Returns:
            mask logits (E, h_1, w_1), and the features (E, dim, h_1, w_1) that they are made of.
        """
        x = self._attend(len(maps), self.project(maps[-1]), tokens, attn_mask)
        for stage in range(len(maps) - 1, 0, -1):
            skip = maps[stage - 1]
            x = self.fuse[stage - 1](torch.cat([resize_maps(x, skip.shape[-2:]), skip], 1))
            x = self._attend(stage, x, tokens, attn_mask)
        return self.head(x).squeeze(1), x

    def layers_to_checkpoint(self) -> list[nn.Module]:
        return [*self.attend.values(), *self.fuse]

    def _attend(self, stage: int, x: Tensor, tokens: Tensor, attn_mask: Tensor | None) -> Tensor:
        if str(stage) not in self.attend:
            return x
        attended = self.attend[str(stage)](x.flatten(2).transpose(1, 2), tokens, attn_mask)
        return attended.transpose(1, 2).unflatten(2, x.shape[-2:])


def _conv(in_dim: int, dim: int, norm: str) -> list[nn.Module]:
    return [nn.Conv2d(in_dim, dim, 3, padding=1, bias=False), get_norm(norm, dim), nn.ReLU()]

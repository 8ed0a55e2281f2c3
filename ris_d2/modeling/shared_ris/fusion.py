"""The layers that vision and text share in FPN and decoder of Shared-RIS (Eq. 6, 8 and 9)."""

from torch import Tensor, nn

from ..layers import MLP, MultiheadAttention
from ..layers.multiway import Streams, join, split, visible_tokens


class SharedSelfAttention(nn.Module):
    """x + MSA(LN(x)) over all tokens of both modalities (Eq. 6 and 8), the paper's choice."""

    def __init__(self, *, dim: int, num_heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = MultiheadAttention(dim=dim, num_heads=num_heads)

    def forward(self, streams: Streams, text_mask: Tensor) -> Streams:
        joint = join(streams)
        normed = self.norm(joint)
        joint = joint + self.attention(normed, normed, visible_tokens(streams, text_mask))
        return split(joint, streams)


class ResidualMLP(nn.Module):
    """x + MLP(LN(x)) (Eq. 9)."""

    def __init__(self, *, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = MLP(dim, 4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))

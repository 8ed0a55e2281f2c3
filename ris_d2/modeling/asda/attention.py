"""Local Visual Attention (Eq. 6) and the attention of pixels on words (Eq. 8)."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import MLP, MultiheadAttention
from ..layers.position import sine_position_2d


class LocalVisualAttention(nn.Module):
    """n self-attention layers over the pixels of F_coarse, and a last LayerNorm: F_A."""

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        num_layers: int,
        dropout: float,
        pre_norm: bool,
        grid: tuple[int, int],
    ):
        super().__init__()
        positions = sine_position_2d(*grid, dim, normalize=False).flatten(0, 1)
        self.register_buffer("positions", positions, persistent=False)
        self.layers = nn.ModuleList(
            VisualAttentionLayer(dim=dim, num_heads=num_heads, dropout=dropout, pre_norm=pre_norm)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(E, h w, dim) -> (E, h w, dim)"""
        for layer in self.layers:
            tokens = layer(tokens, self.positions)
        return self.norm(tokens)


class _Layer(nn.Module):
    """Attention and feed-forward layer; norms after the sums, as released, or before (Eq. 6, 8)."""

    def __init__(self, *, pre_norm: bool):
        super().__init__()
        self.pre_norm = pre_norm

    def _build(self, *, dim: int, num_heads: int, dropout: float, hidden_dim: int) -> None:
        self.attention = MultiheadAttention(dim=dim, num_heads=num_heads, dropout=dropout)
        self.feed_forward = MLP(dim, hidden_dim, dim, activation=nn.ReLU, dropout=dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(E, n, dim), what ``attend`` takes beside it -> (E, n, dim)"""
        if self.pre_norm:
            x = x + self.attend(self.norm1(x), context)
            return x + self.feed_forward(self.norm2(x))
        x = self.norm1(x + self.attend(x, context))
        return self.norm2(x + self.feed_forward(x))


class VisualAttentionLayer(_Layer):
    """Pixels attend each other."""

    def __init__(self, *, dim: int, num_heads: int, dropout: float, pre_norm: bool):
        super().__init__(pre_norm=pre_norm)
        self.dropout = nn.Dropout(dropout)
        self._build(dim=dim, num_heads=num_heads, dropout=dropout, hidden_dim=dim)

    def attend(self, x: Tensor, positions: Tensor) -> Tensor:
        """(E, n, dim), (n, dim) -> (E, n, dim); queries and keys carry positions, values do not."""
        located = x + positions
        return self.dropout(self.attention(located, located, values=x))


class WordGuidedAttention(_Layer):
    """Pixels read words: F_fine. Padding is read as well, as released."""

    def __init__(self, *, dim: int, text_dim: int, num_heads: int, dropout: float, pre_norm: bool):
        super().__init__(pre_norm=pre_norm)
        self.words = nn.Linear(text_dim, dim, bias=False)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self._build(dim=dim, num_heads=num_heads, dropout=dropout, hidden_dim=4 * dim)

    def attend(self, tokens: Tensor, words: Tensor) -> Tensor:
        """Pixels (E, n, dim), words (E, L, text_dim) -> (E, n, dim)"""
        words = F.relu(self.words(words))
        queries, keys = F.relu(self.query(tokens)), F.relu(self.key(words))
        return self.attention(queries, keys, values=F.relu(self.value(words)))

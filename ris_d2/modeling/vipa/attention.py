"""The transformer block of which VIPA's generator, decoder and late fusion are made."""

from torch import Tensor, nn

from ..layers import MLP, MultiheadAttention


class AttentionBlock(nn.Module):
    """x + MHA(LN(x), LN(context)), then x + MLP(LN(x)): Eqs. 6 to 8.

    The paper's equations leave the norms out; before each sub-layer is our reading.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        mlp_ratio: int = 4,
        context_dim: int | None = None,
        attention_dim: int | None = None,
    ):
        """
        Args:
            context_dim: channels of the context that is attended; None = self-attention.
            attention_dim: channels of all heads together, where they differ from ``dim``.
        """
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.context_norm = None if context_dim is None else nn.LayerNorm(context_dim)
        self.attention = MultiheadAttention(
            dim=attention_dim or dim,
            num_heads=num_heads,
            query_dim=dim,
            context_dim=context_dim or dim,
        )
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = MLP(dim, mlp_ratio * dim, dim)

    def forward(
        self, x: Tensor, context: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            x: (B, Q, dim).
            context: (B, K, context_dim); None for self-attention.
            attn_mask: bool (B, K) or (B, Q, K), True where a key may be attended; None =
                everywhere.

        Returns:
            (B, Q, dim)
        """
        query = self.norm(x)
        keys = query if self.context_norm is None else self.context_norm(context)
        x = x + self.attention(query, keys, attn_mask)
        return x + self.mlp(self.mlp_norm(x))

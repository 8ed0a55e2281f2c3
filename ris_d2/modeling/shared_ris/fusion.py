"""The three ways in which Shared-RIS lets vision and text tokens meet (Tables VII b and VIII b)."""

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


class CrossAttention(nn.Module):
    """Vision attends text and text attends vision, with one set of weights."""

    def __init__(self, *, dim: int, num_heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = MultiheadAttention(dim=dim, num_heads=num_heads)

    def forward(self, streams: Streams, text_mask: Tensor) -> Streams:
        vision, text = streams
        v, t = self.norm(vision), self.norm(text)
        return vision + self.attention(v, t, text_mask), text + self.attention(t, v)


class BiDirection(nn.Module):
    """Grounding DINO's enhancer (Fig. 5): self-attention per modality, both cross-attentions, two MLPs."""

    def __init__(self, *, dim: int, num_heads: int, mlp_ratio: int = 4):
        super().__init__()
        self.vision_self = SharedSelfAttention(dim=dim, num_heads=num_heads)
        self.text_self = SharedSelfAttention(dim=dim, num_heads=num_heads)
        self.vision_from_text = _CrossBlock(dim=dim, num_heads=num_heads)
        self.text_from_vision = _CrossBlock(dim=dim, num_heads=num_heads)
        self.vision_mlp = ResidualMLP(dim=dim, mlp_ratio=mlp_ratio)
        self.text_mlp = ResidualMLP(dim=dim, mlp_ratio=mlp_ratio)

    def forward(self, streams: Streams, text_mask: Tensor) -> Streams:
        vision, _ = self.vision_self((streams[0], None), text_mask)
        _, text = self.text_self((None, streams[1]), text_mask)
        attended_vision = self.vision_from_text(vision, text, text_mask)
        attended_text = self.text_from_vision(text, vision, None)
        return self.vision_mlp(attended_vision), self.text_mlp(attended_text)


class _CrossBlock(nn.Module):
    def __init__(self, *, dim: int, num_heads: int):
        super().__init__()
        self.query_norm = nn.LayerNorm(dim)
        self.context_norm = nn.LayerNorm(dim)
        self.attention = MultiheadAttention(dim=dim, num_heads=num_heads)

    def forward(self, query: Tensor, context: Tensor, keep: Tensor | None) -> Tensor:
        return query + self.attention(self.query_norm(query), self.context_norm(context), keep)


class ResidualMLP(nn.Module):
    """x + MLP(LN(x)) (Eq. 9)."""

    def __init__(self, *, dim: int, mlp_ratio: int = 4):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = MLP(dim=dim, hidden_dim=mlp_ratio * dim, out_dim=dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


_FUSIONS = {"self": SharedSelfAttention, "cross": CrossAttention, "bi": BiDirection}


def build_fusion(name: str, *, dim: int, num_heads: int) -> nn.Module:
    """Build the fusion module called ``name``: (streams, text_mask) -> streams.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in _FUSIONS:
        raise ValueError(f"unknown fusion {name!r}; Shared-RIS has {sorted(_FUSIONS)}")
    return _FUSIONS[name](dim=dim, num_heads=num_heads)

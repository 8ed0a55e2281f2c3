"""Attention and MLP blocks that several methods share."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiheadAttention(nn.Module):
    """Multi-head attention with biased projections, for self- and cross-attention.

    Its work is done by ``scaled_dot_product_attention``, which FLOP counters see in training and in
    evaluation (``nn.MultiheadAttention`` switches to a fused kernel that they do not count). It
    starts from that module's distribution.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        query_dim: int | None = None,
        context_dim: int | None = None,
        dropout: float = 0.0,
    ):
        """
        Args:
            dim: channels of all heads together.
            query_dim, context_dim: channels of the queries (and the output) and of the context,
                where they differ from ``dim``.
            dropout: of attention weights, in training.

        Raises:
            ValueError: if the heads do not divide ``dim``.
        """
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        query_dim, context_dim = query_dim or dim, context_dim or dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(query_dim, dim)
        self.key = nn.Linear(context_dim, dim)
        self.value = nn.Linear(context_dim, dim)
        self.out = nn.Linear(dim, query_dim)
        self._reset_parameters()

    @torch.no_grad()
    def _reset_parameters(self) -> None:
        """Xavier-uniform queries, keys and values, zero biases; ``out`` keeps its layer's own
        weights.

        Projections of one width are one matrix to ``nn.MultiheadAttention``, with thrice the
        outputs.
        """
        projections = (self.query, self.key, self.value)
        fused = len({length for layer in projections for length in layer.weight.shape}) == 1
        for layer in projections:
            outputs, inputs = layer.weight.shape
            # nn.Linear's start is uniform within 1 / sqrt(inputs): scaled, not drawn again, so that
            # a seed gives what is built later the same start.
            bound = math.sqrt(6 / (inputs + (3 if fused else 1) * outputs))
            layer.weight.mul_(bound * math.sqrt(inputs))
            layer.bias.zero_()
        self.out.bias.zero_()

    def forward(
        self,
        query: Tensor,
        context: Tensor,
        attn_mask: Tensor | None = None,
        *,
        values: Tensor | None = None,
    ) -> Tensor:
        """Let each query attend the context.

        Args:
            query: (B, Q, query_dim).
            context: (B, K, context_dim), the keys, and the values unless those are given.
            attn_mask: bool (B, K) or (B, Q, K), True where a key may be attended; None =
                everywhere.
            values: (B, K, context_dim), where keys carry positions and values do not.

        Returns:
            (B, Q, query_dim)
        """
        return self.attend(query, *self.project(context, values), attn_mask)

    def project(self, context: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, dim) each, for ``attend``."""
        return self.key(context), self.value(context if values is None else values)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, attn_mask: Tensor | None = None
    ) -> Tensor:
        """``forward`` on a context that was projected before, once for several uses."""
        if attn_mask is not None:
            attn_mask = attn_mask[:, None, None] if attn_mask.ndim == 2 else attn_mask[:, None]
        dropout = self.dropout if self.training else 0.0
        query = self.query(query)
        return self.out(attend_by_heads(query, keys, values, self.num_heads, attn_mask, dropout))


def attend_by_heads(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    num_heads: int,
    attn_mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention of each head's channels; projections are the caller's.

    Args:
        query: (B, Q, C).
        keys, values: (B, K, C).
        attn_mask: bool, as broadcasts to (B, num_heads, Q, K), True where a key may be attended.
        dropout: of attention weights.

    Returns:
        (B, Q, C)
    """
    heads = [x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, keys, values)]
    attended = F.scaled_dot_product_attention(*heads, attn_mask, dropout)
    return attended.transpose(1, 2).flatten(2)


class VisionFromWords(nn.Module):
    """What visual tokens read in words, as LAVT and CrossVLT have it.

    Queries and result pass an instance norm over an image's positions, without scale and shift; the
    layers before it have no bias, which it would remove.
    """

    def __init__(self, *, vision_dim: int, text_dim: int, dim: int, num_heads: int = 1):
        """
        Args:
            dim: channels of all heads together.
        """
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(vision_dim, dim, bias=False)
        self.key = nn.Linear(text_dim, dim)
        self.value = nn.Linear(text_dim, dim)
        self.out = nn.Linear(dim, vision_dim, bias=False)

    def read(self, vision: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """(E, N, vision_dim), (E, L, text_dim), bool (E, L) -> (E, N, vision_dim)"""
        query, mask = _instance_norm(self.query(vision)), text_mask[:, None, None, :]
        read = attend_by_heads(query, self.key(text), self.value(text), self.num_heads, mask)
        return _instance_norm(self.out(read))


def _instance_norm(tokens: Tensor) -> Tensor:
    """Each channel of (B, N, C) over its N tokens."""
    return F.instance_norm(tokens.transpose(1, 2)).transpose(1, 2)


class MLP(nn.Sequential):
    """Linear layers over the last dimension, with activations between them."""

    def __init__(
        self, *dims: int, activation: type[nn.Module] = nn.GELU, dropout: float | None = None
    ):
        """
        Args:
            dims: channels of the input, of each hidden layer, and of the output.
            dropout: behind each activation and of the output; None: there is none.
        """
        layers: list[nn.Module] = []
        for in_dim, out_dim in itertools.pairwise(dims):
            layers += [nn.Linear(in_dim, out_dim), activation()]
            if dropout is not None:
                layers.append(nn.Dropout(dropout))
        layers.pop(-1 if dropout is None else -2)  # the output has no activation
        super().__init__(*layers)


def drop_path_scale(batch_size: int, probability: float, like: Tensor) -> Tensor:
    """Draw a stochastic-depth factor per sample: 0 or 1/(1-p), shape (B, 1, 1), dtype of
    ``like``."""
    keep = 1.0 - probability
    return like.new_empty(batch_size, 1, 1).bernoulli_(keep) / keep

"""BERT (Devlin et al., NAACL 2019) layer by layer, on transformers' modules."""

from collections.abc import Mapping

from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..layers import init_xavier
from ..layers.attention import attend_by_heads
from ..options import arguments, check_choice
from .registry import TEXT_ENCODER_REGISTRY

MAX_POSITIONS = 512


class BertStack(nn.Module):
    """BERT layers without embeddings.

    Layers may read another modality: their self-attention becomes cross-attention, with query,
    output and feed-forward as BERT has (and names) them, and keys and values of their own.
    """

    def __init__(
        self,
        *,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        dropout: float = 0.1,
        context_dims: Mapping[int, int] | None = None,
        init: str = "released",
    ):
        """
        Args:
            dropout: of attention weights and of each sub-layer's output.
            context_dims: layer (0-based) -> channels of the context that it attends instead of the
                text.
            init: of random weights: "released" (normal 0.02, replaced by pretrained weights) or
                "scratch" (Xavier).

        Raises:
            ValueError: for an unknown init or a dim that the heads do not divide.
        """
        super().__init__()
        # Imported here: importing ris_d2 must not import transformers.
        from transformers.models.bert.modeling_bert import BertLayer

        check_choice("MODEL.RIS.TEXT.BERT.INIT", init, _INITS)
        self.dim, self.depth = dim, depth
        config = _bert_config(dim=dim, num_heads=num_heads, dropout=dropout)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(depth))
        self.context_dims = dict(context_dims or {})
        for number, context_dim in self.context_dims.items():
            self.layers[number].attention.self = _CrossAttention(
                dim=dim, context_dim=context_dim, num_heads=num_heads, dropout=dropout
            )
        self.apply(_INITS[init])

    def run_layers(
        self,
        hidden: Tensor,
        text_mask: Tensor,
        start: int,
        stop: int,
        context: Tensor | None = None,
    ) -> Tensor:
        """Run layers ``start`` to ``stop`` - 1.

        Args:
            hidden: (E, L, dim).
            text_mask: bool (E, L), True = real token.
            context: (E, N, C) for those of the layers that read another modality.

        Returns:
            (E, L, dim)
        """
        attention_mask = text_mask[:, None, None, :]
        for number in range(start, stop):
            layer = self.layers[number]
            if number in self.context_dims:
                attended = layer.attention.self(hidden, context)
                hidden = layer.feed_forward_chunk(layer.attention.output(attended, hidden))
            else:
                hidden = layer(hidden, attention_mask=attention_mask)
        return hidden

    def layers_to_checkpoint(self) -> list[nn.Module]:
        # A layer that reads another modality is not called as a whole, and its keys and values are
        # what is large.
        return [
            layer.attention.self if number in self.context_dims else layer
            for number, layer in enumerate(self.layers)
        ]


@TEXT_ENCODER_REGISTRY.register()
class RISBert(BertStack):
    """Embeddings and layers, without the pooler: segmentation does not use it."""

    @configurable
    def __init__(self, *, vocab_size: int = 30522, dropout: float = 0.1, **stack):
        """
        Args:
            vocab_size: rows of the word embedding.
            dropout, stack: see BertStack.
        """
        super().__init__(dropout=dropout, **stack)
        from transformers.models.bert.modeling_bert import BertEmbeddings

        self.vocab_size = vocab_size
        config = _bert_config(
            dim=self.dim,
            num_heads=1,  # the embeddings have none
            dropout=dropout,
            vocab_size=vocab_size,
        )
        self.embeddings = BertEmbeddings(config)
        self.embeddings.apply(_init_released)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        same = ("VOCAB_SIZE", "DEPTH", "NUM_HEADS", "DROPOUT", "INIT")
        return arguments(cfg.MODEL.RIS.TEXT.BERT, *same, dim="EMBED_DIM")

    def embed(self, input_ids: Tensor) -> Tensor:
        """int64 (E, L) -> words plus positions, normalised (E, L, dim)."""
        return self.embeddings(input_ids)

    def forward(self, input_ids: Tensor, text_mask: Tensor) -> Tensor:
        """int64 (E, L), bool (E, L), True = real token -> last hidden states (E, L, dim)."""
        return self.run_layers(self.embed(input_ids), text_mask, 0, self.depth)


class _CrossAttention(nn.Module):
    """What stands in BertSelfAttention's place where a layer reads another modality."""

    def __init__(self, *, dim: int, context_dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(dim, dim)
        # Other names than BERT's: its keys and values read text and do not fit.
        self.context_key = nn.Linear(context_dim, dim)
        self.context_value = nn.Linear(context_dim, dim)

    def forward(self, hidden: Tensor, context: Tensor) -> Tensor:
        keys, values = self.context_key(context), self.context_value(context)
        dropout = self.dropout if self.training else 0.0
        return attend_by_heads(self.query(hidden), keys, values, self.num_heads, dropout=dropout)


def _bert_config(*, dim: int, num_heads: int, dropout: float, vocab_size: int = 1):
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=dim,
        num_attention_heads=num_heads,
        intermediate_size=4 * dim,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        max_position_embeddings=MAX_POSITIONS,
        attn_implementation="sdpa",
    )


def _init_released(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


_INITS = {"released": _init_released, "scratch": init_xavier}

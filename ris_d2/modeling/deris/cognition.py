"""DeRIS' cognition branch: which queries does the sentence refer to?"""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..backbone import RISBEiT3
from ..layers import MLP, MultiheadAttention
from ..layers.position import sine_position_1d
from ..options import arguments, check_choice
from ..text import build_text_encoder

MAX_TOKENS = 1024  # of a sentence, as BEiT-3's table of positions
VIEW = "cognition"  # the resizing of the image (INPUT.RIS.VIEWS) that this branch looks at


class TextDecoderLayer(nn.Module):
    """Post-norm decoder layer: queries attend each other, then the words, then an FFN."""

    def __init__(self, *, dim: int, num_heads: int, ffn_dim: int, dropout: float = 0.0):
        super().__init__()
        self.self_attention = MultiheadAttention(dim=dim, num_heads=num_heads, dropout=dropout)
        self.self_norm = nn.LayerNorm(dim)
        self.text_attention = MultiheadAttention(dim=dim, num_heads=num_heads, dropout=dropout)
        self.text_norm = nn.LayerNorm(dim)
        self.ffn = MLP(dim, ffn_dim, dim, activation=nn.ReLU, dropout=dropout)
        self.ffn_norm = nn.LayerNorm(dim)

    def forward(
        self, queries: Tensor, text: Tensor, text_mask: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            queries: (E, Q, C).
            text: (E, L, C).
            text_mask: bool (E, L), True = real token.
            positions: (L, C), added to the words as keys, not as values.

        Returns:
            (E, Q, C)
        """
        queries = self.self_norm(queries + self.self_attention(queries, queries))
        keys = text if positions is None else text + positions
        attended = self.text_attention(queries, keys, text_mask, values=text)
        queries = self.text_norm(queries + attended)
        return self.ffn_norm(queries + self.ffn(queries))


class CognitionLayer(nn.Module):
    """Instances among each other, instances and words, and the fusion C1 that closes the loop."""

    def __init__(self, *, dim: int, num_heads: int, ffn_dim: int, instance_attention: str):
        """
        Args:
            instance_attention: "queries": an expression's queries attend each other; "released":
                see ``_attend_as_released``.

        Raises:
            ValueError: for an unknown instance attention.
        """
        super().__init__()
        check_choice("MODEL.DERIS.INSTANCE_ATTENTION", instance_attention, ("released", "queries"))
        self.as_released = instance_attention == "released"
        self.instance_attention = MultiheadAttention(dim=dim, num_heads=num_heads)
        self.instance_norm = nn.LayerNorm(dim)
        self.instance_text = TextDecoderLayer(dim=dim, num_heads=num_heads, ffn_dim=ffn_dim)
        self.fusion = nn.Linear(2 * dim, dim)
        # As released: Mask2Former's self-attention, and an attention to words of plain
        # linear layers.
        nn.init.xavier_uniform_(self.instance_attention.out.weight)
        for layer in self.instance_text.text_attention.children():
            layer.reset_parameters()

    def forward(
        self, queries: Tensor, prior: Tensor, text: Tensor, text_mask: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            queries: (E, Q, C).
            prior: (E, Q, C), what lies under each query's mask; it tells queries apart as a
                position does, in queries and keys.
            text, text_mask, positions: see TextDecoderLayer.

        Returns:
            fused queries Q_f = C1(Q_p, Q_r), (E, Q, C), and Q_r (E, Q, C), which is scored.
        """
        if self.as_released:
            attended = self._attend_as_released(queries, prior)
        else:
            located = queries + prior
            attended = self.instance_attention(located, located, values=queries)
        queries = self.instance_norm(queries + attended)
        referring = self.instance_text(queries, text, text_mask, positions)
        return self.fusion(torch.cat([queries, referring], -1)), referring

    def _attend_as_released(self, queries: Tensor, prior: Tensor) -> Tensor:
        """The released code hands (batch, query, channel) to an attention over the first axis.

        Query n of an expression then attends query n of all expressions in the batch. So it is in
        training, as the released weights have learnt; in evaluation, where no result may depend on
        what else is in the batch, each attends itself, as the released code does at batch size 1:
        that of its configs for gRefCOCO. Those for RefCOCO evaluate 16 at a time, in the order of a
        file: numbers of these weights that depend on it are not repeated here.
        """
        attention = self.instance_attention
        if not self.training:
            return attention.out(attention.value(queries))
        located, values = (queries + prior).transpose(0, 1), queries.transpose(0, 1)
        return attention(located, located, values=values).transpose(0, 1)


class ExistenceDecoder(nn.Module):
    """Non-referent judgment: do the queries of the last round hold anything the sentence names?"""

    def __init__(self, *, dim: int, num_layers: int, **layer: Any):
        """
        Args:
            layer: see TextDecoderLayer.
        """
        super().__init__()
        self.layers = nn.ModuleList(TextDecoderLayer(dim=dim, **layer) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        self.logit = nn.Linear(dim, 1)

    def forward(self, queries: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """(E, Q, C), (E, L, C), bool (E, L) -> logits (E,), positive = a target exists."""
        for layer in self.layers:
            queries = layer(queries, text, text_mask)
        return self.logit(self.norm(queries)).mean((1, 2))


class CognitionBranch(nn.Module):
    """Encoder of the small view and the sentence, the initial queries, and the cognition layers."""

    @configurable
    def __init__(
        self,
        *,
        encoder: nn.Module,
        reads_images: bool,
        num_layers: int,
        dim: int,
        num_queries: int,
        text_positions: str,
        existence: ExistenceDecoder,
        **layer: Any,
    ):
        """
        Args:
            encoder: RISBEiT3, or a text encoder (see ``modeling/text``).
            reads_images: build the visual tokens f_v; only with RISBEiT3.
            num_layers: cognition layers K, one per call of ``forward``.
            text_positions: "released" or "sine".
            layer: see CognitionLayer.

        Raises:
            ValueError: for unknown text positions.
        """
        super().__init__()
        check_choice("MODEL.DERIS.TEXT_POSITIONS", text_positions, _POSITIONS)
        self.encoder = encoder
        self.looks = isinstance(encoder, RISBEiT3)
        if self.looks and not reads_images:
            encoder.freeze_unread_vision()
        encoder_dim = encoder.embed_dim if self.looks else encoder.dim
        self.vocab_size = encoder.vocab_size
        self.visual_proj = nn.Linear(encoder_dim, dim) if reads_images else None
        self.text_proj = nn.Linear(encoder_dim, dim)
        self.query = nn.Embedding(num_queries, encoder_dim)
        self.query_proj = nn.Linear(encoder_dim, dim)
        self.layers = nn.ModuleList(CognitionLayer(dim=dim, **layer) for _ in range(num_layers))
        self.referring = nn.Linear(dim, 2)
        self.existence = existence
        positions = _POSITIONS[text_positions](MAX_TOKENS, dim)
        self.register_buffer("text_positions", positions, persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode, num_layers: int) -> dict[str, Any]:
        deris = cfg.MODEL.DERIS
        check_choice("MODEL.DERIS.COGNITION", deris.COGNITION, ("RISBEiT3", "text"))
        if deris.COGNITION == "text":
            encoder = build_text_encoder(cfg)
        else:
            sizes = {name: (height, width) for name, height, width in cfg.INPUT.RIS.VIEWS}
            if VIEW not in sizes:
                raise ValueError(
                    f"MODEL.DERIS.COGNITION RISBEiT3 looks at a view of its own: INPUT.RIS.VIEWS "
                    f"lacks ['{VIEW}', 224, 224]"
                )
            encoder = RISBEiT3(**{**RISBEiT3.from_config(cfg), "image_size": sizes[VIEW]})
        return {
            "encoder": encoder,
            "reads_images": deris.VISUAL_FEATURES and deris.COGNITION != "text",
            "num_layers": num_layers,
            **arguments(deris, "DIM", "NUM_HEADS", "FFN_DIM", "NUM_QUERIES"),
            **arguments(deris, "INSTANCE_ATTENTION", "TEXT_POSITIONS"),
            "existence": ExistenceDecoder(
                **arguments(deris, "DIM", "NUM_HEADS", ffn_dim="EXISTENCE_FFN_DIM"),
                **arguments(deris, num_layers="EXISTENCE_LAYERS", dropout="EXISTENCE_DROPOUT"),
            ),
        }

    def encode_images(self, views: dict[str, Tensor]) -> Tensor | None:
        """Patch tokens of the view (B, 3, h, w), once per image; None for text encoders."""
        return self.encoder.embed_image(views[VIEW]) if self.looks else None

    def read(
        self, image_tokens: Tensor | None, image_index: Tensor, input_ids: Tensor, text_mask: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """Read E sentences, with their images if the encoder sees them.

        Returns:
            f_v (E, C, g, g), or None where it is switched off; words (E, L, C).
        """
        if not self.looks:
            return None, self.text_proj(self.encoder(input_ids, text_mask))
        vision, text = self.encoder.joint(image_tokens[image_index], input_ids, text_mask)
        if self.visual_proj is None:
            return None, self.text_proj(text)
        visual = self.visual_proj(vision[:, 1:]).transpose(1, 2)
        return visual.unflatten(2, self.encoder.grid), self.text_proj(text)

    def initial_queries(self, num_expressions: int) -> Tensor:
        """The same for all expressions: (E, Q, C)."""
        return self.query_proj(self.query.weight).expand(num_expressions, -1, -1)

    def forward(
        self, number: int, queries: Tensor, prior: Tensor, text: Tensor, text_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cognition layer ``number``; arguments as CognitionLayer.

        Returns:
            fused queries (E, Q, C) and referring logits (E, Q, 2), class 0 = referred.
        """
        positions = self.text_positions[: text.shape[1]].to(text.dtype)
        queries, referring = self.layers[number](queries, prior, text, text_mask, positions)
        return queries, self.referring(referring)


def released_positions(length: int, dim: int) -> Tensor:
    """sin l, cos l, 0, 1, 0, 1, ...: sine positions whose frequencies below 1 became 0."""
    positions = sine_position_1d(length, dim)
    positions[:, 2::2], positions[:, 3::2] = 0, 1
    return positions


_POSITIONS = {"released": released_positions, "sine": sine_position_1d}

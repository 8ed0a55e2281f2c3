"""VIPA's encoders: Swin and BERT with early fusion (CrossVLT).

Like those of ``variants`` they are called in two steps, ``encode_images`` once per image and
``forward`` once per expression, and give vision features F_1 ... F_4 and linguistic tokens.
"""

from typing import Any, ClassVar

from detectron2.config import CfgNode
from torch import Tensor, nn

from ..backbone import RISSwin, backbone_class
from ..text import BertStack, RISBert
from .exchange import StageFusion

NUM_STAGES = 4
# BERT layers of a language stage after the first: one reads vision, one is ordinary.
_STAGE_LAYERS = 2
_LATER_LAYERS = _STAGE_LAYERS * (NUM_STAGES - 1)

Encoded = tuple[list[Tensor], Tensor]  # F_1 ... F_4, each (E, C_i, h_i, w_i), and tokens (E, L, d)


class EarlyFusion(nn.Module):
    """Swin and BERT stage by stage, with cross-attention between them (CrossVLT).

    Order: language stage 1, vision stage 1, language stage 2, which reads the image between vision
    stages 1 and 2, and so on; the last language tokens have seen vision up to stage 3. Of CrossVLT,
    the alignment heads are left out. Language stage 1 has all BERT layers but six; each further
    stage has two, of which the first reads the image.

    Per image: patch embedding and the blocks of stage 1. Everything else follows the first
    exchange.
    """

    weight_parts: ClassVar[dict[str, str]] = {"swin": "vision", "bert": "text"}

    def __init__(
        self,
        *,
        vision: RISSwin,
        text: RISBert,
        language_stages: BertStack | None = None,
        language_reads: bool = True,
    ):
        """
        Args:
            vision: without norms of outputs.
            text: with ``context_dims`` of ``context_dims_of``, unless the stages come apart.
            language_stages: the layers of language stages 2 to 4, where they are not ``text``'s
                own.
            language_reads: False: one-way, all of BERT runs first and vision reads its output.

        Raises:
            ValueError: if BERT has too few layers.
        """
        super().__init__()
        self.vision, self.text = vision, text
        self.language_stages = language_stages
        self.language_reads = language_reads
        self.dims, self.text_dim, self.vocab_size = vision.dims, text.dim, text.vocab_size
        self.first_layers = text.depth
        if language_reads and language_stages is None:
            self.first_layers = text.depth - _LATER_LAYERS
        if self.first_layers < 1:
            raise ValueError(
                f"early fusion needs more than {_LATER_LAYERS} BERT layers, "
                f"MODEL.RIS.TEXT.BERT.DEPTH is {text.depth}"
            )
        self.fusions = nn.ModuleList(
            StageFusion(
                vision_dim=dim,
                text_dim=text.dim,
                dim=max(dim, vision.dims[1]),
                last=stage == NUM_STAGES - 1,
            )
            for stage, dim in enumerate(vision.dims)
        )

    @staticmethod
    def context_dims_of(vision: RISSwin, first: int) -> dict[int, int]:
        """BERT layer -> channels of the vision it reads; language stage 2 starts at ``first``."""
        return {first + _STAGE_LAYERS * i: dim for i, dim in enumerate(vision.dims[1:])}

    def encode_images(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        tokens, size = self.vision.embed(images)
        return self.vision.run_stage(0, tokens, size), size

    def forward(
        self,
        features: tuple[Tensor, tuple[int, int]],
        image_index: Tensor,
        input_ids: Tensor,
        text_mask: Tensor,
    ) -> Encoded:
        text = self.text.run_layers(
            self.text.embed(input_ids), text_mask, 0, self.first_layers
        )  # language stage 1, or all of BERT
        tokens, size = features
        tokens, maps = tokens[image_index], []
        for stage, fusion in enumerate(self.fusions):
            if stage > 0:
                if self.language_reads:
                    text = self._language_stage(stage, text, text_mask, tokens)
                tokens = self.vision.run_stage(stage, tokens, size)
            residual = fusion.read(tokens, text, text_mask)
            maps.append(fusion.norm(residual).transpose(1, 2).unflatten(2, size))
            if stage < NUM_STAGES - 1:
                tokens = fusion.gate(tokens, residual)
                tokens, size = self.vision.downsample(stage, tokens, size)
                residual = fusion.read_down(tokens, text, text_mask)
                tokens = fusion.gate_down(tokens, residual)
        return maps, text

    def layers_to_checkpoint(self) -> list[nn.Module]:
        """Beside those of Swin and BERT."""
        layers = [layer for fusion in self.fusions for layer in fusion.children()]
        return [layer for layer in layers if not isinstance(layer, nn.LayerNorm)]

    def _language_stage(
        self, stage: int, text: Tensor, text_mask: Tensor, vision: Tensor
    ) -> Tensor:
        stack, start = self.text, self.first_layers
        if self.language_stages is not None:
            stack, start = self.language_stages, 0
        start += _STAGE_LAYERS * (stage - 1)
        return stack.run_layers(text, text_mask, start, start + _STAGE_LAYERS, vision)


def build_early_fusion(cfg: CfgNode) -> EarlyFusion:
    """Build the encoder of MODEL.VIPA.ENCODER early."""
    swin = backbone_class(cfg, RISSwin)
    vision = swin(**swin.from_config(cfg), out_features=())
    bert: dict[str, Any] = RISBert.from_config(cfg)
    first = bert["depth"] - _LATER_LAYERS
    if cfg.MODEL.VIPA.INIT_STAGES_FROM_BERT:
        context_dims = EarlyFusion.context_dims_of(vision, max(first, 0))
        return EarlyFusion(vision=vision, text=RISBert(**bert, context_dims=context_dims))
    stages = {key: bert[key] for key in ("dim", "num_heads", "dropout", "init")}
    return EarlyFusion(
        vision=vision,
        text=RISBert(**{**bert, "depth": first}),
        language_stages=BertStack(
            **stages, depth=_LATER_LAYERS, context_dims=EarlyFusion.context_dims_of(vision, 0)
        ),
    )

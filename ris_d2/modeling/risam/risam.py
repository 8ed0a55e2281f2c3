"""RISAM: "Referring Image Segmentation via Mutual-Aware Attention Features" (Zhang et al.)."""

import math
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from torch import Tensor, nn

from ..backbone import build_pyramid_backbone
from ..layers.position import sine_position_1d
from ..losses import FocalAndDice
from ..options import arguments, check_choice
from ..segmenter import ReferringSegmenter
from ..text import build_text_encoder
from .decoder import MutualAwareMaskDecoder
from .mutual_aware_attention import MutualFeatures
from .variants import SAMMaskDecoder, build_decoder, build_feature_enhancement, build_fusion


@META_ARCH_REGISTRY.register()
class RISAM(ReferringSegmenter):
    """Fig. 3: encoders -> Feature Enhancement -> Mutual-Aware Attention -> Mask Decoder.

    - ``backbone``, ``text``: F_v1, F_v2, F_v3 of the image, F_l of the words.
    - ``enhancement``: F_v of the three (Eq. 1, 2).
    - ``fusion``: S and A of regions and words, F_lav and F_val (Eq. 3 to 5).
    - ``decoder``: pixels, and F_c = [F_m, F_val] (Eq. 6 to 9); the mask is pixels times F_m.

    The encoders are frozen (MODEL.RIS.FREEZE). Image encoder and Feature Enhancement see no
    sentence and run once per image.
    """

    weight_parts = {
        "sam": "backbone",
        "vit": "backbone",
        "swin": "backbone",
        "clip": ("text",),
        "risam": ("backbone", "text"),
        "sam_decoder": "decoder",
    }
    trims_text = True

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        text: nn.Module,
        word_positions: nn.Module,
        enhancement: nn.Module,
        fusion: nn.Module,
        decoder: MutualAwareMaskDecoder | SAMMaskDecoder,
        in_features: Sequence[str],
        stride: int,
        loss: FocalAndDice,
        **segmenter: Any,
    ):
        """
        Args:
            word_positions: (E, L, C') words -> the same with positions.
            in_features: names of F_v1, F_v2, F_v3 in the backbone's output.
            stride: of the grid that the head works on.
            loss: Eq. 10 to 12, with weights omega_f and omega_d.
            segmenter: see ReferringSegmenter.
        """
        super().__init__(**segmenter)
        self.backbone = backbone
        self.text, self.vocab_size = text, text.vocab_size
        self.word_positions = word_positions
        self.enhancement, self.fusion, self.decoder = enhancement, fusion, decoder
        self.in_features = tuple(in_features)
        self.grid = tuple(math.ceil(n / stride) for n in self.input_size)
        self.loss = loss

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        risam = cfg.MODEL.RISAM
        # torch's synchronised BatchNorm refuses the CPU. This one weighs processes by
        # their expressions.
        on_cpu = risam.NORM == "SyncBN" and cfg.MODEL.DEVICE == "cpu"
        norm = "naiveSyncBN_N" if on_cpu else risam.NORM
        backbone = build_pyramid_backbone(cfg, risam.IN_FEATURES)
        text, outputs = build_text_encoder(cfg), backbone.output_shape()
        return {
            **super().from_config(cfg),
            "sentence_dim": 2 * risam.DIM,
            "backbone": backbone,
            "text": text,
            "word_positions": WordPositions(
                dim=text.dim, length=cfg.INPUT.RIS.MAX_TOKENS, kind=risam.LANG_POS_ENC
            ),
            "enhancement": build_feature_enhancement(
                cfg, [outputs[name] for name in risam.IN_FEATURES], norm
            ),
            "fusion": build_fusion(cfg, word_dim=text.dim, norm=norm),
            "decoder": build_decoder(cfg, norm),
            **arguments(risam, "IN_FEATURES", "STRIDE"),
            "loss": FocalAndDice(
                **arguments(risam, "FOCAL_WEIGHT", "FOCAL_GAMMA", "DICE_WEIGHT", "DICE_SMOOTH")
            ),
        }

    def encode_images(self, images: Tensor, views: dict[str, Tensor]) -> Tensor:
        outputs = self.backbone(images)
        return self.enhancement([outputs[name] for name in self.in_features], self.grid)

    def segment(
        self, features: Tensor, image_index: Tensor, input_ids: Tensor, text_mask: Tensor
    ) -> dict[str, Tensor]:
        fused = self.fuse(features, image_index, input_ids, text_mask)
        logits, evidence = self.decoder(fused, text_mask, self.grid)
        outputs = {"mask_logits": logits}
        if evidence is not None:
            outputs["sentence"] = evidence
        return outputs

    def fuse(
        self, features: Tensor, image_index: Tensor, input_ids: Tensor, text_mask: Tensor
    ) -> MutualFeatures:
        """Fused features of E expressions; no attention reads padded words (paper: silent)."""
        words = self.word_positions(self.text(input_ids, text_mask))
        regions = features[image_index].flatten(2).transpose(1, 2)
        return self.fusion(regions, words, text_mask, self.grid)


class WordPositions(nn.Module):
    """Add a vector per position to words: sine and cosine (as Vaswani et al.), learned, none."""

    def __init__(self, *, dim: int, length: int, kind: str):
        """
        Raises:
            ValueError: for an unknown kind.
        """
        super().__init__()
        check_choice("MODEL.RISAM.LANG_POS_ENC", kind, ("sine", "learned", "none"))
        table = sine_position_1d(length, dim)
        if kind == "learned":
            self.table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        else:
            self.register_buffer("table", table if kind == "sine" else None, persistent=False)

    def forward(self, words: Tensor) -> Tensor:
        return words if self.table is None else words + self.table[: words.shape[1]].to(words.dtype)

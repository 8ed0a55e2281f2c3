"""RISAM: "Referring Image Segmentation via Mutual-Aware Attention Features" (Zhang et al.)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from torch import Tensor, nn

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
    """Fig. 3: encoders -> Feature Enhancement -> Mutual-Aware Attention -> Mutual-Aware Mask Decoder.

    The encoders are frozen (MODEL.RIS.FREEZE). Image encoder and Feature Enhancement see no sentence and
    run once per image.
    """

    weight_parts = {
        "sam": "backbone",
        "vit": "backbone",
        "swin": "backbone",
        "clip": ("text",),
        "sam_decoder": "decoder",
    }

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
        mask_pad: bool,
        loss: FocalAndDice,
        **segmenter: Any,
    ):
        """
        Args:
            word_positions: (E, L, C') words -> the same with positions.
            in_features: names of F_v1, F_v2, F_v3 in the backbone's output.
            stride: of the grid that the head works on.
            mask_pad: no attention reads padded words; else they are words like any other.
            loss: Eq. 10 to 12, with weights omega_f and omega_d.
            segmenter: see ReferringSegmenter.
        """
        super().__init__(**segmenter)
        self.backbone = backbone
        self.text = text
        self.vocab_size = text.vocab_size
        self.word_positions = word_positions
        self.enhancement = enhancement
        self.fusion = fusion
        self.decoder = decoder
        self.in_features = tuple(in_features)
        self.grid = tuple(math.ceil(n / stride) for n in self.input_size)
        self.mask_pad = mask_pad
        # Padded words that something reads must be there, always as many.
        self.trims_text = mask_pad
        self.loss = loss

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        risam = cfg.MODEL.RISAM
        # torch's synchronised BatchNorm refuses the CPU. This one weighs processes by
        # their expressions.
        on_cpu = risam.NORM == "SyncBN" and cfg.MODEL.DEVICE == "cpu"
        norm = "naiveSyncBN_N" if on_cpu else risam.NORM
        backbone, text = build_backbone(cfg), build_text_encoder(cfg)
        outputs = backbone.output_shape()
        missing = [name for name in risam.IN_FEATURES if name not in outputs]
        if missing:
            raise ValueError(
                f"MODEL.RISAM.IN_FEATURES names {missing}; {cfg.MODEL.BACKBONE.NAME} gives "
                f"{sorted(outputs)}"
            )
        dec = risam.DEC
        has_words = dec.TYPE == "sam" or dec.ELG
        if risam.FUSION == "none" and not has_words:
            raise ValueError(
                "MODEL.RISAM.FUSION none with DEC.ELG False: the sentence reaches nothing"
            )
        if risam.FUSION == "conv" and not risam.MASK_PAD:
            raise ValueError(
                "MODEL.RISAM.FUSION conv with MASK_PAD False: it tells the end token, which stands for "
                "the sentence, by the padding behind it"
            )
        return {
            **super().from_config(cfg),
            "sentence_dim": 2 * risam.DIM,
            "backbone": backbone,
            "text": text,
            "word_positions": _build_word_positions(
                risam.LANG_POS_ENC, dim=text.dim, length=cfg.INPUT.RIS.MAX_TOKENS
            ),
            "enhancement": build_feature_enhancement(
                risam.FE.TYPE,
                shapes=[outputs[name] for name in risam.IN_FEATURES],
                dim=risam.DIM,
                norm=norm,
                **arguments(risam.FE, "MLP_LAYERS", "NUM_CONVS"),
            ),
            "fusion": build_fusion(
                risam.FUSION,
                word_dim=text.dim,
                dim=risam.DIM,
                num_heads=dec.NUM_HEADS,
                norm=norm,
                words_are_read=has_words,
                **arguments(risam.MA),
            ),
            "decoder": build_decoder(cfg, norm),
            **arguments(risam, "IN_FEATURES", "STRIDE", "MASK_PAD"),
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
        fused, seen = self.fuse(features, image_index, input_ids, text_mask)
        logits, evidence = self.decoder(fused, seen, self.grid)
        outputs = {"mask_logits": logits}
        if evidence is not None:
            outputs["sentence"] = evidence
        return outputs

    def mask_losses(self, outputs: dict[str, Tensor], masks: Tensor) -> dict[str, Tensor]:
        logits = outputs["mask_logits"]
        return self.loss(logits, self.shrink_targets(masks, logits.shape[-2:]))

    def fuse(
        self, features: Tensor, image_index: Tensor, input_ids: Tensor, text_mask: Tensor
    ) -> tuple[MutualFeatures, Tensor]:
        """Fused features of E expressions, and the words (E, L) that attention may read."""
        words = self.word_positions(self.text(input_ids, text_mask))
        seen = text_mask if self.mask_pad else torch.ones_like(text_mask)
        regions = features[image_index].flatten(2).transpose(1, 2)
        return self.fusion(regions, words, seen, self.grid), seen


class WordPositions(nn.Module):
    """Add a vector per position: learned, or sine and cosine (Vaswani et al., 2017)."""

    def __init__(self, *, dim: int, length: int, learned: bool):
        super().__init__()
        table = sine_position_1d(length, dim)
        if learned:
            self.table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        else:
            self.register_buffer("table", table, persistent=False)

    def forward(self, words: Tensor) -> Tensor:
        return words + self.table[: words.shape[1]].to(words.dtype)


def _build_word_positions(name: str, *, dim: int, length: int) -> nn.Module:
    check_choice("MODEL.RISAM.LANG_POS_ENC", name, ("sine", "learned", "none"))
    if name == "none":
        return nn.Identity()
    return WordPositions(dim=dim, length=length, learned=name == "learned")

"""RISAM: "Referring Image Segmentation via Mutual-Aware Attention Features" (Zhang et al.)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from torch import Tensor, nn

from ..losses import mask_dice, mask_focal
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
        focal_weight: float,
        focal_gamma: float,
        focal_alpha: float,
        dice_weight: float,
        dice_smooth: float,
        **segmenter: Any,
    ):
        """
        Args:
            word_positions: (E, L, C') words -> the same with positions.
            in_features: names of F_v1, F_v2, F_v3 in the backbone's output.
            stride: of the grid that the head works on.
            mask_pad: no attention reads padded words; else they are words like any other.
            focal_weight, dice_weight: omega_f and omega_d of Eq. 12.
            focal_gamma: gamma of Eq. 10.
            focal_alpha: weight of the foreground; -1: none, as in Eq. 10.
            dice_smooth: added to both sides of Eq. 11's fraction.
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
        self.focal_weight, self.dice_weight = focal_weight, dice_weight
        self.focal_gamma, self.focal_alpha = focal_gamma, focal_alpha
        self.dice_smooth = dice_smooth

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        risam = cfg.MODEL.RISAM
        # torch's synchronised BatchNorm refuses the CPU. This one weighs processes by their expressions.
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
                mlp_layers=risam.FE.MLP_LAYERS,
                num_convs=risam.FE.NUM_CONVS,
                norm=norm,
            ),
            "fusion": build_fusion(
                risam.FUSION,
                word_dim=text.dim,
                dim=risam.DIM,
                num_blocks=risam.MA.NUM_BLOCKS,
                num_heads=dec.NUM_HEADS,
                tau=risam.MA.TAU,
                use_mask=risam.MA.USE_MASK,
                lga_norm=risam.MA.LGA_NORM,
                norm=norm,
                words_are_read=has_words,
            ),
            "decoder": build_decoder(cfg, norm),
            "in_features": risam.IN_FEATURES,
            "stride": risam.STRIDE,
            "mask_pad": risam.MASK_PAD,
            "focal_weight": risam.FOCAL_WEIGHT,
            "focal_gamma": risam.FOCAL_GAMMA,
            "focal_alpha": risam.FOCAL_ALPHA,
            "dice_weight": risam.DICE_WEIGHT,
            "dice_smooth": risam.DICE_SMOOTH,
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
        logits = outputs["mask_logits"].float()
        masks = self.shrink_targets(masks, logits.shape[-2:])
        focal = mask_focal(logits, masks, alpha=self.focal_alpha, gamma=self.focal_gamma)
        return {
            "loss_focal": self.focal_weight * focal,
            "loss_dice": self.dice_weight * mask_dice(logits, masks, smooth=self.dice_smooth),
        }

    def fuse(
        self, features: Tensor, image_index: Tensor, input_ids: Tensor, text_mask: Tensor
    ) -> tuple[MutualFeatures, Tensor]:
        """Fused features of E expressions, and the words (E, L) that attention may read."""
        words = self.word_positions(self.text(input_ids, text_mask))
        seen = text_mask if self.mask_pad else torch.ones_like(text_mask)
        regions = features[image_index].flatten(2).transpose(1, 2)
        return self.fusion(regions, words, seen, self.grid), seen


class SinePositions(nn.Module):
    """Add sine and cosine of a word's position (Vaswani et al., 2017)."""

    def forward(self, words: Tensor) -> Tensor:
        length, dim = words.shape[1:]
        steps = torch.arange(0, dim, 2, device=words.device) / dim
        phases = torch.arange(length, device=words.device)[:, None] / 10000**steps
        return words + torch.stack([phases.sin(), phases.cos()], -1).flatten(1).to(words)


class LearnedPositions(nn.Module):
    """Add a vector per position."""

    def __init__(self, *, dim: int, length: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(length, dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, words: Tensor) -> Tensor:
        return words + self.table[: words.shape[1]]


def _build_word_positions(name: str, *, dim: int, length: int) -> nn.Module:
    if name == "learned":
        return LearnedPositions(dim=dim, length=length)
    if name not in ("sine", "none"):
        raise ValueError(f"MODEL.RISAM.LANG_POS_ENC is {name!r}, not sine, learned or none")
    return SinePositions() if name == "sine" else nn.Identity()

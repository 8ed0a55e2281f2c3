"""VIPA: "Visual Informative Part Attention for Referring Image Segmentation" (Cho et al.)."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from ..layers import init_xavier, resize_maps
from ..losses import FocalAndDice, dice_loss, mask_bce
from ..options import arguments, check_choice
from ..segmenter import ReferringSegmenter
from .decoder import VIPADecoder
from .encoders import EarlyFusion
from .generator import VisualExpressionGenerator
from .variants import BEiT3Encoder, LinguisticExpression, SeparateEncoders, build_encoder

_RELEVANCE_LOSSES = ("contrastive", "threshold", "none")


@META_ARCH_REGISTRY.register()
class VIPA(ReferringSegmenter):
    """Fig. 2: vision and language encoders -> visual expression generator -> decoder.

    - ``encoder``: Swin and BERT read each other at every stage; maps F_1 ... F_4, and words.
    - ``generator``: phi^V and phi^L, cosines S_c (Eq. 1), retrieval M of N_p = r N tokens for each
      word (Eq. 2, 3), F_a (Eq. 5), F_r (Eq. 6), and the visual expression (Eq. 7).
    - ``decoder``: pixels attend the expression (Eq. 8) from stride 32 to 4.
    """

    trims_text = True

    @configurable
    def __init__(
        self,
        *,
        encoder: EarlyFusion | SeparateEncoders | BEiT3Encoder,
        generator: VisualExpressionGenerator | LinguisticExpression,
        decoder: VIPADecoder,
        loss: FocalAndDice,
        relevance_loss: str,
        relevance_weight: float,
        learn_relevance_temperature: bool,
        **segmenter: Any,
    ):
        """
        Args:
            generator: makes the decoder's keys and values.
            relevance_loss: on the [CLS] row of the relevance scores (Table VIII): "contrastive"
                (Eq. 4, pixel by pixel), "threshold" (dice loss of the map cut at 0.5), "none". Not
                read with language as keys and values, which has no relevance scores.
            learn_relevance_temperature: divide the cosines by a learnable temperature in the loss.
            segmenter: see ReferringSegmenter.

        Raises:
            ValueError: for an unknown loss, or if nothing would train the relevance scores.
        """
        super().__init__(**segmenter)
        check_choice("MODEL.VIPA.RELEVANCE_LOSS", relevance_loss, _RELEVANCE_LOSSES)
        visual = isinstance(generator, VisualExpressionGenerator)
        if visual and relevance_loss == "none" and not generator.retrieve:
            raise ValueError(
                "MODEL.VIPA.GENERATOR.RETRIEVE False with RELEVANCE_LOSS none: nothing would use "
                "the relevance scores"
            )
        self.encoder = encoder
        self.weight_parts = {
            source: f"encoder.{part}" for source, part in encoder.weight_parts.items()
        }
        self.vocab_size = encoder.vocab_size
        self.generator, self.decoder, self.loss = generator, decoder, loss
        self.relevance_loss = relevance_loss if visual else "none"
        self.relevance_weight = relevance_weight
        self.log_relevance_temperature = None
        if learn_relevance_temperature and self.relevance_loss == "contrastive":
            self.log_relevance_temperature = nn.Parameter(torch.zeros(()))
        for part in (generator, decoder):  # the paper is silent
            part.apply(init_xavier)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        vipa = cfg.MODEL.VIPA
        encoder = build_encoder(cfg)
        common = {"text_dim": encoder.text_dim, "dim": vipa.DIM, "num_heads": vipa.NUM_HEADS}
        check_choice("MODEL.VIPA.KEY_VALUES", vipa.KEY_VALUES, ("visual", "language"))
        if vipa.KEY_VALUES == "language":
            generator = LinguisticExpression(**common)
        else:
            if vipa.ENCODER == "none" and not vipa.GENERATOR.RETRIEVE:
                raise ValueError(
                    "MODEL.VIPA.ENCODER none with GENERATOR.RETRIEVE False: the sentence reaches "
                    "nothing"
                )
            generator = VisualExpressionGenerator(
                **common, vision_dim=encoder.dims[-1], **arguments(vipa.GENERATOR)
            )
        return {
            **super().from_config(cfg),
            "sentence_dim": 2 * vipa.DIM,
            "encoder": encoder,
            "generator": generator,
            "decoder": VIPADecoder(
                in_dims=encoder.dims,
                **arguments(vipa, "DIM", "NUM_HEADS"),
                **arguments(vipa.DECODER),
            ),
            "loss": FocalAndDice(
                focal_name="loss_bce", focal_weight=vipa.BCE_WEIGHT, dice_weight=vipa.DICE_WEIGHT
            ),
            **arguments(vipa, "RELEVANCE_LOSS", "RELEVANCE_WEIGHT", "LEARN_RELEVANCE_TEMPERATURE"),
        }

    def encode_images(self, images: Tensor, views: dict[str, Tensor]) -> Any:
        return self.encoder.encode_images(images)

    def segment(
        self, features: Any, image_index: Tensor, input_ids: Tensor, text_mask: Tensor
    ) -> dict[str, Tensor]:
        """Beside "mask_logits" and "sentence":

        "relevance" (E, L, h, w) and "retrieved" bool (E, L, h, w), on the grid of F_4, where the
        model has them (see ``Expression``).
        """
        maps, text = self.encoder(features, image_index, input_ids, text_mask)
        size = maps[-1].shape[-2:]
        expression = self.generator(maps[-1].flatten(2).transpose(1, 2), text, input_ids, text_mask)
        logits, pixels = self.decoder(maps, expression.tokens, expression.attn_mask)
        # An existence head is our addition. Language tokens have not seen the image
        # without fusion; the decoder's pixels know both.
        evidence = [pixels.amax((2, 3)), _mean(expression.tokens, expression.attn_mask)]
        outputs = {"mask_logits": logits, "sentence": torch.cat(evidence, 1)}
        for name in ("relevance", "retrieved"):
            rows = getattr(expression, name)
            if rows is not None:
                outputs[name] = rows.unflatten(2, size)
        return outputs

    def mask_losses(self, outputs: dict[str, Tensor], masks: Tensor) -> dict[str, Tensor]:
        losses = self.loss(resize_maps(outputs["mask_logits"], masks.shape[-2:]), masks)
        if self.relevance_loss != "none":
            scores = outputs["relevance"][:, 0]  # s of Eq. 4, the row of [CLS]
            losses["loss_relevance"] = self.relevance_weight * self._relevance_loss(scores, masks)
        return losses

    def _relevance_loss(self, scores: Tensor, masks: Tensor) -> Tensor:
        """Cosines (E, h, w), masks (E, H, W) -> (E,)."""
        if self.relevance_loss == "contrastive":
            if self.log_relevance_temperature is not None:
                scores = scores / self.log_relevance_temperature.exp()
            return mask_bce(resize_maps(scores, masks.shape[-2:]), masks)
        # The paper does not define "direct thresholding": sigma(s) > 0.5 is s > 0, its gradient
        # that of sigma(s), and of the two mask losses only dice is finite on a binary map.
        soft = scores.sigmoid()
        binary = (scores > 0).float() + soft - soft.detach()
        # The share of each cell that is on target: a target smaller than a cell must not vanish.
        targets = resize_maps(masks, scores.shape[-2:], "area")
        return dice_loss(binary, targets)


def _mean(tokens: Tensor, attn_mask: Tensor | None) -> Tensor:
    """(E, K, D), bool (E, K) -> (E, D)"""
    if attn_mask is None:
        return tokens.mean(1)
    return (tokens * attn_mask[..., None]).sum(1) / attn_mask.sum(1, keepdim=True)

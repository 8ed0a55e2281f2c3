"""Shared-RIS: "A Simple Baseline with Single-encoder for Referring Image Segmentation" (Yu et al.)."""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from ..backbone import RISBEiT3, backbone_class
from ..layers import init_xavier, resize_maps
from ..losses import mask_bce, mask_dice
from ..options import arguments, check_choice
from ..segmenter import ReferringSegmenter
from .decoder import SharedMaskDecoder
from .fpn import SharedFPN
from .variants import CRISFPN, LastLayer, PixelWordFPN


@META_ARCH_REGISTRY.register()
class SharedRIS(ReferringSegmenter):
    """Fig. 3: shared encoder (BEiT-3) -> shared FPN -> shared mask decoder.

    Image and sentence meet in the first layer, so only the patch embedding is per image.
    """

    weight_parts = {"beit3": "encoder"}
    trims_text = True

    @configurable
    def __init__(
        self,
        *,
        encoder: RISBEiT3,
        fpn: SharedFPN | LastLayer | CRISFPN | PixelWordFPN,
        decoder: SharedMaskDecoder,
        bce_weight: float,
        dice_weight: float,
        loss_at_input_size: bool,
        **segmenter: Any,
    ):
        """
        Args:
            bce_weight, dice_weight: lambda_bce and lambda_dice of Eq. 12.
            loss_at_input_size: upsample logits to the input for the loss, instead of shrinking the
                ground truth to the prediction.
            segmenter: see ReferringSegmenter.
        """
        super().__init__(**segmenter)
        self.encoder = encoder
        self.vocab_size = encoder.vocab_size
        self.fpn = fpn
        self.decoder = decoder
        self.bce_weight = bce_weight
        self.dice_weight = dice_weight
        self.loss_at_input_size = loss_at_input_size
        for part in (fpn, decoder):  # the paper is silent
            part.apply(init_xavier)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        shared = cfg.MODEL.SHARED_RIS
        # h_j is the output of layer j as it is (Eq. 4 and 5): the encoder's last
        # LayerNorm is not used.
        build = backbone_class(cfg, RISBEiT3)
        encoder = build(**build.from_config(cfg), final_norm=False)
        known = ("mask", "input")
        check_choice("MODEL.SHARED_RIS.LOSS_RESOLUTION", shared.LOSS_RESOLUTION, known)
        return {
            **super().from_config(cfg),
            "sentence_dim": shared.DIM,
            "encoder": encoder,
            "fpn": _build_fpn(shared, encoder),
            "decoder": SharedMaskDecoder(
                num_layers=shared.DECODER_LAYERS,
                fusion=shared.DECODER_FUSION,
                grid=encoder.grid,
                **arguments(shared, "DIM", "NUM_HEADS", "NORM"),
            ),
            **arguments(shared, "BCE_WEIGHT", "DICE_WEIGHT"),
            "loss_at_input_size": shared.LOSS_RESOLUTION == "input",
        }

    def encode_images(self, images: Tensor, views: dict[str, Tensor]) -> Tensor:
        return self.encoder.embed_image(images)

    def segment(
        self, features: Tensor, image_index: Tensor, input_ids: Tensor, text_mask: Tensor
    ) -> dict[str, Tensor]:
        text = self.encoder.embed_text(input_ids, text_mask)
        states = self.encoder.encode(features[image_index], text, text_mask, taps=self.fpn.stages)
        logits, sentence = self.decoder(self.fpn(states, text_mask), text_mask)
        return {"mask_logits": logits, "sentence": sentence}

    def mask_losses(self, outputs: dict[str, Tensor], masks: Tensor) -> dict[str, Tensor]:
        logits = outputs["mask_logits"]
        if self.loss_at_input_size:
            logits = resize_maps(logits, masks.shape[-2:])
        else:
            masks = self.shrink_targets(masks, logits.shape[-2:])
        return {
            "loss_bce": self.bce_weight * mask_bce(logits, masks),
            "loss_dice": self.dice_weight * mask_dice(logits, masks),
        }


def _build_fpn(shared: CfgNode, encoder: RISBEiT3) -> nn.Module:
    """(states, text_mask) -> streams of width DIM, of the encoder's layers in its ``stages``."""
    dims = {"in_dim": encoder.embed_dim, "dim": shared.DIM}
    if not shared.STAGES:
        return LastLayer(**dims, depth=encoder.depth, proj_per_modality=shared.PROJ_PER_MODALITY)
    if shared.STAGES[-1] != encoder.depth or list(shared.STAGES) != sorted(set(shared.STAGES)):
        raise ValueError(
            f"MODEL.SHARED_RIS.STAGES is {shared.STAGES}; it must increase and end with the "
            f"encoder's last layer, {encoder.depth} (layers above would never be trained)"
        )
    check_choice("MODEL.SHARED_RIS.FPN", shared.FPN, ("shared", "cris", "pwam"))
    if shared.FPN == "shared":
        return SharedFPN(
            **dims,
            stages=shared.STAGES,
            num_heads=shared.NUM_HEADS,
            fusion=shared.FPN_FUSION,
            proj_per_modality=shared.PROJ_PER_MODALITY,
        )
    if shared.FPN == "cris":
        return CRISFPN(**dims, stages=shared.STAGES, grid=encoder.grid, norm=shared.NORM)
    return PixelWordFPN(**dims, stages=shared.STAGES)

"""Shared-RIS: "A Simple Baseline with Single-encoder for Referring Image Segmentation"."""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from ..backbone import RISBEiT3, backbone_class
from ..layers import init_xavier
from ..losses import FocalAndDice
from ..options import arguments, check_choice
from ..segmenter import ReferringSegmenter
from .decoder import SharedMaskDecoder
from .fpn import SharedFPN
from .variants import CRISFPN, LastLayer, PixelWordFPN


@META_ARCH_REGISTRY.register()
class SharedRIS(ReferringSegmenter):
    """Fig. 3: shared encoder (BEiT-3) -> shared FPN -> shared mask decoder.

    - ``encoder``: image and words through the same layers; h_j of layer j (Eq. 1 to 5).
    - ``fpn``: z_j of some h_j (Eq. 6), and z of all z_j (Eq. 7), d_w channels.
    - ``decoder``: F_0 and t_cls of z (Eq. 8, 9), F_0 enlarged (Eq. 10), its pixels times t_cls
      (Eq. 11).

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
        loss: FocalAndDice,
        **segmenter: Any,
    ):
        """
        Args:
            loss: Eq. 12, with weights lambda_bce and lambda_dice.
            segmenter: see ReferringSegmenter.
        """
        super().__init__(**segmenter)
        self.encoder, self.vocab_size = encoder, encoder.vocab_size
        self.fpn, self.decoder = fpn, decoder
        self.loss = loss
        for part in (fpn, decoder):  # the paper is silent
            part.apply(init_xavier)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        shared = cfg.MODEL.SHARED_RIS
        # h_j is the output of layer j as it is (Eq. 4 and 5): the encoder's last
        # LayerNorm is not used.
        build = backbone_class(cfg, RISBEiT3)
        encoder = build(**build.from_config(cfg), final_norm=False)
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
            "loss": FocalAndDice(
                focal_name="loss_bce", **arguments(shared, "DICE_WEIGHT", focal_weight="BCE_WEIGHT")
            ),
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


def _build_fpn(shared: CfgNode, encoder: RISBEiT3) -> nn.Module:
    """(states, text_mask) -> streams of width DIM, of the encoder's layers in its ``stages``."""
    dims = {"in_dim": encoder.embed_dim, "dim": shared.DIM}
    apart = arguments(shared, "PROJ_PER_MODALITY")
    if not shared.STAGES:
        return LastLayer(**dims, **apart, stages=(encoder.depth,))
    dims["stages"] = shared.STAGES
    if shared.STAGES[-1] != encoder.depth or list(shared.STAGES) != sorted(set(shared.STAGES)):
        raise ValueError(
            f"MODEL.SHARED_RIS.STAGES is {shared.STAGES}; it must increase and end with the "
            f"encoder's last layer, {encoder.depth} (layers above would never be trained)"
        )
    check_choice("MODEL.SHARED_RIS.FPN", shared.FPN, ("shared", "cris", "pwam"))
    if shared.FPN == "shared":
        return SharedFPN(**dims, **apart, num_heads=shared.NUM_HEADS, fusion=shared.FPN_FUSION)
    if shared.FPN == "cris":
        return CRISFPN(**dims, grid=encoder.grid, norm=shared.NORM)
    return PixelWordFPN(**dims)

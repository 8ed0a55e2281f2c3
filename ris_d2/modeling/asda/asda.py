"""ASDA: "Adaptive Selection based Referring Image Segmentation" (Yue et al., ACM MM 2024)."""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from ..backbone import RISCLIPViT, backbone_class
from ..layers import mask_product
from ..losses import FocalAndDice
from ..options import arguments, check_choice
from ..segmenter import ReferringSegmenter
from ..text import RISCLIPText, build_text_encoder
from .afs import AdaptiveFeatureSelection, Selected, to_map
from .attention import LocalVisualAttention, WordGuidedAttention
from .blocks import ConvBlock
from .decoder import SegmentationDecoder
from .sfa import GlobalFusion
from .variants import build_aggregator, build_network
from .wcg import CoefficientGenerator


class ImageFeatures(NamedTuple):
    """What ASDA computes once per image.

    Attributes:
        states: per layer (B, 1 + h w, C), [CLS] first.
        top: (B, C, h, w), the last layer's features, projected for the fusion with the sentence.
    """

    states: list[Tensor]
    top: Tensor


@META_ARCH_REGISTRY.register()
class ASDA(ReferringSegmenter):
    """Fig. 2: CLIP's towers -> selection of layers, fusion, aggregation -> two branches.

    - ``vision``, ``text``: features of all N layers, words f_T, sentence f_E.
    - ``selection``: F_L and F_M, of a layer that the sentence chooses (Eq. 1 to 3).
    - ``fusion``: F_G of the last layer and f_E (Eq. 4).
    - ``aggregator``: F_coarse of F_G, F_M and F_L (Eq. 5).
    - ``attention``: F_A (Eq. 6); ``decoder``: N_c response masks M' of it (Eq. 7).
    - ``word_attention``: F_fine (Eq. 8); ``coefficients``: a weight for each M' (Eq. 9, 10).

    Image and sentence meet behind the towers, so that the vision transformer runs once per
    image, and a selected layer is enlarged once however many expressions select it.
    """

    weight_parts = {"clip": ("vision", "text")}

    @configurable
    def __init__(
        self,
        *,
        vision: RISCLIPViT,
        text: RISCLIPText,
        projection: ConvBlock,
        selection: AdaptiveFeatureSelection,
        fusion: GlobalFusion,
        aggregator: nn.Module,
        attention: LocalVisualAttention | None,
        word_attention: WordGuidedAttention | None,
        decoder: SegmentationDecoder,
        coefficients: CoefficientGenerator | None,
        layerwise_text: bool,
        sigmoid_responses: bool,
        norm_momentum: float,
        loss: FocalAndDice,
        **segmenter: Any,
    ):
        """
        Args:
            projection: of the last layer's features, for the fusion with the sentence.
            attention, word_attention: None leaves them out (Table 2 a to d).
            coefficients: the second branch; None: the decoder makes the mask itself, of features
                that have read the words if there is a ``word_attention`` (Table 2 e).
            layerwise_text: compare the [CLS] of a layer with the sentence in the same layer of the
                text encoder, as released, instead of with f_E.
            sigmoid_responses: response masks through a sigmoid (Eq. 7) instead of a ReLU.
            norm_momentum: weight of the last batch in the running statistics of all norms but the
                fusion's, which have PyTorch's usual one (released).
            segmenter: see ReferringSegmenter.
        """
        super().__init__(**segmenter)
        self.vision, self.text, self.vocab_size = vision, text, text.vocab_size
        self.projection, self.selection = projection, selection
        self.fusion, self.aggregator = fusion, aggregator
        self.attention, self.word_attention = attention, word_attention
        self.decoder, self.coefficients = decoder, coefficients
        self.layerwise_text = layerwise_text
        self.sigmoid_responses = sigmoid_responses
        self.loss = loss
        convolutional = (projection, aggregator, decoder, coefficients)
        for part in (part for part in convolutional if part is not None):
            # Convolutions make up most of the work, and are faster in this memory format.
            part.to(memory_format=torch.channels_last)
            for norm in part.modules():
                if hasattr(norm, "momentum"):
                    norm.momentum = norm_momentum

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        asda = cfg.MODEL.ASDA
        vision, text = backbone_class(cfg, RISCLIPViT)(cfg), build_text_encoder(cfg)
        norm = asda.NORM
        _check(cfg, vision.depth, text.depth)
        levels = {"low": asda.SELECTION.LOW_LAYERS, "mid": asda.SELECTION.MID_LAYERS}
        dual = asda.ALIGNER == "dual"
        num_masks = asda.NUM_MASKS if dual else 1
        parts: dict[str, Any] = {
            "vision": vision,
            "text": text,
            "projection": ConvBlock(vision.dim, vision.dim, kernel=1, norm=norm),
            "selection": AdaptiveFeatureSelection(
                vision_dim=vision.dim,
                text_dim=text.dim,
                levels=levels if asda.AGGREGATOR != "none" else {},
                network=partial(build_network, asda.SELECTION.NETWORK),
                mode=asda.SELECTION.MODE,
                grid=vision.grid,
            ),
            "fusion": GlobalFusion(vision_dim=vision.dim, text_dim=text.dim, norm=norm),
            "aggregator": build_aggregator(
                asda.AGGREGATOR, vision_dim=vision.dim, dim=asda.DIM, norm=norm
            ),
            **dict.fromkeys(("attention", "word_attention", "coefficients")),
        }
        if asda.ALIGNER != "none":
            layer = arguments(asda, "DIM", "NUM_HEADS", "DROPOUT", "PRE_NORM")
            parts["attention"] = LocalVisualAttention(
                **layer, num_layers=asda.ATTENTION_LAYERS, grid=vision.grid
            )
            parts["word_attention"] = WordGuidedAttention(**layer, text_dim=text.dim)
        masks = {"dim": asda.DIM, "num_masks": num_masks, "norm": norm}
        parts["decoder"] = SegmentationDecoder(**masks, form=asda.DECODER)
        if dual:
            parts["coefficients"] = CoefficientGenerator(
                **masks, grid=vision.grid, last_kernel=asda.COEFFICIENT_KERNEL
            )
        return {
            **super().from_config(cfg),
            **parts,
            "sentence_dim": asda.DIM + text.dim,
            **arguments(asda, "NORM_MOMENTUM"),
            "layerwise_text": asda.SELECTION.TEXT == "layer",
            "sigmoid_responses": asda.RESPONSES == "sigmoid",
            "loss": FocalAndDice(
                **arguments(asda, "FOCAL_WEIGHT", "FOCAL_ALPHA", "FOCAL_GAMMA", "DICE_WEIGHT")
            ),
        }

    def encode_images(self, images: Tensor, views: dict[str, Tensor]) -> ImageFeatures:
        states = self.vision.forward_layers(images)
        return ImageFeatures(states, self.projection(self.vision.feature_map(states[-1])))

    def segment(
        self, features: ImageFeatures, image_index: Tensor, input_ids: Tensor, text_mask: Tensor
    ) -> dict[str, Tensor]:
        """
        Returns:
            "mask_logits" (E, 8 h, 8 w); "sentence" (E, dim + D), see ``_evidence``; "coarse" and
            "fine" (E, dim, h, w), features before and after the words (Fig. 4), "fine" only with
            words; "low_layer" and "mid_layer" int64 (E,), 1-based, if layers are selected.
        """
        words, sentence, selected = self.read_and_select(
            features, image_index, input_ids, text_mask
        )
        grid = self.vision.grid
        fused = self.fusion(features.top, sentence, image_index)  # F_G
        coarse = F.relu(self.aggregator(fused, selected))  # F_coarse
        outputs = {"coarse": coarse}
        outputs.update({f"{name}_layer": level.layers for name, level in selected.items()})
        refined = coarse
        if self.attention is not None:
            tokens = self.attention(coarse.flatten(2).transpose(1, 2))  # F_A
            fine = to_map(self.word_attention(tokens, words), grid)  # F_fine
            outputs["fine"] = fine
            refined = fine if self.coefficients is None else to_map(tokens, grid)
        outputs["sentence"] = _evidence(outputs.get("fine", coarse), sentence)
        masks = self.decoder(refined)
        if self.coefficients is None:
            outputs["mask_logits"] = masks[:, 0]
            return outputs
        responses = masks.sigmoid() if self.sigmoid_responses else F.relu(masks, inplace=True)  # M'
        weights = self.coefficients(fine)
        outputs["mask_logits"] = mask_product(responses, weights)  # Eq. 10
        return outputs

    def read_and_select(
        self, features: ImageFeatures, image_index: Tensor, input_ids: Tensor, text_mask: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Selected]]:
        """Words f_T (E, L, D), sentence f_E (E, D), and the levels that it selects."""
        *layers, words = self.text.forward_layers(input_ids, text_mask)
        last_token = text_mask.sum(1) - 1  # [EOS]
        each = torch.arange(words.shape[0], device=words.device)
        sentence = words[each, last_token]
        if self.layerwise_text:
            sentences = [state[each, last_token] for state in layers]
        else:
            sentences = [sentence] * len(features.states)
        return words, sentence, self.selection(features.states, sentences, image_index)


def _evidence(features: Tensor, sentence: Tensor) -> Tensor:
    """What an existence head reads: (E, dim, h, w), (E, D) -> (E, dim + D).

    Ours, as the head is. f_E alone has not seen the image; a target exists where some pixel fits
    it.
    """
    return torch.cat([features.amax((2, 3)), sentence], 1)


def _check(cfg: CfgNode, vision_depth: int, text_depth: int) -> None:
    """Raise ValueError for unknown words, and for layers that the encoders do not have."""
    asda = cfg.MODEL.ASDA
    check_choice("MODEL.ASDA.ALIGNER", asda.ALIGNER, ("dual", "single", "none"))
    check_choice("MODEL.ASDA.RESPONSES", asda.RESPONSES, ("relu", "sigmoid"))
    check_choice("MODEL.ASDA.SELECTION.TEXT", asda.SELECTION.TEXT, ("layer", "final"))
    layerwise = asda.SELECTION.TEXT == "layer"
    depth = min(vision_depth, text_depth) if layerwise else vision_depth
    for key in ("LOW_LAYERS", "MID_LAYERS"):
        layers = asda.SELECTION[key]
        if not layers or min(layers) < 1 or max(layers) > depth or len(set(layers)) < len(layers):
            raise ValueError(
                f"MODEL.ASDA.SELECTION.{key} is {layers}: it names different layers of 1..{depth}"
            )

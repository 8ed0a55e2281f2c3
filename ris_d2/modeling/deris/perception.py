"""DeRIS' perception branch: where are the instances?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import Backbone
from torch import Tensor, nn

from ..backbone import RISSwin, build_pyramid_backbone
from ..layers import MLP, Constants, MultiheadAttention, resize_maps
from ..options import arguments
from .pixel_decoder import LEVELS, PixelDecoder, Size

PRIOR_STRIDE = 4  # of the maps that mask priors are taken on, in pixels of f_m


class ImageFeatures(NamedTuple):
    """What B images give before any sentence is read.

    Attributes:
        levels: tokens (B, h * w, C) of res5, res4, res3, each with its level embedding.
        sizes: their (h, w).
        keys_values: per perception layer, keys and values (B, h * w, C) of its level; empty if
            levels take up visual tokens first.
        maps: (B, C, H/4, W/4), the share of f_h4 in f_m.
    """

    levels: list[Tensor]
    sizes: list[Size]
    keys_values: list[tuple[Tensor, Tensor]]
    maps: Tensor


@dataclass(kw_only=True)
class MaskFeatures:
    """f_m = Conv(Concat(f_h4, f_v)) of E expressions, never computed as one tensor.

    A 1x1 convolution of a concatenation is a sum, and upsampling and the products that f_m is used
    in are linear: the share of f_h4 stays one map per image, and that of f_v as small as it comes.

    Attributes:
        maps: (B, C, h, w), the share of f_h4.
        visual: (E, C, g, g), the share of f_v before upsampling; None without.
        level_visual: (E, C, g, g) per level, what f_v adds to it; empty unless hierarchical.
        image_index: int64 (E,), the row of ``maps`` of each expression.
        upsample_and_pool: of ``upsample_and_pool``.
    """

    maps: Tensor
    visual: Tensor | None
    level_visual: Sequence[Tensor]
    image_index: Tensor
    upsample_and_pool: Constants

    def __post_init__(self) -> None:
        self.pooled = F.avg_pool2d(self.maps, PRIOR_STRIDE)
        # One image's map serves all expressions as it is; of several each expression takes its own.
        self._own_maps = self.maps if self.maps.shape[0] == 1 else self.maps[self.image_index]

    def dot(self, embeddings: Tensor) -> Tensor:
        """f_m times embeddings (E, Q, C) -> (E, Q, h, w)."""
        products = torch.einsum("eqc,echw->eqhw", embeddings, self._own_maps)
        if self.visual is None:
            return products
        visual = torch.einsum("eqc,echw->eqhw", embeddings, self.visual)
        return products + resize_maps(visual, self.maps.shape[-2:])

    def average(self, masks: Tensor) -> Tensor:
        """Mean of each mask times f_m: (E, Q, h // 4, w // 4), on pooled f_m -> (E, Q, C)."""
        pooled = self.pooled.flatten(2).transpose(1, 2)
        total = masks.flatten(2) @ pooled[self.image_index]
        if self.visual is not None:
            rows, columns = self.upsample_and_pool(
                tuple(self.visual.shape[-2:]), tuple(self.maps.shape[-2:]), device=masks.device
            )
            shrunk = torch.einsum("eqhw,gh,fw->eqgf", masks, rows, columns)
            total = total + torch.einsum("eqgf,ecgf->eqc", shrunk, self.visual)
        return total / pooled.shape[1]


class PerceptionLayer(nn.Module):
    """Post-norm decoder layer: masked attention to one level, self-attention, FFN."""

    def __init__(self, *, dim: int, num_heads: int, ffn_dim: int):
        super().__init__()
        self.cross_attention = MultiheadAttention(dim=dim, num_heads=num_heads)
        self.cross_norm = nn.LayerNorm(dim)
        self.self_attention = MultiheadAttention(dim=dim, num_heads=num_heads)
        self.self_norm = nn.LayerNorm(dim)
        self.ffn = MLP(dim, ffn_dim, dim, activation=nn.ReLU)
        self.ffn_norm = nn.LayerNorm(dim)
        # As Mask2Former; queries, keys and values start as MultiheadAttention's.
        for layer in (self.cross_attention.out, self.self_attention.out, self.ffn[0], self.ffn[2]):
            nn.init.xavier_uniform_(layer.weight)

    def forward(
        self,
        queries: Tensor,
        positions: Tensor,
        keys_values: tuple[Tensor, Tensor],
        attn_mask: Tensor | None,
    ) -> Tensor:
        """
        Args:
            queries: (E, Q, C).
            positions: (Q, C), of queries and keys, not of values.
            keys_values: of ``cross_attention.project``.
            attn_mask: bool (E, Q, K), True where a query may attend.

        Returns:
            (E, Q, C)
        """
        attended = self.cross_attention.attend(queries + positions, *keys_values, attn_mask)
        queries = self.cross_norm(queries + attended)
        located = queries + positions
        queries = self.self_norm(queries + self.self_attention(located, located, values=queries))
        return self.ffn_norm(queries + self.ffn(queries))


class PerceptionBranch(nn.Module):
    """Swin, pixel decoder, perception layers, mask head (Mask2Former's, with f_v in its masks)."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        pixel_decoder: PixelDecoder,
        num_layers: int,
        num_queries: int,
        dim: int,
        reads_visual: bool,
        hierarchical: bool,
        **layer: int,
    ):
        """
        Args:
            num_layers: N_r, at least 1; layer i reads level i mod 3 of res5, res4, res3.
            num_queries: N.
            reads_visual: f_v is part of the mask features.
            hierarchical: f_v is also added to each level that the layers read.
            layer: see PerceptionLayer.

        Raises:
            ValueError: without a layer, or hierarchical without f_v.
        """
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"MODEL.DERIS.ROUNDS is {num_layers}, not at least 1")
        if hierarchical and not reads_visual:
            raise ValueError(
                "MODEL.DERIS.QUERY_FLOW hierarchical adds f_v to the pixel decoder's levels and "
                "needs MODEL.DERIS.VISUAL_FEATURES True and a cognition encoder that sees the image"
            )
        self.backbone = backbone
        self.pixel_decoder = pixel_decoder
        self.query_position = nn.Embedding(num_queries, dim)
        self.level_embed = nn.Embedding(len(LEVELS), dim)
        self.layers = nn.ModuleList(PerceptionLayer(dim=dim, **layer) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        self.mask_embed = MLP(dim, dim, dim, dim, activation=nn.ReLU)
        self.mask_proj = nn.Conv2d(dim, dim, 1)
        self.visual_proj = None
        if reads_visual:
            self.visual_proj = nn.Conv2d(dim, dim, 1, bias=False)
            # Together they are one convolution that reads 2 C channels; its weights would
            # be initialised smaller by sqrt(2).
            with torch.no_grad():
                for parameter in (*self.mask_proj.parameters(), *self.visual_proj.parameters()):
                    parameter.mul_(0.5**0.5)
        self.upsample_and_pool = Constants(upsample_and_pool)
        self.level_proj = nn.ModuleList(
            nn.Conv2d(dim, dim, 1) for _ in range(min(num_layers, len(LEVELS)) * hierarchical)
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        deris = cfg.MODEL.DERIS
        backbone = build_pyramid_backbone(cfg, ("res2", "res3", "res4", "res5"), RISSwin)
        return {
            "backbone": backbone,
            "pixel_decoder": PixelDecoder(
                input_shape=backbone.output_shape(),
                **arguments(deris, "DIM", "NUM_HEADS", num_layers="PIXEL_DECODER_LAYERS"),
                ffn_dim=deris.PIXEL_DECODER_FFN_DIM,
            ),
            **arguments(deris, "NUM_QUERIES", "DIM", "NUM_HEADS", "FFN_DIM", num_layers="ROUNDS"),
            "reads_visual": deris.VISUAL_FEATURES and deris.COGNITION != "text",
            "hierarchical": deris.QUERY_FLOW == "hierarchical",
        }

    def encode_images(self, images: Tensor) -> ImageFeatures:
        """(B, 3, H, W), normalised -> what does not depend on the sentence, once per image."""
        tokens, sizes, maps = self.pixel_decoder(self.backbone(images))
        levels = [x + level for x, level in zip(tokens, self.level_embed.weight, strict=True)]
        keys_values = []
        if not self.level_proj:
            keys_values = [
                self._project(number, levels[number % len(LEVELS)], sizes)
                for number in range(len(self.layers))
            ]
        return ImageFeatures(
            levels=levels, sizes=sizes, keys_values=keys_values, maps=self.mask_proj(maps)
        )

    def mask_features(
        self, features: ImageFeatures, image_index: Tensor, visual_tokens: Tensor | None
    ) -> MaskFeatures:
        """f_m of E expressions.

        Args:
            image_index: int64 (E,).
            visual_tokens: f_v (E, C, g, g); None where the cognition branch gives none.
        """
        return MaskFeatures(
            maps=features.maps,
            visual=None if self.visual_proj is None else self.visual_proj(visual_tokens),
            level_visual=[project(visual_tokens) for project in self.level_proj],
            image_index=image_index,
            upsample_and_pool=self.upsample_and_pool,
        )

    def predict_masks(self, queries: Tensor, mask_features: MaskFeatures) -> Tensor:
        """(E, Q, C) -> mask logits (E, Q, H/4, W/4)."""
        return mask_features.dot(self.mask_embed(self.norm(queries)))

    def mask_prior(self, mask_logits: Tensor, mask_features: MaskFeatures) -> Tensor:
        """What lies under each mask, the mean of mask times f_m: (E, Q, H/4, W/4) -> (E, Q, C)."""
        masks = resize_maps(mask_logits, mask_features.pooled.shape[-2:])
        return mask_features.average(masks.sigmoid())

    def attention_mask(self, mask_logits: Tensor, number: int) -> Tensor:
        """Where the queries of perception layer ``number`` may look: inside of their masks.

        Args:
            mask_logits: (E, Q, H/4, W/4).

        Returns:
            bool (E, Q, K), K pixels of the layer's level; all of them for an empty mask.
        """
        factor = 2 ** (len(LEVELS) - number % len(LEVELS))
        size = [-(-length // factor) for length in mask_logits.shape[-2:]]
        inside = resize_maps(mask_logits.detach().float(), size).flatten(2) >= 0
        return inside | ~inside.any(-1, keepdim=True)

    def layer(
        self,
        number: int,
        queries: Tensor,
        attention_mask: Tensor,
        features: ImageFeatures,
        mask_features: MaskFeatures,
    ) -> Tensor:
        """Perception layer ``number``.

        Args:
            queries: (E, Q, C).
            attention_mask: of ``attention_mask`` for the same ``number``.

        Returns:
            (E, Q, C)
        """
        image_index = mask_features.image_index
        if features.keys_values:
            keys, values = (x[image_index] for x in features.keys_values[number])
        else:
            level = number % len(LEVELS)
            visual = resize_maps(mask_features.level_visual[level], features.sizes[level])
            tokens = features.levels[level][image_index] + visual.flatten(2).transpose(1, 2)
            keys, values = self._project(number, tokens, features.sizes)
        positions = self.query_position.weight
        return self.layers[number](queries, positions, (keys, values), attention_mask)

    def _project(self, number: int, tokens: Tensor, sizes: list[Size]) -> tuple[Tensor, Tensor]:
        _, *sine = self.pixel_decoder.level_positions(
            tuple(sizes), tokens.shape[-1], device=tokens.device
        )
        located = tokens + sine[number % len(LEVELS)]
        return self.layers[number].cross_attention.project(located, tokens)

    def fit_state_dict(self, state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Take the first N of a Mask2Former's queries.

        Returns:
            a new state dict, and the names of the tensors that changed size.
        """
        name, wanted = "query_position.weight", self.query_position.num_embeddings
        if name not in state_dict or len(state_dict[name]) <= wanted:
            return state_dict, []
        return {**state_dict, name: state_dict[name][:wanted]}, [name]


def upsample_and_pool(small: Size, large: Size) -> list[Tensor]:
    """Per axis, (small, large // 4): upsampling from ``small`` to ``large`` and pooling by 4."""
    bases = []
    for few, many in zip(small, large, strict=True):
        basis = torch.eye(few)[:, None]
        basis = F.interpolate(basis, size=many, mode="linear", align_corners=False)
        bases.append(F.avg_pool1d(basis, PRIOR_STRIDE)[:, 0])
    return bases

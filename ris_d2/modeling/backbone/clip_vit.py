"""CLIP's vision transformer (Radford et al., ICML 2021), on transformers' ``CLIPVisionModel``."""

from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from ..layers.position import fit_positions
from ..layers.stem import build_stem, patch_grid
from ..options import arguments


class PatchEmbedding(nn.Module):
    """[CLS] and patches with one learned position each, on a grid of any shape.

    transformers' own knows square grids only, and resizes positions by another interpolation.
    """

    def __init__(self, *, dim: int, patch_size: int, grid: tuple[int, int], stem: str):
        super().__init__()
        self.class_embedding = nn.Parameter(dim**-0.5 * torch.randn(dim))
        self.patch_embedding = build_stem(
            "MODEL.RIS.CLIP_VIT.STEM", stem, dim=dim, patch_size=patch_size, bias=False
        )
        if stem == "patch":
            nn.init.normal_(self.patch_embedding.weight, std=0.02)
        self.position_embedding = nn.Parameter(0.02 * torch.randn(1 + grid[0] * grid[1], dim))

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + n, dim); named and called as transformers' embedding."""
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        patches = patches.to(self.class_embedding.dtype)  # autocast or not, as BEiT-3's
        first = self.class_embedding.expand(patches.shape[0], 1, -1).to(patches)
        return torch.cat([first, patches], 1) + self.position_embedding.to(patches)


@BACKBONE_REGISTRY.register()
class RISCLIPViT(Backbone):
    """CLIP's image encoder as a residual stream: no last LayerNorm, no projection.

    Attributes:
        grid: (H/p, W/p).
        dim: channels.
        depth: number of layers.
    """

    @configurable
    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        patch_size: int = 16,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        stem: str = "patch",
    ):
        """The defaults are ViT-B/16.

        Args:
            image_size: (H, W), multiples of ``patch_size``; fixes the position table, to which a
                checkpoint's is resized.
            stem: patch (CLIP) or conv (ours, for training from scratch on small data).

        Raises:
            ValueError: the image size is no multiple of the patch size, or an unknown stem.
        """
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel

        self.image_size, self.patch_size = tuple(image_size), patch_size
        self.grid = patch_grid(image_size, patch_size)
        self.dim, self.depth = dim, depth
        model = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=dim,
                intermediate_size=4 * dim,
                num_hidden_layers=depth,
                num_attention_heads=num_heads,
                image_size=patch_size,  # the smallest table, replaced below
                patch_size=patch_size,
            )
        )
        # transformers 4 has one more level than 5.
        self.transformer = getattr(model, "vision_model", model)
        self.transformer.embeddings = PatchEmbedding(
            dim=dim, patch_size=patch_size, grid=self.grid, stem=stem
        )
        self.transformer.post_layernorm = nn.Identity()  # of [CLS] alone, which is not used

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict[str, Any]:
        return {"image_size": cfg.INPUT.RIS.SIZE, **arguments(cfg.MODEL.RIS.CLIP_VIT)}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> {"last": (B, dim, H/p, W/p)}."""
        return {"last": self.feature_map(self.forward_layers(images)[-1])}

    def layers_to_checkpoint(self) -> Iterable[nn.Module]:
        return self.transformer.encoder.layers

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"last": ShapeSpec(channels=self.dim, stride=self.patch_size)}

    def forward_layers(self, images: Tensor) -> list[Tensor]:
        """Run all layers.

        Args:
            images: (B, 3, H, W) of the size that the model was built for.

        Returns:
            the residual stream after each of the ``depth`` layers, (B, 1 + n, dim), [CLS] first.

        Raises:
            ValueError: images of another size.
        """
        if tuple(images.shape[-2:]) != self.image_size:
            raise ValueError(f"images of {tuple(images.shape[-2:])}, built for {self.image_size}")
        outputs = self.transformer(pixel_values=images, output_hidden_states=True)
        return list(outputs.hidden_states[1:])

    def feature_map(self, tokens: Tensor) -> Tensor:
        """(B, 1 + n, C) -> (B, C, h, w), a view."""
        return tokens[:, 1:].transpose(1, 2).unflatten(2, self.grid)

    def fit_state_dict(self, state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Resize a checkpoint's square grid of positions to this model's (bilinear, as ASDA).

        Returns:
            a new state dict, and the names of the tensors that changed size.

        Raises:
            ValueError: the table is no square grid and [CLS].
        """
        name = "transformer.embeddings.position_embedding"
        return fit_positions(state_dict, name, self.grid, special=1, mode="bilinear")

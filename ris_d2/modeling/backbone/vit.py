"""Plain vision transformers, on timm's."""

from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from ..options import arguments


@BACKBONE_REGISTRY.register()
class RISViT(Backbone):
    """A ViT of timm by name; parameter names are timm's below ``model.``."""

    @configurable
    def __init__(self, *, name: str, image_size: tuple[int, int], out_blocks: Sequence[int]):
        """
        Args:
            name: of a timm model, such as vit_base_patch16_224.
            image_size: (H, W); fixes the position table.
            out_blocks: blocks (0-based, increasing) whose outputs are the features; blocks above
                the last of them are not built.
        """
        super().__init__()
        import timm

        body = timm.create_model(
            name, features_only=True, out_indices=tuple(out_blocks), img_size=tuple(image_size)
        )
        self.model = body.model
        self.out_blocks = tuple(out_blocks)
        self._shapes = {
            f"block{i}": ShapeSpec(channels=channels, stride=stride)
            for i, channels, stride in zip(
                out_blocks, body.feature_info.channels(), body.feature_info.reduction(), strict=True
            )
        }

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict[str, Any]:
        return {"image_size": cfg.INPUT.RIS.SIZE, **arguments(cfg.MODEL.RIS.VIT)}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> "block<i>": (B, C, H/p, W/p), outputs of the blocks, not normalised."""
        maps = self.model.forward_intermediates(
            images, indices=list(self.out_blocks), intermediates_only=True
        )
        return dict(zip(self._shapes, maps, strict=True))

    def layers_to_checkpoint(self) -> Iterable[nn.Module]:
        return self.model.blocks

    def output_shape(self) -> dict[str, ShapeSpec]:
        return dict(self._shapes)

    def fit_state_dict(self, state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Resize the positions of a checkpoint to this model's grid (bicubic, timm's).

        Returns:
            a new state dict, and the names of the tensors that changed size.
        """
        from timm.layers import resample_abs_pos_embed

        name = "model.pos_embed"
        table = state_dict.get(name)
        if table is None or table.shape == self.model.pos_embed.shape:
            return state_dict, []
        resized = resample_abs_pos_embed(
            table,
            new_size=self.model.patch_embed.grid_size,
            num_prefix_tokens=self.model.num_prefix_tokens,
        )
        return {**state_dict, name: resized}, [name]

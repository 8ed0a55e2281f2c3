"""SAM's image encoder (Kirillov et al., "Segment Anything", ICCV 2023), on transformers' SAM."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torchvision.ops import Permute

from ..layers.stem import conv_stem
from ..options import arguments, check_choice

NECK_CHANNELS = 256


@BACKBONE_REGISTRY.register()
class RISSAMViT(Backbone):
    """ViT with windowed attention and a few blocks of global attention; their outputs are the
    features.

    Parameter names are those of transformers' ``SamVisionModel``. Random weights are Xavier's, for
    training from scratch: the library's own (1e-10) give features of size 1e-8.
    """

    @configurable
    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        patch_size: int = 16,
        embed_dim: int = 1280,
        depth: int = 32,
        num_heads: int = 16,
        window_size: int = 14,
        global_blocks: Sequence[int] = (7, 15, 23, 31),
        stem: str = "patch",
        neck: bool = False,
    ):
        """The defaults are ViT-H.

        Args:
            image_size: (H, W), equal and a multiple of ``patch_size``; fixes the position tables.
            global_blocks: blocks (0-based, increasing, with the last one) with global attention.
            stem: patch (SAM) or conv (ours, for training from scratch on small data).
            neck: also return what SAM's own mask decoder reads. Without it the neck, part of the
                published encoder, is frozen: nothing would train it.

        Raises:
            ValueError: if the image is not square or not a multiple of the patch size, or the last
                block (which nothing would read then) is not global, or for an unknown stem.
        """
        super().__init__()
        from transformers import SamVisionConfig, SamVisionModel

        if image_size[0] != image_size[1] or image_size[0] % patch_size:
            raise ValueError(
                f"INPUT.RIS.SIZE is {tuple(image_size)}: SAM takes squares of a multiple of "
                f"{patch_size} pixels (GEOMETRY longest_side pads other images to one)"
            )
        if list(global_blocks) != sorted(set(global_blocks)) or global_blocks[-1] != depth - 1:
            raise ValueError(
                f"MODEL.RIS.SAM.GLOBAL_BLOCKS is {tuple(global_blocks)}; it must increase and end "
                f"with the last block, {depth - 1}"
            )
        self.global_blocks = tuple(global_blocks)
        self.embed_dim, self.patch_size, self.has_neck = embed_dim, patch_size, neck
        config = SamVisionConfig(
            hidden_size=embed_dim,
            output_channels=NECK_CHANNELS,
            num_hidden_layers=depth,
            num_attention_heads=num_heads,
            image_size=image_size[0],
            patch_size=patch_size,
            window_size=window_size,
            global_attn_indexes=list(global_blocks),
        )
        self.vision_encoder = SamVisionModel(config).vision_encoder
        for block in self.vision_encoder.layers:
            block.attn = DecomposedAttention(block.attn)
        check_choice("MODEL.RIS.SAM.STEM", stem, ("patch", "conv"))
        if stem == "conv":
            self.vision_encoder.patch_embed = _conv_stem(embed_dim, patch_size)
        self.apply(_init_weights)
        nn.init.trunc_normal_(self.vision_encoder.pos_embed, std=0.02)
        self.vision_encoder.neck.requires_grad_(neck)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict[str, Any]:
        return {"image_size": cfg.INPUT.RIS.SIZE, **arguments(cfg.MODEL.RIS.SAM)}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Encode images.

        Args:
            images: (B, 3, H, W) of the size that the encoder was built for.

        Returns:
            "global1", "global2", ...: outputs (B, embed_dim, H/16, W/16) of the blocks with global
            attention, before the neck and without norm; with ``neck`` also "neck" (B, 256, H/16,
            W/16).
        """
        encoder = self.vision_encoder
        tokens = encoder.patch_embed(images) + encoder.pos_embed  # channel-last
        outputs = {}
        for i, block in enumerate(encoder.layers):
            tokens = block(tokens)
            if i in self.global_blocks:
                outputs[f"global{len(outputs) + 1}"] = tokens.permute(0, 3, 1, 2)
        if self.has_neck:
            outputs["neck"] = encoder.neck(tokens)
        return outputs

    def layers_to_checkpoint(self) -> Iterable[nn.Module]:
        return self.vision_encoder.layers

    def output_shape(self) -> dict[str, ShapeSpec]:
        shape = ShapeSpec(channels=self.embed_dim, stride=self.patch_size)
        outputs = {f"global{n}": shape for n in range(1, len(self.global_blocks) + 1)}
        if self.has_neck:
            outputs["neck"] = ShapeSpec(channels=NECK_CHANNELS, stride=self.patch_size)
        return outputs

    def fit_state_dict(self, state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Resize the positions of a checkpoint to this model's grid and windows.

        Absolute positions bicubically; relative positions linearly, as SAM itself does where
        queries and keys are of another number than its table.

        Returns:
            a new state dict, and the names of the tensors that changed size.
        """
        own = self.state_dict()
        fitted = {}
        for name, table in state_dict.items():
            if name not in own or table.shape == own[name].shape:
                continue
            if name.endswith("pos_embed"):
                grid = table.permute(0, 3, 1, 2).float()
                size = own[name].shape[1:3]
                grid = F.interpolate(grid, size=size, mode="bicubic", align_corners=False)
                fitted[name] = grid.permute(0, 2, 3, 1).to(table.dtype)
            elif name.endswith(("rel_pos_h", "rel_pos_w")):
                rows = F.interpolate(table.float().T[None], size=len(own[name]), mode="linear")
                fitted[name] = rows[0].T.to(table.dtype)
        return {**state_dict, **fitted}, sorted(fitted)


class DecomposedAttention(nn.Module):
    """Attention with SAM's relative positions of rows and columns, in one fused kernel.

    The logit of query q and key k is q k / sqrt(d) + q r_h + q r_w, with r_h and r_w of the rows
    and columns that lie between them. q r_h and q r_w are further channels of the query, and keys
    say with as many channels in which row and column they are: there is no bias of (h w, h w),
    which takes 0.8 GB for SAM ViT-B at 1024 x 1024.
    """

    def __init__(self, attention: nn.Module):
        """
        Args:
            attention: transformers' ``SamVisionAttention``, whose parameters this takes under their
                names.
        """
        super().__init__()
        self.num_heads = attention.num_attention_heads
        self.qkv, self.proj = attention.qkv, attention.proj
        self.rel_pos_h, self.rel_pos_w = attention.rel_pos_h, attention.rel_pos_w
        height, width = ((len(table) + 1) // 2 for table in (self.rel_pos_h, self.rel_pos_w))
        for name, length in (("rows", height), ("columns", width)):
            at = torch.arange(length)
            between = at[:, None] - at + length - 1  # rows of the table, (query, key)
            self.register_buffer(f"{name}_between", between, persistent=False)
        places = [torch.eye(height).repeat_interleave(width, 0), torch.eye(width).repeat(height, 1)]
        self.register_buffer("places", torch.cat(places, 1), persistent=False)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        """(B, h, w, C) of the size that the tables are of -> the same, and no attention weights."""
        qkv = self.qkv(hidden_states).unflatten(3, (3, self.num_heads, -1))
        query, key, value = qkv.permute(3, 0, 4, 1, 2, 5)  # (B, heads, h, w, d) each
        dim = query.shape[-1]
        rows = torch.einsum("bnhwd,hkd->bnhwk", query, self.rel_pos_h[self.rows_between])
        columns = torch.einsum("bnhwd,wkd->bnhwk", query, self.rel_pos_w[self.columns_between])
        query = torch.cat([query * dim**-0.5, rows, columns], -1).flatten(2, 3)
        places = self.places.to(key.dtype).expand(*key.shape[:2], -1, -1)
        key = torch.cat([key.flatten(2, 3), places], -1)
        # Fused kernels want values as wide as keys.
        value = F.pad(value.flatten(2, 3), (0, places.shape[-1]))
        attended = F.scaled_dot_product_attention(query, key, value, scale=1.0)[..., :dim]
        attended = attended.transpose(1, 2).flatten(2)
        return self.proj(attended.unflatten(1, hidden_states.shape[1:3])), None


def _conv_stem(dim: int, patch_size: int) -> nn.Sequential:
    """(B, 3, H, W) -> (B, H/p, W/p, dim)"""
    convs = conv_stem(dim=dim, patch_size=patch_size)
    return nn.Sequential(OrderedDict(convs=convs, channels_last=Permute([0, 2, 3, 1])))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

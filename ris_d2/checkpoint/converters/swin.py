"""Swin Transformers trained on ImageNet: the official files, and timm's of any age.

Ours are the official names. timm >= 0.9 counts a stage's downsampling as the first thing of the
next stage. Left out are what is computed anyway (``relative_position_index``, ``attn_mask``), the
classifier and the norm before it; a detector's norms of its outputs (``norm0`` ... ``norm3``) are
taken.
"""

import re

from torch import Tensor

from .base import Converter

_COMPUTED = ("relative_position_index", "attn_mask")
_NAMES = re.compile(
    r"(patch_embed\.(proj|norm)|layers\.\d\.downsample\.(norm|reduction)"
    r"|layers\.\d\.blocks\.\d+\.\w+|norm[0-3])\."
)


def rename_swin(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official or timm names -> ours; what is of no use is left out."""
    timm = "layers.3.downsample.reduction.weight" in state_dict
    renamed = {}
    for name, value in state_dict.items():
        if not _NAMES.match(name) or name.endswith(_COMPUTED):
            continue
        if timm:
            name = re.sub(
                r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name
            )
        name = re.sub(r"^norm(\d)", lambda m: f"norms.res{int(m[1]) + 2}", name)
        renamed[name] = value
    return renamed


CONVERTER = Converter(
    title="a Swin checkpoint",
    needs=("layers.0.blocks.0.attn.qkv.weight",),
    rename=rename_swin,
    # Classifiers have no norm at the outputs of the stages: those start as they are.
    may_miss=(r"^norms\.",),
)

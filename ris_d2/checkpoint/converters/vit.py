"""Vision transformers with timm's names (``timm://vit_base_patch16_224.augreg_in21k_ft_in1k``, ...).

Our backbone keeps them below ``model.``. The classifier and the norm before it are left out.
"""

from torch import Tensor

from .base import Converter

__all__ = ["CONVERTER"]

_UNUSED = ("norm.", "fc_norm.", "head.", "head_dist.")


def _convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    if not {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= state_dict.keys():
        raise ValueError(
            "not a vision transformer with timm's names (patch_embed.proj.weight, "
            "blocks.0.attn.qkv.weight); it has e.g. " + ", ".join(list(state_dict)[:3])
        )
    return {
        f"model.{name}": value for name, value in state_dict.items() if not name.startswith(_UNUSED)
    }


CONVERTER = Converter(convert=_convert)

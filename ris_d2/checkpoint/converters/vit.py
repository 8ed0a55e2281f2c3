"""Vision transformers with timm's names, as ``timm://vit_base_patch16_224.augreg_in21k_ft_in1k``.

Our backbone keeps them below ``model.``. The classifier and the norm before it are left out.
"""

from torch import Tensor

from .base import Converter

_UNUSED = ("norm.", "fc_norm.", "head.", "head_dist.")


def _convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        f"model.{name}": value for name, value in state_dict.items() if not name.startswith(_UNUSED)
    }


CONVERTER = Converter(
    title="a vision transformer with timm's names",
    needs=("patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
    rename=_convert,
)

"""CLIP with a vision transformer: transformers' names, or OpenAI's, as in ASDA's released file.

Names of the result begin with ``vision.`` (``RISCLIPViT``) and ``text.`` (``RISCLIPText``), so that
one file fills both towers, or the one that a method has. The projections to the joint space, the
last LayerNorm of the vision tower and the temperature have no use here.
"""

import re

import torch
from torch import Tensor

from .base import Converter, below

_DEAD = re.compile(
    r"^(logit_scale|(visual|text)_projection\.weight|text_projection|visual\.proj"
    r"|visual\.ln_post\..*|vision_model\.post_layernorm\..*|.*\.position_ids"
    r"|input_resolution|context_length|vocab_size)$"
)
# OpenAI's name inside a tower -> transformers'.
_OPENAI = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_final": "final_layer_norm",
    "transformer.resblocks": "encoder.layers",
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OPENAI_PART = re.compile(
    r"(?<![^.])(" + "|".join(map(re.escape, sorted(_OPENAI, key=len, reverse=True))) + r")(?![^.])"
)
_POSITIONS = {
    "vision": "embeddings.position_embedding",
    "text": "embeddings.position_embedding.weight",
}


def convert_tower(tower: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename one tower of OpenAI's layout.

    Args:
        tower: vision or text.
        state_dict: names inside the tower, e.g. ``transformer.resblocks.0.ln_1.weight``.

    Returns:
        names from ``vision.`` or ``text.`` on; query, key and value apart.
    """
    converted = {}
    for name, value in state_dict.items():
        if name == "positional_embedding":
            name = _POSITIONS[tower]
        name = f"{tower}.transformer." + _OPENAI_PART.sub(lambda m: _OPENAI[m[1]], name)
        if ".attn.in_proj_" in name:
            for part, third in zip("qkv", torch.chunk(value, 3), strict=True):
                converted[name.replace("attn.in_proj_", f"self_attn.{part}_proj.")] = third
        else:
            converted[name] = value
    return converted


def _convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    live = {name: value for name, value in state_dict.items() if not _DEAD.match(name)}
    if "visual.class_embedding" in live:
        text = {k: v for k, v in live.items() if not k.startswith("visual.")}
        return {**convert_tower("vision", below(live, "visual.")), **convert_tower("text", text)}
    positions = "vision.transformer.embeddings.position_embedding"
    converted = {
        f"{tower}.transformer.{name}": value
        for tower in ("vision", "text")
        for name, value in below(live, f"{tower}_model.").items()
    }
    if f"{positions}.weight" in converted:
        converted[positions] = converted.pop(f"{positions}.weight")
    return converted


CONVERTER = Converter(
    title="a CLIP checkpoint with a vision transformer, OpenAI's or transformers'",
    needs=(("visual.class_embedding", "vision_model.", "text_model."),),
    rename=_convert,
)

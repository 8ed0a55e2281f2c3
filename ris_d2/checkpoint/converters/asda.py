"""ASDA, as its public code saves it (``*_model_best.pth.tar``, names of swagger-coder/ASDA).

The file holds every block of the vision tower twice (``visu_resblocks``), and modules that its
forward pass never calls; both are left out.
"""

import re

from torch import Tensor

from .base import Converter, split_attention, substitute
from .clip import convert_tower

# Read only by other weights that are dead, or by nothing. The selectors' bias adds the same to
# every candidate, the discarded pyramid convolutions feed no output.
_DEAD = re.compile(
    r"^(visu_resblocks\.|visumodel\.(positional_embedding|proj|ln_post\..*)$|fusion\.lang_attn\."
    r"|fpn\.output_convs\.[01]\.|feature_selector_[lm]\.bias$|up_proj_cat_proj_1\."
    r"|pool_proj_cat_proj_2\.|proj_cat\.|up_proj_cat_2\.|proj_0\.|norm[12]\.)"
)
_TEXT = {
    "textmodel_token_embedding.": "token_embedding.",
    "textmodel_pos_embed": "positional_embedding",
    "textmodel_ln_final.": "ln_final.",
    "textmodel.": "transformer.",
}
_RENAMED = {
    r"^vis_select\.": "selection.project.",
    r"^feature_selector_l\.": "selection.networks.low.0.",
    r"^feature_selector_m\.": "selection.networks.mid.0.",
    r"^fusion\.mapping_visu\.": "projection.",
    r"^fusion\.lang_proj\.0\.": "fusion.words.",
    r"^fusion\.lang_proj\.1\.": "fusion.words_norm.",
    r"^fusion\.fusion\.0\.": "fusion.norm.",
    r"^fpn\.stages\.0\.": "aggregator.top.",
    r"^fpn\.stages\.1\.": "aggregator.mid.",
    r"^fpn\.stages\.2\.": "aggregator.low.",
    r"^fpn\.lateral_convs\.0\.": "aggregator.lateral.top.",
    r"^fpn\.lateral_convs\.1\.": "aggregator.lateral.mid.",
    r"^fpn\.lateral_convs\.2\.": "aggregator.lateral.low.",
    r"^fpn\.output_convs\.2\.": "aggregator.out.",
    r"^encoder\.": "attention.",
    r"^lang_tf_enc\.dense_q\.": "word_attention.query.",
    r"^lang_tf_enc\.dense_k\.": "word_attention.key.",
    r"^lang_tf_enc\.dense_v\.": "word_attention.value.",
    r"^lang_tf_enc\.": "word_attention.",
    r"^fc_2\.": "word_attention.words.",
    r"^mask_decoder\.proj\.": "decoder.out.",
    r"^mask_decoder\.proj([12])\.": lambda m: f"decoder.convs.{int(m[1]) - 1}.",
    r"^mask_decoder\.proj([345])\.": lambda m: f"decoder.upsampling.{int(m[1]) - 3}.",
    r"^proj([123])\.": lambda m: f"coefficients.convs.{int(m[1]) - 1}.",
    r"^projout\.": "coefficients.out.",
    r"\.self_attn\.": ".attention.",
    r"\.linear1\.": ".feed_forward.0.",
    r"\.linear2\.": ".feed_forward.3.",
    r"\.conv\.": ".0.",
    r"\.bn\.": ".1.",
}


def _convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    vision, text, converted = {}, {}, {}
    for name, value in state_dict.items():
        if _DEAD.match(name):
            continue
        if name == "positional_embedding":
            vision[name] = value[0]
        elif name.startswith("visumodel."):
            vision[name[len("visumodel.") :]] = value
        elif name.startswith("textmodel"):
            prefix = next(p for p in _TEXT if name.startswith(p))
            value = value[0] if prefix == "textmodel_pos_embed" else value
            text[_TEXT[prefix] + name[len(prefix) :]] = value
        else:
            converted.update(split_attention(substitute(name, _RENAMED), value))
    return {**convert_tower("vision", vision), **convert_tower("text", text), **converted}


CONVERTER = Converter(
    title="a released ASDA checkpoint",
    needs=("textmodel_pos_embed", "vis_select.weight"),
    rename=_convert,
    is_whole_model=True,
)

"""DeRIS, as its public code saves it (Dmmm1997/DeRIS; ``state_dict``, ``module.`` or not).

Left out are modules that its forward pass never reads, heads that no loss has trained
(``box_embed``, ``cls_embed``, ``logit_embed``), and buffers that are computed anyway. Any other
name that is not known is refused: the file would then be of another model than ours.
"""

import re

from torch import Tensor

from .base import Converter, rename_module, split_attention
from .mask2former import rename_perception

_IGNORED = re.compile(
    r"^(understanding_branch\.logit_embed\.|perception_branch\.(nt_embed|perception_query_embed)\."
    r"|perception_branch\.predictor\.(cls_embed|box_embed|SEG_proj)\."
    r"|perception_branch\.predictor\.Q2TCA\.\d+\.cross_attn\.mapmlp\."
    r"|head\.criterion\.empty_weight$)"
    r"|\.vision_embed\.mask_token$|\.relative_position_index$"
)
_ENCODER = "understanding_branch.vis_enc.beit3."
_FUSION = "perception_branch.predictor.channel_proj_conv."
_EXISTENCE = r"understanding_branch\.roialigner\.TextCorrelation\."
_PREDICTOR = r"perception_branch\.predictor\."
# In the released code, the cognition layers lie in the perception branch's predictor.
_COGNITION = [
    (r"understanding_branch\.vis_embed", "visual_proj"),
    (r"understanding_branch\.text_embed", "text_proj"),
    (r"understanding_branch\.init_query", "query"),
    (r"understanding_branch\.perception_embed", "query_proj"),
    (rf"{_EXISTENCE}(layers\.\d+)\.attentions\.0\.attn", r"existence.\1.self_attention"),
    (rf"{_EXISTENCE}(layers\.\d+)\.attentions\.1\.attn", r"existence.\1.text_attention"),
    (rf"{_EXISTENCE}(layers\.\d+)\.norms\.0", r"existence.\1.self_norm"),
    (rf"{_EXISTENCE}(layers\.\d+)\.norms\.1", r"existence.\1.text_norm"),
    (rf"{_EXISTENCE}(layers\.\d+)\.norms\.2", r"existence.\1.ffn_norm"),
    (rf"{_EXISTENCE}(layers\.\d+)\.ffns\.0\.layers\.0\.0", r"existence.\1.ffn.0"),
    (rf"{_EXISTENCE}(layers\.\d+)\.ffns\.0\.layers\.1", r"existence.\1.ffn.3"),
    (rf"{_EXISTENCE}post_norm_layer", "existence.norm"),
    (r"understanding_branch\.nt_embed", "existence.logit"),
    (rf"{_PREDICTOR}query_SA\.(\d+)\.self_attn", r"layers.\1.instance_attention"),
    (rf"{_PREDICTOR}query_SA\.(\d+)\.norm", r"layers.\1.instance_norm"),
    (rf"{_PREDICTOR}Q2TCA\.(\d+)\.self_attn", r"layers.\1.instance_text.self_attention"),
    (rf"{_PREDICTOR}Q2TCA\.(\d+)\.cross_attn\.q", r"layers.\1.instance_text.text_attention.query"),
    (rf"{_PREDICTOR}Q2TCA\.(\d+)\.cross_attn\.k", r"layers.\1.instance_text.text_attention.key"),
    (rf"{_PREDICTOR}Q2TCA\.(\d+)\.cross_attn\.v", r"layers.\1.instance_text.text_attention.value"),
    (rf"{_PREDICTOR}Q2TCA\.(\d+)\.cross_attn\.proj", r"layers.\1.instance_text.text_attention.out"),
    (rf"{_PREDICTOR}Q2TCA\.(\d+)\.norm1", r"layers.\1.instance_text.text_norm"),
    (rf"{_PREDICTOR}Q2TCA\.(\d+)\.norm2", r"layers.\1.instance_text.self_norm"),
    (rf"{_PREDICTOR}Q2TCA\.(\d+)\.norm3", r"layers.\1.instance_text.ffn_norm"),
    (rf"{_PREDICTOR}Q2TCA\.(\d+)\.linear1", r"layers.\1.instance_text.ffn.0"),
    (rf"{_PREDICTOR}Q2TCA\.(\d+)\.linear2", r"layers.\1.instance_text.ffn.3"),
    (rf"{_PREDICTOR}refer_proj\.(\d+)", r"layers.\1.fusion"),
    (rf"{_PREDICTOR}SEG_cls", "referring"),
]


def _convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    converted, unknown = {}, []
    for name, value in state_dict.items():
        if _IGNORED.search(name):
            continue
        renamed = _rename(name, value)
        converted.update(renamed)
        if not renamed:
            unknown.append(name)
    if unknown:
        raise ValueError(f"a DeRIS checkpoint with {len(unknown)} names unknown: {unknown[:3]}")
    return converted


def _rename(name: str, value: Tensor) -> dict[str, Tensor]:
    """The tensors of ours that one of theirs holds; none if its name is not known."""
    if name == f"{_FUSION}weight":  # of f_h4 and f_v, one after the other
        maps, visual = value.chunk(2, 1)
        return {"perception.mask_proj.weight": maps, "perception.visual_proj.weight": visual}
    if name == f"{_FUSION}bias":
        return {"perception.mask_proj.bias": value}
    if name.startswith(_ENCODER):
        return {f"cognition.encoder.{name[len(_ENCODER):]}": value}
    cognition = rename_module(name, _COGNITION)
    if cognition:
        return split_attention(f"cognition.{cognition}", value)
    perception = rename_perception(
        {name: value},
        backbone="perception_branch.hier_vision_encoder.",
        pixel_decoder="perception_branch.pixel_decoder.",
        predictor="perception_branch.predictor.",
    )
    return {f"perception.{ours}": tensor for ours, tensor in perception.items()}


CONVERTER = Converter(
    title="a released DeRIS checkpoint",
    needs=("understanding_branch.init_query.weight", f"{_FUSION}weight"),
    rename=_convert,
    is_whole_model=True,
)

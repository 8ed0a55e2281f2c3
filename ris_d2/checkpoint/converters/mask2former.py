"""Mask2Former with a Swin backbone (its zoo's ``.pkl``), as the perception branch of DeRIS starts.

Used are the backbone, the pixel decoder and of the transformer decoder the layers, norms, mask
embedding, level embedding and query positions; the branch takes as many layers and queries as it
has. Left out are the query contents, the classifier and the criterion's buffer. Mask2Former has no
biases before the norms of its FPN step and no f_v: those parts of ours stay as they are.
"""

from functools import partial

from torch import Tensor

from .base import Converter, below, rename_module, split_attention
from .swin import rename_swin

_PIXEL_DECODER = [
    (r"transformer\.level_embed", "level_embed"),
    (r"transformer\.encoder\.(layers\.\d+)\.self_attn\.sampling_offsets", r"\1.attention.offsets"),
    (r"transformer\.encoder\.(layers\.\d+)\.self_attn\.attention_weights", r"\1.attention.weights"),
    (r"transformer\.encoder\.(layers\.\d+)\.self_attn\.value_proj", r"\1.attention.value"),
    (r"transformer\.encoder\.(layers\.\d+)\.self_attn\.output_proj", r"\1.attention.out"),
    (r"transformer\.encoder\.(layers\.\d+)\.norm1", r"\1.attention_norm"),
    (r"transformer\.encoder\.(layers\.\d+)\.linear1", r"\1.ffn.0"),
    (r"transformer\.encoder\.(layers\.\d+)\.linear2", r"\1.ffn.2"),
    (r"transformer\.encoder\.(layers\.\d+)\.norm2", r"\1.ffn_norm"),
    # Norms of the FPN step are inside the convolution in detectron2, after it in DeRIS.
    (r"adapter_1(?:\.0)?(?=\.(?:weight|bias))", "lateral.0"),
    (r"adapter_1\.(?:norm|1)", "lateral.1"),
    (r"layer_1(?:\.0)?(?=\.(?:weight|bias))", "output.0"),
    (r"layer_1\.(?:norm|1)", "output.1"),
    (r"(input_proj\.\d\.[01])", r"\1"),
    (r"mask_features", "mask_features"),
]
_PREDICTOR = [
    (r"transformer_self_attention_layers\.(\d+)\.self_attn", r"layers.\1.self_attention"),
    (r"transformer_self_attention_layers\.(\d+)\.norm", r"layers.\1.self_norm"),
    (r"transformer_cross_attention_layers\.(\d+)\.multihead_attn", r"layers.\1.cross_attention"),
    (r"transformer_cross_attention_layers\.(\d+)\.norm", r"layers.\1.cross_norm"),
    (r"transformer_ffn_layers\.(\d+)\.linear1", r"layers.\1.ffn.0"),
    (r"transformer_ffn_layers\.(\d+)\.linear2", r"layers.\1.ffn.2"),
    (r"transformer_ffn_layers\.(\d+)\.norm", r"layers.\1.ffn_norm"),
    (r"decoder_norm", "norm"),
    (r"level_embed", "level_embed"),
    (r"query_embed", "query_position"),
    (r"mask_embed\.layers\.0", "mask_embed.0"),
    (r"mask_embed\.layers\.1", "mask_embed.2"),
    (r"mask_embed\.layers\.2", "mask_embed.4"),
]


def rename_perception(
    state_dict: dict[str, Tensor], *, backbone: str, pixel_decoder: str, predictor: str
) -> dict[str, Tensor]:
    """Names of Mask2Former's modules -> those of DeRIS' ``PerceptionBranch``.

    Args:
        backbone, pixel_decoder, predictor: prefixes of the three modules in ``state_dict``, with
            the dot at the end. What is under none of them, or of no use, is left out.
    """
    swin = rename_swin(below(state_dict, backbone))
    renamed = {f"backbone.{name}": value for name, value in swin.items()}
    for name, value in below(state_dict, pixel_decoder).items():
        ours = rename_module(name, _PIXEL_DECODER)
        if ours is not None:
            renamed[f"pixel_decoder.{ours}"] = value
    for name, value in below(state_dict, predictor).items():
        ours = rename_module(name, _PREDICTOR)
        if ours is not None:
            renamed.update(split_attention(ours, value))
    return renamed


CONVERTER = Converter(
    title="a Mask2Former with a Swin backbone",
    needs=(
        "backbone.layers.0.blocks.0.attn.qkv.weight",
        "sem_seg_head.pixel_decoder.transformer.level_embed",
        "sem_seg_head.predictor.query_embed.weight",
    ),
    rename=partial(
        rename_perception,
        backbone="backbone.",
        pixel_decoder="sem_seg_head.pixel_decoder.",
        predictor="sem_seg_head.predictor.",
    ),
    may_miss=(r"(lateral|output)\.0\.bias$", r"^(mask_proj|visual_proj|level_proj)\."),
)

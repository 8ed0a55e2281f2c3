"""SAM, as released by facebookresearch/segment-anything (``sam_vit_*.pth``) or by transformers.

Two parts of the same file: ``sam``, the image encoder, and ``sam_decoder``, the mask decoder with
what of the prompt encoder it needs beside prompts. Ours carry transformers' names.
"""

from torch import Tensor

from .base import Converter, below, substitute

_IMAGE_ENCODER = {
    r"^image_encoder\.": "vision_encoder.",
    r"patch_embed\.proj\.": "patch_embed.projection.",
    r"\.blocks\.": ".layers.",
    r"\.norm(?=\d\.)": ".layer_norm",
    r"\.neck\.0\.": ".neck.conv1.",
    r"\.neck\.1\.": ".neck.layer_norm1.",
    r"\.neck\.2\.": ".neck.conv2.",
    r"\.neck\.3\.": ".neck.layer_norm2.",
}
_MASK_DECODER = {
    r"\.norm_final_attn\.": ".layer_norm_final_attn.",
    r"\.norm(?=\d\.)": ".layer_norm",
    r"output_upscaling\.0\.": "upscale_conv1.",
    r"output_upscaling\.1\.": "upscale_layer_norm.",
    r"output_upscaling\.3\.": "upscale_conv2.",
    # Three-layer MLPs: the middle one keeps the list's name.
    r"((?:hypernetworks_mlps\.\d|prediction_head)\.)layers\.0\.": r"\1proj_in.",
    r"((?:hypernetworks_mlps\.\d|prediction_head)\.)layers\.1\.": r"\1layers.0.",
    r"((?:hypernetworks_mlps\.\d|prediction_head)\.)layers\.2\.": r"\1proj_out.",
}
# Released name, transformers' name -> ours.
_PROMPT_ENCODER = {
    "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": "position_frequencies",
    "shared_image_embedding.positional_embedding": "position_frequencies",
    "prompt_encoder.no_mask_embed.weight": "no_mask",
}


def _convert_encoder(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        substitute(name, _IMAGE_ENCODER if name.startswith("image_encoder.") else {}): value
        for name, value in state_dict.items()
        if name.startswith(("image_encoder.", "vision_encoder."))
    }


def _convert_decoder(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    released = any(".output_upscaling." in name for name in state_dict)
    converted = {
        "mask_decoder." + substitute(name, _MASK_DECODER if released else {}): value
        for name, value in below(state_dict, "mask_decoder.").items()
    }
    prompts = {
        ours: state_dict[name] for name, ours in _PROMPT_ENCODER.items() if name in state_dict
    }
    return {**converted, **prompts}


CONVERTER = Converter(
    title="a SAM checkpoint",
    needs=(("image_encoder.", "vision_encoder."),),
    rename=_convert_encoder,
)
DECODER_CONVERTER = Converter(
    title="a SAM checkpoint", needs=("mask_decoder.",), rename=_convert_decoder
)

"""Published weight formats -> the names of ris_d2; one file per format.

To add a format, write ``converters/<source>.py`` with a ``CONVERTER`` and enter it in
``CONVERTERS``.
"""

from collections.abc import Mapping

from torch import Tensor

from . import asda, beit3, bert, clip, deris, mask2former, risam, sam, swin, vit
from .base import Converter, unwrap_state_dict

__all__ = [
    "CONVERTERS",
    "Converter",
    "convert_released",
    "convert_state_dict",
    "get_converter",
    "unwrap_state_dict",
]

CONVERTERS: dict[str, Converter] = {
    "asda": asda.CONVERTER,
    "beit3": beit3.CONVERTER,
    "bert": bert.CONVERTER,
    "clip": clip.CONVERTER,
    "deris": deris.CONVERTER,
    "mask2former": mask2former.CONVERTER,
    "risam": risam.CONVERTER,
    "sam": sam.CONVERTER,
    "sam_decoder": sam.DECODER_CONVERTER,
    "swin": swin.CONVERTER,
    "vit": vit.CONVERTER,
}


def get_converter(source: str) -> Converter:
    """Return the converter of a published format.

    Raises:
        ValueError: unknown source; the known ones are listed.
    """
    if source not in CONVERTERS:
        raise ValueError(f"unknown weight source {source!r}; known: {', '.join(CONVERTERS)}")
    return CONVERTERS[source]


def convert_state_dict(state_dict: Mapping, source: str) -> dict[str, Tensor]:
    """Rename a published state dict to the names of ris_d2.

    Args:
        state_dict: name -> tensor, or a published file's whole content (see ``unwrap_state_dict``).
        source: the format, a key of ``CONVERTERS``.

    Returns:
        name -> tensor: relative to the part for backbones (as the sub-module
        ``model.weight_parts[source]`` has them), of the whole model for released methods. Tensors
        are not copied.

    Raises:
        ValueError: unknown source, or the state dict is not of that format.
    """
    converter = get_converter(source)
    return converter.convert(unwrap_state_dict(state_dict))


def convert_released(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state dict of a method's released checkpoint; any other is returned as it is."""
    for converter in CONVERTERS.values():
        if converter.is_whole_model and converter.recognises(state_dict):
            return converter.convert(state_dict)
    return state_dict

"""BEiT-3, as released in microsoft/unilm (``beit3_{base,large}_*.pth``).

The ``.zip`` that DeRIS and C3VG name is the same file.
Everything of the encoder lies under ``beit3.``; the rest are heads of pre-training and fine-tuning
(``mlm_head.*``, the masked-image head, ...), which segmentation has no use for. Our backbone keeps
torchscale's names, so that conversion only strips the prefix.
"""

from torch import Tensor

from .base import Converter

__all__ = ["CONVERTER"]

_PREFIX = "beit3."


def _convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    converted = {
        name[len(_PREFIX) :]: value
        for name, value in state_dict.items()
        if name.startswith(_PREFIX)
    }
    if not converted:
        raise ValueError(
            f"not a BEiT-3 checkpoint: no name starts with {_PREFIX!r}; it has e.g. "
            + ", ".join(list(state_dict)[:3])
        )
    return converted


CONVERTER = Converter(convert=_convert)

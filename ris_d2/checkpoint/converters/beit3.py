"""BEiT-3, as released in microsoft/unilm (``beit3_{base,large}_*.pth``).

The ``.zip`` that DeRIS and C3VG name is the same file.
Everything of the encoder lies under ``beit3.``; the rest are heads of pre-training and fine-tuning
(``mlm_head.*``, the masked-image head, ...), which segmentation has no use for. Our backbone keeps
torchscale's names, so that conversion only strips the prefix.
"""

from functools import partial

from .base import Converter, below

_PREFIX = "beit3."

CONVERTER = Converter(
    title="a BEiT-3 checkpoint", needs=(_PREFIX,), rename=partial(below, prefix=_PREFIX)
)

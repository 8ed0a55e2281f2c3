"""The encoders of a RISAM that was trained here, from its checkpoint; the head is left out."""

from .base import Converter

_ENCODERS = ("backbone.", "text.")

CONVERTER = Converter(
    title="a checkpoint of RISAM",
    needs=_ENCODERS,
    rename=lambda weights: {k: v for k, v in weights.items() if k.startswith(_ENCODERS)},
)

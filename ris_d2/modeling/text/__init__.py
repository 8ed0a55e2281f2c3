"""Text encoders, chosen by MODEL.RIS.TEXT.NAME.

A text encoder is an nn.Module with ``dim``, ``depth``, ``vocab_size`` and
``forward(input_ids (E, L), text_mask bool (E, L), True = real token) -> (E, L, dim)``, its last
normalised hidden states; it is built from the config by its ``from_config``.
"""

from .bert import BertStack, RISBert
from .causal_lm import RISCausalLM
from .clip_text import RISCLIPText
from .registry import TEXT_ENCODER_REGISTRY, build_text_encoder

__all__ = [
    "TEXT_ENCODER_REGISTRY",
    "BertStack",
    "RISBert",
    "RISCLIPText",
    "RISCausalLM",
    "build_text_encoder",
]

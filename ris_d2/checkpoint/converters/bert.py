"""BERT, as published on the Hugging Face hub (bert-base-uncased).

Names may start with ``bert.`` (the pre-training model) or not (BertModel). The pooler and the
pre-training heads are left out; LayerNorm's ``gamma`` and ``beta`` of the oldest files become
weight and bias.
"""

import re

from torch import Tensor

from .base import Converter


def _convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    converted = {}
    for name, value in state_dict.items():
        match = re.fullmatch(r"(?:bert\.)?(embeddings|encoder\.layer)\.(.*)", name)
        if match is None or name.endswith("position_ids"):
            continue
        group = "embeddings" if match[1] == "embeddings" else "layers"
        rest = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", match[2]))
        converted[f"{group}.{rest}"] = value
    return converted


# Keys and values by which a layer reads another modality are no part of BERT.
CONVERTER = Converter(
    title="a BERT checkpoint",
    needs=(("bert.embeddings.word_embeddings.", "embeddings.word_embeddings."),),
    rename=_convert,
    may_miss=(r"\.context_(key|value)\.",),
)

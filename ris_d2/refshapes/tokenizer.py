"""A tokenizer of the words of RefShapes."""

import json
import os

from .language import VOCABULARY


def write_tokenizer(directory: str) -> None:
    """Write a word-level tokenizer of VOCABULARY: <s> 0, <pad> 1, </s> 2, <unk> 3."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *VOCABULARY])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(special)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    os.makedirs(directory, exist_ok=True)
    tokenizer.save(os.path.join(directory, "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 512,
        **dict(bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"),
    }
    with open(os.path.join(directory, "tokenizer_config.json"), "w") as file:
        json.dump(config, file, indent=2)

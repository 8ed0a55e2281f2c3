"""ASDA: the whole model against the public code, on the same seeded weights at the published size.

    python tools/compare/asda.py path/to/ASDA path/to/CLIP

Needs checkouts of swagger-coder/ASDA at 97bc06c and openai/CLIP at d05afc4 (the model is read, not
the tokenizer). Their weights go through our converter of released checkpoints.
"""

from pathlib import Path

import torch
from comparison import Source, Table, randomise, run, stub, unit

from ris_d2 import load_config
from ris_d2.checkpoint import convert_state_dict
from ris_d2.modeling.asda import ASDA

SOURCE = Source("swagger-coder/ASDA", "97bc06c04dc9813ebe66d146a39570ef2f021fbf", "model/model.py")
CLIP_SOURCE = Source("openai/CLIP", "d05afc436d78f1c48dc0dbf8e5980a9d471f35f6", "clip/model.py")
CONFIG = Path(__file__).parents[2] / "configs" / "asda_clip_vit_b.yaml"
LENGTH, END = 17, 49407
TOLERANCE = 1e-4


@torch.no_grad()
def compare(checkouts: list[Path], table: Table) -> None:
    theirs = _public_model(checkouts)
    cfg = load_config(str(CONFIG), ["MODEL.DEVICE", "cpu", "MODEL.INIT", "[]"])
    ours = ASDA(cfg).eval()
    missing, unexpected = ours.load_state_dict(
        convert_state_dict(theirs.state_dict(), "asda"), strict=False
    )
    assert not missing and not unexpected, (missing, unexpected)

    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, 416, 416, generator=generator)
    input_ids = torch.zeros(3, LENGTH, dtype=torch.long)
    for ids, words in zip(input_ids, (15, 4, 8), strict=True):
        ids[0], ids[words + 1] = END - 1, END
        ids[1 : words + 1] = torch.randint(300, 40000, (words,), generator=generator)
    text_mask = input_ids > 0

    seen = {}
    for name in ("projout", "feature_selector_l", "feature_selector_m"):
        getattr(theirs, name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.__setitem__(name, output)
        )
    masks = theirs(images, input_ids[:, None], text_mask[:, None])
    coefficients = []
    ours.coefficients.register_forward_hook(lambda m, i, output: coefficients.append(output))
    outputs = ours.segment(ours.encode_images(images, {}), torch.arange(3), input_ids, text_mask)

    for level, name, first in (("low", "l", 4), ("mid", "m", 7)):
        chosen = first + seen[f"feature_selector_{name}"].squeeze(-1).argmax(1)
        table.add(f"selected {level} layer", outputs[f"{level}_layer"], chosen, 0)
    table.add("coefficients", coefficients[0], torch.tanh(seen["projout"]), TOLERANCE)
    table.add("mask logits", outputs["mask_logits"], masks[:, 0], TOLERANCE)
    one = slice(2, 3)
    table.race(
        "asda",
        lambda: theirs(images[one], input_ids[one, None], text_mask[one, None]),
        ours,
        lambda count: unit(
            torch.randint(256, (3, 416, 416), dtype=torch.uint8),
            {},
            input_ids[one].repeat(count, 1),
            text_mask[one].repeat(count, 1),
        ),
    )


def _public_model(checkouts: list[Path]) -> torch.nn.Module:
    # CLIP's package also imports its tokenizer; clip.model stands by itself.
    stub("clip", __path__=[str(checkouts[1] / "clip")])
    from clip.model import CLIP

    def load(name, jit, device):
        model = CLIP(512, 224, 12, 768, 16, 77, 49408, 512, 8, 12)
        model.cuda = lambda: model  # the public code asks for it wherever it runs
        return model, None

    stub("clip", load=load)
    stub("utils", __path__=[str(checkouts[0] / "utils")])
    from model.model import Model

    # train.py's own arguments.
    return randomise(Model(clip_model="ViT-B/16", tunelang=True, fusion_dim=768, num_query=16))


if __name__ == "__main__":
    run(__doc__, [SOURCE, CLIP_SOURCE], {"asda": compare})

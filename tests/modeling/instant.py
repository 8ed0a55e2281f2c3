"""The smallest model of each method, and units to train it with."""

from pathlib import Path

import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances

from ris_d2 import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
METHODS = ("asda", "deris", "risam", "shared_ris", "vipa")


def make_unit(cfg, num_expressions, *, seed):
    generator = torch.Generator().manual_seed(seed)
    (height, width), length = cfg.INPUT.RIS.SIZE, cfg.INPUT.RIS.MAX_TOKENS

    def pixels(*size):
        return torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)

    masks = torch.zeros(2, height, width, dtype=torch.bool)
    masks[0, 5:20, 5:20] = masks[1, 30:, 30:] = True
    text_mask = (torch.arange(length) < torch.tensor([[5], [7]]))[:num_expressions]
    return {
        "image": pixels(height, width),
        "views": {name: pixels(*size) for name, *size in cfg.INPUT.RIS.VIEWS},
        "input_ids": torch.randint(5, 60, text_mask.shape, generator=generator),
        "text_mask": text_mask,
        "content_box": (0, 0, width, height),
        **{"height": 50, "width": 70, "image_id": seed, "file_name": f"{seed}.jpg"},
        "expressions": [{"expression_id": i} for i in range(num_expressions)],
        "instances": Instances((height, width), gt_masks=BitMasks(masks)),
        "targets": torch.tensor([[True, False], [True, True]])[:num_expressions],
    }


def configure(method, *options):
    leaf = CONFIGS / "instant_test" / f"{method}.yaml"
    return load_config(str(leaf), ["MODEL.DEVICE", "cpu", *options])


def build(method, *options):
    cfg = configure(method, *options)
    torch.manual_seed(0)
    model = build_model(cfg)
    model.to_be_applied = set()
    return model, [make_unit(cfg, 2, seed=1), make_unit(cfg, 1, seed=2)]

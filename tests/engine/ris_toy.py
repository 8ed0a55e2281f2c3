"""A model of 73 parameters on records without images, for tests of everything around the model."""

import multiprocessing
import os
import subprocess

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import BoxMode
from detectron2.utils import comm
from torch import nn

from ris_d2 import get_ris_cfg
from ris_d2.data.loader import build_test_loader, build_train_loader
from ris_d2.engine import Trainer

HEIGHT, WIDTH = 8, 12
DEVICE = "cpu"  # see conftest.py


@META_ARCH_REGISTRY.register()
class RISToy(nn.Module):
    """Four numbers per expression -> left or right half of the image."""

    weight_parts = {"beit3": "encoder"}

    def __init__(self, cfg):
        super().__init__()
        self.encoder = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 1)
        self.dropout = nn.Dropout(cfg.TOY_DROPOUT)
        if cfg.TOY_FREEZE:
            self.encoder.requires_grad_(False)
        self.to(cfg.MODEL.DEVICE)

    def forward(self, batch):
        device = self.head.weight.device
        numbers = torch.cat([x["numbers"] for x in batch]).to(device)
        logits = self.head(self.norm(self.encoder(self.dropout(numbers))))[:, 0]
        if not self.training:
            return self._results(batch, logits)
        answers = torch.cat([x["answers"] for x in batch]).to(device)
        count = sum(comm.all_gather(len(answers))) / comm.get_world_size()
        loss = F.binary_cross_entropy_with_logits(logits, answers, reduction="sum") / count
        return {"loss_toy": loss, "loss_small": 0.1 * loss}

    def _results(self, batch, logits):
        left = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
        left[:, : WIDTH // 2] = True
        logits = iter(logits.tolist())
        return [
            {
                "referring": [
                    {
                        "expression_id": expression["expression_id"],
                        "mask": left if next(logits) > 0 else ~left,
                        "score": 1.0,
                        "no_target": False,
                        "instances": None,
                    }
                    for expression in x["expressions"]
                ]
            }
            for x in batch
        ]


def records():
    """10 images with 1 to 3 expressions each; every fifth expression has no target."""
    halves = [[0, 0, 6, 0, 6, 8, 0, 8], [6, 0, 12, 0, 12, 8, 6, 8]]
    result, expression_id = [], 0
    for image_id in range(10):
        expressions = []
        for _ in range(1 + image_id % 3):
            side = expression_id % 2
            named = [] if expression_id % 5 == 4 else [2 * image_id + side]
            expressions.append(
                {
                    "expression_id": expression_id,
                    "ref_id": expression_id,
                    "text": ("left", "right")[side],
                    "annotation_ids": named,
                }
            )
            expression_id += 1
        result.append(
            {
                "file_name": f"image{image_id}.jpg",
                "image_id": image_id,
                "height": HEIGHT,
                "width": WIDTH,
                "source": "toy",
                "annotations": [
                    {
                        "id": 2 * image_id + side,
                        "segmentation": [halves[side]],
                        "bbox": [6 * side, 0, 6, 8],
                        "bbox_mode": BoxMode.XYWH_ABS,
                        "category_id": 0,
                        "iscrowd": 0,
                    }
                    for side in (0, 1)
                ],
                "expressions": expressions,
            }
        )
    return result


def toy_mapper(record, rng=None):
    """What the model sees of an expression: its id through a fixed table, and noise in training."""
    ids = [expression["expression_id"] for expression in record["expressions"]]
    numbers = np.stack([np.random.default_rng(i).normal(size=4) for i in ids])
    if rng is not None:
        numbers = numbers + 0.1 * rng.normal(size=numbers.shape)
    return {
        **record,
        "numbers": torch.as_tensor(numbers, dtype=torch.float32),
        "answers": torch.tensor([float(e["text"] == "left") for e in record["expressions"]]),
    }


class Terminates(HookBase):
    """Ends process ``target()`` as a scheduler does, in the last process and in its loader's workers."""

    def __init__(self, iteration, target):
        self.iteration, self.target = iteration, target

    def before_step(self):
        if self.trainer.iter == self.iteration and comm.get_rank() == comm.get_world_size() - 1:
            workers = [process.pid for process in multiprocessing.active_children()]
            subprocess.run(["kill", *map(str, [*workers, self.target()])], check=True)


class ToyTrainer(Trainer):
    def build_hooks(self):
        hooks = super().build_hooks()
        if self.cfg.TOY_SIGTERM >= 0:
            target = os.getpid if comm.get_world_size() == 1 else os.getppid
            hooks.append(Terminates(self.cfg.TOY_SIGTERM, target))
        return hooks

    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg, mapper=toy_mapper)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return build_test_loader(cfg, dataset_name, mapper=toy_mapper)


def toy_cfg(output_dir, **options):
    """``options`` have __ for the dots of a key."""
    cfg = get_ris_cfg()
    cfg.TOY_DROPOUT, cfg.TOY_FREEZE, cfg.TOY_SIGTERM = 0.3, False, -1
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "RISToy", DEVICE, ""
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("toy_ris_train",), ("toy_ris_val",)
    cfg.INPUT.RIS.UNIT, cfg.DATALOADER.NUM_WORKERS = "image", 0
    cfg.SOLVER.BASE_LR, cfg.SOLVER.IMS_PER_BATCH = 0.01, 4
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 3, 8, (6,)
    cfg.SOLVER.RIS.CLIP_GRAD_NORM = 1.0
    cfg.SEED, cfg.OUTPUT_DIR = 7, str(output_dir)
    cfg.merge_from_list([x for k, v in options.items() for x in (k.replace("__", "."), v)])
    return cfg


for _name in ("toy_ris_train", "toy_ris_val", "toy_ris_test"):
    if _name not in DatasetCatalog:
        DatasetCatalog.register(_name, records)

"""One process of an evaluation: python evaluate_in_processes.py RANK WORLD_SIZE OUTPUT_DIR."""

import os
import sys

import numpy as np
import torch
import torch.distributed as dist
from detectron2.evaluation import inference_on_dataset

from ris_d2.engine import leave_process_group
from ris_d2.evaluation import ReferringEvaluator
from ris_d2.masks import encode

SIZE = (17, 23)


def make_units() -> list[dict]:
    rng = np.random.default_rng(0)
    units = []
    for image_id in range(31):
        annotations = [
            {"id": index, "segmentation": encode(rng.random(SIZE) < rng.random())}
            for index in range(3)
        ]
        expressions = [
            {
                "expression_id": 10 * image_id + index,
                "ref_id": 10 * image_id + index // 2,
                "text": "word " * int(rng.integers(1, 12)),
                "annotation_ids": list(range(rng.integers(0, 4))),
            }
            for index in range(rng.integers(1, 6))
        ]
        units.append(
            {
                "height": SIZE[0],
                "width": SIZE[1],
                "original_size": SIZE,
                "image_id": image_id,
                "file_name": f"{image_id:03d}.jpg",
                "source": "test",
                "annotations": annotations,
                "expressions": expressions,
            }
        )
    return units


class Guess(torch.nn.Module):
    """A random mask for each expression, the same in whatever process."""

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        return [
            {"referring": [self.guess(e["expression_id"]) for e in unit["expressions"]]}
            for unit in batched_inputs
        ]

    def guess(self, expression_id: int) -> dict:
        rng = np.random.default_rng(expression_id)
        return {
            "expression_id": expression_id,
            "mask": torch.from_numpy(rng.random(SIZE) < rng.random()),
            "score": rng.random(),
            "no_target": bool(rng.random() < 0.3),
            "instances": None,
        }


def main(rank: int, world_size: int, output_dir: str) -> None:
    if world_size > 1:
        os.makedirs(output_dir, exist_ok=True)
        store = dist.FileStore(os.path.join(output_dir, "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    mine = make_units()[rank::world_size]  # the worst case: neighbours on different ranks
    evaluator = ReferringEvaluator("test", output_dir=output_dir, save_predictions=True)
    results = inference_on_dataset(Guess(), [[unit] for unit in mine], evaluator)
    if rank:
        with open(os.path.join(output_dir, f"rank{rank}.txt"), "w") as file:
            file.write(str(dict(results)))
    leave_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

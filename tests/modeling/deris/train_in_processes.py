"""One process of a DeRIS step: python train_in_processes.py RANK WORLD_SIZE OUTPUT_DIR."""

import os
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances
from torch.nn.parallel import DistributedDataParallel

from ris_d2 import load_config
from ris_d2.engine import leave_process_group

CONFIG = Path(__file__).parents[3] / "configs" / "instant_test" / "deris.yaml"
OPTIONS = [
    *("MODEL.DEVICE", "cpu", "MODEL.DERIS.EXISTENCE_DROPOUT", 0.0),
    *("MODEL.RIS.BEIT3.STEM", "patch"),  # the other one has BatchNorm
]


def make_unit(seed: int, targets: list[list[int]]) -> dict:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, 64, 64), generator=generator, dtype=torch.uint8)
    masks = torch.zeros(3, 64, 64, dtype=torch.bool)
    masks[0, :, :30] = masks[1, 40:, 32:] = masks[2, :20, 40:] = True
    instances = Instances((64, 64))
    instances.gt_masks = BitMasks(masks)
    return {
        "image": image,
        "views": {"cognition": image},
        "file_name": f"{seed}.jpg",
        "image_id": seed,
        "expressions": [{"expression_id": i} for i in range(len(targets))],
        "input_ids": torch.randint(4, 100, (len(targets), 8), generator=generator),
        "text_mask": torch.ones(len(targets), 8, dtype=torch.bool),
        "instances": instances,
        "targets": torch.tensor(targets, dtype=torch.bool),
    }


def make_units() -> list[dict]:
    """Three expressions with one, two and no instances; another image, where nothing is meant."""
    return [make_unit(1, [[1, 0, 0], [0, 1, 1], [0, 0, 0]]), make_unit(2, [[0, 0, 0]])]


def same_points(*shape: int, device: torch.device) -> torch.Tensor:
    """Instead of random ones, which differ between the processes: the same for every mask."""
    generator = torch.Generator().manual_seed(0)
    return torch.empty(shape[1:]).uniform_(generator=generator).to(device).expand(shape)


def main(rank: int, world_size: int, output_dir: str) -> None:
    torch.manual_seed(0)
    model = build_model(load_config(str(CONFIG), OPTIONS))
    parallel = model
    if world_size > 1:
        store = dist.FileStore(os.path.join(output_dir, "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        parallel = DistributedDataParallel(model)
    with mock.patch("torch.rand", same_points):
        losses = parallel(make_units()[rank::world_size])
    sum(losses.values()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    losses = {name: loss.item() for name, loss in losses.items()}
    torch.save((losses, gradients), os.path.join(output_dir, f"{rank}_of_{world_size}.pt"))
    leave_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

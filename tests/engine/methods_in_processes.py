"""Each method's smallest leaf, trained for a few steps: python methods_in_processes.py RANK PORT DIR.

Two processes leave what the tests compare with one: losses in NAME/losses.json, with activation
checkpointing, and in micro/losses.json those of shared_ris in micro-batches; in NAME/trained the
files of a training as it is, and in NAME/evaluated those of an evaluation of its checkpoint alone;
in NAME/shared.json how many buffers both processes evaluated with.
"""

import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch
from detectron2.engine import HookBase
from detectron2.layers.batch_norm import NaiveSyncBatchNorm
from detectron2.utils import comm
from torch import nn

from ris_d2 import load_config
from ris_d2.checkpoint import RISCheckpointer
from ris_d2.engine import Trainer, launch

LEAVES = Path(__file__).parents[2] / "configs" / "instant_test"
NAMES = ("asda", "deris", "risam", "shared_ris", "vipa")
STEPS = 3
SETTINGS = {
    "MODEL.DEVICE": "cpu",
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.MAX_ITER": STEPS,
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.RIS.EPS": 0.01,  # or Adam takes whole steps along gradients that are 0 but for rounding
    "SOLVER.CHECKPOINT_PERIOD": 1000,
    "TEST.EVAL_PERIOD": 0,
    "TEST.SAVE_PREDICTIONS": True,
    "DATALOADER.NUM_WORKERS": 0,
}
CHECKPOINTED = {"MODEL__RIS__CHECKPOINT_ACTIVATIONS": ("all",)}
MICRO = {"SOLVER__RIS__ACCUMULATION": 2}
# Dropped weights of attention, which each process draws by itself.
NOISE = {"deris": {"MODEL.DERIS.EXISTENCE_DROPOUT": 0.0}}


def config(name, output_dir, more=()):
    settings = {**SETTINGS, "OUTPUT_DIR": str(output_dir), **dict(more)}
    options = [str(word) for pair in settings.items() for word in pair]
    return load_config(str(LEAVES / f"{name}.yaml"), options)


class Recorder(HookBase):
    def __init__(self):
        self.losses = []

    def after_step(self):
        if comm.is_main_process():
            latest = self.trainer.storage.latest()
            self.losses.append(
                {name: value for name, (value, _) in latest.items() if "loss" in name}
            )


class Comparable(Trainer):
    """Without what makes two processes differ from one: BatchNorm over a process' share of the
    batch, dropout, other noise, and random points that depend on their number in the process."""

    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        for module in list(model.modules()):
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name, child in list(module.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, synchronised(child))
        return model

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        return {}


def synchronised(norm):
    copy = NaiveSyncBatchNorm(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    )
    copy._stats_mode = "N"  # processes weigh as their samples do
    copy.load_state_dict(norm.state_dict())
    return copy


def same_points(*size, device=None, drawn=torch.rand):
    """torch.rand for DeRIS' (masks, points, 2): the same points for every mask."""
    if len(size) != 3:
        return drawn(*size, device=device)
    generator = torch.Generator().manual_seed(size[1])
    return drawn(1, *size[1:], generator=generator).expand(size)


def losses_of(name, output_dir, **more):
    """Losses of each step, by name; ``more`` keys have __ for dots."""
    more = {key.replace("__", "."): value for key, value in more.items()}
    # The second is VIPA's noise, whose -log is 0 then.
    with (
        mock.patch.object(torch, "rand", same_points),
        mock.patch.object(torch.Tensor, "exponential_", lambda self: self.fill_(1.0)),
        # In bf16 Muon's iteration makes a difference of 1e-7 one of 1e-3.
        mock.patch("ris_d2.engine.muon.has_fast_bf16", lambda device: False),
    ):
        torch.manual_seed(7)
        trainer = Comparable(config(name, output_dir, {**NOISE.get(name, {}), **more}))
        recorder = Recorder()
        trainer.register_hooks([recorder])
        trainer.resume_or_load(False)
        trainer.train()
    return recorder.losses


def train_and_evaluate(name, folder):
    """Train as it is, which ends with an evaluation; then evaluate the checkpoint alone.

    Returns how many running statistics there are, and how many of them the processes have in common.
    """
    torch.manual_seed(7)
    trainer = Trainer(config(name, folder / "trained"))
    trainer.resume_or_load(False)
    trainer.train()
    # As the evaluation left them, which is the last thing that a training does.
    # Of the buffers those that are saved: others are constants, of which each process has its own.
    saved, names = trainer.model.state_dict(), dict(trainer.model.named_buffers())
    ranks = comm.all_gather([saved[name].tolist() for name in names if name in saved])
    evaluate(name, folder / "trained" / "model_final.pth", folder / "evaluated")
    return len(ranks[0]), sum(values == ranks[0][i] for i, values in enumerate(ranks[1]))


def evaluate(name, weights, output_dir):
    cfg = config(name, output_dir)
    model = Trainer.build_model(cfg)
    RISCheckpointer(model).load(str(weights))
    return Trainer.test(cfg, model)


def main(folder):
    for name in NAMES:
        losses = losses_of(name, folder / name / "comparable", **CHECKPOINTED)
        shared = train_and_evaluate(name, folder / name)
        if comm.is_main_process():
            (folder / name / "losses.json").write_text(json.dumps(losses))
            (folder / name / "shared.json").write_text(json.dumps(shared))
    losses = losses_of("shared_ris", folder / "micro", **CHECKPOINTED, **MICRO)
    if comm.is_main_process():
        (folder / "micro" / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    rank, port, folder = sys.argv[1:]
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    launch(main, (Path(folder),), device="cpu")

#!/usr/bin/env python
"""Tell how much memory a training step takes, and what batch fits on a GPU, without one.

    python tools/memory.py --config-file configs/vipa_swin_b.yaml [--config-file ANOTHER ...]
        [--precisions fp32 bf16] [--gpus 24 40 80] [--batches 1 8 32] [--json] [KEY VALUE ...]

Weights, activations and gradients are simulated: tensors that have shapes and no content (torch's
fake tensors) go through forward, backward and AdamW, and the bytes of all that are alive are
counted. With and without MODEL.RIS.CHECKPOINT_ACTIVATIONS all. The largest batch is interpolated
between --batches, or beyond them continued, and leaves 8 % of a GPU to CUDA and to fragmentation. A
unit of the batch is an image with one sentence, or with INPUT.MAX_EXPRESSIONS of them where that is
the recipe's unit.

Kernels are those of a CPU: attention whose bias is learned (Swin's windows) keeps its weights,
which CUDA's fused kernel does not, and what kernels use inside themselves is not counted.
"""

import argparse
import json
import weakref
from collections.abc import Sequence
from typing import Any

from _program import Parser, load, run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_config_file(required=True, action="append", help="may be given several times")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--gpus", nargs="+", type=float, default=[24, 40, 80], metavar="GIB")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32], metavar="N")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parse()  # --help and mistakes are answered before the imports below, which take seconds

import torch
from _sample import model_input
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from tabulate import tabulate
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ris_d2.modeling.deris.deris import DeRIS
from ris_d2.modeling.deris.matcher import HungarianMatcher

FREE_SHARE = 0.08  # of a GPU, for CUDA's context and fragmentation


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of fake tensors that are alive; shared memory counts once.

    torch's own MemTracker keeps books for every module: minutes for a step that takes seconds here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: weakref.WeakSet = weakref.WeakSet()

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._alive:
            return
        self._alive.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, FakeTensor):
                self.add(x)
        return result


def step_memory(cfg: CfgNode, batch: int) -> tuple[float, float]:
    """GiB of a training step of ``batch`` units at its peak, and of weights and AdamW alone."""
    model = _without_content(cfg).train()
    count = cfg.INPUT.MAX_EXPRESSIONS if cfg.INPUT.RIS.UNIT == "image" else 1
    inputs = [model_input(cfg, count, training=True) for _ in range(batch)]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    for p in trained:
        p.grad = torch.empty_like(p)
    optimizer.step()  # makes its state
    optimizer.zero_grad()
    memory = PeakMemory()
    state = [x for own in optimizer.state.values() for x in own.values()]
    for x in (*model.parameters(), *model.buffers(), *state):
        memory.add(x)
    fixed = memory.now
    with memory:
        sum(model(inputs).values()).backward()
        optimizer.step()
    return memory.peak / 2**30, fixed / 2**30


def _without_content(cfg: CfgNode) -> nn.Module:
    with torch.device("meta"):
        model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, x in tensors.items():
                if x is not None:
                    fake = FakeTensor(mode, x.detach(), torch.device("cpu"))
                    is_parameter = isinstance(x, nn.Parameter)
                    tensors[name] = nn.Parameter(fake, x.requires_grad) if is_parameter else fake
    model.to_be_applied = set()
    if isinstance(model, DeRIS):
        model.criterion.matcher = _FirstQuery(**vars(model.criterion.matcher))
    return model


class _FirstQuery(HungarianMatcher):
    """DeRIS' matcher needs values: here each instance goes to query 0."""

    def __call__(
        self, rounds: Sequence[dict], masks: Tensor, owners: Tensor, names: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        first = torch.zeros(len(rounds), len(owners), dtype=torch.int64)
        return first, torch.arange(len(owners)).expand_as(first)


def measure(config_file: str, args: argparse.Namespace) -> list[dict]:
    """One dict per precision, without and with activation checkpointing; memory in GiB."""
    figures = []
    for precision in args.precisions:
        for parts in ((), ("all",)):
            changes = ["MODEL.DEVICE", "cpu", "MODEL.RIS.PRECISION", precision]
            changes += ["MODEL.RIS.CHECKPOINT_ACTIVATIONS", str(parts)]
            cfg = load(args, config_file, changes)
            steps = [step_memory(cfg, batch) for batch in sorted(args.batches)]
            points = [(n, peak) for n, (peak, _) in zip(sorted(args.batches), steps, strict=True)]
            figures.append(
                {
                    "config_file": config_file,
                    "precision": precision,
                    "checkpointed": bool(parts),
                    "weights_and_optimizer": steps[0][1],
                    **{f"batch_{n}": peak for n, peak in points},
                    **{f"largest_in_{gib:g}": largest_batch(points, gib) for gib in args.gpus},
                }
            )
    return figures


def largest_batch(points: Sequence[tuple[int, float]], gib: float) -> int:
    """Of two or more (batch, GiB), in order; 0 where not even the first one fits."""
    room = gib * (1 - FREE_SHARE)
    if points[0][1] > room:
        return 0
    # The piece in which the room ends, or the last one.
    pieces = list(zip(points, points[1:]))
    (few, low), (many, high) = next((p for p in pieces if p[1][1] > room), pieces[-1])
    return int(few + (room - low) * (many - few) / (high - low))


def main(arguments: list[str] | None = None) -> list[dict]:
    """Parse ``arguments`` (default: the command line), simulate, print and return the figures."""
    args = parse(arguments)
    figures = [row for config_file in args.config_file for row in measure(config_file, args)]
    if args.json:
        print(json.dumps(figures, indent=2))
    else:
        print(tabulate(figures, headers="keys", tablefmt="github", floatfmt=".2f"))
    return figures


if __name__ == "__main__":
    run(main)

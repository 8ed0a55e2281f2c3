#!/usr/bin/env python3
"""Parameters and multiply-adds of a model, part by part, per image and per expression.

    python tools/analyze.py --config-file configs/shared_ris_beit3_b.yaml [--depth 2] [--json] [KEY VALUE ...]

Parameters are counted without allocating them; multiply-adds (MACs) are counted while the model
segments one sentence of MAX_TOKENS words in one image of the config's size, on the CPU, with random
weights. Convention of the papers' tables (fvcore's): one multiply-add is 1, matrix products,
convolutions and attention are counted, and normalisation and bilinear upsampling at fvcore's
weights of 5, 2 and 4 per element.
"""

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from _program import Parser, load, run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_config_file(required=True)
    parser.add_argument("--depth", type=int, default=1, help="list parts of parts (2), and so on")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parse()  # --help and mistakes are answered before the imports below, which take seconds

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten
# Operations per element of what fvcore counts beside products; FlopCounterMode counts 2 per
# multiply-add.
_ELEMENTWISE = {
    aten.native_layer_norm: lambda x, *args, **kwargs: 2 * 5 * math.prod(x),
    aten.native_batch_norm: lambda x, *args, **kwargs: 2 * 2 * math.prod(x),
    aten.upsample_bilinear2d: lambda x, *args, out_shape, **kwargs: 2 * 4 * math.prod(out_shape),
}


def analyze(cfg: CfgNode, depth: int = 1) -> dict:
    """Count parameters and multiply-adds at the config's input size.

    Args:
        depth: 1 lists the model's parts, 2 the parts of those, and so on.

    Returns:
        {"parameters": {"total", "trainable"}, "macs", "macs_per_image", "macs_per_expression",
        "parts": {name: {"parameters", "macs"}}}: ``macs`` and those of the parts are of the whole
        forward pass of one image with one expression; what runs in no part is in ``macs`` alone.
    """
    build = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    with torch.device("meta"):
        skeleton = build(cfg)
    model = build(cfg).eval()
    parts = dict(_parts(skeleton, depth))
    one, two = (count_macs(model, _inputs(cfg, count), list(parts)) for count in (1, 2))
    per_expression = two["Global"] - one["Global"]
    return {
        "parameters": {
            "total": _count(skeleton.parameters()),
            "trainable": _count(p for p in skeleton.parameters() if p.requires_grad),
        },
        "macs": one["Global"],
        "macs_per_image": one["Global"] - per_expression,
        "macs_per_expression": per_expression,
        "parts": {
            name: {"parameters": _count(part.parameters()), "macs": one[name]}
            for name, part in parts.items()
        },
    }


def _parts(module: nn.Module, depth: int, prefix: str = "") -> Iterable[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if depth > 1 and any(True for _ in child.children()):
            yield from _parts(child, depth - 1, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


class _PartCounter(FlopCounterMode):
    """Counts by part, whether it is called as a whole, by its methods, or in pieces."""

    def __init__(self, model: nn.Module, parts: Sequence[str]):
        super().__init__(display=False, custom_mapping=_ELEMENTWISE)
        self.part_flops = dict.fromkeys(parts, 0)
        self._paths = {part: f"{type(model).__name__}.{part}" for part in parts}

    def _count_flops(self, func_packet: Any, *args: Any) -> Any:
        before = self.flop_counts["Global"][func_packet]
        result = super()._count_flops(func_packet, *args)
        added = self.flop_counts["Global"][func_packet] - before
        if added:
            running = [f"{path}." for path in self.mod_tracker.parents]
            for part, path in self._paths.items():
                if any(name.startswith(f"{path}.") for name in running):
                    self.part_flops[part] += added
        return result


def count_macs(model: nn.Module, inputs: dict, parts: Sequence[str] = ()) -> dict[str, int]:
    """Multiply-adds of segmenting one image with its expressions, by part; "Global" is the whole."""
    counter = _PartCounter(model, parts)
    with counter:
        model([inputs])
    flops = {**counter.part_flops, "Global": counter.get_total_flops()}
    return {name: count // 2 for name, count in flops.items()}


def _inputs(cfg: CfgNode, expressions: int) -> dict:
    height, width = cfg.INPUT.RIS.SIZE
    length = cfg.INPUT.RIS.MAX_TOKENS
    return {
        "image": torch.zeros(3, height, width, dtype=torch.uint8),
        "views": {name: torch.zeros(3, h, w) for name, h, w in cfg.INPUT.RIS.VIEWS},
        "content_box": (0, 0, width, height),
        "height": height,
        "width": width,
        "input_ids": torch.full((expressions, length), 5),  # a word in every vocabulary
        "text_mask": torch.ones(expressions, length, dtype=torch.bool),
        "expressions": [{"expression_id": i} for i in range(expressions)],
    }


def as_table(report: dict) -> str:
    """The report for a person: one row per part, then the whole."""
    rows = [
        (name, part["parameters"] / 1e6, part["macs"] / 1e9)
        for name, part in report["parts"].items()
    ]
    rows.append(("whole", report["parameters"]["total"] / 1e6, report["macs"] / 1e9))
    table = tabulate(rows, headers=("part", "parameters (M)", "MACs (G)"), floatfmt=".2f")
    return (
        f"{table}\n\ntrainable: {report['parameters']['trainable'] / 1e6:.2f} M parameters\n"
        f"per image: {report['macs_per_image'] / 1e9:.2f} G MACs, "
        f"per expression: {report['macs_per_expression'] / 1e9:.2f} G MACs"
    )


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    report = analyze(load(args), args.depth)
    print(json.dumps(report, indent=2) if args.json else as_table(report))


if __name__ == "__main__":
    run(main)

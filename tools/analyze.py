#!/usr/bin/env python3
"""Parameters and multiply-adds of a model, part by part, per image and per expression.

    python tools/analyze.py --config-file configs/shared_ris_beit3_b.yaml [--json] [KEY VALUE ...]

Parameters are counted without allocating them; multiply-adds (MACs) are counted while the model segments
one sentence of MAX_TOKENS words in one image of the config's size, on the CPU, with random weights.
Convention of the papers' tables (fvcore's): one multiply-add is 1, matrix products, convolutions and
attention are counted, and normalisation and bilinear upsampling at fvcore's weights of 5, 2 and 4 per
element.
"""

import argparse
import json
import math
from collections.abc import Iterable, Mapping

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ris_d2 import load_config

aten = torch.ops.aten
# Operations per element of what fvcore counts beside products; FlopCounterMode counts 2 per
# multiply-add.
_ELEMENTWISE = {
    aten.native_layer_norm: lambda x, *args, **kwargs: 2 * 5 * math.prod(x),
    aten.native_batch_norm: lambda x, *args, **kwargs: 2 * 2 * math.prod(x),
    aten.upsample_bilinear2d: lambda x, *args, out_shape, **kwargs: 2 * 4 * math.prod(out_shape),
}


def analyze(cfg: CfgNode) -> dict:
    """Count parameters and multiply-adds at the config's input size.

    Returns:
        {"parameters": {"total", "trainable"}, "macs", "macs_per_image", "macs_per_expression",
        "parts": {name: {"parameters", "macs"}}}: ``macs`` and those of the parts are of the whole
        forward pass of one image with one expression.
    """
    build = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    with torch.device("meta"):
        skeleton = build(cfg)
    model = build(cfg).eval()
    one, two = (_count_macs(model, cfg, expressions) for expressions in (1, 2))
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
            name: {
                "parameters": _count(child.parameters()),
                "macs": _inside(one, f"{type(model).__name__}.{name}"),
            }
            for name, child in skeleton.named_children()
        },
    }


def _count_macs(model: nn.Module, cfg: CfgNode, expressions: int) -> dict[str, int]:
    """Multiply-adds by module path; "Global" is the whole."""
    height, width = cfg.INPUT.RIS.SIZE
    length = cfg.INPUT.RIS.MAX_TOKENS
    inputs = {
        "image": torch.zeros(3, height, width, dtype=torch.uint8),
        "views": {name: torch.zeros(3, h, w) for name, h, w in cfg.INPUT.RIS.VIEWS},
        "content_box": (0, 0, width, height),
        "height": height,
        "width": width,
        "input_ids": torch.full((expressions, length), 5),  # a word in every vocabulary
        "text_mask": torch.ones(expressions, length, dtype=torch.bool),
        "expressions": [{"expression_id": i} for i in range(expressions)],
    }
    with FlopCounterMode(display=False, custom_mapping=_ELEMENTWISE) as counter:
        model([inputs])
    return {path: sum(c.values()) // 2 for path, c in counter.get_flop_counts().items()}


def _inside(macs: Mapping[str, int], part: str) -> int:
    """Sum over the outermost modules of a part that were called (a part may be used by its methods)."""
    inside = [path for path in macs if path == part or path.startswith(f"{part}.")]
    return sum(
        macs[path] for path in inside if not any(path.startswith(f"{other}.") for other in inside)
    )


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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for the config")
    args = parser.parse_args(argv)
    report = analyze(load_config(args.config_file, args.opts))
    print(json.dumps(report, indent=2) if args.json else as_table(report))


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Which layers of the vision encoder ASDA's sentences select, per dataset and type of expression.

    python tools/selected_layers.py --config-file configs/asda_clip_vit_b.yaml --output out \
        --dataset ris_refcoco_unc_val --dataset ris_refcoco+_unc_val [--images 500] \
        [KEY VALUE ...]

writes into the output directory:

    selected_layers.png    a panel per dataset and level: of each type, the share of each layer
    selected_layers.json   dataset -> type -> {"sentences", "low": {layer: count}, "mid": ...}

Types are told by words: "position" (left, top, behind, second, ...), "attribute" (colours, sizes,
materials), "both", or "neither". Ours; the paper has no such table. A hard selector that was never
trained (as released) selects at random, though always the same for the same sentence and image.
"""

import argparse
import json
import os
import re
from collections import Counter

from _program import Parser, load, run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_config_file(required=True)
    parser.add_argument("--dataset", required=True, action="append", help="several times: several")
    parser.add_argument("--images", type=int, default=500, help="of each dataset, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of images")
    parser.add_argument("--output", required=True, metavar="DIRECTORY", help="made if absent")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parse()  # --help and mistakes are answered before the imports below, which take seconds

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from matplotlib.figure import Figure
from tabulate import tabulate

from ris_d2.io import atomic_write
from ris_d2.modeling.asda import ASDA
from ris_d2.predictor import Predictor, load_rgb

TYPES = ("position", "attribute", "both", "neither")
_POSITION = re.compile(
    r"\b(left|right|top|bottom|upper|lower|middle|center|centre|front|back|behind|above|below|under"
    r"|over|between|near|nearest|next|closest|closer|far|farthest|furthest|corner|side|edge|first"
    r"|second|third|last|leftmost|rightmost|background|foreground)\b"
)
_ATTRIBUTE = re.compile(
    r"\b(red|orange|yellow|green|blue|purple|violet|pink|brown|black|white|grey|gray|gold|silver|tan"
    r"|beige|dark|light|bright|big|bigger|biggest|large|larger|largest|small|smaller|smallest|tiny"
    r"|tall|taller|tallest|short|shorter|shortest|long|old|young|striped|plaid|wooden|metal|glass)\b"
)
# Okabe and Ito's palette, in the order of a level's layers.
_COLORS = ("#56B4E9", "#E69F00", "#009E73", "#F0E442", "#CC79A7", "#D55E00")


def expression_type(text: str) -> str:
    """One of ``TYPES``."""
    text = text.lower()
    position, attribute = bool(_POSITION.search(text)), bool(_ATTRIBUTE.search(text))
    if position and attribute:
        return "both"
    return "position" if position else "attribute" if attribute else "neither"


@torch.no_grad()
def selected_layers(model: ASDA, inputs: dict) -> dict[str, torch.Tensor]:
    """What the sentences of one input choose, without segmenting anything.

    Returns:
        "low" and "mid" -> int64 (E,), 1-based layers of the vision encoder, on the CPU.
    """
    features, text = model.encode([inputs]), model._collate_text([inputs])
    with model._autocast():
        *_, selected = model.read_and_select(features, *text)
    return {name: level.layers.cpu() for name, level in selected.items()}


def count(predictor: Predictor, dataset: str, *, images: int, seed: int) -> dict[str, dict]:
    """Type -> {"sentences", level: Counter of layers} over images of a dataset drawn by chance."""
    levels = predictor.model.selection.levels
    counts = {kind: {"sentences": 0, **{name: Counter() for name in levels}} for kind in TYPES}
    records = DatasetCatalog.get(dataset)
    for number in np.random.default_rng(seed).permutation(len(records))[:images]:
        record = records[number]
        texts = [expression["text"] for expression in record["expressions"]]
        inputs = predictor.prepare(load_rgb(record["file_name"]), texts)
        selected = selected_layers(predictor.model, inputs)
        for row, text in enumerate(texts):
            of_type = counts[expression_type(text)]
            of_type["sentences"] += 1
            for name, layers in selected.items():
                of_type[name][int(layers[row])] += 1
    return counts


def draw(path: str, counts: dict[str, dict], levels: dict[str, tuple[int, ...]]) -> None:
    """A row of panels per dataset, a panel per level, a stacked bar per type of expression."""
    figure = Figure(figsize=(5.2 * len(levels), 2.6 * len(counts) + 0.5), layout="constrained")
    grid = figure.subplots(len(counts), len(levels), squeeze=False)
    for panels, (dataset, of_dataset) in zip(grid, counts.items(), strict=True):
        kinds = [kind for kind in TYPES if of_dataset[kind]["sentences"]]
        sentences = [of_dataset[kind]["sentences"] for kind in kinds]
        labels = [f"{kind} ({n:,})" for kind, n in zip(kinds, sentences, strict=True)]
        for axes, (level, layers) in zip(panels, levels.items(), strict=True):
            left = np.zeros(len(kinds))
            for color, layer in zip(_COLORS, layers):
                share = [
                    100 * of_dataset[k][level][layer] / of_dataset[k]["sentences"] for k in kinds
                ]
                axes.barh(labels, share, left=left, color=color, label=f"layer {layer}")
                for y, (start, width) in enumerate(zip(left, share, strict=True)):
                    if width >= 8:
                        axes.text(start + width / 2, y, f"{width:.0f}", ha="center", va="center")
                left += share
            axes.set(title=f"{dataset}: {level}", xlim=(0, 100), xlabel="share of sentences (%)")
            axes.invert_yaxis()
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small", frameon=False)
    with atomic_write(path, mode="wb") as file:
        figure.savefig(file, format="png", dpi=110)


def main(arguments: list[str] | None = None) -> dict:
    """Parse ``arguments`` (default: the command line), count, write the files, print a table."""
    args = parse(arguments)
    predictor = Predictor(load(args))
    if not isinstance(predictor.model, ASDA):
        raise ValueError(f"{args.config_file}: its model is no ASDA, which alone selects layers")
    levels = predictor.model.selection.levels
    if not levels:
        raise ValueError(f"{args.config_file}: MODEL.ASDA.AGGREGATOR none selects no layers")
    counts = {
        dataset: count(predictor, dataset, images=args.images, seed=args.seed)
        for dataset in args.dataset
    }
    os.makedirs(args.output, exist_ok=True)
    draw(os.path.join(args.output, "selected_layers.png"), counts, levels)
    with atomic_write(os.path.join(args.output, "selected_layers.json")) as file:
        json.dump(counts, file, indent=2)
    rows = [
        (dataset, kind, c["sentences"], *(c[level][x] for level in levels for x in levels[level]))
        for dataset, of_dataset in counts.items()
        for kind, c in of_dataset.items()
    ]
    names = [f"{level} {layer}" for level, layers in levels.items() for layer in layers]
    print(tabulate(rows, headers=("dataset", "type", "sentences", *names)))
    return counts


if __name__ == "__main__":
    run(main)

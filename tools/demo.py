#!/usr/bin/env python
"""Segment what sentences refer to in images.

    python tools/demo.py
    python tools/demo.py --config-file configs/shared_ris_beit3_b.yaml --weights model_best.pth \
        --image street.jpg --text "the left man" --text "the red cars" --output out

Without --config-file the model is the small one that comes with ris_d2 and knows RefShapes alone, and
what --image and --text do not say is its own scene and sentences. It writes into the output directory,
for the sentences 0, 1, ...:

    0_overlay.png   the image with the mask painted on it (unchanged where the answer is "nothing")
    0_mask.png      0 and 255 at the image's size
    results.json    text, score, no_target, area in pixels and compressed COCO RLE of every sentence

Of several images, or a folder of them, each has a directory of its own there, named as its file.
"""

import argparse
import json
import os
import time
from collections import Counter

from _program import Parser, load, run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_config_file()
    parser.add_argument("--weights", metavar="FILE", help="a checkpoint; the same as MODEL.WEIGHTS")
    parser.add_argument(
        "--image",
        action="append",
        metavar="PATH",
        help="a file, or a folder of .jpg and .png files; may be given several times",
    )
    parser.add_argument("--text", action="append", help="may be given several times")
    parser.add_argument(
        "--output",
        default=os.path.join("output", "demo"),
        metavar="DIRECTORY",
        help="made if absent",
    )
    parser.add_argument(
        "--untrained", action="store_true", help="go on without a checkpoint, with random weights"
    )
    args = parser.parse_args(arguments)
    if args.config_file and not (args.image and args.text):
        parser.error("a model of your own needs --image and --text")
    return args


if __name__ == "__main__":
    parse()  # --help and mistakes are answered before the imports below, which take seconds

from detectron2.config import CfgNode
from tabulate import tabulate

from ris_d2 import example
from ris_d2.hub import find_config
from ris_d2.io import atomic_write
from ris_d2.masks import encode
from ris_d2.predictor import Predictor, load_rgb
from ris_d2.visualization import overlay, write_png

EXTENSIONS = (".jpg", ".jpeg", ".png")


def main(arguments: list[str] | None = None) -> None:
    """Parse ``arguments`` (default: the command line), predict, write the files, print a table."""
    args = parse(arguments)
    weights = ["MODEL.WEIGHTS", args.weights] if args.weights else []
    if args.config_file:
        cfg = load(args, options=weights)
    else:
        args.config_file = example.FOLDER
        args.image, args.text = args.image or [example.SCENE], args.text or example.SENTENCES
        cfg = find_config(example.FOLDER, [*args.opts, *weights], modules=args.modules)
    if not cfg.MODEL.WEIGHTS and not args.untrained:
        raise ValueError("no weights: give --weights FILE, or --untrained to see random masks")
    paths = image_paths(args.image)
    predictor = Predictor(cfg)
    rows, seconds = [], 0.0
    for path in paths:
        name = os.path.basename(path)
        folder = os.path.join(args.output, name) if len(paths) > 1 else args.output
        image = load_rgb(path)
        start = time.perf_counter()
        results = predictor(image, args.text)
        seconds += time.perf_counter() - start
        records = [
            _write(folder, position, image, text, result)
            for position, (text, result) in enumerate(zip(args.text, results, strict=True))
        ]
        _write_report(folder, path, image.shape, args.config_file, cfg, records)
        pixels = image.shape[0] * image.shape[1]
        rows += [_row(name, position, record, pixels) for position, record in enumerate(records)]
    headers = ("image", "", "sentence", "area", "score")
    print(tabulate(rows, headers=headers, disable_numparse=True))
    print(f"\n{seconds:.2f} s on {cfg.MODEL.DEVICE}; pictures and results.json in {args.output}")


def image_paths(given: list[str]) -> list[str]:
    """The files among ``given`` and those in its folders, in order.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a folder without images, or two files of one name (their results would be
            written to one place).
    """
    paths = []
    for path in given:
        if not os.path.exists(path):
            raise FileNotFoundError(f"--image {path}: no such file or folder")
        if not os.path.isdir(path):
            paths.append(path)
            continue
        inside = sorted(n for n in os.listdir(path) if n.lower().endswith(EXTENSIONS))
        if not inside:
            raise ValueError(f"--image {path}: no {', '.join(EXTENSIONS)} file in this folder")
        paths += [os.path.join(path, name) for name in inside]
    name, count = Counter(map(os.path.basename, paths)).most_common(1)[0]
    if count > 1:
        raise ValueError(f"--image: {count} files are named {name}; give them in several runs")
    return paths


def _write(folder: str, position: int, image, text: str, result: dict) -> dict:
    """Write the pictures of one sentence; return its entry of results.json."""
    mask = result["mask"].numpy()
    files = {kind: f"{position}_{kind}.png" for kind in ("overlay", "mask")}
    write_png(os.path.join(folder, files["overlay"]), overlay(image, mask))
    write_png(os.path.join(folder, files["mask"]), mask)
    return {
        "text": text,
        "no_target": bool(result["no_target"]),
        "score": float(result["score"]),
        "area": int(mask.sum()),
        "mask": encode(mask),
        "files": files,
    }


def _write_report(
    folder: str, path: str, shape: tuple, config_file: str, cfg: CfgNode, records: list[dict]
) -> None:
    report = {
        "image": path,
        "height": shape[0],
        "width": shape[1],
        "config_file": config_file,
        "weights": cfg.MODEL.WEIGHTS,
        "results": records,
    }
    with atomic_write(os.path.join(folder, "results.json")) as file:
        json.dump(report, file, indent=2)


def _row(name: str, position: int, record: dict, pixels: int) -> tuple:
    area = "nothing" if record["no_target"] else f"{100 * record['area'] / pixels:.1f} %"
    return name, position, record["text"], area, f"{record['score']:.3f}"


if __name__ == "__main__":
    run(main)

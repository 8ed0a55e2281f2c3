#!/usr/bin/env python
"""Segment what sentences refer to in one image.

    python tools/demo.py --config-file configs/shared_ris_beit3_b.yaml --image street.jpg \
        --text "the left man" --text "the red cars" --output out MODEL.WEIGHTS model_best.pth

writes into the output directory, for the sentences 0, 1, ...:

    0_overlay.png   the image with the mask painted on it (unchanged where the answer is "nothing")
    0_mask.png      0 and 255 at the image's size
    results.json    text, score, no_target, area in pixels and compressed COCO RLE of every sentence
"""

import argparse
import json
import os
import time

from tabulate import tabulate

from ris_d2 import load_config
from ris_d2.io import atomic_write
from ris_d2.masks import encode
from ris_d2.predictor import Predictor, load_rgb
from ris_d2.visualization import overlay, write_png


def main(arguments: list[str] | None = None) -> None:
    """Parse ``arguments`` (default: the command line), predict, write the files, print a table."""
    args = _parse(arguments)
    cfg = load_config(args.config_file, args.opts)
    predictor = Predictor(cfg)
    image = load_rgb(args.image)
    start = time.perf_counter()
    results = predictor(image, args.text)
    seconds = time.perf_counter() - start

    records = []
    for position, (text, result) in enumerate(zip(args.text, results)):
        mask = result["mask"].numpy()
        files = {kind: f"{position}_{kind}.png" for kind in ("overlay", "mask")}
        write_png(os.path.join(args.output, files["overlay"]), overlay(image, mask))
        write_png(os.path.join(args.output, files["mask"]), mask)
        records.append(
            {
                "text": text,
                "no_target": bool(result["no_target"]),
                "score": float(result["score"]),
                "area": int(mask.sum()),
                "mask": encode(mask),
                "files": files,
            }
        )
    height, width = image.shape[:2]
    report = {
        "image": args.image,
        "height": height,
        "width": width,
        "config_file": args.config_file,
        "weights": cfg.MODEL.WEIGHTS,
        "results": records,
    }
    with atomic_write(os.path.join(args.output, "results.json")) as file:
        json.dump(report, file, indent=2)

    rows = [
        (
            position,
            record["text"],
            (
                "nothing"
                if record["no_target"]
                else f"{100 * record['area'] / (height * width):.1f} %"
            ),
            f"{record['score']:.3f}",
        )
        for position, record in enumerate(records)
    ]
    print(tabulate(rows, headers=("", "sentence", "area", "score"), disable_numparse=True))
    print(f"\n{seconds:.2f} s on {cfg.MODEL.DEVICE}; pictures and results.json in {args.output}")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--image", required=True, metavar="FILE")
    parser.add_argument("--text", required=True, action="append", help="may be given several times")
    parser.add_argument("--output", required=True, metavar="DIRECTORY", help="made if absent")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="changes to the configuration"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Segment what sentences refer to in images.

    python tools/demo.py
    python tools/demo.py --config-file configs/shared_ris_beit3_b.yaml --weights model_best.pth \
        --image street.jpg --text "the left man" --text "the red cars" --output out

For a trained model by folder or name there is the command ris_d2. Without --config-file the model
is the small one that comes with ris_d2 and knows RefShapes alone, and what --image and --text do
not say is its own scene and sentences. It writes into the output directory,
for the sentences 0, 1, ...:

    0_overlay.png   the image with the mask painted on it (unchanged where the answer is "nothing")
    0_mask.png      0 and 255 at the image's size
    results.json    text, score, no_target, area in pixels and compressed COCO RLE of every sentence

Of several images, or a folder of them, each has a directory of its own there, named as its file.
"""

import argparse
import os

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

from ris_d2 import example
from ris_d2.__main__ import answer_images, image_paths
from ris_d2.hub import find_config
from ris_d2.predictor import Predictor


def main(arguments: list[str] | None = None) -> None:
    """Parse ``arguments`` (default: the command line), predict, write the files, print a table."""
    args = parse(arguments)
    weights = ["MODEL.WEIGHTS", args.weights] if args.weights else []
    if args.config_file:
        cfg = load(args, options=weights)
    else:
        cfg = find_config(example.FOLDER, [*args.opts, *weights], modules=args.modules)
    if not cfg.MODEL.WEIGHTS and not args.untrained:
        raise ValueError("no weights: give --weights FILE, or --untrained to see random masks")
    paths = image_paths(args.image or [example.SCENE])
    texts = args.text or example.SENTENCES
    model = args.config_file or example.FOLDER
    answer_images(Predictor(cfg), paths, texts, output=args.output, model=model)


if __name__ == "__main__":
    run(main)

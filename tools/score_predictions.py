"""Score masks from a file (one RLE per line) against a registered dataset, without a model.

    python tools/score_predictions.py --dataset ris_refcoco_unc_val --predictions masks.jsonl

The form of the file is that of ris_d2.evaluation.score_predictions, and what TEST.SAVE_PREDICTIONS
writes. Datasets are read from $DETECTRON2_DATASETS.
"""

import argparse

from detectron2.utils.logger import setup_logger

import ris_d2  # noqa: F401  (registers the datasets)
from ris_d2.evaluation import score_predictions
from ris_d2.masks import SAMPLES


def main() -> None:
    parser = argparse.ArgumentParser(description="Score masks from a file, without a model.")
    parser.add_argument("--dataset", required=True, help="name, as in DATASETS.TEST")
    parser.add_argument("--predictions", required=True, help="JSON lines file")
    parser.add_argument("--output", help="directory for results.json and per_expression.jsonl")
    parser.add_argument(
        "--resolution",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="of all masks, as in TEST.RESOLUTION; default: each image's original size",
    )
    parser.add_argument(
        "--sample",
        choices=sorted(SAMPLES),
        default="corner",
        help="of ground truth that is resized, as in TEST.SAMPLE",
    )
    args = parser.parse_args()
    setup_logger(name="ris_d2")
    resolution = tuple(args.resolution) if args.resolution else None
    score_predictions(
        args.dataset,
        args.predictions,
        output_dir=args.output,
        resolution=resolution,
        sample=args.sample,
    )


if __name__ == "__main__":
    main()

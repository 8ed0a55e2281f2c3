"""Score masks from a file (one RLE per line) against a registered dataset, without a model.

    python tools/score_predictions.py --dataset ris_refcoco_unc_val --predictions masks.jsonl

The form of the file is that of ris_d2.evaluation.score_predictions, and what TEST.SAVE_PREDICTIONS
writes. The report tells kinds of sentences apart (docs/evaluating.md). Datasets are read from
$DETECTRON2_DATASETS.
"""

import argparse

from _program import Parser, load, run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
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
        choices=("center", "corner"),
        default="corner",
        help="of ground truth that is resized, as in TEST.SAMPLE",
    )
    parser.add_changes()
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parse()  # --help and mistakes are answered before the imports below, which take seconds

from detectron2.utils.logger import setup_logger

from ris_d2.data.catalog import check_files
from ris_d2.evaluation import score_predictions


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    load(args)  # registers the datasets of --import and DATASETS.RIS_JSON
    check_files(args.dataset)
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
    run(main)

#!/usr/bin/env python
"""Show where models look, side by side on the same images, and measure it.

    python tools/attention/main.py --model "Advanced LE" configs/papers/vipa.yaml:t5_advanced_le le.pth \
        --model VE configs/papers/vipa.yaml:refcocop ve.pth \
        --dataset ris_refcoco+_unc_val --images 200 --output out [--tsne] [KEY VALUE ...]
    python tools/attention/main.py --model Shared-RIS configs/shared_ris_beit3_b.yaml model_best.pth \
        --image street.jpg --text "the left man" --output out

draws for the first ``--draw`` sentences with a target, and measures over all of them:

    maps.png        a line per sentence: the target, and of each model its mask and its maps. Of a map
                    per word that of the first token ([CLS], <s>), which stands for the sentence
    words_0.png     sentence 0: the maps of each of its tokens, where a model has them
    region_0.png    --point X Y: sentence 0: what the tokens' maps are at that pixel of the image, the
                    weights of the words for a region (RISAM's Fig. 7 a)
    tsne_0.png      --tsne: sentence 0: the decoder's pixels, on target and off it, and the tokens that
                    they attend, in two dimensions (scikit-learn; perplexity 30, cosine distance)
    attention.json  per model, means over the sentences: the entropy of the rows of its decoder's
                    attentions, in nats (less: each query looks at fewer keys); per map, how well it
                    tells the target from the rest (AUC in percent: the probability that a place on
                    target has the higher value; 50 is chance); with tokens, their cosine with pixels
                    on and off target. And of the sentences drawn, the AUC of each token's maps

What a model shows is its method's function in methods.py: Shared-RIS's Figs. 7 and 8, VIPA's Figs.
1, 5 and 6, RISAM's Fig. 7, ASDA's Fig. 4. KEY VALUE pairs go to all models.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator

# Beside this folder lies what all programs share.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from _program import Parser, load, run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--model",
        required=True,
        action="append",
        nargs=3,
        metavar=("NAME", "CONFIG", "WEIGHTS"),
        help="may be given several times; WEIGHTS '' is an untrained model",
    )
    parser.add_changes()
    parser.add_argument("--dataset", metavar="NAME", help="a registered one")
    parser.add_argument(
        "--images", type=int, default=50, help="of the dataset (default: %(default)s)"
    )
    parser.add_argument(
        "--sentences", type=int, default=2, help="per image of the dataset, at most"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw of images")
    parser.add_argument("--image", metavar="FILE", help="instead of a dataset")
    parser.add_argument("--text", action="append", help="with --image; may be given several times")
    parser.add_argument(
        "--point", type=int, nargs=2, metavar=("X", "Y"), help="with --image: a pixel of it"
    )
    parser.add_argument("--draw", type=int, default=4, help="sentences to draw")
    parser.add_argument("--tsne", action="store_true")
    parser.add_argument("--output", required=True, metavar="DIRECTORY", help="made if absent")
    args = parser.parse_args(arguments)
    if bool(args.dataset) == bool(args.image) or bool(args.image) != bool(args.text):
        parser.error("give either --dataset, or --image and --text")
    if args.point and not args.image:
        parser.error("--point is a pixel of the --image")
    if len({name for name, _, _ in args.model}) < len(args.model):
        parser.error("every --model needs a name of its own")
    return args


if __name__ == "__main__":
    parse()  # --help and mistakes are answered before the imports below, which take seconds

import numpy as np
from attention.drawing import draw_maps, draw_region, draw_tsne, draw_words
from attention.looking import Looked, Observer, Sample
from attention.measures import Measures, auc
from detectron2.data import DatasetCatalog
from tabulate import tabulate

from ris_d2.evaluation.report import finite_or_null
from ris_d2.io import atomic_write
from ris_d2.masks import rasterize, union
from ris_d2.predictor import load_rgb


def samples(args: argparse.Namespace) -> Iterator[Sample]:
    """The image and texts of the command line, or images of a dataset drawn by chance."""
    if args.image:
        yield Sample(image=load_rgb(args.image), texts=args.text, targets=[None] * len(args.text))
        return
    records = DatasetCatalog.get(args.dataset)
    order = np.random.default_rng(args.seed).permutation(len(records))
    for number in order[: args.images]:
        record = records[number]
        expressions = [e for e in record["expressions"] if e["annotation_ids"]]
        if not expressions:
            continue
        masks = {
            a["id"]: rasterize(a["segmentation"], record["height"], record["width"])
            for a in record["annotations"]
        }
        expressions = expressions[: args.sentences]
        yield Sample(
            image=load_rgb(record["file_name"]),
            texts=[e["text"] for e in expressions],
            targets=[union([masks[i] for i in e["annotation_ids"]]) for e in expressions],
        )


def _per_token(sample: Sample, row: int, looked: Looked) -> dict:
    """What attention.json says of a sentence that is drawn."""
    target = sample.targets[row]
    return {
        "text": sample.texts[row],
        "tokens": looked.tokens,
        "auc": {
            name: [100 * auc(of_token.numpy(), target) for of_token in values]
            for name, values in looked.maps.items()
            if values.ndim == 3 and target is not None
        },
    }


def main(arguments: list[str] | None = None) -> dict:
    """Parse ``arguments`` (default: the command line), draw, write, print and return the report."""
    args = parse(arguments)
    if args.point:
        height, width = load_rgb(args.image).shape[:2]
        if not (0 <= args.point[0] < width and 0 <= args.point[1] < height):
            raise ValueError(f"--point lies outside the image of {width} x {height} pixels")
    observers = {
        name: Observer(load(args, config, ["MODEL.WEIGHTS", weights]))
        for name, config, weights in args.model
    }
    measures = {name: Measures() for name in observers}
    drawn: list[tuple[Sample, int, dict[str, Looked]]] = []
    for sample in samples(args):
        looked = {name: observer.look(sample) for name, observer in observers.items()}
        for row, target in enumerate(sample.targets):
            for name in observers:
                measures[name].add(looked[name][row], target)
        # One sentence of each image, and all of the command line's.
        for row in range(len(sample.texts) if args.image else 1):
            if len(drawn) < args.draw:
                drawn.append((sample, row, {name: looked[name][row] for name in observers}))
    if not drawn:
        raise SystemExit(f"{args.dataset}: none of the images drawn has a sentence with a target")
    draw_maps(os.path.join(args.output, "maps.png"), drawn)
    for number, (sample, row, models) in enumerate(drawn):
        draw_words(os.path.join(args.output, f"words_{number}.png"), sample, row, models)
        if args.point:
            path = os.path.join(args.output, f"region_{number}.png")
            draw_region(path, sample, row, models, args.point)
        if args.tsne and any(looked.pixels is not None for looked in models.values()):
            path = os.path.join(args.output, f"tsne_{number}.png")
            draw_tsne(path, sample.texts[row], models)
    report = {
        name: {
            "config_file": config,
            "weights": weights,
            "sentences": measures[name].sentences,
            **measures[name].means(),
            "drawn": [_per_token(sample, row, models[name]) for sample, row, models in drawn],
        }
        for name, config, weights in args.model
    }
    with atomic_write(os.path.join(args.output, "attention.json")) as file:
        json.dump(finite_or_null(report), file, indent=2)
    rows = [
        (name, kind, what, value)
        for name, figures in report.items()
        for kind in ("entropy", "auc", "cosine")
        for what, value in figures.get(kind, {}).items()
    ]
    print(tabulate(rows, headers=("model", "measure", "of", "mean"), floatfmt=".3f"))
    print(f"\n{measures[args.model[0][0]].sentences} sentences; pictures in {args.output}")
    return report


if __name__ == "__main__":
    run(main)

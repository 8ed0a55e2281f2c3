"""Segment what sentences refer to in an image.

    ris_d2
    ris_d2 street.jpg "the left man" "the red cars" --model deris_l_grefcoco --output out

(python -m ris_d2 is the same.) Without arguments it asks the small model that comes with ris_d2,
which knows RefShapes alone, about its own scene. It writes into the output directory, for sentences
0, 1, ...:

    0_overlay.png   the image with the mask painted on it (unchanged where the answer is "nothing")
    0_mask.png      0 and 255 at the image's size
    results.json    text, score, no_target, area in pixels and compressed COCO RLE of every sentence
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence

from tabulate import tabulate

from . import example
from .data.images import images_in
from .io import atomic_write
from .masks import encode
from .predictor import Predictor, Results, load_rgb
from .visualization import overlay, write_png


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; ``arguments`` default to the command line's."""
    parser = argparse.ArgumentParser(
        "ris_d2", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image", nargs="?", help="a file, or a folder of images and folders")
    parser.add_argument("sentences", nargs="*", metavar="SENTENCE")
    parser.add_argument(
        "--model",
        # Not by its name: there may be a folder of that name here.
        default=example.FOLDER,
        help="a model folder, a name of docs/weights.md, or organisation/repository on the hub",
    )
    parser.add_argument(
        "--output",
        default=os.path.join("output", "demo"),
        metavar="DIRECTORY",
        help="made if absent",
    )
    args = parser.parse_args(arguments)
    if args.image and not args.sentences:
        parser.error("give a sentence, or several, after the image")
    try:
        answer_images(
            Predictor.from_pretrained(args.model),
            image_paths([args.image or example.SCENE]),
            args.sentences or example.SENTENCES,
            output=args.output,
            model=args.model,
        )
    except (OSError, ValueError) as error:
        sys.exit(f"ris_d2: {error}")


def answer_images(
    predictor: Predictor, paths: Sequence[str], sentences: Sequence[str], *, output: str, model: str
) -> None:
    """Ask all sentences about each image, write the files, print a table.

    Of several images, each has a directory of its own in ``output``, named as its file. ``model``
    is how results.json calls the model.
    """
    rows, seconds = [], 0.0
    for path in paths:
        name = os.path.basename(path)
        folder = os.path.join(output, name) if len(paths) > 1 else output
        image = load_rgb(path)
        start = time.perf_counter()
        results = predictor(image, sentences)
        seconds += time.perf_counter() - start
        records = _write(folder, path, image, results, model, predictor.cfg.MODEL.WEIGHTS)
        for i, record in enumerate(records):
            share = 100 * record["area"] / (image.shape[0] * image.shape[1])
            area = "nothing" if record["no_target"] else f"{share:.1f} %"
            rows.append((name, i, record["text"], area, f"{record['score']:.3f}"))
    headers = ("image", "", "sentence", "area", "score")
    print(tabulate(rows, headers=headers, disable_numparse=True))
    device = predictor.cfg.MODEL.DEVICE
    print(f"\n{seconds:.2f} s on {device}; pictures and results.json in {output}")


def image_paths(given: Sequence[str]) -> list[str]:
    """The files among ``given`` and the images in its folders, in order.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a folder without images, or two files of one name (their results would be
            written to one place).
    """
    paths = []
    for path in given:
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path}: no such file or folder")
        is_folder = os.path.isdir(path)
        paths += [os.path.join(path, name) for name in images_in(path)] if is_folder else [path]
    name, count = Counter(map(os.path.basename, paths)).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} files are named {name}; give them in several runs")
    return paths


def _write(folder: str, path: str, image, results: Results, model: str, weights: str) -> list[dict]:
    """Write the pictures and results.json of one image; return its entries."""
    records = []
    for i, result in enumerate(results):
        mask = result["mask"].numpy()
        files = {kind: f"{i}_{kind}.png" for kind in ("overlay", "mask")}
        write_png(os.path.join(folder, files["overlay"]), overlay(image, mask))
        write_png(os.path.join(folder, files["mask"]), mask)
        kept = {key: result[key] for key in ("text", "no_target", "score", "box")}
        records.append({**kept, "area": int(mask.sum()), "mask": encode(mask), "files": files})
    height, width = image.shape[:2]
    report = {"image": path, "height": height, "width": width, "model": model, "weights": weights}
    with atomic_write(os.path.join(folder, "results.json")) as file:
        json.dump({**report, "results": records}, file, indent=2)
    return records


if __name__ == "__main__":
    main()

"""Write RefShapes, the synthetic benchmark, in the formats of RefCOCO and gRefCOCO.

python datasets/make_refshapes.py --root datasets/refshapes --train-images 2000 --sheet sheet.png
python datasets/make_refshapes.py --root datasets/refshapes_hard_v1 --benchmark hard-v1
"""

import argparse
import importlib.util
import logging
import sys
import textwrap
from dataclasses import fields

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

package = importlib.util.find_spec("ris_d2")
if package and "ris_d2" not in sys.modules:
    # Without its __init__: that takes seconds to import torch, which nothing here needs.
    sys.modules["ris_d2"] = importlib.util.module_from_spec(package)

from ris_d2.io import atomic_write
from ris_d2.refshapes import BENCHMARKS, SPLITS, Options, Scene, generate, polygon, render, write


def sheet(scenes: list[Scene], options: Options) -> Image.Image:
    """One expression per scene with its picture: targets outlined, the rest dimmed."""
    columns, tile, caption, gap = 4, 240, 60, 8
    font = ImageFont.load_default(size=15)
    rows = -(-len(scenes) // columns)
    page = Image.new("RGB", (columns * (tile + gap) + gap, rows * (tile + caption) + gap), "white")
    draw = ImageDraw.Draw(page)
    for number, scene in enumerate(scenes):
        expression = scene.expressions[number % len(scene.expressions)]
        picture = cv2.resize(render(scene, options), (tile, tile), interpolation=cv2.INTER_CUBIC)
        corners = [np.array(polygon(scene.shapes[i])).reshape(-1, 2) for i in expression.targets]
        outlines = [np.round(c * tile / scene.side).astype(np.int32) for c in corners]
        mask = np.zeros((tile, tile, 1), np.uint8)
        cv2.fillPoly(mask, outlines, 1)
        picture = np.where(mask, picture, picture * 0.6 + 50).astype(np.uint8)
        cv2.polylines(picture, outlines, True, (255, 0, 255), 2, cv2.LINE_AA)
        x, y = gap + number % columns * (tile + gap), gap + number // columns * (tile + caption)
        page.paste(Image.fromarray(picture), (x, y))
        text = expression.text + ("" if expression.targets else " (no target)")
        draw.text((x, y + tile + 2), "\n".join(textwrap.wrap(text, 32)), fill="black", font=font)
    return page


def _what(
    args: argparse.Namespace, parser: argparse.ArgumentParser
) -> tuple[Options, dict[str, int]]:
    """The scenes that are asked for, and how many of each split."""
    chosen = {field.name: getattr(args, field.name) for field in fields(Options)}
    numbers = {f"{split}_images": getattr(args, f"{split}_images") for split in SPLITS}
    if not args.benchmark:
        return Options(**chosen), dict(zip(SPLITS, numbers.values()))
    changed = [k for k, v in {**numbers, **chosen}.items() if v != parser.get_default(k)]
    if changed:
        raise ValueError(f"--benchmark {args.benchmark} fixes {', '.join(changed)}")
    benchmark = BENCHMARKS[args.benchmark]
    return benchmark.options, benchmark.scenes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--root", required=True, help="folder to make, laid out as a dataset root")
    parser.add_argument(
        "--benchmark",
        choices=BENCHMARKS,
        help="a set that never changes (docs/refshapes.md); takes no option about images and scenes",
    )
    for split, default in zip(SPLITS, (4000, 400, 200, 200, 200)):
        parser.add_argument(f"--{split}-images", type=int, default=default, help="scenes")
    for field in fields(Options):
        flag = f"--{field.name.replace('_', '-')}"
        help_text = field.metadata["help"]
        parser.add_argument(flag, type=field.type, default=field.default, help=help_text)
    parser.add_argument("--overwrite", action="store_true", help="replace another RefShapes set")
    parser.add_argument(
        "--sheet", help="also write a picture of 24 samples of val to this PNG file"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    try:
        options, numbers = _what(args, parser)
        if write(args.root, numbers, options, overwrite=args.overwrite):
            logging.info("Wrote %d images to %s", sum(numbers.values()), args.root)
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    if args.sheet:
        with atomic_write(args.sheet, "wb") as file:
            sheet(generate("val", 24, options), options).save(file, format="PNG")


if __name__ == "__main__":
    main()

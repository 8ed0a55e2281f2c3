"""Write RefShapes, the synthetic benchmark, in the formats of RefCOCO and gRefCOCO.

    python datasets/make_refshapes.py --root datasets/refshapes --train-images 2000 --sheet sheet.png
"""

import argparse
import logging
import textwrap
from dataclasses import fields

import numpy as np

from ris_d2.data.refshapes import SPLITS, Options, Scene, generate, render, write


def sheet(scenes: list[Scene], options: Options, *, columns: int = 4, tile: int = 240) -> np.ndarray:
    """Pictures of one expression per scene, targets outlined and the rest dimmed: uint8 (H,W,3) RGB."""
    import cv2
    from PIL import Image, ImageDraw, ImageFont

    caption, gap = 44, 8
    font = ImageFont.load_default(size=15)
    rows = -(-len(scenes) // columns)
    width, height = columns * (tile + gap) + gap, rows * (tile + caption + gap) + gap
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    for number, scene in enumerate(scenes):
        expression = scene.expressions[number % len(scene.expressions)]
        picture = cv2.resize(render(scene, options), (tile, tile), interpolation=cv2.INTER_CUBIC)
        outlines = [
            np.round(np.array(scene.shapes[i].polygon).reshape(-1, 2) * tile / scene.side).astype(np.int32)
            for i in expression.targets
        ]
        mask = np.zeros((tile, tile, 1), np.uint8)
        cv2.fillPoly(mask, outlines, 1)
        picture = np.where(mask, picture, picture * 0.55 + 60).astype(np.uint8)
        cv2.polylines(picture, outlines, True, (255, 0, 255), 2, cv2.LINE_AA)
        x, y = gap + number % columns * (tile + gap), gap + number // columns * (tile + caption + gap)
        page.paste(Image.fromarray(picture), (x, y))
        text = expression.text + ("" if expression.targets else "  (no target)")
        draw.text((x, y + tile + 2), "\n".join(textwrap.wrap(text, 32)), fill="black", font=font)
    return np.asarray(page)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--root", required=True, help="folder to make, e.g. $DETECTRON2_DATASETS/refshapes")
    for split, default in zip(SPLITS, (4000, 400, 200, 200, 200)):
        parser.add_argument(f"--{split}-images", type=int, default=default)
    for field in fields(Options):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=field.type, default=field.default)
    parser.add_argument("--overwrite", action="store_true", help="replace a RefShapes set that is there")
    parser.add_argument("--sheet", help="also write a picture of 24 samples of val to this file")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    options = Options(**{field.name: getattr(args, field.name) for field in fields(Options)})
    numbers = {split: getattr(args, f"{split}_images") for split in SPLITS}
    if write(args.root, numbers, options, overwrite=args.overwrite):
        logging.info("Wrote %d images to %s", sum(numbers.values()), args.root)
    if args.sheet:
        import cv2

        cv2.imwrite(args.sheet, sheet(generate("val", 24, options), options)[..., ::-1])


if __name__ == "__main__":
    main()

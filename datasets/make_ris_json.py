"""Make a training and a validation set of your own pictures, masks and sentences.

    python datasets/make_ris_json.py --coco instances.json --images images \\
        --sentences sentences.csv --output kitchen
    python datasets/make_ris_json.py --labelme images --sentences sentences.csv --output kitchen

writes kitchen/train.json and kitchen/val.json, which DATASETS.RIS_JSON names; every image is opened
and every mask drawn. docs/own_data.md leads from there to a model of your own. The sentences are a
.csv file with a first line "image,text,targets", or a .json list of objects with these fields:

    image    its file name, as in the annotations
    text     the sentence
    targets  what it means, separated by ";" (in json a list): the id of an annotation (COCO); a name, for
             all of that category or label in the image; name#2, for the second of them in the file.
             Nothing: the sentence fits nothing in the image.

LabelMe's shapes of one label and group_id are one thing; they are polygons, rectangles, circles or
masks.
"""

import argparse
import base64
import contextlib
import csv
import io
import json
import math
import os
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The programs' common ground lies with the tools; a folder "tools" is no package to import from.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

from _program import Parser, run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    annotations = parser.add_mutually_exclusive_group(required=True)
    annotations.add_argument(
        "--coco", metavar="FILE", help="json with images, annotations, categories"
    )
    annotations.add_argument("--labelme", metavar="FOLDER", help="of LabelMe's json files")
    parser.add_argument(
        "--images", metavar="FOLDER", help="of the images; default: LabelMe's folder"
    )
    parser.add_argument("--sentences", required=True, metavar="FILE", help=".csv or .json")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="made if absent")
    parser.add_argument(
        "--val", type=float, default=0.2, metavar="SHARE", help="of the images; 0: no val.json"
    )
    args = parser.parse_args(arguments)
    if args.coco and not args.images:
        parser.error("--coco needs --images")
    if not 0 <= args.val < 1:
        parser.error(f"--val is a share from 0 to less than 1, not {args.val}")
    args.images = args.images or args.labelme
    return args


if __name__ == "__main__":
    parse()  # --help and mistakes are answered before the imports below, which take seconds

import numpy as np
from PIL import Image

from ris_d2.data.images import read_image
from ris_d2.data.ris_json import load_ris_json
from ris_d2.io import atomic_write, load_json, reading
from ris_d2.masks import encode, rasterize, union


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    data = load_json(args.coco) if args.coco else read_labelme(args.labelme, args.images)
    add_sentences(data, args.sentences, args.coco or args.labelme)
    check_images(data["images"], args.images)
    # The same images whenever the program runs again.
    images = sorted(data["images"], key=lambda image: zlib.crc32(image["file_name"].encode()))
    number = max(1, round(args.val * len(images))) if args.val else 0
    if number == len(images):
        raise ValueError(
            f"{args.sentences}: one image is too few for train and val; --val 0 makes no val"
        )
    parts = {"train": images[number:], "val": images[:number]}
    with contextlib.ExitStack() as files:  # all of them or none
        for name, part in parts.items():
            if part:
                path = os.path.join(args.output, f"{name}.json")
                write(files.enter_context(atomic_write(path)), path, data, part, args.images)


def read_labelme(folder: str, image_root: str) -> dict:
    """LabelMe's files in ``folder`` as one COCO-style dict."""
    data: dict[str, list] = {"images": [], "annotations": [], "categories": []}
    categories: dict[str, int] = {}
    for path in sorted(Path(folder).glob("*.json")):
        content = load_json(path)
        with reading(path):
            if "shapes" not in content:
                continue  # the sentences, for one
            name = os.path.relpath(
                path.parent / content["imagePath"].replace("\\", "/"), image_root
            )
            height, width = content["imageHeight"], content["imageWidth"]
            image = {
                "id": len(data["images"]) + 1,
                "file_name": name,
                "height": height,
                "width": width,
            }
            data["images"].append(image)
            things = defaultdict(list)
            for number, shape in enumerate(content["shapes"]):
                group = shape.get("group_id")
                key = (shape["label"], number if group is None else f"group {group}")
                things[key].append(_outline(shape, height, width))
            for (label, _), parts in things.items():
                if any(isinstance(part, dict) for part in parts):
                    drawn = [p if isinstance(p, dict) else [p] for p in parts]
                    parts = encode(union([rasterize(part, height, width) for part in drawn]))
                data["annotations"].append(
                    {
                        "id": len(data["annotations"]) + 1,
                        "image_id": image["id"],
                        "category_id": categories.setdefault(label, len(categories) + 1),
                        "segmentation": parts,
                    }
                )
    if not data["images"]:
        raise FileNotFoundError(f"{folder}: no file of LabelMe's (.json with shapes) in it")
    data["categories"] = [{"id": id_, "name": label} for label, id_ in categories.items()]
    return data


def _outline(shape: dict, height: int, width: int) -> list[float] | dict:
    """A shape as COCO's flat polygon, or as an RLE."""
    kind, points = shape.get("shape_type") or "polygon", np.array(shape["points"], dtype=float)
    if kind == "mask":  # a picture of what lies between two corners, both included
        (left, top), (right, bottom) = points.astype(int)
        picture = Image.open(io.BytesIO(base64.b64decode(shape["mask"])))
        mask = np.zeros((height, width), dtype=bool)
        mask[top : bottom + 1, left : right + 1] = np.asarray(picture)
        return encode(mask)
    if kind == "rectangle":
        (x0, y0), (x1, y1) = points[0], points[-1 if len(points) == 2 else 2]
        points = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    elif kind == "circle":  # its centre and a point of the circle
        angles = np.linspace(0, 2 * math.pi, 72, endpoint=False)
        radius = math.dist(*points)
        points = points[0] + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    elif kind != "polygon":
        raise ValueError(f"shape {shape['label']!r} is a {kind}, which has no area")
    return points.ravel().tolist()


def add_sentences(data: dict, path: str, annotations_path: str) -> None:
    """Put the sentences into ``data``, and leave out images that have none."""
    with reading(annotations_path):
        images = {image["file_name"]: image for image in data["images"]}
        names = {category["id"]: category["name"] for category in data.get("categories", [])}
        things = defaultdict(list)
        for annotation in data["annotations"]:
            name = names.get(annotation.get("category_id"), "")
            things[annotation["image_id"]].append((annotation["id"], name))
    data["expressions"], rows, refs = [], {}, {}
    for row, image_name, text, targets in read_sentences(path):
        with reading(path, f"row {row}"):
            if image_name not in images:
                raise ValueError(f"image {image_name!r} is not in {annotations_path}")
            image_id = images[image_name]["id"]
            first = rows.setdefault((image_id, text), row)
            if first != row:
                raise ValueError(
                    f"the sentence {text!r} of {image_name} was already in row {first}"
                )
            ids = dict.fromkeys(i for t in targets for i in find_targets(t, things[image_id]))
            # Sentences of one target are one referent, of which INPUT.RIS.UNIT referent draws one.
            referent = (image_id, frozenset(ids)) if ids else (image_id, row)
            data["expressions"].append(
                {
                    "id": row,
                    "ref_id": refs.setdefault(referent, row),
                    "image_id": image_id,
                    "text": text,
                    "annotation_ids": list(ids),
                }
            )
    used = {expression["image_id"] for expression in data["expressions"]}
    data["images"] = [image for image in data["images"] if image["id"] in used]


def read_sentences(path: str) -> Iterator[tuple[int, str, str, list[str]]]:
    """(number of the row, image, text, targets) of each sentence."""
    if path.endswith(".json"):
        rows = enumerate(load_json(path), start=1)
    else:
        with reading(path), open(path, newline="", encoding="utf-8-sig") as file:  # Excel's mark
            text = file.read()
        head = text.partition("\n")[0]
        lines = csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=head.count))
        rows = ((lines.line_num, line) for line in lines)
    for row, line in rows:
        with reading(path, f"row {row}"):
            if not {"image", "text", "targets"} <= line.keys():
                raise ValueError(
                    f"the fields are image, text and targets, not {', '.join(map(str, line))}"
                )
            targets = line["targets"] or []
            if not isinstance(targets, list):
                targets = [part.strip() for part in targets.split(";") if part.strip()]
            yield row, line["image"].strip(), line["text"].strip(), targets


def find_targets(target: Any, things: list[tuple[int, str]]) -> list[int]:
    """The ids of what ``target`` names among ``things``, the (id, name) of an image's
    annotations."""
    by_id = [id_ for id_, _ in things if str(id_) == str(target)]
    name, _, number = str(target).rpartition("#")
    by_name = [id_ for id_, other in things if other == str(target)]
    numbered = [id_ for id_, other in things if other == name]
    if not by_id and not by_name and number.isdigit() and 0 < int(number) <= len(numbered):
        return [numbered[int(number) - 1]]
    if not by_id and not by_name:
        there = ", ".join(f"{id_} ({name})" if name else str(id_) for id_, name in things)
        raise ValueError(f"target {target!r} is not in the image, which has {there or 'nothing'}")
    return by_id or by_name


def check_images(images: list[dict], image_root: str) -> None:
    for image in images:
        path = os.path.join(image_root, image["file_name"])
        height, width = read_image(path).shape[:2]
        if (height, width) != (image["height"], image["width"]):
            raise ValueError(
                f"{path} is {width} x {height} pixels (turned as its EXIF data says); it was annotated as "
                f"{image['width']} x {image['height']}"
            )


def write(file: io.TextIOBase, path: str, data: dict, images: list[dict], image_root: str) -> None:
    """Write what belongs to ``images``, read it as a training will, and say what it is."""
    ids = {image["id"] for image in images}
    expressions = [e for e in data["expressions"] if e["image_id"] in ids]
    named = {annotation_id for e in expressions for annotation_id in e["annotation_ids"]}
    annotations = [a for a in data["annotations"] if a["id"] in named]
    part = {"images": images, "annotations": annotations, "expressions": expressions}
    json.dump({**part, "categories": data.get("categories", [])}, file)
    file.flush()
    try:
        records = load_ris_json(file.name, image_root)
    except ValueError as error:
        raise ValueError(str(error).replace(file.name, path)) from error
    for record in records:
        for annotation in record["annotations"]:
            if not rasterize(annotation["segmentation"], record["height"], record["width"]).any():
                raise ValueError(
                    f"annotation {annotation['id']} of {record['file_name']} encloses no pixel"
                )
    kinds = Counter(min(2, len(e["annotation_ids"])) for e in expressions)
    print(
        f"{path}: {len(images)} images, {len(expressions)} sentences ({kinds[1]} of one thing, "
        f"{kinds[2]} of several, {kinds[0]} of nothing)"
    )


if __name__ == "__main__":
    run(main)

#!/usr/bin/env python
"""Masks for a folder of images, a list of them or a video, as one COCO json.

    python tools/predict.py --model FOLDER --images photos --text "the left man" --text "the dog" --output out
    python tools/predict.py --model FOLDER --images photos --sentences sentences.csv --output out
    python tools/predict.py --model FOLDER --images clip.mp4 --every 10 --text "the ball" --output out
    torchrun --nproc-per-node 2 tools/predict.py --model FOLDER ...

--images is a folder (images in folders within count, too), one image, a .txt file with a path per
line (relative to that file), or a video. --sentences is a .csv or .tsv file with the columns image
and sentence, or a .json, [{"image": ..., "sentence": ...}, ...]; images are named relative to the
folder (or list), frames of a video frame_000000.png, frame_000010.png, ... It writes into the
output directory:

    predictions.json    COCO images and annotations (boxes, compressed RLE, scores), and per sentence an
                        entry of "expressions"; datasets/README.md has the form, register_ris_json reads it
    overlays/           each image with its masks, a colour per sentence
    contact_sheet.png   the first sentences with their masks
    frames/             the frames of a video that were asked about
    parts/              what is answered so far: a run that was stopped goes on from here

An image that cannot be read is named at the end and in predictions.json, and tried again by the
next run. Under torchrun every process takes its share; the result is that of one process.
"""

import argparse
import csv
import datetime
import json
import os
from collections.abc import Callable, Iterator

from _program import Parser, run

VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_model()
    parser.add_argument("--images", required=True, metavar="FOLDER|LIST|VIDEO")
    parser.add_argument("--text", action="append", help="asked of every image; several times")
    parser.add_argument("--sentences", metavar="FILE", help="images with a sentence each")
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="of a video, each Nth frame"
    )
    parser.add_argument("--output", required=True, metavar="DIRECTORY", help="made if absent")
    parser.add_argument("--no-overlays", action="store_true", help="write no picture per image")
    parser.add_argument("--sheet", type=int, default=24, metavar="N", help="sentences on the sheet")
    parser.add_changes()
    args = parser.parse_args(arguments)
    if bool(args.text) == bool(args.sentences):
        parser.error("give either --text or --sentences")
    if args.every < 1:
        parser.error("--every is at least 1")
    return args


if __name__ == "__main__":
    parse()  # --help and mistakes are answered before the imports below, which take seconds

import cv2
import numpy as np
import torch
from pycocotools import mask as coco_mask
from tqdm import tqdm

from _pictures import overlay_all, picture_grid
from ris_d2 import example
from ris_d2.data.images import images_in
from ris_d2.io import atomic_write, load_json, reading
from ris_d2.predictor import Predictor, Results, load_rgb
from ris_d2.visualization import overlay, write_png

# Position, name, and a function that gives the RGB image.
Source = Iterator[tuple[int, str, Callable[[], np.ndarray]]]


def main(arguments: list[str] | None = None) -> None:
    """Parse ``arguments`` (default: the command line), ask, write the files."""
    args = parse(arguments)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    sentences = read_sentences(args.sentences) if args.sentences else None
    root, paths = find_images(args.images)
    if sentences and paths and (unknown := sentences.keys() - set(paths)):
        raise ValueError(
            f"{args.sentences} names {min(unknown)}, which {args.images} does not hold"
        )
    if world > 1:
        # No limit: who is done waits for the others as long as they take.
        forever = datetime.timedelta(days=365)
        torch.distributed.init_process_group("gloo", timeout=forever)
    _claim(args, sentences, rank)
    options = list(args.opts)
    if torch.cuda.is_available() and "MODEL.DEVICE" not in options[::2]:
        options += ["MODEL.DEVICE", f"cuda:{os.environ.get('LOCAL_RANK', 0)}"]
    predictor = Predictor.from_pretrained(
        args.model or example.FOLDER, options, modules=args.modules
    )
    source = _files(root, paths) if paths else _frames(args.images, args.every)
    count = len(paths) if paths else _count_frames(args.images, args.every)
    _answer_all(
        args, predictor, tqdm(source, total=count, disable=rank > 0), sentences, rank, world
    )
    if world > 1:
        torch.distributed.barrier()
    if rank == 0:
        _report(args, root if paths else os.path.join(args.output, "frames"))


def read_sentences(path: str) -> dict[str, list[str]]:
    """image -> its sentences, in the file's order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or an entry without an image or a sentence.
    """
    if path.endswith(".json"):
        rows = load_json(path)
    elif path.endswith((".csv", ".tsv")):
        with open(path, encoding="utf-8-sig", newline="") as file, reading(path):
            rows = list(csv.DictReader(file, dialect="excel" if path[-3] == "c" else "excel-tab"))
    else:
        raise ValueError(f"{path}: sentences come in a .csv, .tsv or .json file")
    sentences: dict[str, list[str]] = {}
    for i, row in enumerate(rows if isinstance(rows, list) else [rows]):
        values = [row.get(k) for k in ("image", "sentence")] if isinstance(row, dict) else [None]
        if not all(isinstance(value, str) and value.strip() for value in values):
            raise ValueError(f"{path}: entry {i} has no image and sentence: {str(row)[:100]}")
        sentences.setdefault(values[0].strip(), []).append(values[1])
    if not sentences:
        raise ValueError(f"{path}: no sentence in it")
    return sentences


def find_images(given: str) -> tuple[str, list[str]]:
    """(folder, names of the images relative to it); no names for a video.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: no image there.
    """
    extension = os.path.splitext(given)[1].lower()
    if not os.path.exists(given):
        raise FileNotFoundError(f"--images {given}: no such file or folder")
    if os.path.isdir(given):
        root, names = given, images_in(given)
    elif extension == ".txt":
        with open(given, encoding="utf-8") as file, reading(given):
            names = list(dict.fromkeys(filter(None, map(str.strip, file))))
        root = os.path.dirname(given)
    elif extension in VIDEOS:
        return "", []
    else:
        root, names = os.path.dirname(given), [os.path.basename(given)]
    if not names:
        raise ValueError(f"--images {given}: no image is named in it")
    return root, names


def _files(root: str, names: list[str]) -> Source:
    for position, name in enumerate(names):
        yield position, name, lambda path=os.path.join(root, name): load_rgb(path)


def _frames(path: str, every: int) -> Source:
    video, index = cv2.VideoCapture(path), 0
    while video.grab():
        if index % every == 0:
            yield index // every, f"frame_{index:06d}.png", lambda: _decode(video)
        index += 1
    if not index:
        raise ValueError(f"--images {path}: no frame can be read; not a video, or damaged")


def _decode(video: cv2.VideoCapture) -> np.ndarray:
    found, frame = video.retrieve()
    if not found:
        raise ValueError("the frame is damaged")
    return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


def _count_frames(path: str, every: int) -> int:
    return -(-int(cv2.VideoCapture(path).get(cv2.CAP_PROP_FRAME_COUNT)) // every)


def _claim(args: argparse.Namespace, sentences: dict | None, rank: int) -> None:
    """Refuse an output directory of another run, whose answers would be taken for this one's."""
    path = os.path.join(args.output, "parts", "run.json")
    asked = {
        "model": args.model,
        "options": args.opts,
        "images": os.path.abspath(args.images),
        "every": args.every,
        "sentences": sentences or args.text,
    }
    if os.path.exists(path):
        before = load_json(path)
        if different := [key for key, value in asked.items() if before.get(key) != value]:
            raise ValueError(
                f"{args.output} holds a run with other {', '.join(different)}: give another --output, or "
                "delete it"
            )
    elif rank == 0:
        with atomic_write(path) as file:
            json.dump(asked, file, indent=2)


def _answer_all(
    args: argparse.Namespace,
    predictor: Predictor,
    source: Source,
    sentences: dict[str, list[str]] | None,
    rank: int,
    world: int,
) -> None:
    """Ask about every ``world``-th image, from ``rank`` on, that no earlier run has answered."""
    done = {record["name"] for record in _records(args.output) if "error" not in record}
    path = os.path.join(args.output, "parts", f"{rank}.jsonl")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "ab+") as part:
        part.seek(0)
        part.truncate(part.read().rfind(b"\n") + 1)  # a killed process may leave half a line
        for position, name, load in source:
            texts = sentences.get(name, []) if sentences else args.text
            if position % world != rank or name in done or not texts:
                continue
            record = {"position": position, "name": name}
            try:
                image = load()
            except (OSError, ValueError) as error:
                record["error"] = str(error)
            else:
                results = predictor(image, texts)
                record.update(_record(image, results))
                _draw(args, position, name, image, results)
            # Last: what is written here is done.
            part.write(json.dumps(record).encode() + b"\n")
            part.flush()


def _record(image: np.ndarray, results: Results) -> dict:
    answers = [
        {"text": r["text"], "score": round(r["score"], 6), "no_target": r["no_target"]}
        for r in results
    ]
    height, width = image.shape[:2]
    return {
        "height": height,
        "width": width,
        "expressions": answers,
        "annotations": results.to_coco(),
    }


def _draw(
    args: argparse.Namespace, position: int, name: str, image: np.ndarray, results: Results
) -> None:
    if args.images.lower().endswith(VIDEOS):
        write_png(os.path.join(args.output, "frames", name), image)
    if args.no_overlays:
        return
    stem = os.path.splitext(os.path.basename(name))[0]
    painted = overlay_all(image, [result["mask"].numpy() for result in results])
    write_png(os.path.join(args.output, "overlays", f"{position:06d}_{stem}.png"), painted)


def _records(output: str) -> list[dict]:
    """All that was answered, whole lines of every process, in the order of the images."""
    folder, records = os.path.join(output, "parts"), {}
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        if name.endswith(".jsonl"):
            with open(os.path.join(folder, name), "rb") as file:
                for line in file.read().split(b"\n")[:-1]:
                    record = json.loads(line)
                    # An answer counts more than an earlier failure to read the image.
                    if "error" not in record or record["position"] not in records:
                        records[record["position"]] = record
    return [records[position] for position in sorted(records)]


def _report(args: argparse.Namespace, root: str) -> None:
    """Write predictions.json and the contact sheet; name what could not be read."""
    records = _records(args.output)
    answered = [record for record in records if "error" not in record]
    errors = {record["name"]: record["error"] for record in records if "error" in record}
    images, annotations, expressions = [], [], []
    for record in answered:
        image = {"id": record["position"] + 1, "file_name": record["name"]}
        images.append({**image, "height": record["height"], "width": record["width"]})
        first = len(expressions) + 1
        own = [
            {**e, "id": first + i, "image_id": image["id"]}
            for i, e in enumerate(record["expressions"])
        ]
        expressions += [{**expression, "annotation_ids": []} for expression in own]
        for annotation in record["annotations"]:
            expression = expressions[first - 1 + annotation.pop("expression_id")]
            annotation.update(id=len(annotations) + 1, image_id=image["id"])
            expression["annotation_ids"].append(annotation["id"])
            annotations.append(annotation)
    content = {
        "info": {
            "description": f"tools/predict.py, model {args.model or 'example'}",
            "errors": errors,
        },
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "referred"}],
        "expressions": expressions,
    }
    path = os.path.join(args.output, "predictions.json")
    with atomic_write(path) as file:
        json.dump(content, file)
    if args.sheet > 0 and expressions:
        write_png(os.path.join(args.output, "contact_sheet.png"), _sheet(content, root, args.sheet))
    nothing = sum(not expression["annotation_ids"] for expression in expressions)
    print(
        f"{len(images)} images, {len(expressions)} sentences, {nothing} of them without a mask: {path}"
    )
    if errors:
        print(f"{len(errors)} images could not be read:", *errors.values(), sep="\n  ")


def _sheet(content: dict, root: str, count: int) -> np.ndarray:
    names = {image["id"]: image["file_name"] for image in content["images"]}
    masks = {a["id"]: a["segmentation"] for a in content["annotations"]}
    rows, before = [], None
    for expression in content["expressions"][:count]:
        name = names[expression["image_id"]]
        image = load_rgb(os.path.join(root, name))
        answer = np.full_like(image, 245), "nothing"
        if expression["annotation_ids"]:
            segmentation = masks[expression["annotation_ids"][0]]
            answer = overlay(image, coco_mask.decode(segmentation).astype(bool))
        text = f"{expression['text']}\n{name}, score {expression['score']:.2f}"
        rows.append((text, [image if name != before else None, answer]))
        before = name
    return picture_grid(rows, columns=["image", "answer"], cell=224)


if __name__ == "__main__":
    run(main)

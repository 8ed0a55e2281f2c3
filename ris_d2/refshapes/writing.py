"""RefShapes as files, in the exact formats of RefCOCO and gRefCOCO (see datasets/README.md)."""

import json
import logging
import os
import pickle
from dataclasses import asdict

from ..io import atomic_folder, sweep_temporaries
from .language import KINDS, Scene
from .scenes import SPLITS, Options, check_split, generate, integer_corners, polygon, render
from .tokenizer import write_tokenizer

logger = logging.getLogger(__name__)


def _image_id(scene: Scene) -> int:
    return (SPLITS.index(scene.split) + 1) * 1_000_000 + scene.index


def instances(scenes: list[Scene]) -> dict:
    """COCO ``instances.json`` of the scenes: images, one annotation per shape, categories."""
    images, annotations = [], []
    for scene in scenes:
        image_id = _image_id(scene)
        name = f"COCO_train2014_{image_id:012d}.jpg"
        images.append(
            {"id": image_id, "file_name": name, "height": scene.side, "width": scene.side}
        )
        for number, shape in enumerate(scene.shapes):
            corners = integer_corners(shape)
            # In integers: float sums are not the same in every Python.
            shoelace = sum(
                a[0] * b[1] - b[0] * a[1] for a, b in zip(corners, corners[1:] + corners)
            )
            (left, right), (top, bottom) = ((min(v), max(v)) for v in zip(*corners))
            annotations.append(
                {
                    "id": image_id * 10 + number,
                    "image_id": image_id,
                    "category_id": KINDS.index(shape.kind) + 1,
                    "segmentation": [polygon(shape)],
                    "area": abs(shoelace) / 20_000,
                    "bbox": [v / 100 for v in (left, top, right - left, bottom - top)],
                    "iscrowd": 0,
                }
            )
    categories = [
        {"supercategory": "shape", "id": i + 1, "name": kind} for i, kind in enumerate(KINDS)
    ]
    return {
        "info": {"description": "RefShapes"},
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


def references(scenes: list[Scene], *, generalized: bool) -> list[dict]:
    """RefCOCO's refs (single targets only) or, if ``generalized``, gRefCOCO's.

    A ref has the sentences of one set of targets; one without target is a ref of its own.
    """
    refs = []
    for scene in scenes:
        image_id = _image_id(scene)
        groups: dict[tuple, list[int]] = {}
        for number, expression in enumerate(scene.expressions):
            if generalized or len(expression.targets) == 1:
                key = expression.targets or ("no target", number)
                groups.setdefault(key, []).append(number)
        for place, numbers in enumerate(groups.values()):
            targets = scene.expressions[numbers[0]].targets
            ann_ids = [image_id * 10 + target for target in targets]
            categories = [KINDS.index(scene.shapes[target].kind) + 1 for target in targets]
            ref = {
                "ref_id": image_id * 100 + place,
                "image_id": image_id,
                "file_name": f"COCO_train2014_{image_id:012d}_{place}.jpg",
                "split": scene.split,
                "sent_ids": [image_id * 100 + number for number in numbers],
                "sentences": [
                    {
                        "raw": scene.expressions[number].text,
                        "sent": scene.expressions[number].text,
                        "sent_id": image_id * 100 + number,
                        "tokens": scene.expressions[number].text.split(),
                    }
                    for number in numbers
                ],
            }
            if generalized:
                ref |= {
                    "ann_id": ann_ids or [-1],
                    "category_id": categories or [-1],
                    "no_target": not targets,
                }
            else:
                ref |= {"ann_id": ann_ids[0], "category_id": categories[0]}
            refs.append(ref)
    return refs


def write(
    root: str, numbers: dict[str, int], options: Options = Options(), *, overwrite: bool = False
) -> bool:
    """Write ``numbers[split]`` scenes per split under ``root``, laid out as a real dataset root.

    images/train2014/*.jpg, refcoco/refs(unc).p and instances.json (without "heldout"),
    grefcoco/grefs(unc).json and instances.json, tokenizer/, refshapes.json with the options. The
    tree appears whole or not at all. Returns False where the same set is there already.

    Raises ``FileExistsError`` where another set (unless ``overwrite``) or anything else is there.
    """
    import cv2

    for split in numbers:
        check_split(split)
    root = os.path.abspath(root)
    made = {
        "version": 1,
        "numbers": {split: numbers.get(split, 0) for split in SPLITS},
        **asdict(options),
    }
    _check_free(root, made, overwrite)
    if os.path.isdir(root) and _made(root) == made and not overwrite:
        logger.info("RefShapes is in %s already", root)
        return False
    scenes = {split: generate(split, made["numbers"][split], options) for split in SPLITS}
    everything = [scene for split in SPLITS for scene in scenes[split]]
    published = [scene for scene in everything if scene.split != "heldout"]

    for path in sweep_temporaries(os.path.dirname(root)):
        logger.info("Removed %s, which a killed process left", path)
    with atomic_folder(root) as partial:
        for folder in ("images/train2014", "refcoco", "grefcoco"):
            os.makedirs(os.path.join(partial, folder))
        for scene in everything:
            path = f"{partial}/images/train2014/COCO_train2014_{_image_id(scene):012d}.jpg"
            pixels = render(scene, options)[..., ::-1]
            if not cv2.imwrite(path, pixels, [cv2.IMWRITE_JPEG_QUALITY, 95]):
                raise OSError(f"cannot write {path}")
        _dump(f"{partial}/refcoco/instances.json", instances(published))
        _dump(f"{partial}/grefcoco/instances.json", instances(everything))
        _dump(f"{partial}/grefcoco/grefs(unc).json", references(everything, generalized=True))
        # Through json, or the bytes would depend on which equal strings are one object.
        refs = json.loads(json.dumps(references(published, generalized=False)))
        with open(f"{partial}/refcoco/refs(unc).p", "wb") as file:
            pickle.dump(refs, file, protocol=2)
        write_tokenizer(f"{partial}/tokenizer")
        _dump(f"{partial}/refshapes.json", made)
    return True


def _dump(path: str, value: object) -> None:
    with open(path, "w") as file:
        json.dump(value, file)


_TREE = ("images", "refcoco", "grefcoco", "tokenizer", "refshapes.json")


def _made(root: str) -> dict | None:
    """The options that ``root`` was written with, or None."""
    try:
        with open(os.path.join(root, "refshapes.json")) as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def _check_free(root: str, made: dict, overwrite: bool) -> None:
    if not os.path.exists(root) or (os.path.isdir(root) and not os.listdir(root)):
        return
    there = _made(root)
    if there is None:
        raise FileExistsError(f"{root} was not written by RefShapes; choose another --root")
    strangers = sorted({*os.listdir(root)} - {*_TREE})
    if overwrite and strangers:
        raise FileExistsError(
            f"{root} also holds {', '.join(strangers[:3])}, not of RefShapes; choose another --root"
        )
    if there != made and not overwrite:
        different = [k for k in made if there.get(k) != made[k]]
        raise FileExistsError(
            f"{root} holds a RefShapes set with other options ({', '.join(different)}); "
            "pass --overwrite to replace it, or choose another --root"
        )

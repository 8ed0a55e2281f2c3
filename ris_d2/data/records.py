"""What the readers share: what is skipped, the instances, records per image."""

import functools
import logging
import math
import operator
import os
import reprlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from numbers import Integral
from typing import Any

from detectron2.structures import BoxMode
from detectron2.utils.logger import log_first_n
from pycocotools import mask as coco_mask

from .. import masks
from ..io import load_json, reading


class Skipped:
    """What a reader met that cannot be used as it is.

    Published files have flaws that their authors did not mend: the flawed part is left out or
    mended, counted here, and logged once. In the user's own file each of them is an error.

    Args:
        strict: raise instead of counting.

    Attributes:
        expressions: (image id, ref id, number of expressions) of whatever was left out as a whole.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.expressions: list[tuple[int, int, int]] = []
        self._strict = strict
        self._parts: dict[str, set] = defaultdict(set)

    def part(self, kind: str, key: Any, problem: str = "") -> None:
        """Count one ``kind``; the same ``key`` counts once, as splits and refs share annotations.

        Args:
            kind: in the plural, e.g. "blank sentences".
            problem: what to say instead of ``kind`` where it is an error.

        Raises:
            ValueError: strict.
        """
        if self._strict:
            raise ValueError(problem or kind)
        self._parts[kind].add(key)

    def whole(
        self, kind: str, image_id: int, ref_id: int, count: int = 1, *, problem: str = ""
    ) -> None:
        """Count a ``kind`` with which ``count`` expressions of a ref are left out."""
        self.part(kind, len(self.expressions), problem)
        self.expressions.append((image_id, ref_id, count))

    def __str__(self) -> str:
        return "; ".join(f"{kind}: {len(keys):,}" for kind, keys in self._parts.items())

    def log(self, name: str) -> None:
        """Warn of what there is, once per process however often the file is read."""
        if self._parts:
            log_first_n(logging.WARNING, f"{name}: {self}", name=__name__, key="message")


class InstanceTable:
    """Images, annotations and categories of one COCO-style json, found by id.

    Only what is asked for is looked at, so that a large file costs its parsing and little more.
    Annotation ids that are strings in the file (RefCLEF) become positions, counted from 1.

    Args:
        path: of the json, for messages.
        data: its content; None reads it.

    Attributes:
        category_names: in the order of the contiguous ids that annotations get.

    Raises:
        ValueError: a list is missing, or an id occurs twice.
    """

    def __init__(self, path: str, data: dict | None = None) -> None:
        self.path = path
        data = load_json(path) if data is None else data
        with reading(path):
            self._images = by_id(data["images"], "image")
            self._annotations = by_id(data["annotations"], "annotation")
            self._positions = None
            if any(isinstance(annotation_id, str) for annotation_id in self._annotations):
                self._positions = {id_: i for i, id_ in enumerate(self._annotations, start=1)}
            categories = by_id(data.get("categories", []), "category")
            self._category_index = {id_: i for i, id_ in enumerate(sorted(categories))}
            self.category_names = [str(categories[id_].get("name")) for id_ in self._category_index]

    def image(self, image_id: int) -> dict:
        """Return {"file_name" (as in the file), "image_id", "height", "width"} of one image."""
        if image_id not in self._images:
            raise ValueError(f"there is no image with the id {reprlib.repr(image_id)}")
        with reading(self.path, f"image {image_id}"):
            item = self._images[image_id]
            return make_image(item, image_id, os.fspath(item["file_name"]))

    def annotation(
        self, annotation_id: int | str, image: dict, skipped: Skipped, *, crowds: bool = True
    ) -> dict | None:
        """Return one annotation of ``image`` in record form.

        None if no part of it can be drawn, or if it is a crowd and ``crowds`` is False.
        """
        if annotation_id not in self._annotations:
            raise ValueError(f"there is no annotation with the id {reprlib.repr(annotation_id)}")
        item, entry = self._annotations[annotation_id], f"annotation {annotation_id!r}"
        if item["image_id"] != image["image_id"]:
            shown = reprlib.repr(item["image_id"])
            raise ValueError(f"{entry} is on image {shown}, not on image {image['image_id']}")
        with reading(self.path, entry):
            category = item["category_id"] if self._category_index else None
            if category is not None and category not in self._category_index:
                raise ValueError(f"category_id {category} is not among the file's categories")
            shape = drawable(
                item.get("segmentation"), item.get("bbox"), image, skipped, key=annotation_id
            )
            id_ = self._positions[annotation_id] if self._positions else as_id(annotation_id)
            is_crowd = as_id(item.get("iscrowd", 0))
            if shape and is_crowd and not crowds:
                skipped.part("crowds left out of the ground truth", id_)
                return None
            category_id = self._category_index.get(category, 0)
            return shape and {"id": id_, **shape, "category_id": category_id, "iscrowd": is_crowd}


def by_id(items: list, name: str, key: str = "id") -> dict:
    """{item[key]: item}; ``ValueError`` names an item without a usable id, or the second of one."""
    found = {}
    for position, item in enumerate(items):
        if not isinstance(item, dict) or not isinstance(item.get(key), int | str | Integral):
            raise ValueError(f"{name} {position} (from 0) has no usable field {key!r}")
        if item[key] in found:
            raise ValueError(f"{name}: {key} {reprlib.repr(item[key])} occurs twice")
        found[item[key]] = item
    return found


def as_id(value: Any) -> int:
    """An id as int; TypeError or OverflowError where it is none that arrays can hold."""
    value = int(operator.index(value))
    if value.bit_length() > 63:
        raise OverflowError("an id of more than 64 bits")
    return value


def make_image(item: dict, image_id: int, file_name: str) -> dict:
    """What a record says of its image, from an entry of the file's image table."""
    height, width = item["height"], item["width"]
    masks.check_size(height, width)
    return {
        "file_name": file_name,
        "height": int(height),
        "width": int(width),
        "image_id": as_id(image_id),
    }


def load_instances(path: str | os.PathLike) -> InstanceTable:
    """Read an ``instances.json``, see ``kept``. Records share its polygons: they are read-only."""
    return kept(InstanceTable, path)


def kept(read: Callable[[str], Any], path: str | os.PathLike) -> Any:
    """``read(path)``; the latest two are kept until their files change on disk, as read-only.

    Splits of one dataset are mostly asked for in a row, and its two files are large (RefCOCO:
    50,000 refs; 20,000 images, 200,000 annotations).
    """
    path = os.path.abspath(path)
    is_there = os.path.exists(path)
    version = is_there and (os.stat(path).st_mtime_ns, os.stat(path).st_size)
    return _kept(read, path, version)


@functools.lru_cache(maxsize=2)
def _kept(read: Callable[[str], Any], path: str, version: tuple[int, int]) -> Any:
    return read(path)


forget_files = _kept.cache_clear


def drawable(segmentation: Any, box: Any, image: dict, skipped: Skipped, key: Any) -> dict | None:
    """The fields of an annotation that say where it is; None where nothing of it can be drawn.

    Args:
        segmentation: polygons, an RLE, or a list of RLE, which are united (RefCLEF).
        box: XYWH; where it is missing or malformed, that of the mask is taken.
        image: with "height" and "width".
        key: of the annotation, to count it by.

    Returns:
        {"segmentation": polygons or one RLE, "bbox": [x, y, width, height], "bbox_mode"}.
    """
    size = image["height"], image["width"]
    parts = [segmentation] if isinstance(segmentation, dict) else segmentation
    if not isinstance(parts, list) or not parts:
        shown = reprlib.repr(segmentation)
        problem = f"field 'segmentation': must be polygons or RLE, not {shown}"
        skipped.part("annotations without a mask", key, problem)
        return None
    usable = []
    for number, part in enumerate(parts):
        try:
            masks.check_part(part, *size)
            usable.append(part)
        except ValueError as error:
            problem = f"field 'segmentation': {error}"
            skipped.part("polygons or RLE that cannot be drawn", (key, number), problem)
    if not usable:
        return None
    if any(isinstance(part, dict) for part in usable):
        if len(usable) > 1:
            drawn = [masks.rasterize(p if isinstance(p, dict) else [p], *size) for p in usable]
            usable = [masks.encode(masks.union(drawn))]
        usable = usable[0]
    if box is not None and not _is_box(box):
        shown = reprlib.repr(box)
        problem = f"field 'bbox': must be four numbers x, y, width, height, not {shown}"
        skipped.part("boxes that are none (the masks' are taken)", key, problem)
        box = None
    if box is None:
        box = coco_mask.toBbox(masks.encode(masks.rasterize(usable, *size)))
    box = [float(value) for value in box]
    return {"segmentation": usable, "bbox": box, "bbox_mode": BoxMode.XYWH_ABS}


def _is_box(box: Any) -> bool:
    if not isinstance(box, list) or len(box) != 4 or {*map(type, box)} - {int, float}:
        return False
    return all(map(math.isfinite, box)) and min(box[2:]) >= 0


class RecordBuilder:
    """Gathers expressions into one record per image, in the order in which images first appear.

    Args:
        image_root: directory in front of the images' file names.
        source: name of the dataset family, kept in each record.
        skipped: counts blank sentences and repeated ids.
    """

    def __init__(self, *, image_root: str | os.PathLike, source: str, skipped: Skipped) -> None:
        self._image_root = os.fspath(image_root)
        self._source = source
        self.skipped = skipped
        self._records: dict[int, dict] = {}
        self._expression_ids: set[int] = set()
        self._replaced = 0

    def add(
        self, image: dict, expression_id: int, ref_id: int, text: str, annotations: Iterable[dict]
    ) -> None:
        """Add one expression; no annotations means that it refers to nothing.

        A text without letter or digit is left out here, at loading, and whatever the tokenizer does
        to texts: so all methods train and are scored on the same expressions, and no worker meets a
        sentence that its tokenizer's cleaning empties. An id that an earlier expression has is
        replaced by a negative one: every sentence counts, as in the public loaders.

        Args:
            image: {"file_name", "image_id", "height", "width"}.
            annotations: in record form.
        """
        image_id = image["image_id"]
        expression_id, ref_id = as_id(expression_id), as_id(ref_id)
        str.encode(text)  # half a pair of surrogates is no text, and no tokenizer takes it
        if not any(map(str.isalnum, text)):
            kind = "sentences without a letter or digit" if text.strip() else "blank sentences"
            problem = f"the text {reprlib.repr(text)} has no letter or digit"
            self.skipped.whole(kind, image_id, ref_id, problem=problem)
            return
        if expression_id in self._expression_ids:
            problem = f"the expression id {expression_id} occurs twice"
            self._replaced += 1
            self.skipped.part("repeated sentence ids (replaced)", self._replaced, problem)
            expression_id = -self._replaced
        self._expression_ids.add(expression_id)
        if image_id not in self._records:
            file_name = os.path.join(self._image_root, image["file_name"])
            self._records[image_id] = {
                **image,
                "file_name": file_name,
                "source": self._source,
                "annotations": {},  # by id
                "expressions": [],
            }
        named = {annotation["id"]: annotation for annotation in annotations}
        self._records[image_id]["annotations"].update(named)
        ids = {"expression_id": expression_id, "ref_id": ref_id}
        expression = {**ids, "text": text, "annotation_ids": list(named)}
        self._records[image_id]["expressions"].append(expression)

    def records(self) -> list[dict]:
        """The records gathered so far."""
        gathered = self._records.values()
        return [{**r, "annotations": list(r["annotations"].values())} for r in gathered]

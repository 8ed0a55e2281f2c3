"""What the readers share: what is skipped, typed fields, the instances, records per image."""

import functools
import itertools
import logging
import math
import operator
import os
import reprlib
from collections import defaultdict
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from detectron2.structures import BoxMode
from detectron2.utils.logger import log_first_n
from pycocotools import mask as coco_mask

from .. import masks
from ..io import load_json, reading

_KIND_NAMES = {
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


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
            message = f"{name}: {self}"
            log_first_n(logging.WARNING, message, name=__name__, key="message")


def field(obj: Any, key: str, kind: type, where: str) -> Any:
    """Return ``obj[key]`` after checking that it is of ``kind``: int, float, str, list or dict.

    numpy's integers count as int, integers as float; True and False as neither.

    Raises:
        ValueError: the field is missing or of another type; names ``where`` and the field.
    """
    if not isinstance(obj, dict):
        raise ValueError(f"{where}: must be an object with fields, not {_shown(obj)}")
    if key not in obj:
        raise ValueError(f"{where}: field {key!r} is missing; there are {sorted(map(str, obj))}")
    value = obj[key]
    if type(value) is kind:
        return value  # asking the abstract classes below is slow
    if kind in (int, float):
        if isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool):
            return kind(value)
    elif isinstance(value, kind):
        return value
    raise ValueError(f"{where}: field {key!r} must be {_KIND_NAMES[kind]}, not {_shown(value)}")


def text_field(obj: dict, key: str, where: str) -> str:
    """``field`` for a text that must not be blank."""
    text = field(obj, key, str, where)
    if not text.strip():
        raise ValueError(f"{where}: field {key!r} is empty")
    return text


def _shown(value: Any) -> str:
    return reprlib.repr(value)


class InstanceTable:
    """Images, annotations and categories of one COCO-style json, found by id.

    Only what is asked for is looked at, so that a large file costs its parsing and little more.
    Annotation ids that are strings in the file (RefCLEF) become positions, counted from 1.

    Args:
        path: of the json, for messages.
        data: its content.

    Raises:
        ValueError: a list is missing, or an id occurs twice.
    """

    def __init__(self, path: str, data: dict) -> None:
        self.path = path
        with reading(path):
            self._images = by_id(field(data, "images", list, path), "image")
            self._annotations = by_id(field(data, "annotations", list, path), "annotation")
            self._positions = None
            if any(isinstance(annotation_id, str) for annotation_id in self._annotations):
                self._positions = {id_: i for i, id_ in enumerate(self._annotations, start=1)}
            self._has_categories = "categories" in data
            categories = by_id(data.get("categories", []), "category")
            category_ids = sorted(categories)
            self._categories = [categories[category_id] for category_id in category_ids]
            self._category_index = {category_id: i for i, category_id in enumerate(category_ids)}

    def category_names(self) -> list[str]:
        """The categories' names, in the order of the contiguous ids that annotations get."""
        where = f"{self.path}: categories"
        return [text_field(category, "name", where) for category in self._categories]

    def image(self, image_id: int) -> dict:
        """Return {"file_name" (as in the file), "image_id", "height", "width"} of one image."""
        if image_id not in self._images:
            raise ValueError(f"there is no image with the id {_shown(image_id)}")
        item, here = self._images[image_id], f"{self.path}: image {image_id}"
        return make_image(item, text_field(item, "file_name", here), "id", here)

    def annotation(self, annotation_id: int | str, image: dict, skipped: Skipped) -> dict | None:
        """Return one annotation of ``image`` in record form; None where no part can be drawn."""
        if annotation_id not in self._annotations:
            raise ValueError(f"there is no annotation with the id {_shown(annotation_id)}")
        item, entry = self._annotations[annotation_id], f"annotation {annotation_id!r}"
        if item["image_id"] != image["image_id"]:
            raise ValueError(
                f"{entry} is on image {_shown(item['image_id'])}, the expression on image "
                f"{image['image_id']}"
            )
        here = f"{self.path}: {entry}"
        with reading(self.path, entry):
            shape = drawable(
                item.get("segmentation"), item.get("bbox"), image, skipped, key=annotation_id
            )
            return shape and {
                "id": self._positions[annotation_id] if self._positions else as_id(annotation_id),
                **shape,
                "category_id": self._category(item, here),
                "iscrowd": field(item, "iscrowd", int, here) if "iscrowd" in item else 0,
            }

    def _category(self, item: dict, where: str) -> int:
        if not self._has_categories:
            return 0
        category_id = field(item, "category_id", int, where)
        if category_id not in self._category_index:
            raise ValueError(f"category_id {category_id} is not among the file's categories")
        return self._category_index[category_id]


def by_id(items: list, name: str, key: str = "id") -> dict:
    """{item[key]: item}; ``ValueError`` names the item without a usable id, or the second of one."""
    found = {}
    for position, item in enumerate(items):
        if not isinstance(item, dict) or not isinstance(item.get(key), Integral | str):
            raise ValueError(f"{name} {position} (from 0) has no usable field {key!r}")
        if item[key] in found:
            raise ValueError(f"{name}: {key} {_shown(item[key])} occurs twice")
        found[item[key]] = item
    return found


def as_id(value: Any) -> int:
    """An id as int; TypeError or OverflowError where it is none that arrays can hold."""
    value = int(operator.index(value))
    if value.bit_length() > 63:
        raise OverflowError("an id of more than 64 bits")
    return value


def make_image(item: dict, file_name: str, id_key: str, where: str) -> dict:
    """What a record says of its image, from an entry of the file's image table."""
    image = {
        "file_name": file_name,
        "height": field(item, "height", int, where),
        "width": field(item, "width", int, where),
    }
    with reading(where):
        masks.check_size(image["height"], image["width"])
        return {**image, "image_id": as_id(item[id_key])}


def load_instances(path: str | os.PathLike) -> InstanceTable:
    """Read an ``instances.json``; the latest one is kept until it changes on disk.

    Splits of one dataset are mostly asked for in a row, and the file is large (RefCOCO: 20,000
    images, 200,000 annotations). Records share its polygons: treat them as read-only.
    """
    path = os.path.abspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file")
    stat = os.stat(path)
    return _load_instances(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1)
def _load_instances(path: str, mtime_ns: int, size: int) -> InstanceTable:
    return InstanceTable(path, load_json(path))


def forget_instances() -> None:
    """Free the table that ``load_instances`` keeps."""
    _load_instances.cache_clear()


def drawable(segmentation: Any, box: Any, image: dict, skipped: Skipped, key: Any) -> dict | None:
    """The fields of an annotation that say where it is; None where nothing of it can be drawn.

    Args:
        segmentation: polygons, an RLE, or a list of RLE, which are united (RefCLEF).
        box: XYWH; None, or one that is none: that of the mask.
        image: with "height" and "width".
        key: of the annotation, to count it by.

    Returns:
        {"segmentation": polygons or one RLE, "bbox": [x, y, width, height], "bbox_mode"}.
    """
    height, width = image["height"], image["width"]
    parts = [segmentation] if isinstance(segmentation, dict) else segmentation
    if not isinstance(parts, list) or not parts:
        problem = f"field 'segmentation': must be polygons or RLE, not {_shown(segmentation)}"
        skipped.part("annotations without a mask", key, problem)
        return None
    usable = []
    for number, part in enumerate(parts):
        try:
            masks.check_part(part, height, width)
            usable.append(part)
        except ValueError as error:
            problem = f"field 'segmentation': {error}"
            skipped.part("polygons or RLE that cannot be drawn", (key, number), problem)
    if not usable:
        return None
    if any(isinstance(part, dict) for part in usable):
        if len(usable) > 1:
            drawn = [p if isinstance(p, dict) else [p] for p in usable]
            united = masks.union([masks.rasterize(part, height, width) for part in drawn])
            usable = [masks.encode(united)]
        usable = usable[0]
    if box is not None and not _is_box(box):
        problem = f"field 'bbox': must be four numbers x, y, width, height, not {_shown(box)}"
        skipped.part("boxes that are none (the masks' are taken)", key, problem)
        box = None
    if box is None:
        box = coco_mask.toBbox(masks.encode(masks.rasterize(usable, height, width)))
    return {
        "segmentation": usable,
        "bbox": [float(value) for value in box],
        "bbox_mode": BoxMode.XYWH_ABS,
    }


def _is_box(box: Any) -> bool:
    if not isinstance(box, list) or len(box) != 4:
        return False
    are_numbers = all(isinstance(v, Real) and not isinstance(v, bool) for v in box)
    return are_numbers and all(map(math.isfinite, box)) and min(box[2:]) >= 0


def without_crowds(annotations: Iterable[dict], skipped: Skipped) -> list[dict]:
    """The annotations that are no crowds; the others are counted."""
    kept = []
    for annotation in annotations:
        if annotation["iscrowd"]:
            skipped.part("crowds left out of the ground truth", annotation["id"])
        else:
            kept.append(annotation)
    return kept


class RecordBuilder:
    """Gathers expressions into one record per image, in the order in which images first appear.

    Args:
        image_root: directory in front of the images' file names.
        source: name of the dataset family, kept in each record.
        skipped: told of expressions that are none, and of repeated ids.
    """

    def __init__(self, *, image_root: str, source: str, skipped: Skipped) -> None:
        self._image_root = image_root
        self._source = source
        self._skipped = skipped
        self._records: dict[int, dict] = {}
        self._annotations: dict[int, dict[int, dict]] = {}
        self._expression_ids: set[int] = set()
        self._new_ids = itertools.count(-1, -1)

    def add(
        self,
        *,
        image: dict,
        expression_id: int,
        ref_id: int,
        text: str,
        annotations: Iterable[dict],
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
        if not any(map(str.isalnum, str.strip(text))):
            kind = "sentences without a letter or digit" if text.strip() else "blank sentences"
            problem = f"the text {_shown(text)} has no letter or digit"
            self._skipped.whole(kind, image_id, ref_id, problem=problem)
            return
        if expression_id in self._expression_ids:
            problem = f"the expression id {expression_id} occurs twice"
            new_id = next(self._new_ids)
            self._skipped.part("repeated sentence ids (replaced)", new_id, problem)
            expression_id = new_id
        self._expression_ids.add(expression_id)
        if image_id not in self._records:
            file_name = os.path.join(self._image_root, image["file_name"])
            self._records[image_id] = {
                **image,
                "file_name": file_name,
                "source": self._source,
                "annotations": [],
                "expressions": [],
            }
            self._annotations[image_id] = {}
        by_id = {annotation["id"]: annotation for annotation in annotations}
        for annotation_id, annotation in by_id.items():
            self._annotations[image_id].setdefault(annotation_id, annotation)
        self._records[image_id]["expressions"].append(
            {
                "expression_id": expression_id,
                "ref_id": ref_id,
                "text": text,
                "annotation_ids": list(by_id),
            }
        )

    def records(self) -> list[dict]:
        """The records gathered so far."""
        for image_id, record in self._records.items():
            record["annotations"] = list(self._annotations[image_id].values())
        return list(self._records.values())

"""What the readers share: typed fields with clear errors, the instances, records per image."""

import functools
import os
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from detectron2.structures import BoxMode
from pycocotools import mask as coco_mask

from .. import masks
from ..io import load_json

_KIND_NAMES = {
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


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
        raise ValueError(f"{where}: field {key!r} is an empty expression")
    return text


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


class InstanceTable:
    """Images, annotations and categories of one COCO-style json, found by id.

    Only what is asked for is checked, so that a large file costs its parsing and little more.
    Annotation ids that are strings in the file (RefCLEF) become positions, counted from 1.

    Args:
        path: of the json, for messages.
        data: its content.

    Raises:
        ValueError: a list is missing, or an id occurs twice.
    """

    def __init__(self, path: str, data: dict) -> None:
        self.path = path
        images = field(data, "images", list, path)
        annotations = field(data, "annotations", list, path)
        categories = field(data, "categories", list, path) if "categories" in data else []
        self._images = self._by_id(images, "images")
        self._annotations = self._by_id(annotations, "annotations")
        self._positions = None
        if any(isinstance(annotation_id, str) for annotation_id in self._annotations):
            self._positions = {id_: i for i, id_ in enumerate(self._annotations, start=1)}
        categories = self._by_id(categories, "categories")
        category_ids = sorted(categories)
        self._categories = [categories[category_id] for category_id in category_ids]
        self._category_index = {category_id: i for i, category_id in enumerate(category_ids)}
        self._has_categories = "categories" in data

    def _by_id(self, items: list, name: str) -> dict:
        try:
            found = {item["id"]: item for item in items}
        except (KeyError, TypeError):
            position = next(i for i, item in enumerate(items) if not _has_hashable_id(item))
            raise ValueError(f"{self.path}: {name}[{position}]: no usable field 'id'") from None
        if len(found) != len(items):
            seen: set = set()
            twice = next(item["id"] for item in items if item["id"] in seen or seen.add(item["id"]))
            raise ValueError(f"{self.path}: {name}: id {twice!r} occurs twice")
        return found

    def category_names(self) -> list[str]:
        """The categories' names, in the order of the contiguous ids that annotations get."""
        where = f"{self.path}: categories"
        return [text_field(category, "name", where) for category in self._categories]

    def image(self, image_id: int, where: str) -> dict:
        """Return {"file_name" (as in the file), "image_id", "height", "width"} of one image."""
        if image_id not in self._images:
            raise ValueError(f"{where}: image_id {image_id} is not among the images of {self.path}")
        item, here = self._images[image_id], f"{self.path}: image {image_id}"
        image = {
            "file_name": text_field(item, "file_name", here),
            "image_id": field(item, "id", int, here),
            "height": field(item, "height", int, here),
            "width": field(item, "width", int, here),
        }
        for side in ("height", "width"):
            if image[side] <= 0:
                raise ValueError(f"{here}: field {side!r} must be positive, not {image[side]}")
        return image

    def annotation(self, annotation_id: int | str, image: dict, where: str) -> dict:
        """Return one annotation of ``image`` in record form."""
        if annotation_id not in self._annotations:
            raise ValueError(
                f"{where}: annotation {annotation_id!r} is not among the annotations of {self.path}"
            )
        item, here = self._annotations[annotation_id], f"{self.path}: annotation {annotation_id!r}"
        image_id = field(item, "image_id", int, here)
        if image_id != image["image_id"]:
            raise ValueError(
                f"{where}: annotation {annotation_id!r} is on image {image_id}, "
                f"the expression on image {image['image_id']}"
            )
        segmentation = checked_segmentation(item, image["height"], image["width"], here)
        if "bbox" in item:
            bbox = checked_box(field(item, "bbox", list, here), f"{here}: field 'bbox'")
        else:
            bbox = box_of(segmentation, image["height"], image["width"])
        iscrowd = field(item, "iscrowd", int, here) if "iscrowd" in item else 0
        return {
            "id": self._positions[annotation_id] if self._positions else annotation_id,
            "segmentation": segmentation,
            "bbox": bbox,
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": self._category(item, here),
            "iscrowd": iscrowd,
        }

    def _category(self, item: dict, where: str) -> int:
        if not self._has_categories:
            return 0
        category_id = field(item, "category_id", int, where)
        if category_id not in self._category_index:
            raise ValueError(
                f"{where}: category_id {category_id} is not among the file's categories"
            )
        return self._category_index[category_id]


def _has_hashable_id(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("id"), Integral | str)


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


def checked_segmentation(item: dict, height: int, width: int, where: str) -> list | dict:
    """Return ``item["segmentation"]`` as polygons or one RLE dict; a list of RLE is united.

    Raises:
        ValueError: no polygon, one with an odd number of coordinates or fewer than three points,
            or an RLE of another size than the image.
    """
    where = f"{where}: field 'segmentation'"
    segmentation = item.get("segmentation")
    if isinstance(segmentation, list) and segmentation and isinstance(segmentation[0], dict):
        parts = [_checked_rle(part, height, width, where) for part in segmentation]
        if len(parts) == 1:
            return parts[0]
        return masks.encode(masks.union([masks.rasterize(part, height, width) for part in parts]))
    if isinstance(segmentation, dict):
        return _checked_rle(segmentation, height, width, where)
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError(f"{where}: must be polygons or RLE, not {_shown(segmentation)}")
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(
                f"{where}: a polygon is a list of 6 or more numbers x0, y0, x1, y1, ..., "
                f"an even number of them, not {_shown(polygon)}"
            )
    return segmentation


def _checked_rle(rle: Any, height: int, width: int, where: str) -> dict:
    size = field(rle, "size", list, where)
    if size != [height, width]:
        raise ValueError(f"{where}: the RLE's size is {size}, the image's [{height}, {width}]")
    if not isinstance(rle.get("counts"), str | list):
        raise ValueError(f"{where}: an RLE's counts are a string or a list, not {_shown(rle)}")
    return rle


def checked_box(box: Any, where: str) -> list[float]:
    """Return an XYWH box as four floats, or raise ValueError."""
    is_box = isinstance(box, list) and len(box) == 4
    if not is_box or not all(isinstance(v, Real) and not isinstance(v, bool) for v in box):
        raise ValueError(f"{where}: must be four numbers x, y, width, height, not {_shown(box)}")
    return [float(v) for v in box]


def box_of(segmentation: list | dict, height: int, width: int) -> list[float]:
    """The XYWH box of a checked segmentation's mask."""
    rle = masks.encode(masks.rasterize(segmentation, height, width))
    return [float(v) for v in coco_mask.toBbox(rle)]


class RecordBuilder:
    """Gathers expressions into one record per image, in the order in which images first appear.

    Args:
        image_root: directory in front of the images' file names.
        source: name of the dataset family, kept in each record.
    """

    def __init__(self, *, image_root: str, source: str) -> None:
        self._image_root = image_root
        self._source = source
        self._records: dict[int, dict] = {}
        self._annotations: dict[int, dict[int, dict]] = {}
        self._expression_ids: set[int] = set()

    def add(
        self,
        *,
        image: dict,
        expression_id: int,
        ref_id: int,
        text: str,
        annotations: Iterable[dict],
        where: str,
    ) -> None:
        """Add one expression; no annotations means that it refers to nothing.

        Args:
            image: {"file_name", "image_id", "height", "width"}.
            annotations: in record form.
            where: file and record, for messages.

        Raises:
            ValueError: the expression's id has been added before.
        """
        if expression_id in self._expression_ids:
            raise ValueError(
                f"{where}: the expression id {expression_id} occurs twice in this split"
            )
        self._expression_ids.add(expression_id)
        image_id = image["image_id"]
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

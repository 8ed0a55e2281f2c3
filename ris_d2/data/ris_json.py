"""The custom format: COCO-style json with ``expressions`` (datasets/README.md) -> records."""

import os
import reprlib
from typing import Any

from ..io import load_json, reading
from .records import InstanceTable, RecordBuilder, Skipped

# Field -> its types; a ? marks one that may be missing.
_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "images": {"id": (int, str), "file_name": (str,), "height": (int,), "width": (int,)},
    "annotations": {
        "id": (int, str),
        "image_id": (int, str),
        "segmentation": (list, dict),
        "category_id?": (int,),
        "iscrowd?": (int,),
    },
    "expressions": {
        "id": (int,),
        "image_id": (int,),
        "text": (str,),
        "annotation_ids": (list,),
        "ref_id?": (int,),
    },
}
_NAMES = {int: "an integer", str: "a text", list: "a list", dict: "an object"}


def load_ris_json(
    json_path: str | os.PathLike, image_root: str | os.PathLike, *, source: str = "custom"
) -> list[dict]:
    """Read a json with ``images``, ``annotations`` and ``expressions``.

    It is the user's own file, so that nothing in it is skipped or mended as in published ones.

    Args:
        json_path: the file; its format is in datasets/README.md.
        image_root: directory in front of the images' file names.
        source: kept in the records.

    Returns:
        One record per image, in the order of the expressions.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a field is missing or malformed, an id is unknown or occurs twice, a text has no
            letter or digit, a polygon cannot be drawn, or there is no expression at all; names
            file, entry and field.
    """
    data = load_json(json_path)
    with reading(json_path):
        _check(data)
    table = InstanceTable(os.fspath(json_path), data)
    skipped = Skipped(strict=True)
    builder = RecordBuilder(image_root=image_root, source=source, skipped=skipped)
    for position, expression in enumerate(data["expressions"]):
        with reading(json_path, f"expression {position}"):
            id_, image = expression["id"], table.image(expression["image_id"])
            annotation_ids = expression["annotation_ids"]
            if not all(isinstance(i, int | str) for i in annotation_ids):
                raise ValueError("field 'annotation_ids' must be a list of ids")
            annotations = [table.annotation(i, image, skipped) for i in annotation_ids]
            ref_id = expression.get("ref_id", id_)
            builder.add(image, id_, ref_id, expression["text"], annotations)
    return builder.records()


def _check(data: Any) -> None:
    for key, fields in _FIELDS.items():
        entries = _field(data, key, (list,), "the file")
        if key == "expressions" and not entries:
            raise ValueError("field 'expressions' is empty")
        for position, entry in enumerate(entries):
            # An image or annotation is known by its id, an expression by its place.
            id_ = entry.get("id") if isinstance(entry, dict) and key != "expressions" else None
            where = f"{key[:-1]} {position if id_ is None else reprlib.repr(id_)}"
            for field, types in fields.items():
                name = field.rstrip("?")
                if name == field or name in entry:
                    _field(entry, name, types, where)


def _field(entry: Any, name: str, types: tuple[type, ...], where: str) -> Any:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: must be an object with fields, not {reprlib.repr(entry)}")
    if name not in entry:
        raise ValueError(f"{where}: field {name!r} is missing; there are {sorted(entry)}")
    if type(entry[name]) not in types:
        wanted, shown = " or ".join(_NAMES[t] for t in types), reprlib.repr(entry[name])
        raise ValueError(f"{where}: field {name!r} must be {wanted}, not {shown}")
    return entry[name]

"""The custom format: COCO-style json with ``expressions`` (datasets/README.md) -> records."""

import os
from numbers import Integral

from ..io import load_json, reading
from .records import InstanceTable, RecordBuilder, Skipped, field, text_field


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
    table = InstanceTable(os.fspath(json_path), data)
    skipped = Skipped(strict=True)
    builder = RecordBuilder(image_root=os.fspath(image_root), source=source, skipped=skipped)
    expressions = field(data, "expressions", list, os.fspath(json_path))
    if not expressions:
        raise ValueError(f"{json_path}: field 'expressions' is empty")
    for position, expression in enumerate(expressions):
        where = f"{json_path}: expression {position}"
        with reading(json_path, f"expression {position}"):
            expression_id = field(expression, "id", int, where)
            image = table.image(field(expression, "image_id", int, where))
            annotation_ids = field(expression, "annotation_ids", list, where)
            if not all(isinstance(i, Integral | str) for i in annotation_ids):
                raise ValueError("field 'annotation_ids' must be a list of ids")
            has_ref = "ref_id" in expression
            builder.add(
                image=image,
                expression_id=expression_id,
                ref_id=field(expression, "ref_id", int, where) if has_ref else expression_id,
                text=text_field(expression, "text", where),
                annotations=[table.annotation(i, image, skipped) for i in annotation_ids],
            )
    return builder.records()

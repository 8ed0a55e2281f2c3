"""PhraseCut: ``refer_<split>.json`` and the image table on Visual Genome -> records."""

import os

from ..io import load_json, reading
from .records import RecordBuilder, Skipped, by_id, drawable, make_image


def load_phrasecut(
    refer_path: str | os.PathLike,
    image_table_path: str | os.PathLike,
    image_root: str,
    *,
    source: str = "phrasecut",
    skipped: Skipped | None = None,
) -> list[dict]:
    """Read one split of PhraseCut (github.com/ChenyunWu/PhraseCutDataset).

    Each phrase ("task") is one expression, each of its instances one annotation. Expression and ref
    id are the task's position in the file, which leads back to its ``task_id``.

    Args:
        refer_path: ``refer_train.json``, ``refer_val.json``, ``refer_test.json`` or
            ``refer_miniv.json``.
        image_table_path: ``image_data_split.json``.
        image_root: directory of the images, <image_id>.jpg.
        source: kept in the records.
        skipped: counts what cannot be used; it is logged as well.

    Returns:
        One record per image, in the order of the file; see datasets/README.md.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file is damaged or of another format (a field that is missing, an unknown
            image); names file and task.
    """
    rows = load_json(image_table_path)
    with reading(image_table_path):
        rows = by_id(rows, "image", "image_id")
    tasks = load_json(refer_path)
    if not isinstance(tasks, list) or not tasks:
        raise ValueError(f"{refer_path}: must hold a list of tasks")
    skipped = skipped or Skipped()
    builder = RecordBuilder(image_root=image_root, source=source, skipped=skipped)
    last_id = 0
    for position, task in enumerate(tasks):
        with reading(refer_path, f"task {position} (from 0)"):
            image_id, phrase = task["image_id"], task["phrase"]
            if image_id not in rows:
                raise ValueError(f"image_id {image_id} is not in {image_table_path}")
            where = f"{image_table_path}: image_id {image_id}"
            image = make_image(rows[image_id], f"{image_id}.jpg", "image_id", where)
            boxes, instances = task["instance_boxes"], task["Polygons"]
            if len(boxes) != len(instances):
                raise ValueError(f"{len(boxes)} instance_boxes, but Polygons of {len(instances)}")
            annotations = []
            for last_id, (box, polygons) in enumerate(zip(boxes, instances), start=last_id + 1):
                flat = [_flat(points) for points in polygons if points]
                shape = drawable(flat, box, image, skipped, key=last_id)
                if shape:
                    annotations.append({"id": last_id, **shape, "category_id": 0, "iscrowd": 0})
            if not annotations:
                skipped.whole("phrases without a region", image_id, position)
                continue
            builder.add(
                image=image,
                expression_id=position,
                ref_id=position,
                text=phrase,
                annotations=annotations,
            )
    skipped.log(os.fspath(refer_path))
    return builder.records()


def _flat(points: list[list[float]]) -> list[float]:
    """[x, y] points -> COCO's flat polygon."""
    # Strokes of one or two points exist; repeated, they are polygons that enclose nothing.
    points = points + [points[-1]] * (3 - len(points))
    return [value for x, y in points for value in (x, y)]

"""PhraseCut: ``refer_<split>.json`` and the image table on Visual Genome -> records."""

import os
from collections.abc import Iterator

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
            with reading(image_table_path, f"image_id {image_id}"):
                image = make_image(rows[image_id], image_id, f"{image_id}.jpg")
            annotations = list(_annotations(task, image, skipped, last_id + 1))
            last_id += len(task["Polygons"])
            if annotations:
                builder.add(image, position, position, phrase, annotations)
            else:
                skipped.whole("phrases without a region", image_id, position)
    skipped.log(os.fspath(refer_path))
    return builder.records()


def _annotations(task: dict, image: dict, skipped: Skipped, first_id: int) -> Iterator[dict]:
    boxes, instances = task["instance_boxes"], task["Polygons"]
    if len(boxes) != len(instances):
        raise ValueError(f"{len(boxes)} instance_boxes, but Polygons of {len(instances)}")
    for id_, (box, polygons) in enumerate(zip(boxes, instances), start=first_id):
        flat = [_flat(points) for points in polygons if points]
        shape = drawable(flat, box, image, skipped, key=id_)
        if shape:
            yield {"id": id_, **shape, "category_id": 0, "iscrowd": 0}


def _flat(points: list[list[float]]) -> list[float]:
    """[x, y] points -> COCO's flat polygon."""
    # Strokes of one or two points exist; repeated, they are polygons that enclose nothing.
    points = points + [points[-1]] * (3 - len(points))
    return [value for x, y in points for value in (x, y)]

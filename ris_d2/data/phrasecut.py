"""PhraseCut: ``refer_<split>.json`` and the image table on Visual Genome -> records."""

import os

from detectron2.structures import BoxMode

from ..io import load_json
from .records import RecordBuilder, checked_box, field, text_field


def load_phrasecut(
    refer_path: str | os.PathLike,
    image_table_path: str | os.PathLike,
    image_root: str,
    *,
    source: str = "phrasecut",
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

    Returns:
        One record per image, in the order of the file; see datasets/README.md.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a field is missing or malformed, an image unknown, a task_id twice there, a
            phrase empty or without a region; names file, record and field.
    """
    images = _load_images(image_table_path)
    tasks = load_json(refer_path)
    if not isinstance(tasks, list) or not tasks:
        raise ValueError(f"{refer_path}: must hold a list of tasks")
    builder = RecordBuilder(image_root=image_root, source=source)
    task_ids: set[str] = set()
    last_annotation_id = 0
    for position, task in enumerate(tasks):
        where = f"{refer_path}: task {position}"
        task_id = text_field(task, "task_id", where)
        if task_id in task_ids:
            raise ValueError(f"{where}: task_id {task_id!r} occurs twice")
        task_ids.add(task_id)
        where = f"{where} (task_id {task_id})"
        image_id = field(task, "image_id", int, where)
        if image_id not in images:
            raise ValueError(f"{where}: image_id {image_id} is not in {image_table_path}")
        annotations = _annotations(task, last_annotation_id + 1, where)
        last_annotation_id += len(annotations)
        builder.add(
            image=images[image_id],
            expression_id=position,
            ref_id=position,
            text=text_field(task, "phrase", where),
            annotations=annotations,
            where=where,
        )
    return builder.records()


def _load_images(path: str | os.PathLike) -> dict[int, dict]:
    rows = load_json(path)
    if not isinstance(rows, list):
        raise ValueError(f"{path}: must hold a list of images, not {type(rows).__name__}")
    images = {}
    for position, row in enumerate(rows):
        where = f"{path}: image {position}"
        image_id = field(row, "image_id", int, where)
        if image_id in images:
            raise ValueError(f"{where}: image_id {image_id} occurs twice")
        images[image_id] = {
            "file_name": f"{image_id}.jpg",
            "image_id": image_id,
            "height": field(row, "height", int, where),
            "width": field(row, "width", int, where),
        }
    return images


def _annotations(task: dict, first_id: int, where: str) -> list[dict]:
    boxes = field(task, "instance_boxes", list, where)
    instances = field(task, "Polygons", list, where)
    if len(instances) != len(boxes) or not boxes:
        raise ValueError(
            f"{where}: fields 'instance_boxes' and 'Polygons' have {len(boxes)} and "
            f"{len(instances)} entries; a phrase has one or more, as many of each"
        )
    return [
        {
            "id": first_id + i,
            "segmentation": _polygons(polygons, f"{where}: field 'Polygons', instance {i}"),
            "bbox": checked_box(box, f"{where}: field 'instance_boxes', instance {i}"),
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": 0,
            "iscrowd": 0,
        }
        for i, (box, polygons) in enumerate(zip(boxes, instances))
    ]


def _polygons(polygons: list, where: str) -> list[list[float]]:
    """Lists of [x, y] points -> COCO's flat polygons."""
    flat = []
    try:
        for points in polygons:
            if not points:
                continue  # the official tools skip polygons without points, too
            # Strokes of one or two points exist; repeated, they are polygons that enclose nothing.
            points = points + [points[-1]] * (3 - len(points))
            flat.append([float(value) for x, y in points for value in (x, y)])
    except (TypeError, ValueError):
        raise ValueError(f"{where}: polygons must be lists of points [x, y]") from None
    if not flat:
        raise ValueError(f"{where}: has no polygon")
    return flat

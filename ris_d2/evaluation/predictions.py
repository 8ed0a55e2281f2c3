"""Masks from a file, scored against a registered dataset without any model."""

import json
import os
import reprlib
from collections import OrderedDict, defaultdict
from typing import Any

import torch
from detectron2.data import DatasetCatalog

from ..io import reading
from ..masks import check_size, rasterize
from .evaluator import ReferringEvaluator

# The types that JSON has for the fields of a line; the first two have to be there.
_TYPES = {
    "expression_id": (int,),
    "segmentation": (dict,),
    "no_target": (bool,),
    "score": (int, float, type(None)),
    "image_id": (int,),
    "file_name": (str,),
    "source": (str,),
}


def score_predictions(
    dataset_name: str,
    path: str | os.PathLike,
    *,
    output_dir: str | None = None,
    resolution: tuple[int, int] | None = None,
    sample: str = "corner",
) -> "OrderedDict[str, dict[str, float]]":
    """Score a file of masks, each counted as given, in the way of ``ReferringEvaluator``.

    The file holds one JSON object per line, in any order, one for each expression of the dataset:

        {"expression_id": int, "segmentation": {"size": [height, width], "counts": str | list},
         "no_target": bool (false), "score": float (null),
         "image_id", "file_name", "source": only needed if the expression id alone is ambiguous}

    Only the base name of file_name is compared. TEST.SAVE_PREDICTIONS writes such a file.

    Args:
        dataset_name: registered in DatasetCatalog.
        path: of the file.
        output_dir: as for ReferringEvaluator.
        resolution: (height, width) of all masks; ground truth is nearest-resized to it. None: each
            mask has its image's original size.
        sample: of ground truth that is resized, "corner" or "center" (TEST.SAMPLE).

    Raises:
        FileNotFoundError: no such file.
        KeyError: no dataset of this name.
        ValueError: a line (named by its number) that is no such object, has a field of another
            type, fits none or several of the dataset's expressions, or has a mask of another size;
            an expression without a line; an impossible resolution.
    """
    if resolution is not None:
        check_size(*resolution)
    records = DatasetCatalog.get(dataset_name)
    lines = _assign(records, path)
    evaluator = ReferringEvaluator(
        dataset_name, output_dir=output_dir, distributed=False, sample=sample
    )
    for index, record in enumerate(records):
        height, width = resolution or (record["height"], record["width"])
        original_size = (record["height"], record["width"])
        unit = {**record, "height": height, "width": width, "original_size": original_size}
        results = []
        for number, line in lines[index].items():
            with reading(path, f"line {number}"):
                mask = torch.from_numpy(rasterize(line["segmentation"], height, width))
            kept = {key: line[key] for key in ("expression_id", "no_target", "score")}
            results.append({**kept, "mask": mask})
        with reading(path):  # an expression without a line is the file's fault
            evaluator.process([unit], [{"referring": results}])
    return evaluator.evaluate()


def _assign(records: list[dict], path: str | os.PathLike) -> dict[int, dict[int, dict]]:
    """{record index: {line number: line}}, the record being the one of the line's expression."""
    places = defaultdict(list)
    for index, record in enumerate(records):
        for expression in record["expressions"]:
            places[expression["expression_id"]].append(index)
    assigned: dict[int, dict[int, dict]] = defaultdict(dict)
    first_lines: dict[tuple[int, int], int] = {}
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    with open(path, "rb") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            with reading(path, f"line {number}"):
                line = _parse(text)
            id_ = line["expression_id"]
            where = f"{path}: line {number}: expression {id_}"
            fitting = [i for i in places[id_] if _agrees(line, records[i])]
            if not fitting:
                raise ValueError(f"{where} is not in the dataset, or not in the image named there")
            if len(fitting) > 1:
                raise ValueError(
                    f"{where} is in {len(fitting)} images of the dataset; say which by image_id, "
                    "file_name or source"
                )
            first = first_lines.setdefault((fitting[0], id_), number)
            if first != number:
                raise ValueError(f"{where} was already in line {first}")
            assigned[fitting[0]][number] = line
    return assigned


def _parse(text: bytes) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(line, dict) or not {"expression_id", "segmentation"} <= line.keys():
        raise ValueError("expected an object with expression_id and segmentation")
    for key, types in _TYPES.items():
        if key in line and type(line[key]) not in types:
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            raise ValueError(f"{key} must be {names}, not {reprlib.repr(line[key])}")
    line.setdefault("no_target", False)
    line["score"] = float("nan") if line.get("score") is None else float(line["score"])
    return line


def _agrees(line: dict, record: dict) -> bool:
    same_file = "file_name" not in line or os.path.basename(line["file_name"]) == os.path.basename(
        record["file_name"]
    )
    return same_file and all(
        key not in line or line[key] == record[key] for key in ("image_id", "source")
    )

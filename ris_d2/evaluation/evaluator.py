"""ReferringEvaluator: counts each predicted mask as it comes and keeps one row of numbers of it."""

import functools
import json
import logging
import os
import sys
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances
from detectron2.utils import comm

from ..io import atomic_write
from ..masks import encode, rasterize, resize_nearest, union
from .kinds import kinds_of
from .report import (
    ROW,
    breakdowns,
    expression_records,
    finite_or_null,
    prediction_records,
    resolution,
    summarize,
    tables,
)

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class ReferringEvaluator(DatasetEvaluator):
    """Metrics of ``ris_d2.evaluation.metrics`` over the expressions of one dataset.

    Works with any model whose inputs and results have the form of ris_d2, under detectron2's
    ``inference_on_dataset``. Ground truth comes from the inputs: each annotation is decoded once
    per image at the image's own size and nearest-resized if the masks are asked for at another one;
    an expression's ground truth is the union of its annotations; it has no target if it names none.
    Pixels are counted on the masks' device, and only the counts are kept (70 bytes per expression),
    so memory does not depend on image size. All sums are of integers or exactly rounded: one
    process and several give the same numbers to the last digit.

    Args:
        dataset_name: named in the logs and in results.json; need not be registered.
        output_dir: directory for results.json, per_expression.jsonl and predictions.jsonl, each
            written atomically by the main process; None writes nothing.
        distributed: gather from all processes; False evaluates what this process has seen.
        save_predictions: also write predictions.jsonl, one mask as RLE per line, in the form that
            ``score_predictions`` reads. Needs output_dir and keeps about 0.5 kB per expression.
        sample: of ground truth that is resized, "corner" or "center" (TEST.SAMPLE).

    Raises:
        ValueError: save_predictions without output_dir.
    """

    dataset_name: str
    _: KW_ONLY
    output_dir: str | None = None
    distributed: bool = True
    save_predictions: bool = False
    sample: str = "corner"

    def __post_init__(self) -> None:
        if self.save_predictions and not self.output_dir:
            raise ValueError("save_predictions=True needs an output_dir")
        self.reset()

    def reset(self) -> None:
        self._images: list[tuple[str, str, int]] = []  # source, file name, image id
        self._rows = bytearray()  # of ROW: no Python object per expression
        self._run_lengths: list[str] = []  # RLE counts, one per row; none unless they are saved

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Count one batch.

        Args:
            inputs: per unit "height", "width" (of the masks), "image_id", "annotations" (id,
                segmentation), "expressions" (expression_id, ref_id, text, annotation_ids); where
                there, "file_name", "source", and "original_size" (height, width of the image;
                absent: the size of its first RLE, else that of the masks).
            outputs: per unit {"referring": [{"expression_id", "mask": bool (height,width), "score",
                "no_target", "instances": None or Instances with bool pred_masks (M, height,
                width)}]}.

        Raises:
            ValueError: the results are not exactly one per expression of the unit, a mask has the
                wrong shape or dtype, an expression names an unknown annotation, a segmentation is
                malformed. The message names the image, and the expression or annotation.
        """
        if len(inputs) != len(outputs):
            raise ValueError(f"{len(inputs)} inputs, but {len(outputs)} outputs")
        for unit, output in zip(inputs, outputs):
            if "referring" not in output:
                raise ValueError(f"{_name(unit)}: no 'referring' in the output {list(output)}")
            self._process_unit(unit, output["referring"])

    def _process_unit(self, unit: dict, results: Sequence[dict]) -> None:
        expressions = unit["expressions"]
        results = _in_order(unit, results)
        if not results:
            return
        size = (unit["height"], unit["width"])
        for result in results:
            _check_shape(unit, result, result["mask"], size)
        truths, which = ground_truth(unit, self.sample)
        masks = [result["mask"] for result in results]
        predicted_area, intersection = _count(masks, truths, which)
        target_area = np.array([np.count_nonzero(truth) for truth in truths])[which]

        rows = np.empty(len(expressions), ROW)
        rows["image"] = len(self._images)
        rows["expression_id"] = [expression["expression_id"] for expression in expressions]
        rows["ref_id"] = [expression["ref_id"] for expression in expressions]
        rows["intersection"] = intersection
        rows["union"] = predicted_area + target_area - intersection
        rows["target_area"] = target_area
        rows["height"], rows["width"] = size
        rows["original_size"] = size == _original_size(unit)
        rows["num_targets"] = [len(expression["annotation_ids"]) for expression in expressions]
        rows["num_words"] = [len(expression["text"].split()) for expression in expressions]
        rows["kinds"] = [kinds_of(expression["text"]) for expression in expressions]
        rows["score"] = [float(result["score"]) for result in results]
        rows["predicted_no_target"] = [bool(result["no_target"]) for result in results]
        for row, result, index in zip(rows, results, which):
            instances = result.get("instances")
            counts = (-1, -1) if instances is None else _oracle(unit, result, truths[index], size)
            row["oracle_intersection"], row["oracle_union"] = counts

        self._rows += rows.tobytes()
        # Interned: a dataset has a handful of sources and the name may come anew from each worker.
        source = sys.intern(unit.get("source", ""))
        self._images.append((source, unit.get("file_name", ""), unit["image_id"]))
        if self.save_predictions:
            self._run_lengths += [encode(mask.cpu().numpy())["counts"] for mask in masks]

    def evaluate(self) -> "OrderedDict[str, dict[str, float]]":
        """Log the tables, write the files and return the metrics.

        Returns:
            {"referring": metrics and counts of ``compute_metrics``, plus oracle_mIoU where results
            carried instances}, undefined metrics as float nan; {} on the other processes.

        Raises:
            ValueError: an expression was scored twice, by one process or by two.
        """
        images, rows, run_lengths = self._gather()
        if images is None:
            return OrderedDict()
        _check_unique(images, rows)
        metrics = self.metrics(rows)
        groups = breakdowns(rows, [source for source, _, _ in images])
        size = resolution(rows)
        where = "at original resolution" if size == "original" else f"resolution {size}"
        logger.info(
            f"{self.dataset_name}: {len(rows)} expressions of {len(images)} images, {where}\n"
            f"{tables(metrics, groups)}"
        )
        if self.output_dir:
            report = {"dataset": self.dataset_name, "resolution": size, "referring": metrics}
            self._write({**report, "breakdowns": groups}, images, rows, run_lengths)
        return OrderedDict(referring=metrics)

    def metrics(self, rows: np.ndarray) -> dict[str, float]:
        """What ``evaluate`` returns and writes of all expressions.

        A subclass adds metrics of its own to ``super().metrics(rows)``.

        Args:
            rows: (n,), one per expression, with the fields of ``ris_d2.evaluation.report.ROW``.
        """
        return summarize(rows)

    def _gather(self) -> tuple[list[tuple[str, str, int]] | None, np.ndarray, list[str]]:
        """Everything that all processes keep, by source, file name and expression id."""
        mine = (self._images, np.frombuffer(self._rows, ROW), self._run_lengths)
        if self.distributed:
            comm.synchronize()
        parts = comm.gather(mine) if self.distributed else [mine]
        if not parts:  # of another process than the main one
            return None, np.empty(0, ROW), []
        images = sorted({image for part_images, _, _ in parts for image in part_images})
        position = {image: index for index, image in enumerate(images)}
        rows = np.concatenate([part_rows for _, part_rows, _ in parts])
        positions = [np.array([position[i] for i in own], np.int32) for own, _, _ in parts]
        rows["image"] = np.concatenate(
            [p[own["image"]] for p, (_, own, _) in zip(positions, parts)]
        )
        order = np.lexsort((rows["expression_id"], rows["image"]))
        saved = [counts for _, _, part_saved in parts for counts in part_saved]
        return images, rows[order], [saved[index] for index in order] if saved else []

    def _write(
        self,
        record: dict,
        images: list[tuple[str, str, int]],
        rows: np.ndarray,
        run_lengths: list[str],
    ) -> None:
        with atomic_write(os.path.join(self.output_dir, "results.json")) as file:
            json.dump(finite_or_null(record), file, indent=2)
        files = {"per_expression.jsonl": expression_records(rows, images)}
        if self.save_predictions:
            files["predictions.jsonl"] = prediction_records(rows, images, run_lengths)
        for name, lines in files.items():
            with atomic_write(os.path.join(self.output_dir, name)) as file:
                for line in lines:
                    file.write(json.dumps(finite_or_null(line)) + "\n")


def _name(unit: dict) -> str:
    return f"image {unit.get('file_name', '')} (id {unit['image_id']})"


def _original_size(unit: dict) -> tuple[int, int]:
    """(height, width) of the image, at which its annotations are drawn."""
    segmentations = [annotation["segmentation"] for annotation in unit["annotations"]]
    sizes = [rle["size"] for rle in segmentations if isinstance(rle, dict)]
    return tuple(unit.get("original_size") or [*sizes, (unit["height"], unit["width"])][0])


def _in_order(unit: dict, results: Sequence[dict]) -> Sequence[dict]:
    """The unit's results in the order of its expressions, exactly one for each."""
    wanted = [expression["expression_id"] for expression in unit["expressions"]]
    given = [result["expression_id"] for result in results]
    times = Counter(given)
    for id_ in times.keys() | set(wanted):
        if id_ not in wanted:
            raise ValueError(
                f"{_name(unit)}: a result for expression {id_}, which it does not have"
            )
        if times[id_] != 1:
            found = f"{times[id_]} results" if times[id_] else "no result"
            raise ValueError(f"{_name(unit)}: expression {id_} has {found}")
    by_id = dict(zip(given, results))
    return [by_id[expression_id] for expression_id in wanted]


def _check_shape(unit: dict, result: dict, masks: torch.Tensor, shape: tuple[int, ...]) -> None:
    if masks.dtype != torch.bool or tuple(masks.shape) != shape:
        raise ValueError(
            f"{_name(unit)}, expression {result['expression_id']}: expected a bool mask of shape "
            f"{shape}, got {masks.dtype} of {tuple(masks.shape)}"
        )


def ground_truth(unit: dict, sample: str) -> tuple[list[np.ndarray], np.ndarray]:
    """The unit's distinct ground truths, bool (height,width), and which is each expression's."""
    segmentations = {a["id"]: a["segmentation"] for a in unit["annotations"]}

    @functools.cache
    def decode(annotation_id: int) -> np.ndarray:
        try:
            mask = rasterize(segmentations[annotation_id], *_original_size(unit))
        except ValueError as error:
            raise ValueError(f"{_name(unit)}, annotation {annotation_id}: {error}") from error
        return resize_nearest(mask, unit["height"], unit["width"], sample=sample)

    truths: dict[tuple[int, ...], np.ndarray] = {}
    which = []
    for expression in unit["expressions"]:
        key = tuple(sorted(expression["annotation_ids"]))
        unknown = set(key) - segmentations.keys()
        if unknown:
            raise ValueError(
                f"{_name(unit)}, expression {expression['expression_id']}: annotation "
                f"{unknown.pop()} is not among the image's annotations"
            )
        if key not in truths:
            parts = [*map(decode, key)] or [np.zeros((unit["height"], unit["width"]), bool)]
            truths[key] = parts[0] if len(parts) == 1 else union(parts)
        which.append(list(truths).index(key))
    return list(truths.values()), np.array(which)


def _count(
    masks: Sequence[torch.Tensor], truths: Sequence[np.ndarray], which: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Areas of E masks and of their intersections with truths[which]: int64 (E,), int64 (E,)."""
    # numpy counts bools four times as fast as torch does on a CPU.
    count = _count_numpy if masks[0].device.type == "cpu" else _count_torch
    return count(masks, truths, which)


def _count_numpy(
    masks: Sequence[torch.Tensor], truths: Sequence[np.ndarray], which: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    predictions = [mask.contiguous().numpy() for mask in masks]
    areas = [np.count_nonzero(mask) for mask in predictions]
    shared = [np.count_nonzero(mask & truths[i]) for mask, i in zip(predictions, which)]
    return np.array(areas), np.array(shared)


def _count_torch(
    masks: Sequence[torch.Tensor], truths: Sequence[np.ndarray], which: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    predictions = torch.stack(list(masks)).flatten(1)
    truth = torch.from_numpy(np.stack(truths)).to(predictions.device).flatten(1)
    shared = predictions & truth[torch.from_numpy(which).to(predictions.device)]
    # One transfer, of integers.
    areas, shared = torch.stack([predictions.sum(1), shared.sum(1)]).cpu().numpy()
    return areas, shared


def _oracle(unit: dict, result: dict, truth: np.ndarray, size: tuple[int, int]) -> tuple[int, int]:
    """I and U of the union of those instances that lie in the ground truth by more than half."""
    instances: Instances = result["instances"]
    masks = instances.pred_masks
    _check_shape(unit, result, masks, (len(instances), *size))
    target = torch.from_numpy(truth).to(masks.device)
    areas = masks.flatten(1).sum(1)
    inside = (masks & target).flatten(1).sum(1) * 2 > areas
    best = masks[inside].any(0)
    return int((best & target).sum()), int((best | target).sum())


def _check_unique(images: Sequence[tuple[str, str, int]], rows: np.ndarray) -> None:
    same = (rows["image"][1:] == rows["image"][:-1]) & (
        rows["expression_id"][1:] == rows["expression_id"][:-1]
    )
    if same.any():
        row = rows[np.flatnonzero(same)[0]]
        _, file_name, image_id = images[row["image"]]
        raise ValueError(
            f"image {file_name} (id {image_id}): expression {row['expression_id']} was scored "
            f"twice, as were {same.sum() - 1} others: a loader that repeats images, or no reset()"
        )

"""Rows of counts -> metrics, breakdowns, tables and the records that are written to files."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tabulate import tabulate

from .kinds import KINDS, kind_names
from .metrics import PRECISION_THRESHOLDS, compute_metrics, gres_iou, iou, mean_percent

# All that is kept of an expression.
ROW = np.dtype(
    [
        ("image", np.int32),  # position in the list of images
        ("expression_id", np.int64),
        ("ref_id", np.int64),
        ("intersection", np.int32),  # pixels, mask as given
        ("union", np.int32),
        ("target_area", np.int32),  # pixels of the ground truth
        ("oracle_intersection", np.int32),  # -1: the result carried no instances
        ("oracle_union", np.int32),
        ("score", np.float64),
        ("height", np.int32),  # of the masks
        ("width", np.int32),
        ("num_targets", np.int32),  # 0: no target
        ("num_words", np.int32),
        ("kinds", np.uint8),  # of kinds_of
        ("predicted_no_target", np.bool_),
        ("original_size", np.bool_),  # height and width are the image's own
    ]
)

# Groups of the breakdowns by their lower edges; the last one is open.
_NUM_TARGETS = {"0": 0, "1": 1, "2": 2, "3": 3, "4+": 4}
_AREA_RATIO = {"<1%": 0.0, "1-5%": 0.01, "5-10%": 0.05, "10-30%": 0.1, ">=30%": 0.3}
# The edges of both customary groupings (RefCOCO and RefCOCO+: 1-2, 3, 4-5, 6+; RefCOCOg: 1-5, 6-7,
# 8-10, 11+).
_NUM_WORDS = {"1-2": 0, "3": 3, "4-5": 4, "6-7": 6, "8-10": 8, "11+": 11}

_PRECISIONS = [f"Pr@{threshold}" for threshold in PRECISION_THRESHOLDS]
_METRICS = ["gIoU", "cIoU", "oIoU", "mIoU", *_PRECISIONS, "N_acc", "T_acc"]


def _counts(rows: np.ndarray) -> dict[str, np.ndarray]:
    """The arguments of ``compute_metrics``."""
    no_target = rows["num_targets"] == 0
    kept = ("intersection", "union", "predicted_no_target")
    return {"no_target": no_target, **{name: rows[name] for name in kept}}


def summarize(rows: np.ndarray) -> dict[str, float]:
    """ROW (n,) -> ``compute_metrics``, plus oracle_mIoU over targets if any row has an oracle."""
    metrics = compute_metrics(**_counts(rows))
    with_oracle = rows[rows["oracle_union"] >= 0]
    if len(with_oracle):
        targets = with_oracle[with_oracle["num_targets"] > 0]
        metrics["oracle_mIoU"] = mean_percent(
            iou(targets["oracle_intersection"], targets["oracle_union"])
        )
    return metrics


def breakdowns(rows: np.ndarray, sources: Sequence[str]) -> dict[str, dict]:
    """Metrics of groups of expressions.

    Args:
        rows: ROW (n,).
        sources: of each image, indexed by rows["image"].

    Returns:
        {"num_targets" | "target_area" | "num_words" | "kind" | "source": {group: metrics}} without
        empty groups, target_area (share of the image) over expressions with a target only; an
        expression is in the group of each of its kinds, and in "absence" if it has no target; and
        "referent": over the referents that have a target, their number and the mean of the IoU
        (mask as given, percent) of each one's best sentence, of its sentences' mean, and of its
        worst sentence.
    """
    targets = rows[rows["num_targets"] > 0]
    source = np.array(sources, dtype=object)[rows["image"]] if len(rows) else np.array([])
    return {
        "num_targets": _by_edges(rows, rows["num_targets"], _NUM_TARGETS),
        "target_area": _by_edges(targets, area_ratio(targets), _AREA_RATIO),
        "num_words": _by_edges(rows, rows["num_words"], _NUM_WORDS),
        "kind": _by_kind(rows),
        "source": {name: summarize(rows[source == name]) for name in sorted(set(source))},
        "referent": _by_referent(targets),
    }


def area_ratio(rows: np.ndarray) -> np.ndarray:
    """ROW (n,) -> float64 (n,): ground-truth pixels / pixels of the image."""
    return rows["target_area"] / (rows["height"].astype(np.int64) * rows["width"])


def _by_edges(rows: np.ndarray, values: np.ndarray, edges: dict[str, float]) -> dict[str, dict]:
    groups = np.searchsorted(list(edges.values()), values, side="right") - 1
    return {
        name: summarize(rows[groups == index])
        for index, name in enumerate(edges)
        if (groups == index).any()
    }


def _by_kind(rows: np.ndarray) -> dict[str, dict]:
    members = {kind: rows["kinds"] >> bit & 1 == 1 for bit, kind in enumerate(KINDS)}
    members["absence"] = rows["num_targets"] == 0
    return {kind: summarize(rows[which]) for kind, which in members.items() if which.any()}


def _by_referent(targets: np.ndarray) -> dict[str, float]:
    referents, which = np.unique(targets[["image", "ref_id"]], return_inverse=True)
    values = iou(targets["intersection"], targets["union"])
    best, worst = np.zeros(len(referents)), np.ones(len(referents))
    np.maximum.at(best, which, values)
    np.minimum.at(worst, which, values)
    return {
        "num_referents": len(referents),
        "best_mIoU": mean_percent(best),
        "mean_mIoU": mean_percent(np.bincount(which, values) / np.bincount(which)),
        "worst_mIoU": mean_percent(worst),
    }


def resolution(rows: np.ndarray) -> str | list[int]:
    """ROW (n,) -> "original", [height, width] if all masks have that one size, else "mixed"."""
    if rows["original_size"].all():
        return "original"
    sizes = np.unique(rows[["height", "width"]])
    return [int(side) for side in sizes[0]] if len(sizes) == 1 else "mixed"


def tables(metrics: dict[str, float], groups: dict[str, dict]) -> str:
    """The log's text: tables of the metrics, the counts and the breakdowns; n/a = undefined."""
    percentages = [name for name in (*_METRICS, "oracle_mIoU") if name in metrics]
    counts = [name for name in metrics if name not in percentages]
    shown = ["num_expressions", "gIoU", "cIoU", "mIoU", "Pr@0.5", "N_acc", "T_acc"]
    lines = [
        [f"{kind} {group}", *(_show(values[name]) for name in shown)]
        for kind, by_group in groups.items()
        if kind != "referent"
        for group, values in by_group.items()
    ]
    referent = [_show(value) for value in groups["referent"].values()]
    return "\n\n".join(
        [
            _table([[_show(metrics[name]) for name in percentages]], percentages),
            _table([[_show(metrics[name]) for name in counts]], counts),
            _table(lines, ["group", *shown]),
            _table([referent], list(groups["referent"])),
        ]
    )


def _table(lines: list[list[str]], headers: list[str]) -> str:
    return tabulate(lines, headers, tablefmt="pipe", disable_numparse=True)


def _show(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return "n/a" if math.isnan(value) else f"{value:.2f}"


def expression_records(
    rows: np.ndarray, images: Sequence[tuple[str, str, int]]
) -> Iterator[dict[str, Any]]:
    """The lines of per_expression.jsonl, one per row.

    I and U are pixels of the mask as given, IoU is I/U (0 where U = 0), gIoU the expression's share
    of the metric of that name (1 for a no-target expression recognised as such, 0 for a target
    denied), all in 0..1. no_target is what the prediction says; the truth is num_targets == 0.
    area_ratio is the ground truth's share of the image. oracle_IoU is the IoU of the union of those
    predicted instances that lie in the ground truth by more than half: nan without instances, 1
    where that union and the ground truth are both empty.
    """
    # Python objects of a part of them at a time.
    for part in np.array_split(rows, range(5000, len(rows), 5000)):
        oracle = iou(part["oracle_intersection"], part["oracle_union"])
        oracle[(part["oracle_union"] == 0) & (part["target_area"] == 0)] = 1.0
        oracle[part["oracle_union"] < 0] = math.nan
        columns = {
            "ref_id": part["ref_id"],
            "expression_id": part["expression_id"],
            "I": part["intersection"],
            "U": part["union"],
            "IoU": iou(part["intersection"], part["union"]),
            "gIoU": gres_iou(**_counts(part)),
            "score": part["score"],
            "no_target": part["predicted_no_target"],
            "num_targets": part["num_targets"],
            "area_ratio": area_ratio(part),
            "num_words": part["num_words"],
            "kinds": np.array([kind_names(bits) for bits in part["kinds"].tolist()], dtype=object),
            "oracle_IoU": oracle,
        }
        for index, *values in zip(part["image"], *(column.tolist() for column in columns.values())):
            source, file_name, image_id = images[index]
            image = {"source": source, "file_name": file_name, "image_id": image_id}
            yield {**image, **dict(zip(columns, values))}


def prediction_records(
    rows: np.ndarray, images: Sequence[tuple[str, str, int]], run_lengths: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The lines of predictions.jsonl, one per row and RLE, as ``score_predictions`` reads them."""
    for row, counts in zip(rows, run_lengths):
        source, file_name, image_id = images[row["image"]]
        yield {
            "source": source,
            "file_name": file_name,
            "image_id": image_id,
            "expression_id": int(row["expression_id"]),
            "no_target": bool(row["predicted_no_target"]),
            "score": float(row["score"]),
            "segmentation": {"size": [int(row["height"]), int(row["width"])], "counts": counts},
        }


def finite_or_null(value: Any) -> Any:
    """Copy nested dicts and lists with None for every float that JSON lacks (nan, inf)."""
    if isinstance(value, dict):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

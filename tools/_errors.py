"""Where gIoU is lost: no good mask was predicted (perception), or the wrong one chosen
(cognition)."""

import itertools
import json
import math
from collections.abc import Sequence

import numpy as np

from ris_d2.io import reading

# Of the size ratio, with the small ones, where the trouble is, apart.
SIZE_EDGES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
_KINDS = {
    "gIoU": float,
    "IoU": float,
    "num_targets": int,
    "no_target": bool,
    "area_ratio": float,
    "oracle_IoU": float,
}


def read_per_expression(path: str) -> dict[str, np.ndarray]:
    """Read what ReferringEvaluator writes as per_expression.jsonl.

    Returns:
        name -> (n,): gIoU, IoU, oracle_IoU (nan where a result carried no instances) and
        area_ratio, float64 in 0..1; num_targets int64; no_target (said by the prediction) bool.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is no JSON object with these fields, or there is no line.
    """
    rows = []
    with open(path, "rb") as file:
        for number, text in enumerate(file, start=1):
            with reading(path, f"line {number}"):
                try:
                    line = json.loads(text)
                    rows.append([_field(line, name) for name in _KINDS])
                except (ValueError, TypeError, KeyError) as error:
                    raise ValueError(
                        f"not a line of per_expression.jsonl ({type(error).__name__}: {error})"
                    ) from error
    if not rows:
        raise ValueError(f"{path}: no expressions")
    columns = zip(_KINDS, zip(*rows, strict=True), strict=True)
    return {name: np.array(values) for name, values in columns}


def _field(line: dict, name: str) -> float | int | bool:
    value, kind = line[name], _KINDS[name]
    if name == "oracle_IoU" and value is None:
        return math.nan
    is_kind = type(value) is kind or (kind is float and type(value) is int)
    if not is_kind or not 0 <= value <= (1 if kind is float else 2**31):
        raise ValueError(f"field {name!r} is {value!r}")
    return kind(value)


def attribute_loss(rows: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Split the gIoU that is lost to 100 % into what perception and what cognition loses.

    An oracle that chooses among the predicted instances by the ground truth reaches oracle_IoU.
    What is lost beyond that lies in the choice: the chosen instances, or the answer "no target".
    Where a prediction beats the oracle (whose rule, instances that lie in the target by more than
    half, is not optimal), all of its loss is perception's.

    Args:
        rows: of :func:`read_per_expression`; expressions without oracle_IoU are left out.

    Returns:
        group ("all", "no target", "1 target", "2+ targets"; none if empty) -> num_expressions; in
        percentage points of the group's mean: gIoU, oracle (gIoU of the oracle's choice), lost =
        perception + cognition, and of the latter wrong_choice, denied (a target is called absent)
        and invented (an absent one is not); perception_share and cognition_share, percent of lost
        (nan if nothing is); failed, percent of the expressions with a target that have IoU < 0.5,
        and failed_with_mask, percent of those for which the oracle reaches 0.5 (nan if there are
        none).
    """
    known = ~np.isnan(rows["oracle_IoU"])
    targets = rows["num_targets"]
    groups = {
        "all": known,
        "no target": known & (targets == 0),
        "1 target": known & (targets == 1),
        "2+ targets": known & (targets > 1),
    }
    return {
        name: _attribute({key: values[members] for key, values in rows.items()})
        for name, members in groups.items()
        if members.any()
    }


def _attribute(rows: dict[str, np.ndarray]) -> dict[str, float]:
    lost = 1 - rows["gIoU"]
    absent = rows["num_targets"] == 0
    cognition = np.maximum(rows["oracle_IoU"] - rows["gIoU"], 0)
    denied = ~absent & rows["no_target"]
    # Without a target the oracle is always right, by choosing nothing: such rows say nothing here.
    failed = rows["gIoU"][~absent] < 0.5
    with_mask = rows["oracle_IoU"][~absent][failed] >= 0.5

    def points(values: np.ndarray) -> float:
        return 100 * math.fsum(values) / len(lost)

    def share(part: np.ndarray) -> float:
        return 100 * math.fsum(part) / math.fsum(lost) if lost.any() else math.nan

    return {
        "num_expressions": len(lost),
        "gIoU": points(rows["gIoU"]),
        "oracle": points(rows["gIoU"] + cognition),
        "lost": points(lost),
        "perception": points(lost - cognition),
        "cognition": points(cognition),
        "wrong_choice": points(np.where(absent | denied, 0, cognition)),
        "denied": points(np.where(denied, cognition, 0)),
        "invented": points(np.where(absent, cognition, 0)),
        "perception_share": share(lost - cognition),
        "cognition_share": share(cognition),
        "failed": 100 * float(failed.mean()) if len(failed) else math.nan,
        "failed_with_mask": 100 * float(with_mask.mean()) if failed.any() else math.nan,
    }


def by_target_size(
    rows: dict[str, np.ndarray], edges: Sequence[float] = SIZE_EDGES
) -> list[dict[str, float]]:
    """IoU of the expressions with a target by its size (Shared-RIS, Fig. 6).

    Args:
        rows: of :func:`read_per_expression`.
        edges: increasing ratios of target area to image area; bins are [edge, next), the last one
            closed.

    Returns:
        per bin that has expressions: low, high (ratios), num_expressions, and in percent mIoU,
        "Pr@0.5" and oracle_mIoU (over the expressions that have an oracle; nan without).

    Raises:
        ValueError: edges do not increase, or leave out a target.
    """
    if len(edges) < 2 or any(a >= b for a, b in itertools.pairwise(edges)):
        raise ValueError(f"the edges {list(edges)} of the size ratio must increase")
    targets = rows["num_targets"] > 0
    size, iou = rows["area_ratio"][targets], rows["IoU"][targets]
    oracle = rows["oracle_IoU"][targets]
    if len(size) and (size.min() < edges[0] or size.max() > edges[-1]):
        raise ValueError(
            f"size ratios from {size.min():g} to {size.max():g} do not fit into the edges {edges}"
        )
    which = np.searchsorted(edges[1:-1], size, side="right")
    bins = []
    for index, (low, high) in enumerate(itertools.pairwise(edges)):
        members = which == index
        if not members.any():
            continue
        known = oracle[members & ~np.isnan(oracle)]
        bins.append(
            {
                "low": low,
                "high": high,
                "num_expressions": int(members.sum()),
                "mIoU": 100 * float(iou[members].mean()),
                "Pr@0.5": 100 * float((iou[members] >= 0.5).mean()),
                "oracle_mIoU": 100 * float(known.mean()) if len(known) else math.nan,
            }
        )
    return bins

"""The metrics of referring segmentation, from pixel counts alone.

Expression i brings I_i = |P and G| and U_i = |P or G|, pixels of its predicted mask P and its
ground truth G, both as given; whether it has no target; and whether the prediction says so. As in
GRES (ReLA), "no target" is the positive class:

    TP  no target, said so        gIoU_i = 1        cIoU gets 0, 0, even if P is not empty  (rule 1)
    FN  no target, not said       gIoU_i = 0        cIoU gets 0, |P|                        (rule 2)
    FP  target, "no target" said  gIoU_i = 0        cIoU gets 0, U_i, with P as given       (rule 3)
    TN  target, not said          gIoU_i = I_i/U_i  cIoU gets I_i, U_i; 0 if U_i = 0        (rule 4)

    gIoU   mean of gIoU_i over all expressions
    cIoU   sum I / sum U over all expressions, by the rules
    mIoU   mean of I_i/U_i (0 if U_i = 0) over the expressions with a target
    oIoU   sum I_i / sum U_i over the expressions with a target
    Pr@X   share of the expressions with a target whose gIoU_i >= X, exact ties included
    N_acc  TP / (TP + FN)
    T_acc  TN / (TN + FP)

gIoU, cIoU, N_acc, T_acc are those of ReLA's evaluator, oIoU and mIoU those of LAVT's test script,
Pr@X that of both. LAVT knows no "no target" answer: oIoU and mIoU judge the mask alone, as given,
whatever the prediction says beside it, while a denied target (FP) misses for gIoU, cIoU and Pr@X,
as in ReLA. Where every expression has a target that is not denied, gIoU = mIoU and cIoU = oIoU.

All are percentages (ReLA's accuracies are fractions). What is not defined, having no expression to
average over or a union of 0 pixels, is nan, where ReLA has 0 or an exception.
"""

import math

import numpy as np

PRECISION_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


def iou(intersection: np.ndarray, union: np.ndarray) -> np.ndarray:
    """Integers (n,), (n,) -> float64 (n,) in 0..1; 0 where the union is empty."""
    return np.divide(intersection, union, out=np.zeros(len(union)), where=union > 0)


def gres_iou(
    *,
    intersection: np.ndarray,
    union: np.ndarray,
    no_target: np.ndarray,
    predicted_no_target: np.ndarray,
) -> np.ndarray:
    """gIoU_i by rules 1 to 4, float64 (n,) in 0..1; arguments as those of compute_metrics."""
    found = np.where(predicted_no_target, 0.0, iou(intersection, union))
    return np.where(no_target, predicted_no_target, found)


def compute_metrics(
    *,
    intersection: np.ndarray,
    union: np.ndarray,
    no_target: np.ndarray,
    predicted_no_target: np.ndarray,
) -> dict[str, float]:
    """Metrics over n expressions; n may be 0. Independent of their order to the last digit.

    Args:
        intersection: integer (n,), pixels in both mask and ground truth.
        union: integer (n,), pixels in either.
        no_target: bool (n,), the truth.
        predicted_no_target: bool (n,), what the prediction says.

    Returns:
        gIoU, cIoU, oIoU, mIoU, Pr@0.5 ... Pr@0.9, N_acc, T_acc: float, percent, nan if undefined;
        the counts behind them: int num_expressions, num_no_target, TP, FN, FP, TN, and the pixel
        sums cIoU_I, cIoU_U, oIoU_I, oIoU_U.
    """
    target = ~no_target
    true_positive = no_target & predicted_no_target
    false_positive = target & predicted_no_target
    sums = {
        "cIoU_I": int(intersection[target & ~predicted_no_target].sum(dtype=np.int64)),
        "cIoU_U": int(union[~true_positive].sum(dtype=np.int64)),
        "oIoU_I": int(intersection[target].sum(dtype=np.int64)),
        "oIoU_U": int(union[target].sum(dtype=np.int64)),
    }
    counts = {
        "num_expressions": len(target),
        "num_no_target": int(no_target.sum()),
        "TP": int(true_positive.sum()),
        "FN": int((no_target & ~predicted_no_target).sum()),
        "FP": int(false_positive.sum()),
        "TN": int((target & ~predicted_no_target).sum()),
    }
    shares = gres_iou(
        intersection=intersection,
        union=union,
        no_target=no_target,
        predicted_no_target=predicted_no_target,
    )
    num_targets = counts["num_expressions"] - counts["num_no_target"]
    metrics = {
        "gIoU": mean_percent(shares),
        "cIoU": _percent(sums["cIoU_I"], sums["cIoU_U"]),
        "oIoU": _percent(sums["oIoU_I"], sums["oIoU_U"]),
        "mIoU": mean_percent(iou(intersection[target], union[target])),
    }
    for threshold in PRECISION_THRESHOLDS:
        hits = int((shares[target] >= threshold).sum())
        metrics[f"Pr@{threshold}"] = _percent(hits, num_targets)
    metrics["N_acc"] = _percent(counts["TP"], counts["num_no_target"])
    metrics["T_acc"] = _percent(counts["TN"], num_targets)
    return {**metrics, **counts, **sums}


def mean_percent(values: np.ndarray) -> float:
    """100 x mean of float64 (n,), nan if n = 0. The sum is exactly rounded, hence free of order."""
    return _percent(math.fsum(values.tolist()), len(values))


def _percent(part: float, whole: float) -> float:
    return 100.0 * part / whole if whole else math.nan

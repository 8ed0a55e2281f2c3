"""The metrics on counts small enough to work out by hand; each docstring holds the arithmetic."""

import math

import numpy as np
import pytest

from ris_d2.evaluation.metrics import compute_metrics

PRECISIONS = ["Pr@0.5", "Pr@0.6", "Pr@0.7", "Pr@0.8", "Pr@0.9"]


def metrics(*samples):
    """Each sample: (I, U of the mask as given, no target in truth, no target predicted)."""
    intersection, union, no_target, predicted = np.array(samples, np.int64).reshape(-1, 4).T
    return compute_metrics(
        intersection=intersection,
        union=union,
        no_target=no_target.astype(bool),
        predicted_no_target=predicted.astype(bool),
    )


def test_targets_without_any_no_target_answer():
    """I/U = 30/60, 90/100: mean (0.5 + 0.9)/2 = 70 %, cumulative 120/160 = 75 %.

    Both count as hits at 0.5, only the second from 0.6 to 0.9 (0.9 exactly); T_acc = 2/2, and no
    sample defines N_acc.
    """
    result = metrics((30, 60, 0, 0), (90, 100, 0, 0))
    assert result["gIoU"] == result["mIoU"] == pytest.approx(70)
    assert result["cIoU"] == result["oIoU"] == 75
    assert [result[name] for name in PRECISIONS] == [100, 50, 50, 50, 50]
    assert result["T_acc"] == 100
    assert math.isnan(result["N_acc"])


def test_rule_1_recognised_no_target_counts_one_even_with_a_mask():
    """TP with a mask of 40 pixels beside a target of 20/50.

    gIoU = (1 + 0.4)/2 = 70 %; cIoU = (0 + 20)/(0 + 50) = 40 %: the 40 pixels are not in the union.
    mIoU and oIoU know only the target: 40 %.
    """
    result = metrics((0, 40, 1, 1), (20, 50, 0, 0))
    assert result["gIoU"] == pytest.approx(70)
    assert result["cIoU"] == result["mIoU"] == result["oIoU"] == 40
    assert result["N_acc"] == result["T_acc"] == 100
    assert (result["cIoU_I"], result["cIoU_U"]) == (20, 50)


def test_rule_2_missed_no_target_puts_its_pixels_into_the_union():
    """FN with a mask of 50 pixels beside a target of 50/50.

    gIoU = (0 + 1)/2 = 50 %, cIoU = 50/(50 + 50) = 50 %, oIoU = 50/50; N_acc = 0/1.
    """
    result = metrics((0, 50, 1, 0), (50, 50, 0, 0))
    assert result["gIoU"] == result["cIoU"] == 50
    assert result["oIoU"] == result["mIoU"] == 100
    assert result["N_acc"] == 0
    assert result["FN"] == 1


def test_rule_2_with_an_empty_mask_costs_ciou_nothing():
    """FN without a pixel: gIoU = (0 + 1)/2 = 50 %, but cIoU = 50/(0 + 50) = 100 %."""
    result = metrics((0, 0, 1, 0), (50, 50, 0, 0))
    assert result["gIoU"] == 50
    assert result["cIoU"] == 100
    assert result["N_acc"] == 0


def test_rule_3_denied_target_loses_its_intersection_and_keeps_its_union():
    """FP: a target denied with a mask of I/U = 80/100 beside a target of 60/100.

    gIoU = (0 + 0.6)/2 = 30 %, cIoU = (0 + 60)/(100 + 100) = 30 %, T_acc = 1/2. Pr@0.5 and Pr@0.6 =
    1/2: the denied one misses at every threshold. The mask as given: mIoU = (0.8 + 0.6)/2 = 70 %,
    oIoU = 140/200 = 70 %.
    """
    result = metrics((80, 100, 0, 1), (60, 100, 0, 0))
    assert result["gIoU"] == pytest.approx(30)
    assert result["cIoU"] == 30
    assert result["T_acc"] == 50
    assert [result[name] for name in PRECISIONS] == [50, 50, 0, 0, 0]
    assert result["mIoU"] == pytest.approx(70)
    assert result["oIoU"] == 70


def test_rule_3_with_an_empty_mask():
    """FP as our models give it, I/U = 0/100 (ground truth 100 pixels), beside a target of 60/100.

    gIoU = mIoU = (0 + 0.6)/2 = 30 %; cIoU = oIoU = 60/200 = 30 %.
    """
    result = metrics((0, 100, 0, 1), (60, 100, 0, 0))
    assert result["gIoU"] == result["mIoU"] == pytest.approx(30)
    assert result["cIoU"] == result["oIoU"] == 30


def test_rule_4_target_without_a_pixel_anywhere_counts_zero():
    """A target whose ground truth and mask are both empty (U = 0) beside one of 1/2.

    gIoU = mIoU = (0 + 0.5)/2 = 25 %; cIoU = oIoU = 1/2.
    """
    result = metrics((0, 0, 0, 0), (1, 2, 0, 0))
    assert result["gIoU"] == result["mIoU"] == 25
    assert result["cIoU"] == result["oIoU"] == 50
    assert result["Pr@0.5"] == 50


def test_all_four_cases_together():
    """TP; FN with 10 pixels; FP 30/40; TN 45/60.

    gIoU = (1 + 0 + 0 + 0.75)/4 = 43.75 %; cIoU = 45/(10 + 40 + 60) = 45/110;
    mIoU = (0.75 + 0.75)/2; oIoU = 75/100; Pr@0.7 = 1/2; N_acc = T_acc = 1/2.
    """
    result = metrics((0, 7, 1, 1), (0, 10, 1, 0), (30, 40, 0, 1), (45, 60, 0, 0))
    assert result["gIoU"] == 43.75
    assert result["cIoU"] == 100 * 45 / 110
    assert result["mIoU"] == result["oIoU"] == 75
    assert (result["Pr@0.7"], result["Pr@0.8"]) == (50, 0)
    assert result["N_acc"] == result["T_acc"] == 50
    assert [result[name] for name in ("TP", "FN", "FP", "TN")] == [1, 1, 1, 1]
    assert (result["num_expressions"], result["num_no_target"]) == (4, 2)


def test_only_no_target_samples_leave_target_metrics_undefined():
    """Three samples: two recognised, one missed with 5 pixels.

    gIoU = 2/3, cIoU = 0/5 = 0, N_acc = 2/3; no target, hence no T_acc, mIoU, oIoU, Pr.
    """
    result = metrics((0, 0, 1, 1), (0, 9, 1, 1), (0, 5, 1, 0))
    assert result["gIoU"] == result["N_acc"] == pytest.approx(200 / 3)
    assert result["cIoU"] == 0
    undefined = {name for name, value in result.items() if math.isnan(value)}
    assert undefined == {"T_acc", "mIoU", "oIoU", *PRECISIONS}


def test_everything_recognised_as_no_target_has_no_cumulative_iou():
    """Two TP: gIoU = 100 %, but no pixel enters the sums: cIoU = 0/0 is undefined, not 0."""
    result = metrics((0, 0, 1, 1), (0, 3, 1, 1))
    assert result["gIoU"] == result["N_acc"] == 100
    assert math.isnan(result["cIoU"])


def test_all_targets_with_empty_unions():
    """Two targets with U = 0: means are 0, cumulative ratios 0/0 undefined."""
    result = metrics((0, 0, 0, 0), (0, 0, 0, 0))
    assert result["gIoU"] == result["mIoU"] == result["Pr@0.5"] == 0
    assert math.isnan(result["cIoU"]) and math.isnan(result["oIoU"])
    assert result["T_acc"] == 100


def test_all_right_without_no_target_samples_has_full_t_acc():
    """T_acc = 3/3 = 100 % (ReLA's code prints 0 here), N_acc undefined."""
    result = metrics(*[(5, 5, 0, 0)] * 3)
    assert result["T_acc"] == 100
    assert math.isnan(result["N_acc"])


def test_no_expression_at_all():
    result = metrics()
    assert result["num_expressions"] == 0
    assert all(
        math.isnan(result[name])
        for name in ("gIoU", "cIoU", "oIoU", "mIoU", "N_acc", "T_acc", *PRECISIONS)
    )


@pytest.mark.parametrize("tenths", [5, 6, 7, 8, 9])
@pytest.mark.parametrize("scale", [1, 3, 7, 12345])
def test_exact_ties_count(tenths, scale):
    """I/U = 0.X to the last digit counts for Pr@0.X; one pixel less does not."""
    union = 10 * scale
    result = metrics((tenths * scale, union, 0, 0), (tenths * scale - 1, union, 0, 0))
    assert result[f"Pr@0.{tenths}"] == 50


def test_cumulative_sums_are_exact_beyond_32_bits():
    """5,000 masks of 10^6 pixels: 5 * 10^9 > 2^32."""
    result = metrics(*[(999_999, 1_000_000, 0, 0)] * 5000)
    assert result["cIoU_U"] == 5_000_000_000
    assert result["cIoU"] == pytest.approx(99.9999)


def test_order_does_not_matter_to_the_last_digit():
    rng = np.random.default_rng(0)
    union = rng.integers(1, 10_000, 3000)
    samples = np.stack([(union * rng.random(3000)).astype(int), union], 1)
    samples = np.concatenate([samples, rng.integers(0, 2, (3000, 2))], 1)
    shuffled = metrics(*rng.permutation(samples))
    assert shuffled == metrics(*samples)


def test_names_survive_detectron2_and_values_are_numbers():
    """print_csv_format drops names with "-", EvalHook wants floats."""
    result = metrics((1, 2, 0, 0))
    assert not [name for name in result if "-" in name]
    assert all(isinstance(value, (int, float)) for value in result.values())

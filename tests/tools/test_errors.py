import json
import math

import numpy as np
import pytest

from _errors import attribute_loss, by_target_size, read_per_expression

FIELDS = ("gIoU", "IoU", "num_targets", "no_target", "area_ratio", "oracle_IoU")
ROWS = [
    (0.9, 0.9, 1, False, 0.10, 0.9),  # right
    (0.2, 0.2, 1, False, 0.02, 0.8),  # a query had it, another was chosen
    (0.3, 0.3, 1, False, 0.005, 0.3),  # no query had it
    (0.0, 0.0, 1, True, 0.30, 0.7),  # denied
    (0.6, 0.6, 3, False, 0.50, 0.5),  # better than the oracle
    (0.0, 0.0, 0, False, 0.00, 1.0),  # invented
    (1.0, 0.0, 0, True, 0.00, 1.0),  # recognised
]


@pytest.fixture
def write(tmp_path):
    def write(rows=ROWS, name="per_expression.jsonl"):
        path = tmp_path / name
        lines = [json.dumps(dict(zip(FIELDS, row), expression_id=3)) for row in rows]
        path.write_text("".join(line + "\n" for line in lines))
        return str(path)

    return write


def test_loss_is_split_by_what_the_queries_could_do(write):
    groups = attribute_loss(read_per_expression(write()))
    assert list(groups) == ["all", "no target", "1 target", "2+ targets"]
    # gIoU lost: 0.1, 0.8, 0.7, 1.0, 0.4, 1.0, 0; of it cognition: 0, 0.6, 0, 0.7, 0, 1.0, 0.
    whole = groups["all"]
    assert whole["num_expressions"] == 7
    expected = {
        "gIoU": 3.0,
        "oracle": 5.3,
        "lost": 4.0,
        "perception": 1.7,
        "cognition": 2.3,
        "wrong_choice": 0.6,
        "denied": 0.7,
        "invented": 1.0,
    }
    for name, value in expected.items():
        assert whole[name] == pytest.approx(100 * value / 7), name
    assert whole["perception_share"] == pytest.approx(42.5)
    assert whole["cognition_share"] == pytest.approx(57.5)
    assert whole["failed"] == pytest.approx(100 * 3 / 5)  # 0.2, 0.3, denied; of those with a target
    assert whole["failed_with_mask"] == pytest.approx(100 * 2 / 3)
    assert math.isnan(groups["no target"]["failed"])
    assert groups["no target"]["cognition_share"] == 100
    assert groups["2+ targets"]["cognition"] == 0
    assert groups["1 target"]["lost"] == pytest.approx(100 * 2.6 / 4)


def test_perfect_predictions_lose_nothing(write):
    whole = attribute_loss(read_per_expression(write([(1.0, 1.0, 1, False, 0.1, 1.0)])))["all"]
    assert whole["lost"] == 0 and whole["failed"] == 0
    assert math.isnan(whole["perception_share"]) and math.isnan(whole["failed_with_mask"])


def test_expressions_without_instances_are_left_out(write):
    without = [(*row[:5], None) for row in ROWS]
    assert attribute_loss(read_per_expression(write(without))) == {}
    groups = attribute_loss(read_per_expression(write([*without[:3], ROWS[1]])))
    assert groups["all"]["num_expressions"] == 1 and groups.keys() == {"all", "1 target"}


def test_iou_by_target_size(write):
    bins = by_target_size(read_per_expression(write()), (0, 0.02, 0.3, 0.5))
    assert [(row["low"], row["high"], row["num_expressions"]) for row in bins] == [
        (0, 0.02, 1),
        (0.02, 0.3, 2),  # closed below
        (0.3, 0.5, 2),  # the last one also above
    ]
    assert [row["mIoU"] for row in bins] == pytest.approx([30, 55, 30])
    assert [row["Pr@0.5"] for row in bins] == [0, 50, 50]
    assert [row["oracle_mIoU"] for row in bins] == pytest.approx([30, 85, 60])
    assert [row["num_expressions"] for row in by_target_size(read_per_expression(write()))] == [
        *(1, 1, 1, 1, 1)
    ]


def test_sizes_without_oracle_or_targets(write):
    rows = read_per_expression(write([(*row[:5], None) for row in ROWS]))
    assert np.isnan([row["oracle_mIoU"] for row in by_target_size(rows)]).all()
    assert by_target_size(read_per_expression(write(ROWS[5:]))) == []


@pytest.mark.parametrize("edges", [(0.5,), (0, 0.5, 0.5, 1), (1, 0)])
def test_edges_that_do_not_increase_are_errors(write, edges):
    with pytest.raises(ValueError, match="must increase"):
        by_target_size(read_per_expression(write()), edges)


def test_edges_that_leave_targets_out_are_errors(write):
    with pytest.raises(ValueError, match="from 0.005 to 0.5 do not fit"):
        by_target_size(read_per_expression(write()), (0, 0.1, 0.2))


def changed(**values):
    line = dict(gIoU=1, IoU=1, num_targets=1, no_target=False, area_ratio=0.5, oracle_IoU=None)
    return json.dumps({**line, **values})


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[]",
        '{"gIoU": 1.0}',
        "\udcff",
        changed(gIoU=None),
        changed(IoU=math.nan),
        changed(area_ratio="0.5"),
        changed(num_targets=2**70),
        changed(no_target="false"),
    ],
)
def test_other_files_are_named(write, line):
    path = write()
    with open(path, "a", errors="surrogateescape") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match="line 8: not a line of per_expression.jsonl"):
        read_per_expression(path)
    with pytest.raises(ValueError, match="no expressions"):
        read_per_expression(write([]))

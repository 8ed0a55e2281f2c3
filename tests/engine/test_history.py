"""What a training has logged: metrics.json, whole and half lines."""

import json
import math

import pytest

from ris_d2.engine.history import cut_history, has_evaluation, read_history

pytestmark = pytest.mark.cpu_only


def test_history_survives_resume_and_half_written_lines(tmp_path):
    lines = [
        {"iteration": 19, "total_loss": 2.0},
        {"iteration": 39, "total_loss": 1.5},
        {"iteration": 39, "referring/gIoU": 10.0},
        {"iteration": 39, "total_loss": 1.4},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    # Killed in the middle of a line, resumed, killed again.
    text += '{"iteration": 59, "tot' + '{"iteration": 59, "total_loss": 1.2}\n'
    text += '{"iteration": 79, "total_loss": 1.1}\n{"iteration": 99'
    (tmp_path / "metrics.json").write_text(text)
    assert read_history(str(tmp_path)) == [
        {"iteration": 19, "total_loss": 2.0},
        {"iteration": 39, "total_loss": 1.4, "referring/gIoU": 10.0},
        {"iteration": 79, "total_loss": 1.1},
    ]
    assert read_history(str(tmp_path / "absent")) == []


def test_history_is_cut_where_a_training_goes_on(tmp_path):
    path = tmp_path / "metrics.json"
    lines = [f'{{"iteration": {i}, "total_loss": 1.0}}\n' for i in (19, 39, 59, 79)]
    path.write_text("".join(lines) + '{"iteration": 99, "tot')
    cut_history(str(tmp_path), math.inf)
    assert path.read_text() == "".join(lines)
    cut_history(str(tmp_path), 59)
    assert path.read_text() == "".join(lines[:2])
    cut_history(str(tmp_path), 40)
    assert path.read_text() == "".join(lines[:2])
    cut_history(str(tmp_path / "absent"), 0)
    assert has_evaluation([{"iteration": 39, "referring/gIoU": 1.0}], 39)
    assert not has_evaluation([{"iteration": 39, "total_loss": 1.0}], 39)

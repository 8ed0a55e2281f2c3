"""Trainings that are followed from outside."""

import json
import subprocess
import sys
import time

import pytest

from ris_d2.engine.follow import describe_progress, follow_training, read_history


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


def test_progress_in_words():
    assert describe_progress(61, [], 40) == " 1 min 01 s  starting"
    line = {"iteration": 19, "total_loss": 1.25, "eta_seconds": 70.0}
    evaluated = {"iteration": 19, "referring/gIoU": 3.0}
    words = " 0 min 09 s  iteration    20 of 40  loss 1.250   1 min 10 s to go"
    assert describe_progress(9, [line, evaluated], 40) == words
    assert describe_progress(9, [line], 20).endswith("evaluating")


def test_a_process_is_followed_to_its_end_and_its_status_returned(tmp_path):
    seen = []
    script = (
        "import os, sys, time; print(os.environ['A'], flush=True); time.sleep(0.3); sys.exit(3)"
    )
    command = [sys.executable, "-c", script]
    for _ in range(2):
        status = follow_training(
            command, str(tmp_path / "out"), seen.append, every=0.1, environment={"A": "told"}
        )
        assert status == 3
    assert (tmp_path / "out" / "console.txt").read_text() == "told\ntold\n"
    assert len(seen) >= 2 and seen[0] >= 0.1


def test_a_process_does_not_outlive_its_follower(tmp_path, monkeypatch):
    started = []
    real = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[0]
    )

    def stop(seconds):
        raise KeyboardInterrupt

    begin = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        follow_training(command, str(tmp_path), stop, every=0.1)
    assert started[0].poll() is not None and time.perf_counter() - begin < 30

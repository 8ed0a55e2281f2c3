"""Trainings that are followed from outside."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest

from ris_d2.engine.follow import (
    cut_history,
    describe_progress,
    follow_training,
    has_evaluation,
    read_history,
)


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


FOLLOWER = """
import sys
from ris_d2.engine.follow import follow_training, stop_on_signals
stop_on_signals()
training = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(100)"
follow_training([sys.executable, "-c", training, sys.argv[1]], sys.argv[2], print)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a killed process takes nobody along")
def test_a_training_ends_with_its_follower_however_that_ends(tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
    notes = [tmp_path / number.name for number in numbers]
    followers = [
        subprocess.Popen(
            [sys.executable, "-c", FOLLOWER, str(note), str(tmp_path / f"{note.name}_output")],
            start_new_session=True,  # a terminal's Ctrl-C would reach the training by itself
            # A suite in a shell's background was told to ignore it, and would hand that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            stderr=subprocess.DEVNULL,
        )
        for note in notes
    ]
    try:
        wait_until(lambda: all(note.exists() and note.read_text() for note in notes), 120)
        for number, follower in zip(numbers, followers, strict=True):
            follower.send_signal(number)
        for follower in followers:
            assert follower.wait(20) != 0
        wait_until(lambda: not any(is_running(int(note.read_text())) for note in notes), 10)
    finally:
        for follower in followers:
            follower.kill()


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(") ")[2][0] != "Z"  # ended, and nobody has asked how
    except FileNotFoundError:
        return False


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

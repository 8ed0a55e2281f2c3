"""tools/_follow.py: trainings that are followed from outside."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from _follow import Training, describe_progress, follow, why_failed

TOOLS = str(Path(__file__).parents[2] / "tools")


def test_progress_in_words():
    assert describe_progress(61, [], 40) == " 1 min 01 s  starting"
    line = {"iteration": 19, "total_loss": 1.25, "eta_seconds": 70.0}
    evaluated = {"iteration": 19, "referring/gIoU": 3.0}
    words = " 0 min 09 s  iteration    20 of 40  loss 1.250   1 min 10 s to go"
    assert describe_progress(9, [line, evaluated], 40) == words
    assert describe_progress(9, [line], 20).endswith("evaluating")


def test_a_process_is_followed_to_its_end_and_its_status_returned(tmp_path, capsys):
    script = (
        "import os, sys, time; print(os.environ['A'], flush=True); time.sleep(0.5); sys.exit(3)"
    )
    training = Training(
        command=[sys.executable, "-c", script],
        folder=str(tmp_path / "out"),
        max_iter=4,
        name="wide",
        environment={"A": "told"},
    )
    calls = []
    ended = follow([training, training], every=0.1, on_progress=lambda: calls.append(1))
    assert list(ended) == 2 * [(training, 3)]
    assert (tmp_path / "out" / "console.txt").read_text() == "told\ntold\n"
    assert capsys.readouterr().out.count("      wide   0 min 00 s  starting\n") >= 4
    assert len(calls) >= 4
    words = f"told\ntraining failed (status 3); all of it in {tmp_path}/out/console.txt"
    assert why_failed(training, 3) == words


def test_a_process_does_not_outlive_its_follower(tmp_path, monkeypatch):
    started = []
    real = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[-1]
    )
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    training = Training(command=command, folder=str(tmp_path), max_iter=1)

    def stop(*args, **keywords):
        raise KeyboardInterrupt

    begin = time.perf_counter()
    monkeypatch.setattr("builtins.print", stop)
    with pytest.raises(KeyboardInterrupt):
        list(follow([training] * 3, at_once=2, every=0.1))
    assert len(started) == 2 and all(process.poll() is not None for process in started)
    assert time.perf_counter() - begin < 30


FOLLOWER = """
import sys
sys.path.append(sys.argv[3])
from _follow import Training, follow, stop_on_signals
stop_on_signals()
training = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(100)"
command = [sys.executable, "-c", training, sys.argv[1]]
list(follow([Training(command=command, folder=sys.argv[2], max_iter=1)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a killed process takes nobody along")
def test_a_training_ends_with_its_follower_however_that_ends(tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
    notes = [tmp_path / number.name for number in numbers]
    followers = [
        subprocess.Popen(
            [sys.executable, "-c", FOLLOWER, str(note), str(tmp_path / f"{note.name}_out"), TOOLS],
            start_new_session=True,  # a terminal's Ctrl-C would reach the training by itself
            # A suite in a shell's background (or under nohup) was told to ignore some, and would hand that on.
            preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in numbers[:3]],
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

"""Trainings in processes of their own: started, followed by their log, never left behind."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from operator import index

from ..io import reading

from ..processes import die_with_parent

__all__ = [
    "cut_history",
    "describe_progress",
    "follow_training",
    "has_evaluation",
    "minutes_and_seconds",
    "read_history",
    "stop_on_signals",
]

# glibc gives the memory of large tensors back and asks for it again at every step of a small model
# on a CPU; to keep it saves 15 % of the step.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "2000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}


def follow_training(
    command: Sequence[str],
    output_dir: str,
    on_progress: Callable[[float], None],
    *,
    every: float = 20.0,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run ``command`` to its end and return its exit status.

    The process ends with this call, also where ``on_progress`` or a signal raises; on Linux also
    where this process is killed.

    Args:
        command: program and arguments; what it prints is appended to ``output_dir``/console.txt.
        output_dir: made if absent.
        on_progress: called with the seconds since the start, while the process runs.
        every: seconds between these calls.
        environment: changes to that of this process.
    """
    os.makedirs(output_dir, exist_ok=True)
    begin = time.perf_counter()
    this_process = os.getpid()
    with open(os.path.join(output_dir, "console.txt"), "a") as console:
        process = subprocess.Popen(
            command,
            stdout=console,
            stderr=subprocess.STDOUT,
            env={**_KEEP_MEMORY, **os.environ, **(environment or {})},
            # SIGTERM: torchrun then ends its processes, too.
            preexec_fn=lambda: die_with_parent(this_process, signal.SIGTERM),
        )
    try:
        while True:
            try:
                return process.wait(every)
            except subprocess.TimeoutExpired:
                on_progress(time.perf_counter() - begin)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def read_history(output_dir: str) -> list[dict]:
    """The log lines (metrics.json) of the training in ``output_dir``, by iteration.

    A line that a resumed training repeats counts once; no file, no lines.

    Raises:
        ValueError: the file is damaged, or of something else.
    """
    path = os.path.join(output_dir, "metrics.json")
    lines: dict[int, dict] = {}
    if os.path.exists(path):
        with reading(path), open(path, encoding="utf-8") as file:
            for line in file:
                # A process that is killed leaves half a line; a resumed one writes on behind it.
                with contextlib.suppress(json.JSONDecodeError):
                    record = json.loads(line)
                    lines.setdefault(index(record["iteration"]), {}).update(record)
    return [lines[i] for i in sorted(lines)]


def cut_history(output_dir: str, iteration: float) -> None:
    """Cut metrics.json where a training goes on from ``iteration``.

    What is cut off comes anew: the lines from there on, and half a line of a killed process, which
    would take the next whole one with it.
    """
    path = os.path.join(output_dir, "metrics.json")
    if not os.path.exists(path):
        return
    with open(path, "rb") as file:
        lines = file.readlines()
    kept = len(lines)
    while kept and not _is_before(lines[kept - 1], iteration):
        kept -= 1
    if kept < len(lines):
        os.truncate(path, sum(map(len, lines[:kept])))


def _is_before(line: bytes, iteration: float) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["iteration"] < iteration
    except (ValueError, KeyError, TypeError):
        return False


def has_evaluation(history: Sequence[Mapping], iteration: int) -> bool:
    """Whether ``history`` (``read_history``) has metrics of an evaluation at that iteration."""
    # Results are named <task>/<metric> or <test set>/<task>/<metric>; nothing else has a slash.
    return any("/" in name for line in history if line["iteration"] == iteration for name in line)


def stop_on_signals() -> None:
    """Let SIGTERM and SIGHUP (kill, a closing terminal) interrupt this process as Ctrl-C does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, signal.default_int_handler)


def describe_progress(seconds: float, history: Sequence[Mapping], max_iter: int) -> str:
    """One line for a person: the time so far and what ``history`` (``read_history``) says last."""
    last = next((line for line in reversed(history) if "total_loss" in line), None)
    elapsed = minutes_and_seconds(seconds)
    if last is None:
        return f"{elapsed}  starting"
    done = last["iteration"] + 1
    if done >= max_iter:
        return f"{elapsed}  evaluating"
    return (
        f"{elapsed}  iteration {done:5d} of {max_iter}  loss {last['total_loss']:.3f}  "
        f"{minutes_and_seconds(last.get('eta_seconds', 0))} to go"
    )


def minutes_and_seconds(seconds: float) -> str:
    """Return 65.4 as " 1 min 05 s"."""
    return f"{int(seconds) // 60:2d} min {int(seconds) % 60:02d} s"

"""Trainings in processes of their own: started, followed by their log, never left behind."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

__all__ = ["describe_progress", "follow_training", "minutes_and_seconds", "read_history"]

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

    The process ends with this call, also where ``on_progress`` or a signal raises.

    Args:
        command: program and arguments; what it prints is appended to ``output_dir``/console.txt.
        output_dir: made if absent.
        on_progress: called with the seconds since the start, while the process runs.
        every: seconds between these calls.
        environment: changes to that of this process.
    """
    os.makedirs(output_dir, exist_ok=True)
    begin = time.perf_counter()
    with open(os.path.join(output_dir, "console.txt"), "a") as console:
        process = subprocess.Popen(
            command,
            stdout=console,
            stderr=subprocess.STDOUT,
            env={**_KEEP_MEMORY, **os.environ, **(environment or {})},
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
    """
    path = os.path.join(output_dir, "metrics.json")
    lines: dict[int, dict] = {}
    if os.path.exists(path):
        with open(path) as file:
            for line in file:
                # A process that is killed leaves half a line; a resumed one writes on behind it.
                with contextlib.suppress(json.JSONDecodeError):
                    record = json.loads(line)
                    lines.setdefault(record["iteration"], {}).update(record)
    return [lines[i] for i in sorted(lines)]


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

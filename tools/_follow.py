"""Trainings in processes of their own: started, followed by their log, never left behind."""

import itertools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ris_d2.engine.history import read_history
from ris_d2.processes import die_with_parent

PROGRESS_SECONDS = 20.0
_POLL_SECONDS = 0.1
# glibc gives the memory of large tensors back and asks for it again at every step of a small model
# on a CPU; to keep it saves 15 % of the step.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "2000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """A training to be run.

    Attributes:
        command: program and arguments.
        folder: its OUTPUT_DIR; what it prints is appended to console.txt there.
        max_iter: its iterations, for the lines about its progress.
        name: stands before these lines.
        environment: changes to that of this process.
    """

    command: Sequence[str]
    folder: str
    max_iter: int
    name: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def follow(
    trainings: Iterable[Training],
    *,
    at_once: int = 1,
    every: float = PROGRESS_SECONDS,
    on_progress: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Training, int]]:
    """Run trainings, print every so many seconds how far they are, and yield each with its exit
    status.

    No process outlives this generator, also where a signal interrupts it; on Linux none outlives
    this process, also where it is killed.

    Args:
        trainings: taken one by one, when there is a place for the next.
        at_once: processes at a time.
        every: seconds between lines about the progress.
        on_progress: called after these lines.
    """
    waiting, running = iter(trainings), {}
    try:
        while True:
            for training in itertools.islice(waiting, at_once - len(running)):
                running[start(training)] = (training, time.perf_counter())
            if not running:
                return
            deadline = time.perf_counter() + every
            while all(process.poll() is None for process in running):
                if time.perf_counter() > deadline:
                    deadline += every
                    for training, begin in running.values():
                        print(f"      {_progress(training, begin)}", flush=True)
                    on_progress()
                time.sleep(_POLL_SECONDS)
            for process in [process for process in running if process.poll() is not None]:
                training, _ = running.pop(process)
                yield training, process.poll()
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def start(training: Training) -> subprocess.Popen:
    """Start a training's process; it ends with this one."""
    os.makedirs(training.folder, exist_ok=True)
    this_process = os.getpid()
    with open(os.path.join(training.folder, "console.txt"), "a") as console:
        return subprocess.Popen(
            training.command,
            stdout=console,
            stderr=subprocess.STDOUT,
            env={**_KEEP_MEMORY, **os.environ, **training.environment},
            # SIGTERM: torchrun then ends its processes, too.
            preexec_fn=lambda: die_with_parent(this_process, signal.SIGTERM),
        )


def why_failed(training: Training, status: int, *, lines: int = 1) -> str:
    """The last lines that a training printed, its exit status, and where the other lines are."""
    console = os.path.join(training.folder, "console.txt")
    with open(console) as file:
        tail = "\n".join([line.rstrip() for line in file if line.strip()][-lines:])
    ended = f"status {status}" if status >= 0 else f"ended by {signal.Signals(-status).name}"
    return f"{tail}\ntraining failed ({ended}); all of it in {console}"


def stop_on_signals() -> None:
    """Let SIGTERM and SIGHUP (kill, a closing terminal) interrupt this process as Ctrl-C does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, signal.default_int_handler)


def _progress(training: Training, begin: float) -> str:
    history = read_history(training.folder)
    words = describe_progress(time.perf_counter() - begin, history, training.max_iter)
    return f"{training.name}  {words}" if training.name else words


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

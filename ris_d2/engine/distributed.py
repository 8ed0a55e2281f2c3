"""Processes of a distributed training: how they start, what they share, how they end."""

import contextlib
import datetime
import errno
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import nn

from ..processes import die_with_parent
from .hooks import Preempted

try:
    import fcntl
except ImportError:  # Windows: two trainings in one folder are not noticed
    fcntl = None

logger = logging.getLogger(__name__)

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_TIMEOUT = datetime.timedelta(minutes=30)


def launch(
    main: Callable[..., Any],
    args: Sequence[Any] = (),
    *,
    device: str,
    num_processes: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
) -> None:
    """Call ``main(*args)`` in every process: those that torchrun started, or new ones.

    As detectron2's ``launch``, except that processes on CPUs speak gloo on a machine with GPUs,
    too, that torchrun's processes may call it, and that no process outlives the one that started
    it.

    Args:
        main: importable by name; new processes import it anew.
        device: MODEL.DEVICE. NCCL on "cuda", where every process takes a GPU; gloo otherwise.
        num_processes: on this machine; 1 (and one machine) calls ``main`` here. torchrun's
            environment, if there is one, replaces this and the next three.
        num_machines, machine_rank: of all machines, each with ``num_processes``.
        dist_url: where rank 0 is met, "tcp://host:port"; "auto" (one machine) finds a free port.

    Raises:
        ValueError: more processes than GPUs on "cuda".
    """
    if all(name in os.environ for name in _TORCHRUN):
        rank, world_size, local_rank, local_size = (int(os.environ[name]) for name in _TORCHRUN)
        where = (rank // local_size, world_size, local_size, "env://")
        _run_process(local_rank, os.getppid(), device, where, main, args)
    elif num_machines * num_processes == 1:
        main(*args)
    else:
        if device.startswith("cuda") and num_processes > torch.cuda.device_count():
            raise ValueError(
                f"{num_processes} processes for {torch.cuda.device_count()} visible GPUs; give a "
                "smaller --num-gpus, or MODEL.DEVICE cpu"
            )
        if num_machines > 1 and dist_url == "auto":
            raise ValueError("--num-machines needs --dist-url tcp://HOST:PORT of the first machine")
        url = f"tcp://127.0.0.1:{_free_port()}" if dist_url == "auto" else dist_url
        where = (machine_rank, num_machines * num_processes, num_processes, url)
        started = torch.multiprocessing.spawn(
            _run_process, (os.getpid(), device, where, main, args), nprocs=num_processes, join=False
        )
        _wait(started)


@contextlib.contextmanager
def claim(folder: str, *, patience: float = 5.0) -> Iterator[None]:
    """Within, no other process claims ``folder``; the claim ends with the process, however it ends.

    Args:
        folder: made if absent.
        patience: seconds to wait for another process, which may have been killed and be about to
            end.

    Raises:
        BlockingIOError: another process has claimed it.
    """
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, ".lock"), "w") as file:
        deadline = time.monotonic() + patience
        while not _lock(file):
            if time.monotonic() > deadline:
                raise BlockingIOError(
                    f"another training is at work in {folder}: end it, or name another OUTPUT_DIR"
                )
            time.sleep(0.05)
        yield


def _lock(file: IO) -> bool:
    """False if another process has the lock; True if this one has it, or files have no locks."""
    if fcntl is None:
        return True
    try:
        # Not flock: a forked worker of the loader would hold that one for seconds longer.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        logger.warning("%s cannot be locked (%s): start one training there", file.name, error)
    return True


def share_buffers(model: nn.Module) -> None:
    """Give every process the main one's buffers: BatchNorm's running statistics.

    Each process moves its own statistics in training, and detectron2 leaves it so. Checkpoints hold
    the main process' ones; called before an evaluation, all processes evaluate what is saved.
    """
    if comm.get_world_size() == 1:
        return
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in saved:
            dist.broadcast(buffer, src=0)


def leave_process_group() -> None:
    """Close this process's groups before the interpreter ends; nothing to do without one.

    detectron2 never closes them, and ``comm`` keeps two references that outlive
    ``destroy_process_group``. A gloo thread that is still putting away its last message when the
    interpreter is taken down then aborts the process: all results written, exit code -6. Without
    those references closing waits for the threads.
    """
    if not dist.is_initialized():
        return
    comm.synchronize()  # nobody closes a connection that another process still reads from
    comm._get_global_gloo_group.cache_clear()
    comm._LOCAL_PROCESS_GROUP = None
    dist.destroy_process_group()


def _run_process(
    local_rank: int,
    parent: int,
    device: str,
    where: tuple[int, int, int, str],
    main: Callable[..., Any],
    args: Sequence[Any],
) -> None:
    die_with_parent(parent)
    machine_rank, world_size, local_size, url = where
    on_gpu = device.startswith("cuda")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=url,
        world_size=world_size,
        rank=machine_rank * local_size + local_rank,
        timeout=_TIMEOUT,
    )
    comm._LOCAL_PROCESS_GROUP, _ = dist.new_subgroups(local_size)
    if on_gpu:
        torch.cuda.set_device(local_rank)
    comm.synchronize()  # the first collective waits for the slowest start
    try:
        main(*args)
    except Preempted:  # in all processes after the same step
        leave_process_group()
        raise
    leave_process_group()


def _wait(started: torch.multiprocessing.ProcessContext) -> None:
    """Wait for processes, which are told of SIGTERM, and raise what ended one of them."""

    def tell(*_: object) -> None:
        for process in started.processes:
            process.terminate()

    is_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, tell) if is_main_thread else None
    try:
        while not started.join():
            pass
    finally:
        if is_main_thread:
            signal.signal(signal.SIGTERM, before)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

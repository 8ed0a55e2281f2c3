"""A function in a process of its own: its peak memory is its own, and it crashes or hangs alone."""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection


def in_a_process(function: Callable, *arguments: object, limit: float) -> tuple[object | None, str]:
    """What the function returns, and "" or why there is nothing, after ``limit`` seconds at the latest."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, *arguments))
    process.start()
    sender.close()  # else a process that is gone would be waited for
    try:
        if receiver.poll(limit):
            return receiver.recv()
        return None, f"not done after {limit / 60:.3g} minutes"
    except EOFError:
        process.join()
        return None, f"the process ended with status {process.exitcode}"
    finally:
        process.kill()
        process.join()  # and the GPU's memory is free


def _send(sender: Connection, function: Callable, *arguments: object) -> None:
    try:
        sender.send((function(*arguments), ""))
    except Exception as error:  # in words: not all kinds of errors can be sent
        traceback.print_exc()
        sender.send((None, f"{type(error).__name__}: {error}"))

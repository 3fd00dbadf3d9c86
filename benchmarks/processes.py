"""Functions in processes of their own, which neither a crash nor Ctrl-C leaves behind."""

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from utils import is_out_of_memory, one_line

WEEK = 7 * 24 * 3600


def in_new_process(function: Callable, *arguments: Any) -> Any:
    """The result of a function of a module, called in a process of its own, so that its peak of
    memory and its speed do not depend on what ran before. Raises RuntimeError with its error."""
    results, error = stream_from_process(function, arguments, WEEK)
    if error:
        raise RuntimeError(error)
    return results[0]


def stream_from_process(
    function: Callable, arguments: tuple, seconds: float
) -> tuple[list, str | None]:
    """What a generator of a module yields, or a function returns, in a process of its own, and the
    error, or None. What it has yielded counts if it fails, crashes or takes longer."""
    # It is forked from a process that has only imported torch, with what an optimiser imports at
    # its first step: 150 MB that would count as memory of the step.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.measure", "torch._dynamo"])
    # Blocked and not ignored: the new process inherits that, and here Ctrl-C comes a little later.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send, args=(sender, function, arguments))
    results, interrupts = [], []
    handler = signal.signal(
        signal.SIGINT, lambda *_: interrupts.append(1)
    )  # until it can be killed
    process.start()
    signal.signal(signal.SIGINT, handler)
    try:
        if interrupts:
            raise KeyboardInterrupt
        sender.close()  # only the new process has it now: its end is an EOFError here
        deadline = time.monotonic() + seconds
        while receiver.poll(max(0, deadline - time.monotonic())):
            result, error = receiver.recv()
            if result is None:
                return results, error
            results.append(result)
        return results, f"stopped after {seconds:.0f} s"
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:
            return results, "the process was killed, probably because it was out of memory"
        return results, f"the process ended with status {process.exitcode}"
    finally:
        process.kill()
        process.join()


def send(connection: Connection, function: Callable, arguments: tuple) -> None:
    """Send (result, None) for each result, and (None, the error or None) at the end."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    error = None
    try:
        results = function(*arguments)
        for result in results if isinstance(results, Iterator) else [results]:
            connection.send((result, None))
    except Exception as failure:  # of any kind: the next step should start
        error = describe_error(failure)
    connection.send((None, error))


def describe_error(error: Exception) -> str:
    if is_out_of_memory(error):
        return "out of memory"
    return f"{type(error).__name__}: {one_line(error)}"

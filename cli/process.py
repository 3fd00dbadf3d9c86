"""A script as a process: its exit status, and the signals that stop it."""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from files import BAD_PATHS
from utils import LOG, UserError, is_first_process, is_out_of_memory, print_error, printable, warn

# Exit statuses, documented in docs/checkpoints.md.
INVALID = 2
YIELDED = 75  # "temporary failure, try again" in sysexits.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h


def run(main: Callable[[], int | None]) -> None:
    """Run a script's `main()` and exit: a `UserError` is one line on stderr and status 2."""
    name = Path(sys.argv[0]).name
    keep_freed_memory()
    LOG.setLevel(logging.INFO)
    LOG.propagate, LOG.handlers = False, [MessageHandler()]
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set while torch was imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not (sys.stdout and sys.stderr):  # closed, as with >&-
        nowhere = open(os.devnull, "w")  # noqa: SIM115
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    sys.stdout.reconfigure(errors="backslashreplace")  # for paths it cannot encode
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # as in `| head`: Python must not try to flush at exit
        drop_stdout()
        status = 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print_error(f"{name}: interrupted")
        status = 128 + signal.SIGINT
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        message, status = explain(error)
        print_error(f"{name}: error: {message}")
    sys.exit(status)


def explain(error: Exception) -> tuple[str, int]:
    """The message and the exit status for an exception, which is re-raised if it is a bug."""
    if isinstance(error, UserError):
        return str(error), INVALID
    if isinstance(error, OSError):  # for example, the disk filled up while writing
        named = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return named, INVALID if error.errno in BAD_PATHS else 1
    if is_out_of_memory(error):
        return "out of memory: lower --batch_size or the size of the model", INVALID
    raise error


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones.

    New memory from the system is zeroed page by page, which on virtual machines takes several
    times longer than the computation that uses it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(M_MMAP_THRESHOLD, 2**30)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class MessageHandler(logging.Handler):
    """Prints messages on stdout and warnings on stderr, from the first process only, without
    breaking a progress bar.

    When stdout is closed, as in `| head`, later messages are dropped and SIGPIPE is raised:
    training then saves and exits (`StopSignals`), sampling continues.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if not is_first_process():
            return
        text = printable(record.getMessage())
        if record.levelno >= logging.WARNING:
            with suppress(OSError):
                tqdm.write(f"warning: {text}", file=sys.stderr)
            return
        try:
            tqdm.write(text)
            sys.stdout.flush()
        except OSError as error:
            drop_stdout()
            if isinstance(error, BrokenPipeError):
                signal.raise_signal(signal.SIGPIPE)
            else:
                warn(f"the output cannot be written ({error.strerror}); continuing without it")


def drop_stdout() -> None:
    """Let Python write to nowhere instead of a closed stdout."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class StopSignals:
    """Remembers a signal to stop, or SIGPIPE (stdout was closed), so that the training loop can
    save, if it `saves`, and exit; the same signal again ends the program at once. True after a
    signal, whose `name` and `exit_status` it has then."""

    # SIGUSR1 comes from queues before a time limit, SIGHUP when a terminal or connection is closed.
    NUMBERS = signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGUSR1, signal.SIGHUP

    def __init__(self, saves: bool):
        self.action = "saving and exiting" if saves else "exiting"
        self.name, self.exit_status = None, 0

    def __enter__(self) -> "StopSignals":
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        numbers = self.NUMBERS[:-1] if nohup else self.NUMBERS
        self.previous = {number: signal.signal(number, self.handle) for number in numbers}
        return self

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.name, self.exit_status = signal.Signals(number).name, 128 + number  # as in shells
        signal.signal(number, self.previous[number])
        print_error(f"{self.name}: {self.action}; send it again to exit at once")

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.name is not None

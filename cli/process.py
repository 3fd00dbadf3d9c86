"""A script as a process: its exit status, and the signals that stop it."""

import ctypes
import os
import signal
import sys
from pathlib import Path

from utils import BAD_PATHS, UserError, is_out_of_memory, print_error

# Exit statuses, documented in docs/checkpoints.md.
INVALID = 2
YIELDED = 75  # "temporary failure, try again" in sysexits.h
# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def run(main):
    """Run a script's `main()` and exit: a `UserError` is one line on stderr and status 2."""
    name = Path(sys.argv[0]).name
    keep_freed_memory()
    sys.stdout.reconfigure(errors="backslashreplace")  # for paths it cannot encode
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # as in `| head`: Python must not try to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print_error(f"{name}: interrupted")
        status = 128 + signal.SIGINT
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        message, status = explain(error)
        print_error(f"{name}: error: {message}")
    sys.exit(status)


def explain(error):
    """The message and the exit status for an exception, which is re-raised if it is a bug."""
    if isinstance(error, UserError):
        return str(error), INVALID
    if isinstance(error, OSError):  # for example, the disk filled up while writing
        return str(error), INVALID if error.errno in BAD_PATHS else 1
    if is_out_of_memory(error):
        return "out of memory: lower --batch_size or the size of the model", INVALID
    raise error


def keep_freed_memory():
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


class StopSignals:
    """Remembers a SIGINT, SIGTERM or SIGPIPE (stdout was closed), so that the training loop can
    save and exit; the same signal again ends the program at once. True after a signal."""

    NUMBERS = signal.SIGINT, signal.SIGTERM, signal.SIGPIPE

    def __enter__(self):
        self.number = None
        self.previous = {s: signal.signal(s, self.handle) for s in self.NUMBERS}
        return self

    def handle(self, number, frame):
        self.number = number
        signal.signal(number, self.previous[number])
        print_error(f"{self.name}: saving and exiting; send it again to exit at once")

    def __exit__(self, *exception):
        for signal_number, handler in self.previous.items():
            signal.signal(signal_number, handler)

    def __bool__(self):
        return self.number is not None

    @property
    def name(self):
        return signal.Signals(self.number).name if self else None

    @property
    def exit_status(self):
        """128 + the number of the signal, as shells report it; 0 without a signal."""
        return 128 + self.number if self else 0

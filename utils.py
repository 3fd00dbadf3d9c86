"""Shared helpers: errors, messages, atomic file writes, device and precision."""

import errno
import fcntl
import os
import re
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

import torch
from tqdm import tqdm

# Where Linux lists the instruction sets of a CPU, and those with bfloat16 (x86; ARM).
CPU_FLAGS = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
# errno values of an invalid path.
BAD_PATHS = {errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR,
             errno.EISDIR, errno.ELOOP, errno.EINVAL}  # fmt: skip
# A field of a pattern of file names.
FIELD = re.compile(r"\{(:0\d{1,2}d)?\}", re.ASCII)
# In the names of temporary files.
MACHINE = re.sub(r"\W", "_", os.uname().nodename)
# Seconds after which a temporary file that is not written to is abandoned.
ABANDONED = 3600


class UserError(Exception):
    """An error the user can fix: one line that names the value, the reason and the way out."""


# Messages


def is_first_process():
    """Whether this is the first of the processes that torchrun started, or the only process."""
    return int(os.environ.get("WORLD_SIZE", 1)) == 1 or os.environ.get("RANK", "0") == "0"


def say(text):
    """Print a line on stdout, from the first process only, without breaking a progress bar.

    When stdout is closed, as in `| head`, later lines are dropped and SIGPIPE is raised: training
    then saves and exits (`StopSignals`), sampling continues.
    """
    if not is_first_process():
        return
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            signal.raise_signal(signal.SIGPIPE)
        else:
            warn(f"the output cannot be written ({error.strerror}); continuing without it")


def warn(text):
    """Print a warning on stderr, from the first process only, without breaking a progress bar."""
    if is_first_process():
        with suppress(OSError):
            tqdm.write(f"warning: {text}", file=sys.stderr)


def print_error(text):
    """Print a line on stderr, if it is open, with control characters escaped."""
    with suppress(OSError):
        print("".join(c if c.isprintable() else repr(c)[1:-1] for c in text), file=sys.stderr)


def one_line(error, longest=200):
    """The message of an exception on one line, or the name of its class."""
    return " ".join(str(error).split())[:longest] or type(error).__name__


# Errors of torch that only their message identifies


def is_out_of_memory(error):
    """Whether Python, torch or CUDA ran out of memory; torch has no class for CPU memory."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text


def is_lost_process(error):
    """Whether a collective operation failed because another process has ended."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


# Files


def count_fields(pattern: str) -> int:
    """The number of {} in a pattern of file names.

    Raises ValueError for other braces than {} and, for a number with zeros before it, {:06d}:
    {:>1000000000} would be a name of a gigabyte.
    """
    others, count = FIELD.subn("", pattern)
    if "{" in others or "}" in others:
        raise ValueError("only {} and {:06d} may stand in braces")
    return count


def write_atomically(
    path: str | Path, write: Callable[[BinaryIO], object], durable: bool = False
) -> None:
    """Call `write` with a temporary file beside `path`, then rename it to `path`: readers of
    `path` see the old file or the new one, never a part of it. Missing folders are created, links
    are followed.

    With `durable` that holds even if the machine crashes. Raises OSError, which names `path`.
    """
    path = output_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent.absolute())
    try:
        with temporary_file(path.parent) as (temporary, lock):
            with os.fdopen(os.dup(lock), "wb") as file:
                write(file)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        if durable:
            sync_folder(path.parent)
    except OSError as error:  # it names no file, or the temporary one
        reason = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, reason, str(path)) from None


def output_file(path: str | Path) -> Path:
    """The file that is written for `path`, at the end of its links. Raises OSError if anything
    but a regular file is there, which a rename would replace: a device, a pipe, a folder."""
    is_folder = os.fspath(path).endswith(os.sep)
    path = Path(path)
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        kind = stat.S_IFDIR if is_folder else stat.S_IFREG
    if not stat.S_ISREG(kind):
        code = errno.EISDIR if stat.S_ISDIR(kind) else errno.EINVAL
        reason = "it is a folder" if stat.S_ISDIR(kind) else "it is not a regular file"
        raise OSError(code, reason, str(path))
    return Path(os.path.realpath(path)) if path.is_symlink() else path


@contextmanager
def temporary_file(folder: Path) -> Iterator[tuple[Path, int]]:
    """A new file, which is removed in the end if it is still there, and its descriptor. It is
    locked until then, which tells `remove_abandoned` that its writer lives."""
    while True:
        path = folder / f"unfinished-{MACHINE}-{secrets.token_hex(4)}.tmp"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if path.exists():  # else it was taken for abandoned before it was locked
            break
        os.close(descriptor)
    try:
        yield path, descriptor
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@cache  # once in each process
def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files in a folder whose writers were killed."""
    for path in folder.glob("unfinished-*.tmp"):
        with suppress(OSError):  # another user's, or removed by another process
            if is_abandoned(path):
                path.unlink()


def is_abandoned(path: Path) -> bool:
    """Whether the writer of a temporary file is dead. Its lock ends with it; where locks may not
    tell, on another machine or a file system without them, an hour without a change does."""
    decided = path.name.startswith(f"unfinished-{MACHINE}-")
    with open(path, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            decided = False
    return decided or time.time() - path.stat().st_mtime > ABANDONED


def sync_folder(folder: Path) -> None:
    """Flush a rename in this folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(path: str | Path, flag: str) -> None:
    """Raise a `UserError` if the file `path` could not be written; creates nothing.

    Its folder may be missing: then the nearest existing parent must be writable.
    """
    try:
        target = output_file(path)
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, "it is write-protected")
        folder = next(parent for parent in target.absolute().parents if parent.exists())
    except OSError as error:
        raise UserError(
            f"{flag} {path} cannot be written ({error.strerror}): choose another path"
        ) from None
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{flag} {path} cannot be written because {folder} is not writable "
            f"({error.strerror}): choose another path"
        ) from None


# Device and precision


def select_device(name):
    """The torch.device of --device; raises a `UserError` if this machine does not have it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        name = "mps" if name == "cpu" and torch.backends.mps.is_available() else name
    kind, _, index = name.partition(":")
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # set by torchrun: one GPU per process
        index = os.environ["LOCAL_RANK"]
        name = f"cuda:{index}"
    if kind not in ("cpu", "cuda", "mps") or (name != kind and not index.isdecimal()):
        raise UserError(f"--device {name} is unknown: give auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UserError(f"--device {name}: torch finds {found} CUDA devices here; try --device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch finds no Apple GPU here; try --device cpu")
    return torch.device(name)


def to_device(tensor, device):
    """The tensor on the device; a copy to a GPU does not block the CPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def select_precision(name, device):
    """The precision, "fp32" or "bf16", that --precision names.

    "bf16" is refused if the device has no bfloat16 instructions, since emulating them is slow;
    "bf16-emulated" is bf16 in any case; "auto" is bf16 if the device has them.
    """
    if name == "auto":
        return "bf16" if has_bfloat16(device) else "fp32"
    if name == "bf16" and not has_bfloat16(device):
        raise UserError(
            f"--precision bf16: this {device.type} device has no bfloat16 instructions, so bf16 "
            "would be slower: use fp32, or bf16-emulated to use bf16 anyway"
        )
    return name.removesuffix("-emulated")


def has_bfloat16(device):
    """Whether the device has bfloat16 instructions; for a CPU, as Linux or macOS reports it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "mps":
        return True
    if CPU_FLAGS.exists():
        return not BFLOAT16_FLAGS.isdisjoint(CPU_FLAGS.read_text().split())
    if not shutil.which("sysctl"):
        return False
    command = ["sysctl", "-n", "hw.optional.arm.FEAT_BF16"]
    return subprocess.run(command, capture_output=True).stdout.strip() == b"1"


def autocast(device, precision):
    """The context manager in which a model runs in "fp32" or "bf16".

    Without autocast's cache: a pass uses each weight once, and a CUDA graph would go on reading the
    converted weights after the context had freed them.
    """
    enabled = precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def device_memory(device):
    """Bytes of memory of a GPU, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(needed, device):
    """Raise a `UserError` if `needed` bytes, a lower bound, exceed the memory of the device."""
    available = device_memory(device)
    if needed > available:
        raise UserError(
            f"this model and --batch_size need at least {needed / 1e9:.1f} GB of memory, "
            f"and the {device.type} device has {available / 1e9:.1f}: reduce one of them"
        )

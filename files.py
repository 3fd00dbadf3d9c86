"""Files are written whole or not at all, through links, and never in the place of a device."""

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

from utils import UserError

# errno values of an invalid path.
BAD_PATHS = {errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR,
             errno.EISDIR, errno.ELOOP, errno.EINVAL}  # fmt: skip
FIELD = re.compile(r"\{(:0\d{1,2}d)?\}", re.ASCII)  # a field of a pattern of file names
MACHINE = re.sub(r"\W", "_", os.uname().nodename)  # in the names of temporary files
ABANDONED = 3600  # seconds after which a temporary file without a change is abandoned


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


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder, which is renamed to `path` if no exception leaves the context, and else
    removed: `path` has all that is written there or nothing. It must not exist, or be empty."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"unfinished-{MACHINE}-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    cause = ""
    try:
        target = output_file(path)
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, "it is write-protected")
        folder = next(parent for parent in target.absolute().parents if parent.exists())
        cause = f" because {folder} is not writable"
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = f"cannot be written{cause} ({error.strerror})"
        raise UserError(f"{flag} {path} {reason}: choose another path") from None

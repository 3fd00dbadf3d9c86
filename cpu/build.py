"""Compiles this program's C++ files for this CPU, which takes seconds, and caches the libraries."""

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from files import write_atomically
from layers import attention, gated, mixture
from utils import UserError, one_line, say, warn

FOLDER = Path(__file__).parent
# Included by the sources.
HEADERS = (
    "numbers.h", "exports.h", "tile.h", "product.h", "common.h",
    "gated.h", "attention.h", "gated_attention.h", "dropout.h", "norm.h",
    "words.h", "feed_forward.h", "mixture.h",
)  # fmt: skip
# The eps of torch.nn.LayerNorm.
NORM_EPSILON = 1e-5
# Of the operations on rows: enough to be worth starting a task, few enough to stay in the cache.
ROWS_PER_TASK = 64
# Of the feed-forward network: enough to pay for reading the weights, few enough to stay in a core's
# own cache.
ROWS_PER_BLOCK = 192
CONSTANTS = {
    "ATTENTION_EPSILON": attention.EPSILON,
    "BIN_WIDTH": mixture.BIN_WIDTH,
    "LENGTH_EPSILON": gated.LENGTH_EPSILON,
    "MIN_LOG_SCALE": mixture.MIN_LOG_SCALE,
    "NORM_EPSILON": NORM_EPSILON,
    "OUTPUT_RMS": gated.OUTPUT_RMS,
    "ROWS_PER_BLOCK": ROWS_PER_BLOCK,
    "ROWS_PER_TASK": ROWS_PER_TASK,
}
# Letters of the argument types in the table of functions of exports.h.
ARGUMENTS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


class Export(ctypes.Structure):
    """As in exports.h."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("types", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]  # fmt: skip


class Library:
    """The functions of a compiled C++ file. Raises OSError if it cannot be loaded."""

    def __init__(self, path: Path):
        exports = ctypes.CDLL(str(path)).exports
        exports.restype = ctypes.POINTER(Export)
        self.functions = {}
        for export in takewhile(lambda export: export.name, exports()):
            types = [ARGUMENTS[letter] for letter in export.types.decode()]
            function = ctypes.CFUNCTYPE(ctypes.c_int, *types)(export.address)
            self.functions[export.name.decode()] = function

    def call(self, name: str, *arguments) -> None:
        """Call a function with numbers, and with contiguous tensors, whose addresses it gets (null
        for None). Raises MemoryError, and `UserError` if a thread cannot be started."""
        status = self.functions[name](*(argument(name, x) for x in arguments))
        if status == 0:
            return
        if status == 1:
            raise MemoryError
        if status == 2:
            raise UserError(
                f"the system cannot start the {torch.get_num_threads()} threads that torch is to "
                "use: set OMP_NUM_THREADS to fewer"
            )
        raise RuntimeError(f"{name} failed")


def argument(name, x):
    """A tensor's address; anything else as it is."""
    if not torch.is_tensor(x):
        return x
    if not x.is_contiguous():
        raise TypeError(f"{name} takes contiguous tensors")
    return x.data_ptr()


def try_compile(build: Callable[[], Any], required: bool | None, purpose: str) -> Any:
    """The result of `build()`, which compiles, or None, with a message, if plain PyTorch is to be
    used. `required` is --compile: True makes a failure a `UserError`, False compiles nothing.
    """
    if required is False:
        say(f"--no-compile: {purpose} in plain PyTorch, which is slower")
        return None
    try:
        return build()
    except UserError as error:
        if required:
            raise
        warn(f"{error}; {purpose} in plain PyTorch, which is slower")


def find_compiler() -> str | None:
    """The path of the C++ compiler: $CXX, or the first of the usual names; None without one."""
    names = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def check_compiler() -> None:
    """Raise a `UserError` if there is no C++ compiler."""
    if not find_compiler():
        raise UserError("--compile: no C++ compiler found: install g++, or give --no-compile")


def cache_path(source: str, sizes: dict) -> tuple[Path, list[str]]:
    """Where the library of a C++ file, compiled for sizes {macro: value}, is cached, and the
    command that compiles it.

    The path lacks `-CHECKSUM.so`. Its name is a hash of everything that determines the library:
    the sources, the flags, and the compiler's predefined macros, which include its version and
    the CPU's instruction sets.
    """
    arm = platform.machine().lower() in ("arm64", "aarch64")
    target = "-mcpu=native" if arm else "-march=native"
    command = [find_compiler(), "-std=c++17", "-O3", target, "-shared", "-fPIC", "-pthread"]
    macros = subprocess.run(
        [command[0], target, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True
    ).stdout
    # With g++, OpenMP uses the same runtime as torch; clang may have none. g++ also avoids fused
    # multiply-adds in some loops on some CPUs, and samples would depend on the size of a batch. And
    # for the rest of a row it may use smaller vectors that must be aligned where they are not.
    gcc = ["-fopenmp", "--param=avoid-fma-max-bits=0", "--param=vect-epilogues-nomask=0"]
    command += ["-fopenmp-simd"] if b"__clang__" in macros else gcc
    command += ["-fno-math-errno", "-fno-trapping-math"]
    command += [f"-D{name}={value}" for name, value in (CONSTANTS | sizes).items()]
    content = "\0".join(command).encode() + macros
    for name in (source, *HEADERS):
        content += (FOLDER / name).read_bytes()
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise UserError("--compile: no home folder found: set XDG_CACHE_HOME or use --no-compile")
    name = f"{Path(source).stem}-{checksum(content)}"
    return cache / "image-transformers" / name, command


def checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def cached_files(path: Path) -> list[Path]:
    """The files cached for a `cache_path`, intact or not."""
    return sorted(path.parent.glob(f"{path.name}-*.so"))


def find_cached(path: Path) -> Path | None:
    """The library cached for a `cache_path` if it is intact: its name ends with its checksum.
    Loading a damaged one would kill the process."""
    intact = (x for x in cached_files(path) if x.stem.endswith(checksum(x.read_bytes())))
    return next(intact, None)


def is_cached(source: str, sizes: dict) -> bool:
    """Whether the library has been compiled before."""
    try:
        return bool(find_compiler() and find_cached(cache_path(source, sizes)[0]))
    except (UserError, OSError):
        return False


def load_library(source: str, sizes: dict) -> tuple[Library, float]:
    """The library, and the seconds its compilation took, 0 if it was cached.

    Raises `UserError` if it cannot be compiled or loaded.
    """
    check_compiler()
    path, command = cache_path(source, sizes)
    start = time.perf_counter()
    library, is_new = find_or_compile(path, [*command, str(FOLDER / source)])
    seconds = time.perf_counter() - start if is_new else 0.0
    if is_new:
        say(f"compiled {source} in {seconds:.1f} s; cached in {path.parent}")
    try:
        return Library(library), seconds
    except OSError as error:  # a cache folder mounted noexec, a missing runtime
        raise UserError(
            f"--compile: {library} cannot be loaded ({one_line(error)}): set XDG_CACHE_HOME to "
            "another folder, or use --no-compile"
        ) from None


def find_or_compile(path, command):
    """The library of a `cache_path`, and whether it was compiled now."""
    try:
        if library := find_cached(path):
            return library, False
        with locked(path.parent):
            if library := find_cached(path):  # another process has compiled it meanwhile
                return library, False
            return compile_to(path, command), True
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise UserError(f"--compile: {command[0]} failed ({lines[0]}): use --no-compile") from None
    except OSError as error:
        raise UserError(
            f"--compile: {path.parent} cannot be written ({error.strerror}): "
            "set XDG_CACHE_HOME to a writable folder, or use --no-compile"
        ) from None


@contextmanager
def locked(folder):
    """Create the folder, and let one process at a time change it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compile_to(path, command):
    """Compile the library of a `cache_path`, whose folder is locked; returns the file."""
    for leftover in path.parent.glob("*.tmp"):  # of a process that was killed
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    with tempfile.TemporaryDirectory(dir=path.parent, suffix=".tmp") as folder:
        library = Path(folder) / "library.so"
        environment = {**os.environ, "TMPDIR": folder}  # the compiler's own files, too
        command = [*command, "-o", str(library)]
        subprocess.run(command, check=True, capture_output=True, env=environment)
        content = library.read_bytes()
    for damaged in cached_files(path):
        warn(f"{damaged} was damaged and is replaced")
        damaged.unlink()
    library = path.with_name(f"{path.name}-{checksum(content)}.so")
    write_atomically(library, lambda file: file.write(content), durable=True)
    return library

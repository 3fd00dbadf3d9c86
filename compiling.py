"""Compiles this program's C++ files in seconds, for this processor, and keeps the libraries."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from reporting import say, warn
from utils import UserError

FOLDER = Path(__file__).parent
HEADER = "processor.h"  # included by all


def compiled(make, wanted, purpose):
    """What `make()`, which compiles, returns; None where it is not to (`wanted`, of --compile, is
    False) or cannot: a line says why, or, where it was `wanted`, a `UserError`."""
    if wanted is False:
        return None
    try:
        return make()
    except UserError as error:
        if wanted:
            raise
        warn(f"{error}; {purpose} without, which is slower")


def find_compiler():
    """The C++ compiler: $CXX, or the first of the usual names; None where there is none."""
    names = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def check_compiler():
    """A `UserError` where there is no C++ compiler."""
    if not find_compiler():
        raise UserError("--compile: no C++ compiler is there: install g++, or give --no-compile")


def kept_at(source, sizes):
    """Where the library of a C++ file, with constants {name: int}, is kept, and the command that
    compiles it.

    The name holds all that it was made from: the source, the flags, and the macros of the
    compiler, which tell its version and the instructions of the processor.
    """
    arm = platform.machine().lower() in ("arm64", "aarch64")
    target = "-mcpu=native" if arm else "-march=native"
    command = [find_compiler(), "-std=c++17", "-O3", target, "-shared", "-fPIC", "-pthread"]
    macros = subprocess.run(
        [command[0], target, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True
    ).stdout
    # g++ comes with the OpenMP that torch uses too; clang may come with none.
    command += ["-fopenmp-simd" if b"__clang__" in macros else "-fopenmp"]
    command += ["-fno-math-errno", "-fno-trapping-math"]
    command += [f"-D{name}={size}" for name, size in sizes.items()]
    made_from = "\0".join(command).encode() + macros
    for name in (source, HEADER):
        made_from += (FOLDER / name).read_bytes()
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise UserError("--compile: you have no home folder: set XDG_CACHE_HOME, or --no-compile")
    name = f"{Path(source).stem}-{hashlib.sha256(made_from).hexdigest()[:32]}.so"
    return cache / "image-transformers" / name, command


def is_kept(source, sizes):
    """Whether the library was compiled before."""
    try:
        return bool(find_compiler()) and kept_at(source, sizes)[0].exists()
    except UserError:
        return False


def load_library(source, sizes):
    """The library, a `ctypes.CDLL`, and the seconds that compiling it took, 0 if it was kept.
    Raises `UserError` where it cannot be compiled."""
    check_compiler()
    path, command = kept_at(source, sizes)
    seconds = 0.0
    if not path.exists():
        start = time.perf_counter()
        compile_to(path, [*command, FOLDER / source])
        seconds = time.perf_counter() - start
        say(f"compiled {source} in {seconds:.1f} s; kept in {path.parent}")
    return ctypes.CDLL(str(path)), seconds


def compile_to(path, command):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            subprocess.run([*command, "-o", made], check=True, capture_output=True)
            os.replace(made, path)  # two runs at once make the same file
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise UserError(f"--compile: {command[0]} failed ({lines[0]}): use --no-compile") from None
    except OSError as error:
        raise UserError(
            f"--compile: {path.parent} cannot be written ({error.strerror}): "
            "set XDG_CACHE_HOME to a folder that can, or use --no-compile"
        ) from None

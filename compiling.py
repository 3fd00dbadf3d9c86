"""Compiles this program's C++ files in seconds, for this processor, and keeps the libraries."""

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path

from utils import UserError, find_compiler

FOLDER = Path(__file__).parent
HEADER = "processor.h"  # included by all


def library_path(source, sizes):
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
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = f"{Path(source).stem}-{hashlib.sha256(made_from).hexdigest()[:32]}.so"
    return cache / "image-transformers" / name, command


def is_kept(source, sizes):
    """Whether the library was compiled before."""
    return library_path(source, sizes)[0].exists()


def load_library(source, sizes):
    """The library, a `ctypes.CDLL`, its path, and the seconds that compiling it took, 0 if it was
    kept. Raises `UserError` where it cannot be compiled."""
    path, command = library_path(source, sizes)
    start = time.perf_counter()
    if not path.exists():
        compile_to(path, [*command, FOLDER / source])
        return ctypes.CDLL(str(path)), path, time.perf_counter() - start
    return ctypes.CDLL(str(path)), path, 0.0


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

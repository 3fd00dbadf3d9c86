"""Shared helpers: errors, messages, device and precision."""

import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch

# Where Linux describes a CPU, and the instruction sets with bfloat16 (x86; ARM).
CPU_INFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
MEMORY = Path("/proc/meminfo")


class UserError(Exception):
    """An error the user can fix: one line that names the value, the reason and the way out."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, torch or CUDA ran out of memory; torch has no class for CPU memory."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text


def is_first_process() -> bool:
    """Whether this is the first of the processes that torchrun started, or the only process."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


# Messages and warnings go to a logger: cli/process.py prints them, other programs that import the
# modules see the warnings only, unless they ask for more.
LOG = logging.getLogger("image_transformer")
say, warn = LOG.info, LOG.warning


def print_error(text: str) -> None:
    """Print a line on stderr, if it is open, with control characters escaped."""
    with suppress(OSError):
        print(printable(text), file=sys.stderr)


def printable(text: str) -> str:
    """A text with its control characters, such as a newline in a file's name, escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def one_line(error: Exception | str, longest: int = 200) -> str:
    """The message of an exception on one line, without colours, or the name of its class."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return " ".join(text.split())[:longest] or type(error).__name__


def select_device(name: str) -> torch.device:
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


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device; a copy to a GPU does not block the CPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def select_precision(name: str, device: torch.device, backend: str = "native") -> str:
    """The precision, "fp32" or "bf16", that --precision names. On a GPU "auto" is bf16 if it has
    bfloat16 instructions; on a CPU it remains "auto", to be measured (engine/precision.py)."""
    if name == "auto" and backend != "native":
        return "fp32"  # the library's only one
    if name == "auto" and device.type != "cpu":
        return "bf16" if has_bfloat16(device) else "fp32"
    if name == "bf16" and not has_bfloat16(device):
        warn(f"--precision bf16: this {device.type} has no bfloat16 instructions: fp32 is faster")
    return name


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16 instructions; for a CPU, as Linux or macOS reports it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "mps":
        return True
    if CPU_INFO.exists():
        return not BFLOAT16_FLAGS.isdisjoint(CPU_INFO.read_text().split())
    if not shutil.which("sysctl"):
        return False
    command = ["sysctl", "-n", "hw.optional.arm.FEAT_BF16"]
    return subprocess.run(command, capture_output=True).stdout.strip() == b"1"


def not_emulated(device: torch.device, *precisions: str) -> list[str]:
    """Those of the precisions that a device has instructions for. torch's emulation of bfloat16
    takes many times as long as float32, so it is not even measured."""
    return [name for name in precisions if name == "fp32" or has_bfloat16(device)]


def cpu_name() -> str:
    """The name of the CPU; on x86 with the numbers of its family and model, since virtual machines
    may have names without a generation."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    known = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    if "model name" not in known:
        return platform.processor() or platform.machine()
    numbers = [f"{key} {known[key]}" for key in ("cpu family", "model") if key in known]
    return ", ".join([known["model name"], *numbers])


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context manager in which a model runs in "fp32" or "bf16".

    Without autocast's cache: a pass uses each weight once, and a CUDA graph would go on reading the
    converted weights after the context had freed them.
    """
    enabled = precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def device_memory(device: torch.device) -> int:
    """Bytes of memory of a GPU, or those that are available on this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    with suppress(OSError, TypeError):  # on Linux
        return 1024 * int(re.search(r"MemAvailable: +(\d+) kB", MEMORY.read_text())[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

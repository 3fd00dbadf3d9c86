"""What the benchmarks measure with: models, times, memory and the machine's limits."""

import os
import resource
import statistics
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.command_line import OUTPUTS, parse
from cli.flags import flag
from cpu.torch_private import private_or_public, public_linear
from engine.checkpoint import NO_CHECKPOINT
from engine.construction import load_model
from layers.ops import PlainOps
from models import ImageTransformer, ModelConfig
from options import COUNT
from utils import UserError, cpu_name, not_emulated, select_device, warn

# The models of the paper.
CONFIGS = {
    "mnist": {"length": 784, "n_layers": 8, "n_heads": 8},
    "cifar10": {"length": 3072, "n_layers": 16, "n_heads": 8},
}
# Those that are compared with the library: also a small one, that of `make demo` but without
# neighbours, which the library lacks.
COMPARED = CONFIGS | {"small": {"length": 784, "n_layers": 3, "n_heads": 3}}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parse_arguments(
    description: str, batches: list[int] | None, argv: list[str] | None
) -> Namespace:
    """The flags of the comparisons with the library, with these batches by default, and the device
    as a torch.device."""
    flags = {
        "configs": flag(
            "models of the paper, and a small one", tuple(COMPARED), list(COMPARED), nargs="+"
        ),
        "batches": flag("images at a time", COUNT, batches, nargs="+"),
        "precisions": flag(
            "of our model (default: those that the device has instructions for)",
            tuple(DTYPES),
            nargs="+",
        ),
        "rounds": flag("repetitions, of which the median counts", COUNT, 5),
        "device": flag("auto (a GPU if there is one), cpu, cuda or cuda:N", default="cpu"),
    }
    args = parse(description, {**flags, **OUTPUTS}, argv)
    args.device = select_device(args.device)
    args.precisions = args.precisions or not_emulated(args.device, *DTYPES)
    return args


def print_machine(precisions: list[str], device: torch.device) -> None:
    """Print the machine and its fastest rates of large matrix products and of memory."""
    print(describe_machine(device))
    for name in precisions:
        operations = matrix_rate(DTYPES[name], device)
        print(f"large matrix products in {name}: {operations / 1e9:.0f} GFLOP/s")
    reads, changes = rate(reading(2**28, device), device), memory_rate(2**28, device)
    speeds = f"{reads / 1e9:.0f} GB/s read, {changes / 1e9:.0f} GB/s read and written"
    print(f"memory beyond the caches: {speeds}")


def make_models(
    config: ModelConfig, device: torch.device, ops: PlainOps | None = None
) -> dict[str, ImageTransformer]:
    """ "ours" and, if it is installed, the library's, "theirs", with the same random weights."""
    models = {"ours": load_model(NO_CHECKPOINT, config, device=device, ops=ops)}
    library = {"device": device, "backend": "fast-transformers"}
    try:
        models["theirs"] = load_model(NO_CHECKPOINT, config, **library)
    except UserError as error:
        warn(f"{error}; measuring without it")
    return models


def count_weights(model: ImageTransformer) -> int:
    """Those of matrices, which every byte is multiplied by."""
    return sum(matrix.numel() for matrix in matrices(model))


def matrices(model: ImageTransformer) -> list[torch.Tensor]:
    return [p for p in model.transformer.parameters() if p.dim() == 2] + [model.predictor.weight]


def state_bytes(states: Any) -> int:
    """The size of all tensors in `states`, which nest them in lists and objects."""
    if torch.is_tensor(states):
        return states.nbytes
    if isinstance(states, (list, tuple)):
        return sum(map(state_bytes, states))
    return state_bytes(list(vars(states).values())) if hasattr(states, "__dict__") else 0


def timed(run: Callable, device: torch.device) -> float:
    """Seconds of one call, including the device's work; a GPU measures them by its own clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleaved(
    candidates: dict[Hashable, Callable], rounds: int, device: torch.device
) -> dict[Hashable, float]:
    """Median seconds of each of `candidates`, {name: function}, called alternately after a
    warm-up, so that a slow phase of the machine affects all of them."""
    for run in candidates.values():
        run()
    times = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            times[name].append(timed(run, device))
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def median_seconds(run: Callable, seconds: float, device: torch.device) -> float:
    """Median seconds of `run`, which has been called before: of as many calls as fit into
    `seconds`, two to five. Of two calls the faster one counts: what else the machine does can only
    slow a call down."""
    times = []
    while len(times) < 2 or (len(times) < 5 and sum(times) < seconds):
        times.append(timed(run, device))
    return statistics.median_low(times)


# Memory and the machine


def current_mb(device: torch.device) -> float:
    """The memory, MB, of this process, or of its tensors on a GPU. (Where there is no /proc, the
    peak so far.)"""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e6
    return resident_kb("VmRSS") / 1e3


def peak_mb(device: torch.device) -> float:
    """The peak so far of what `current_mb` returns."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resident_kb("VmHWM") / 1e3


def resident_kb(name):
    """The resident set of this process, kB: VmRSS is the current one, VmHWM the largest so far.
    (On Linux, getrusage includes the time before exec.)"""
    status = Path("/proc/self/status")
    if not status.exists():
        unit = 1000 if sys.platform == "darwin" else 1  # macOS reports bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1.024


# (amount, function): what is done by calling the function, floating-point operations or bytes.
Work = tuple[float, Callable]


def matrix_product(dtype: torch.dtype, device: torch.device) -> Work:
    """A large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3, lambda: torch.mm(a, b)


def reading(size: int, device: torch.device) -> Work:
    """To read `size` bytes, by a sum, torch's fastest function that only reads; from a cache, if
    it is called again and they fit."""
    return size, torch.zeros(max(1, size // 4), device=device).sum


def changing(size: int, device: torch.device) -> Work:
    """To read and write `size` bytes, which count twice; as `reading`."""
    x = torch.zeros(max(1, size // 4), device=device)
    return 2 * size, lambda: x.add_(1)


def rate(work: Work, device: torch.device) -> float:
    """What is done in a second at best: by the fastest of ten calls, after one that does not
    count."""
    amount, run = work
    run()
    return amount / min(timed(run, device) for _ in range(10))


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a large matrix product, the best of ten."""
    return rate(matrix_product(dtype, device), device)


def memory_rate(size: int, device: torch.device) -> float:
    """Bytes per second, read plus written, when `size` bytes are changed in place, the best of
    ten."""
    return rate(changing(size, device), device)


def products(
    model: ImageTransformer, rows: int, dtype: torch.dtype, device: torch.device, train: bool
) -> Callable[[], None]:
    """A function that computes the products of a pass through a model with `rows` rows, one after
    the other without anything between them; to `train`, with those of the gradients of inputs and
    weights."""
    shapes = Counter(tuple(matrix.shape) for matrix in matrices(model))
    linear = private_or_public(dtype) if device.type == "cpu" else public_linear
    calls = []
    for (outputs, inputs), n in shapes.items():
        sizes = (rows, inputs), (outputs, inputs), (rows, outputs)
        x, weight, g = (torch.randn(size, device=device).to(dtype) for size in sizes)
        of_matrix = [partial(linear, x, weight, None, None)]
        if train:
            of_matrix += [partial(linear, g, weight.t(), None, None), partial(torch.mm, g.t(), x)]
        calls += n * of_matrix

    def run():
        for call in calls:
            call()

    return run


def describe_machine(device: torch.device) -> str:
    """One line: CPU or GPU, threads, torch."""
    name = f"{cpu_name()}, {os.cpu_count()} cores"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"

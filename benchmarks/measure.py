"""What the benchmarks share: timing, memory, the machine's own limits, tables and files."""

import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from tqdm import tqdm

from cpu.ops import CompiledOps
from models import ImageTransformer
from utils import UserError

# The models of the paper.
CONFIGS = {
    "mnist": {"length": 784, "n_layers": 8, "n_heads": 8},
    "cifar10": {"length": 3072, "n_layers": 16, "n_heads": 8},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def add_arguments(parser, batches):
    """The flags that both benchmarks share."""
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--batches", nargs="+", type=int, default=batches, metavar="N")
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="repetitions (5)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", metavar="FILE", help="write the records")
    parser.add_argument("--plot", metavar="FILE", help="write a bar chart")


def make_pair(config, ops=None):
    """Our model and the library's with the same weights, or None if it is not installed."""
    torch.manual_seed(0)
    ours = ImageTransformer(config, ops)
    try:
        from reference.model import ReferenceTransformer
    except UserError as error:
        tqdm.write(f"{error}; measuring without it", file=sys.stderr)
        return ours, None
    theirs = ReferenceTransformer(config)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def compiled_ops(config):
    """The compiled operations, or None, with a message, if they cannot be built."""
    try:
        return CompiledOps(config)
    except UserError as error:
        print(f"{error}; measuring without them", file=sys.stderr)


def count_weights(model):
    """Those of matrices, which every byte is multiplied by."""
    matrices = [p.numel() for p in model.transformer.parameters() if p.dim() == 2]
    return sum(matrices) + model.predictor.weight.numel()


def state_bytes(states):
    """The size of all tensors in `states`, which nest them in lists and objects."""
    if torch.is_tensor(states):
        return states.nbytes
    if isinstance(states, (list, tuple)):
        return sum(map(state_bytes, states))
    return state_bytes(list(vars(states).values())) if hasattr(states, "__dict__") else 0


def timed(run, device):
    """Seconds of one call, including the device's work; a GPU measures them by its own clock."""
    synchronize(device)
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(candidates, rounds, device):
    """Median seconds of each of `candidates`, {name: function}, called alternately after a
    warm-up, so that a slow phase of the machine affects all of them."""
    for run in candidates.values():
        run()
    times = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            times[name].append(timed(run, device))
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def median_seconds(run, seconds, device, calls=5):
    """Median seconds of `run`, which has been called before: of as many calls as fit into
    `seconds`, at least two and at most `calls`. Of two calls the faster one counts: what else the
    machine does can only slow a call down."""
    times = []
    while len(times) < 2 or (len(times) < calls and sum(times) < seconds):
        times.append(timed(run, device))
    return statistics.median_low(times)


def in_new_process(function, *arguments):
    """The result of a function of a module, called in a process of its own, so that its peak of
    memory and its speed do not depend on what ran before. Raises MemoryError if it was killed."""
    # It is forked from a process that has only imported torch, with what an optimiser imports at
    # its first step: 150 MB that would count as memory of the step.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool:
        raise MemoryError("the process was killed, probably because memory ran out") from None


def current_mb(device):
    """The memory, MB, of this process, or of its tensors on a GPU. (Where there is no /proc, the
    peak so far.)"""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e6
    return resident_kb("VmRSS") / 1e3


def peak_mb(device):
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


def matrix_rate(dtype, device):
    """Floating-point operations per second of a large matrix product, the best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * n**3 / min(timed(lambda: torch.mm(a, b), device) for _ in range(10))


def memory_rate(size, device):
    """Bytes per second, read plus written, when `size` bytes are changed in place; for sizes that
    fit into a cache, the rate of the cache."""
    x = torch.zeros(max(1, size // 4), device=device)
    x.add_(1)
    return 2 * size / min(timed(lambda: x.add_(1), device) for _ in range(10))


def describe_machine(device):
    """One line: CPU or GPU, threads, torch."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
        name = f"{models[0]}, {len(models)} cores" if models else name
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def table(rows, columns):
    """Print `rows`, dictionaries, under `columns`, {key: format}."""
    cells = [list(columns)]
    for row in rows:
        values = [(row.get(key), form) for key, form in columns.items()]
        cells.append(["-" if value is None else format(value, form) for value, form in values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def write(records, args, label, value, title):
    """--json, and --plot: a bar of `value` for each record that has one."""
    if args.json:
        Path(args.json).write_text(json.dumps(records, indent=1) + "\n")
    if args.plot:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        bars = [record for record in records if record.get(value)]
        figure, axes = plt.subplots(figsize=(8, 0.3 * len(bars) + 1), layout="constrained")
        drawn = axes.barh([label(record) for record in bars], [record[value] for record in bars])
        axes.bar_label(drawn, fmt="%.1f", padding=2)
        axes.axvline(1, color="black", linewidth=1)
        axes.invert_yaxis()
        axes.set_xlabel(title)
        figure.savefig(args.plot)

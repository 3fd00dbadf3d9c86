"""What the benchmarks share: times by turns, the machine's own limits, tables and files."""

import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import utils
from models import ImageTransformer, ModelConfig

# The models of the paper.
CONFIGS = {
    "mnist": {"length": 784, "n_layers": 8, "n_heads": 8},
    "cifar10": {"length": 3072, "n_layers": 16, "n_heads": 8},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def add_arguments(parser, batches):
    """The flags that both benchmarks take."""
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--batches", nargs="+", type=int, default=batches, metavar="N")
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="times of each (5)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", metavar="FILE", help="write the records")
    parser.add_argument("--plot", metavar="FILE", help="write a bar chart")


def make_pair(config):
    """Our model and the library's with the same weights, or None where it is not installed."""
    torch.manual_seed(0)
    ours = ImageTransformer(ModelConfig(**config))
    try:
        from reference import ReferenceTransformer
    except utils.UserError as error:
        tqdm.write(f"{error}; measuring without it", file=sys.stderr)
        return ours, None
    theirs = ReferenceTransformer(ours.config)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def timed(run, device):
    """Seconds of one call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def by_turns(candidates, rounds, device):
    """Median seconds of each of `candidates`, {name: function}, called in turns after a warm-up:
    what slows the machine down for a while slows all of them down."""
    for run in candidates.values():
        run()
    times = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            times[name].append(timed(run, device))
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def matrix_rate(dtype, device):
    """Floating-point operations a second in a large matrix product, the best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * n**3 / min(timed(lambda: torch.mm(a, b), device) for _ in range(10))


def memory_rate(size, device):
    """Bytes a second, read and written, where `size` bytes are changed in place; what fits into a
    cache is as fast as the cache."""
    x = torch.zeros(max(1, size // 4), device=device)
    x.add_(1)
    return 2 * size / min(timed(lambda: x.add_(1), device) for _ in range(10))


def describe_machine(device):
    """One line: processor or GPU, threads, torch."""
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

"""The paper's comparison on this machine: linear, softmax and Reformer attention in time, memory
and, with --learning, bits/dim.

python -m benchmarks.comparison --json comparison.json --plot comparison.png
python -m benchmarks.comparison --learning --json learning.json --plot learning.png
python -m benchmarks.comparison --results comparison.json --plot comparison.png
"""

import argparse
import datetime
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.comparison import cases, learning
from benchmarks.comparison.methods import available_methods, trained_methods
from benchmarks.comparison.plots import draw
from benchmarks.comparison.report import report
from cli.process import run
from engine.progress import progress_bar
from files import check_writable
from utils import UserError, is_out_of_memory, say, select_device


@dataclass(frozen=True)
class Plan:
    """What is measured, and for how long."""

    configs: dict  # the models of the table of images per second, {name: fields of ModelConfig}
    lengths: tuple  # bytes of an image, with the layers of the first of the models
    seconds: float  # of the repeated calls of one measurement
    learning_seconds: float  # of each run
    test_images: int  # of each evaluation


FULL = Plan(measure.CONFIGS, (256, 784, 1536, 3072, 6144, 12288), 3.0, 240.0, 200)
TINY = {"n_layers": 2, "n_heads": 2}
QUICK = Plan(
    {"mnist": {"length": 64, **TINY}, "cifar10": {"length": 192, **TINY}}, (64, 256), 0.2, 2.0, 8
)
SECONDS_BAR = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


def main(argv=None):
    args = parse_arguments(argv)
    results = read(args.results) if args.results else measure_all(args)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    print("", *report(results), sep="\n")
    if args.plot:
        Path(args.plot).parent.mkdir(parents=True, exist_ok=True)
        draw(results, args.plot)


def read(name):
    """The results in a file that --json wrote."""
    try:
        results = json.loads(Path(name).read_text())
    except FileNotFoundError:
        raise UserError(f"--results {name} does not exist") from None
    except ValueError:
        results = None
    if not (isinstance(results, dict) and {"machine", "date", "quick"} <= set(results)):
        raise UserError(f"--results {name} is not a file that --json has written")
    return results


def measure_all(args):
    """The results, as they are written to --json."""
    device, plan = select_device(args.device), QUICK if args.quick else FULL
    start, methods = time.perf_counter(), available_methods(device)
    if args.learning:
        results = {"learning": learn_all(methods, plan, device)}
    else:
        results = measure_speed(methods, plan, args.batch, device)
    about = {
        "machine": measure.describe_machine(device), "date": datetime.date.today().isoformat(),
        "minutes": (time.perf_counter() - start) / 60, "quick": args.quick,
    }  # fmt: skip
    return about | results


def measure_speed(methods, plan, batch_size, device):
    """The records of training steps, of sampling, and of the cost of a byte."""
    layers, seconds = plan.configs["mnist"], plan.seconds
    sizes = [{**layers, "length": length} for length in plan.lengths]
    sampled = [("mnist", size, 1) for size in sizes]
    for config, size in plan.configs.items():
        sampled += [(config, size, n) for n in (1, batch_size) if (config, size, n) not in sampled]
    arguments = {
        cases.training_step: [
            (name, size, seconds, device) for size in sizes for name in trained_methods(methods)
        ],
        cases.sampling: [(name, *size, seconds, device) for size in sampled for name in methods],
        cases.byte_cost: [(layers, layers["length"], plan.lengths[-1], device)],
    }
    training, sampling, byte_cost = run_cases(arguments)
    return {
        "configs": {name: size["length"] for name, size in plan.configs.items()},
        "training": training, "sampling": sampling, "byte_cost": byte_cost,
    }  # fmt: skip


def run_cases(arguments):
    """A list of records for each of `arguments`, {function of cases.py: its lists of arguments}."""
    with progress_bar(total=sum(map(len, arguments.values())), unit="case") as bar:
        return [
            [record for values in all_values if (record := run_case(case, values, bar))]
            for case, all_values in arguments.items()
        ]


def run_case(case, values, bar):
    """The record of one case, or None if there is not enough memory for it."""
    start, record = time.perf_counter(), None
    try:
        record = measure.in_new_process(case, *values)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    seconds = f"{time.perf_counter() - start:.1f} s"
    say(f"{describe(case, values)}: {seconds if record else 'left out: not enough memory'}")
    bar.update()
    return record


def describe(case, values):
    """A case in words; its last two arguments are the same for all."""
    words = [f"{v['length']} bytes" if isinstance(v, dict) else str(v) for v in values[:-2]]
    return ", ".join([case.__name__.replace("_", " "), *words])


def learn_all(methods, plan, device):
    """The records of the learning runs, the methods interleaved."""
    runs = [(name, seed) for seed in learning.SEEDS for name in learning.METHODS if name in methods]
    records = []
    length = plan.learning_seconds, plan.test_images
    with progress_bar(total=len(runs) * plan.learning_seconds, bar_format=SECONDS_BAR) as bar:
        for name, seed in runs:
            record = learning.learn(name, seed, *length, device, bar.update)
            last = record["points"][-1]
            say(f"{name}, seed {seed}: {last['bits_per_dim']:.4f} bits/dim after "
                f"{last['images']} images, {last['seconds']:.0f} s")  # fmt: skip
            records.append(record)
    return records


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--learning", action="store_true", help="compare bits/dim instead of speed")
    parser.add_argument("--quick", action="store_true", help="tiny models, to try this program")
    parser.add_argument("--batch", type=int, default=10, metavar="N", help="batch size (10)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device)
    parser.add_argument("--results", metavar="FILE", help="measure nothing: read what --json wrote")
    parser.add_argument("--json", metavar="FILE", help="write the results")
    parser.add_argument("--plot", metavar="FILE", help="draw the results")
    args = parser.parse_args(argv)
    if args.batch < 2:
        parser.error("--batch must be at least 2: single images are measured in any case")
    for flag in ("json", "plot"):
        if getattr(args, flag):
            check_writable(getattr(args, flag), f"--{flag}")
    return args


if __name__ == "__main__":
    run(main)

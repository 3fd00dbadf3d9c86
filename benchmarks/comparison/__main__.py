"""The paper's comparison on this machine: linear, softmax and Reformer attention in time, memory
and, with --learning, bits/dim.

python -m benchmarks.comparison --json comparison.json --plot comparison.png
python -m benchmarks.comparison --learning --json learning.json --plot learning.png
python -m benchmarks.comparison --results comparison.json --plot comparison.png
"""

import datetime
import json
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import measure
from benchmarks.command_line import OUTPUTS, parse, write_json
from benchmarks.comparison import cases, learning
from benchmarks.comparison.methods import available_methods, trained_methods
from benchmarks.comparison.plots import draw
from benchmarks.comparison.report import report
from benchmarks.processes import in_new_process
from cli.flags import flag, switch
from cli.process import run
from engine.progress import progress_bar
from options import Number
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


FLAGS = {
    "learning": switch("compare bits/dim instead of speed"),
    "quick": switch("tiny models, to try this program"),
    "batch": flag("batch size, beside single images", Number(int, 2, 2**31), 10),
    "device": flag(
        "where to measure", ("cpu", "cuda"), "cuda" if torch.cuda.is_available() else "cpu"
    ),
    "results": flag("measure nothing: read what --json wrote", "FILE"),
    **OUTPUTS,
}


def main(argv: list[str] | None = None) -> None:
    args = parse(__doc__, FLAGS, argv)
    if args.results:
        return show_stored(args)
    results = measure_all(args)
    if args.json:
        write_json(results, args.json)
    show(results, args.plot)


def show(results: dict, figure: str | None) -> None:
    """Print the report and draw the figure, if a file is given for it."""
    print("", *report(results), sep="\n")
    if figure:
        draw(results, figure)


def show_stored(args: Namespace) -> None:
    """As `show`, of the results in a file that --json wrote; a copy is written to --json."""
    try:
        results = json.loads(Path(args.results).read_text(encoding="utf-8"))
        show(results, args.plot)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        raise UserError(
            f"--results {args.results} is not a file that --json has written: give one"
        ) from None
    if args.json:
        write_json(results, args.json)


def measure_all(args: Namespace) -> dict:
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


def measure_speed(methods: list[str], plan: Plan, batch_size: int, device: torch.device) -> dict:
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
        cases.byte_cost: [(layers, plan.lengths[-1], device)],
    }
    training, sampling, byte_cost = run_cases(arguments)
    return {
        "configs": {name: size["length"] for name, size in plan.configs.items()},
        "training": training, "sampling": sampling, "byte_cost": byte_cost,
    }  # fmt: skip


def run_cases(arguments: dict[Callable, list[tuple]]) -> list[list[dict]]:
    """A list of records for each of `arguments`, {function of cases.py: its lists of arguments}."""
    with progress_bar(total=sum(map(len, arguments.values())), unit="case") as bar:
        return [
            [record for values in all_values if (record := run_case(case, values, bar))]
            for case, all_values in arguments.items()
        ]


def run_case(case: Callable, values: tuple, bar: tqdm) -> dict | None:
    """The record of one case, or None if there is not enough memory for it."""
    start, record = time.perf_counter(), None
    try:
        record = in_new_process(case, *values)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    seconds = f"{time.perf_counter() - start:.1f} s"
    say(f"{describe(case, values)}: {seconds if record else 'left out: not enough memory'}")
    bar.update()
    return record


def describe(case: Callable, values: tuple) -> str:
    """A case in words; of its arguments, the last two are no more than how to measure it."""
    words = [f"{v['length']} bytes" if isinstance(v, dict) else str(v) for v in values[:-2]]
    return ", ".join([case.__name__.replace("_", " "), *words])


def learn_all(methods: list[str], plan: Plan, device: torch.device) -> list[dict]:
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


if __name__ == "__main__":
    run(main)

"""Time and memory of a training step and of an evaluation, compared with the library.

python -m benchmarks.training_speed --json training.json --plot training.png
"""

import argparse
from functools import cache, partial
from itertools import count

import torch

from benchmarks import measure
from cli.process import keep_freed_memory
from engine.optimizers import make_optimizer
from engine.recipes import Settings
from engine.training import NegativeLogLikelihood, train_step
from models import ModelConfig
from utils import autocast

# On random images, which take as long as real ones.
CASES = {"mnist": [4, 16], "cifar10": [4]}
DROPOUTS = [0.1, 0.0]
COLUMNS = {
    "config": "", "batch": "", "precision": "", "mode": "", "dropout": "", "ours_s": ".3f",
    "theirs_s": ".3f", "ratio": ".2f", "images_per_second": ".2f", "limit_fraction": ".0%",
    "peak_mb": ".0f", "theirs_peak_mb": ".0f",
}  # fmt: skip


def main():
    args = parse_arguments()
    keep_freed_memory()
    device = torch.device(args.device)
    print(measure.describe_machine(device))
    rates = {name: measure.matrix_rate(measure.DTYPES[name], device) for name in args.precisions}
    for name, rate in rates.items():
        print(f"matrix products in {name}: {rate / 1e9:.0f} GFLOP/s")
    records = []
    for config in args.configs:
        for batch in args.batches or CASES[config]:
            for dropout in DROPOUTS:
                records += measure_case(config, batch, dropout, args, rates, device)
    measure.table(records, COLUMNS)
    measure.write(records, args, label, "ratio", "times as fast as the library in float32")


def label(record):
    words = (record[key] for key in ("config", "batch", "precision", "mode"))
    return " ".join(map(str, words)) + f" dropout {record['dropout']}"


def measure_case(config, batch, dropout, args, rates, device):
    """Records of training and, without dropout, of evaluation at each precision."""
    model_config = ModelConfig(**measure.CONFIGS[config], dropout=dropout)
    runs, models = {}, make_models(model_config, device)
    images = make_images(models["ours"].model, batch, device)
    for who, nll in models.items():
        for precision in args.precisions if who == "ours" else ["fp32"]:
            runs[who, "train", precision] = trainer(nll, images, precision)
            if not dropout:
                runs[who, "evaluate", precision] = partial(evaluate, nll, images, precision, device)
    seconds = measure.interleaved(runs, args.rounds, device)
    weights = measure.count_weights(models["ours"].model)
    records = []
    for who, mode, precision in runs:
        if who == "theirs":
            continue
        ours, theirs = seconds[who, mode, precision], seconds.get(("theirs", mode, "fp32"))
        operations = 2 * weights * images[:, 1:].numel() * (3 if mode == "train" else 1)
        record = {
            "config": config, "batch": batch, "precision": precision, "mode": mode,
            "dropout": dropout, "ours_s": ours, "theirs_s": theirs,
            "ratio": theirs and theirs / ours, "images_per_second": batch / ours,
            "limit_fraction": operations / rates[precision] / ours,
        }  # fmt: skip
        case = model_config, batch, mode, device
        record["peak_mb"] = added_mb("ours", precision, *case)
        record["theirs_peak_mb"] = theirs and added_mb("theirs", "fp32", *case)
        records.append(record)
    return records


def make_models(config, device):
    """{"ours": our loss, compiled where possible, "theirs": the library's if it is installed}."""
    ops = measure.compiled_ops(config) if device.type == "cpu" else None
    pair = measure.make_pair(config, ops)
    losses = [model and NegativeLogLikelihood(model.to(device)) for model in pair]
    if device.type != "cpu":
        losses[0].compile()
    return {who: nll for who, nll in zip(("ours", "theirs"), losses, strict=True) if nll}


def make_images(model, batch, device):
    generator = torch.Generator().manual_seed(0)
    shape = batch, model.config.length
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)


def trainer(nll, images, precision):
    """A function that does one training step of main.py."""
    optimizer = make_optimizer(nll.model, Settings())
    options = {"seed": 0, "accumulate": 1, "precision": precision, "clip_norm": 1.0}
    iterations = count(1)

    def step():
        nll.train()
        train_step(nll, optimizer, images, iteration=next(iterations), **options)

    return step


@torch.no_grad()
def evaluate(nll, images, precision, device):
    nll.eval()
    with autocast(device, precision):
        nll(images)


@cache
def added_mb(*case):
    """MB that a case adds to the memory of a process that runs it twice and does nothing else."""
    return measure.in_new_process(use_memory, case)


def use_memory(case):
    """MB that the case adds to this process, or on a GPU to its tensors, at the peak."""
    who, precision, config, batch, mode, device = case
    nll = make_models(config, device)[who]
    images = make_images(nll.model, batch, device)
    run = partial(evaluate, nll, images, precision, device)
    run = trainer(nll, images, precision) if mode == "train" else run
    keep_freed_memory()
    before = measure.current_mb(device)
    run()
    run()
    return measure.peak_mb(device) - before


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    measure.add_arguments(parser, batches=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()

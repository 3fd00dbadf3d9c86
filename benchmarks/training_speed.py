"""Time and memory of a training step and of an evaluation, compared with the library.

python -m benchmarks.training_speed --json training.json --plot training.png
"""

from argparse import Namespace
from collections.abc import Callable
from functools import cache, partial
from itertools import count

import torch

from benchmarks import measure
from benchmarks.command_line import print_table, write_comparison
from benchmarks.processes import in_new_process
from cli.process import keep_freed_memory, run
from engine.construction import check_memory, choose_ops, training_memory
from engine.optimizers import make_optimizer
from engine.recipes import Settings
from engine.training import NegativeLogLikelihood, train_step
from models import ImageTransformer, ModelConfig
from utils import autocast

# On random images, which take as long as real ones.
CASES = {"mnist": [4, 16], "cifar10": [4], "small": [16]}
DROPOUTS = [0.1, 0.0]
COLUMNS = {
    "config": "", "batch": "", "precision": "", "mode": "", "dropout": "", "ours_s": ".3f",
    "theirs_s": ".3f", "ratio": ".2f", "images_per_second": ".2f", "products_gflops": ".0f",
    "limit_fraction": ".0%",
    "peak_mb": ".0f", "theirs_peak_mb": ".0f",
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = measure.parse_arguments(__doc__, None, argv)
    device = args.device
    cases = [
        (config, batch, dropout)
        for config in args.configs
        for batch in args.batches or CASES[config]
        for dropout in DROPOUTS
    ]
    for config, batch, _ in cases:
        sizes = ModelConfig(**measure.COMPARED[config])
        check_memory(training_memory(sizes, batch, 1, device, args.precisions[0]), device)
    measure.print_machine(args.precisions, device)
    records = [record for case in cases for record in measure_case(*case, args, device)]
    write_comparison(records, args, label, "times as fast as the library in float32")
    print_table(records, COLUMNS)


def label(record: dict) -> str:
    words = (record[key] for key in ("config", "batch", "precision", "mode"))
    return " ".join(map(str, words)) + f" dropout {record['dropout']}"


def measure_case(
    config: str, batch: int, dropout: float, args: Namespace, device: torch.device
) -> list[dict]:
    """Records of training and, without dropout, of evaluation at each precision."""
    model_config = ModelConfig(**measure.COMPARED[config], dropout=dropout)
    runs, losses = {}, make_losses(model_config, device)
    model = losses["ours"].model
    images, rows = make_images(model, batch, device), batch * (model.config.length - 1)
    for who, nll in losses.items():
        for precision in args.precisions if who == "ours" else ["fp32"]:
            runs[who, "train", precision] = trainer(nll, images, precision)
            if not dropout:
                runs[who, "evaluate", precision] = partial(evaluate, nll, images, precision, device)
    ours = [(mode, precision) for who, mode, precision in runs if who == "ours"]
    for mode, precision in ours:
        sizes = rows, measure.DTYPES[precision], device
        runs["products", mode, precision] = measure.products(model, *sizes, mode == "train")
    seconds = measure.interleaved(runs, args.rounds, device)
    records = []
    for mode, precision in ours:
        names = ("ours", mode, precision), ("theirs", mode, "fp32"), ("products", mode, precision)
        ours_s, theirs_s, products_s = map(seconds.get, names)
        operations = 2 * measure.count_weights(model) * rows * (3 if mode == "train" else 1)
        record = {
            "config": config, "batch": batch, "precision": precision, "mode": mode,
            "dropout": dropout, "ours_s": ours_s, "theirs_s": theirs_s,
            "ratio": theirs_s and theirs_s / ours_s, "images_per_second": batch / ours_s,
            "products_gflops": operations / products_s / 1e9,
            "limit_fraction": products_s / ours_s,
        }  # fmt: skip
        case = model_config, batch, mode, device
        record["peak_mb"] = added_mb("ours", precision, *case)
        record["theirs_peak_mb"] = theirs_s and added_mb("theirs", "fp32", *case)
        records.append(record)
    return records


def make_losses(config: ModelConfig, device: torch.device) -> dict[str, NegativeLogLikelihood]:
    """{"ours": our loss, compiled where possible, "theirs": the library's if it is installed}."""
    models = measure.make_models(config, device, choose_ops(config, device, None, "training"))
    losses = {who: NegativeLogLikelihood(model) for who, model in models.items()}
    if device.type != "cpu":
        losses["ours"].compile()
    return losses


def make_images(model: ImageTransformer, batch: int, device: torch.device) -> torch.Tensor:
    """Random images (batch, L), uint8."""
    generator = torch.Generator().manual_seed(0)
    shape = batch, model.config.length
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)


def trainer(nll: NegativeLogLikelihood, images: torch.Tensor, precision: str) -> Callable:
    """A function that does one training step of main.py."""
    optimizer = make_optimizer(nll.model, Settings())
    options = {"seed": 0, "accumulate": 1, "precision": precision, "clip_norm": 1.0}
    iterations = count(1)

    def step():
        nll.train()
        train_step(nll, optimizer, images, iteration=next(iterations), **options)

    return step


@torch.no_grad()
def evaluate(
    nll: NegativeLogLikelihood, images: torch.Tensor, precision: str, device: torch.device
) -> None:
    nll.eval()
    with autocast(device, precision):
        nll(images)


@cache
def added_mb(*case) -> float:
    """MB that a case adds to the memory of a process that runs it twice and does nothing else."""
    return in_new_process(use_memory, case)


def use_memory(case: tuple) -> float:
    """MB that the case adds to this process, or on a GPU to its tensors, at the peak."""
    who, precision, config, batch, mode, device = case
    nll = make_losses(config, device)[who]
    images = make_images(nll.model, batch, device)
    run = partial(evaluate, nll, images, precision, device)
    run = trainer(nll, images, precision) if mode == "train" else run
    keep_freed_memory()
    before = measure.current_mb(device)
    run()
    run()
    return measure.peak_mb(device) - before


if __name__ == "__main__":
    run(main)

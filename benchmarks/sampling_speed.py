"""Time per sampled byte, compared with pytorch-fast-transformers and with the machine's limits.

python -m benchmarks.sampling_speed --json sampling.json --plot sampling.png
"""

import os
import tempfile
from argparse import Namespace
from collections.abc import Callable, Hashable
from functools import partial

import torch

from benchmarks import measure
from benchmarks.command_line import print_table, write_comparison
from cli.process import run
from engine.checkpoint import NO_CHECKPOINT
from engine.construction import check_memory, choose_ops, load_model, sampling_memory
from engine.sampling import (
    EagerDecoder,
    black_images,
    choose_decoder,
    convert_weights,
    empty_batch,
    plain_decoder,
    sample_recomputing,
)
from models import ImageTransformer, ModelConfig
from utils import autocast

# Seconds of one measurement, which determine its number of bytes (at least two): many more than
# those for which torch's threads, idle after another sampler, spin and slow down the next one.
SECONDS = 0.3
# The sampler that recomputes the prefix: the cost of the last byte of an image.
RECOMPUTED_IMAGES = 4
COLUMNS = {
    "config": "", "batch": "", "precision": "", "sampler": "", "ours_ms_per_byte": ".3f",
    "theirs_ms_per_byte": ".3f", "ratio": ".1f", "images_per_second": ".2f",
    "limit_fraction": ".0%", "compile_s": ".1f",
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = measure.parse_arguments(__doc__, [1, 10, 64, 256], argv)
    device = args.device
    configs = {name: ModelConfig(**measure.COMPARED[name]) for name in args.configs}
    for config in configs.values():
        check_memory(sampling_memory(config, max(args.batches)), device)
    measure.print_machine(args.precisions, device)
    records = []
    with tempfile.TemporaryDirectory() as cache, torch.inference_mode():
        os.environ["XDG_CACHE_HOME"] = cache  # so that compilation is measured
        for name, config in configs.items():
            records += measure_config(name, config, args, device)
    write_comparison(records, args, label, "times as fast as the library")
    print("\nmilliseconds per byte of the whole batch")
    print_table(records, COLUMNS)


def label(record: dict) -> str:
    return f"{record['config']} {record['batch']} {record['precision']} {record['sampler']}"


def measure_config(
    name: str, config: ModelConfig, args: Namespace, device: torch.device
) -> list[dict]:
    """Records of one model: every sampler at every batch size and precision."""
    models = measure.make_models(config, device)
    ours, theirs = models["ours"], models.get("theirs")
    decoders = make_decoders(config, args.precisions, device)
    records = []
    for batch in args.batches:
        runs = {}
        if theirs:
            runs["theirs", "fp32"] = loop(theirs, EagerDecoder(theirs), batch, "fp32", device)
        for (sampler, precision), (model, decoder) in decoders.items():
            runs[sampler, precision] = loop(model, decoder, batch, precision, device)
        limits = {
            precision: parts_of_limit(ours, batch, precision, device)
            for precision in args.precisions
        }
        for precision, parts in limits.items():
            runs |= {(part, precision): partial(repeat, run) for part, (_, run) in parts.items()}
        ms = milliseconds_per_byte(runs, args.rounds, device)
        their_ms = ms.get(("theirs", "fp32"))
        for (sampler, precision), (_, decoder) in decoders.items():
            our_ms = ms[sampler, precision]
            parts = {part: n * ms[part, precision] for part, (n, _) in limits[precision].items()}
            records.append({
                "config": name, "batch": batch, "precision": precision, "sampler": sampler,
                "ours_ms_per_byte": our_ms, "theirs_ms_per_byte": their_ms,
                "ratio": their_ms and their_ms / our_ms,
                "images_per_second": batch / config.length / our_ms * 1e3,
                "limit_fraction": least_time(parts) / our_ms,
                "compile_s": getattr(decoder, "compile_seconds", None),
            })  # fmt: skip
    return [*records, measure_recomputing(name, models, args.rounds, device)]


def make_decoders(config: ModelConfig, precisions: list[str], device: torch.device) -> dict:
    """{(sampler, precision): (model, decoder)}: those of prediction.py, on a CPU "recurrent" is the
    compiled one, and "uncompiled" the fastest in PyTorch."""
    decoders = {}
    for precision in precisions:
        model = load_model(NO_CHECKPOINT, config, device=device)
        decoder = choose_decoder(model, precision)
        convert_weights(model, precision)
        if not isinstance(decoder, EagerDecoder):
            decoders["recurrent", precision] = model, decoder
        decoders["uncompiled", precision] = model, plain_decoder(model)
    return decoders


def milliseconds_per_byte(
    runs: dict[Hashable, Callable], rounds: int, device: torch.device
) -> dict[Hashable, float]:
    """Median times of `runs`, {name: function that draws a given number of bytes}."""
    counts = {name: choose_count(run, device) for name, run in runs.items()}
    runs = {name: partial(run, counts[name]) for name, run in runs.items()}
    seconds = measure.interleaved(runs, rounds, device)
    return {name: 1e3 * seconds[name] / counts[name] for name in runs}


def loop(
    model: ImageTransformer, decoder: Callable, n: int, precision: str, device: torch.device
) -> Callable[[int], None]:
    """A function that draws a given number of bytes of n images from the first one on, and begins
    them again when they are complete."""
    batch, length = empty_batch(model, n), model.config.length - 1

    def run(count):
        for drawn in range(0, count, length):
            batch.position.zero_()
            with autocast(device, precision):
                decoder(batch, min(length, count - drawn))

    return run


def choose_count(run: Callable[[int], None], device: torch.device) -> int:
    """How many bytes take about SECONDS. (The first ones of a fast sampler take longer than later
    ones.)"""
    run(2)
    count, seconds = 2, 0
    while seconds < SECONDS / 10:
        count *= 2
        seconds = measure.timed(partial(run, count), device)
    return max(2, int(count * SECONDS / seconds))


def parts_of_limit(
    model: ImageTransformer, batch: int, precision: str, device: torch.device
) -> dict[str, tuple[float, Callable]]:
    """What a byte of the whole batch takes at least, {part: (n, function)}, in n calls of the
    function: its operations, as those of a large product, and its memory traffic, weights read,
    states read and written (from the caches if all fit)."""
    weights, dtype = measure.count_weights(model), measure.DTYPES[precision]
    states = batch * measure.state_bytes(model.empty_states(1))
    weight_bytes = weights * dtype.itemsize
    size = weight_bytes + states
    works = {
        "products": (2 * weights * batch, measure.matrix_product(dtype, device)),
        "reading": (weight_bytes, measure.reading(size, device)),
        "changing": (2 * states, measure.changing(size, device)),
    }
    return {part: (needed / amount, run) for part, (needed, (amount, run)) in works.items()}


def least_time(times: dict[str, float]) -> float:
    """The lower bound with these times of the parts: products and traffic may overlap."""
    return max(times["products"], times["reading"] + times["changing"])


def repeat(run: Callable, count: int) -> None:
    for _ in range(count):
        run()


def measure_recomputing(name: str, models: dict, rounds: int, device: torch.device) -> dict:
    """The last byte of an image by the sampler that recomputes all bytes before it."""
    config = models["ours"].config
    length, ops = config.length, choose_ops(config, device, None, "sampling")
    models = {**models, "ours": load_model(NO_CHECKPOINT, config, device=device, ops=ops)}

    def run(model):
        images, noise = black_images(RECOMPUTED_IMAGES, length, device)
        sample_recomputing(model, images, length - 1, noise)

    runs = {who: partial(run, model) for who, model in models.items()}
    seconds = measure.interleaved(runs, rounds, device)
    ours, theirs = 1e3 * seconds["ours"], seconds.get("theirs") and 1e3 * seconds["theirs"]
    return {
        "config": name, "batch": RECOMPUTED_IMAGES, "precision": "fp32",
        "sampler": "recomputing, last byte", "ours_ms_per_byte": ours,
        "theirs_ms_per_byte": theirs, "ratio": theirs and theirs / ours,
    }  # fmt: skip


if __name__ == "__main__":
    run(main)

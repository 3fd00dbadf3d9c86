"""Time per sampled byte, compared with pytorch-fast-transformers and with the machine's limits.

python -m benchmarks.sampling_speed --json sampling.json --plot sampling.png
"""

import argparse
import os
import tempfile
from functools import partial

import torch

from benchmarks import measure
from cli.process import keep_freed_memory
from cpu.build import find_compiler
from cpu.sampler import CompiledDecoder
from engine.sampling import (
    Batch,
    EagerDecoder,
    image_noise,
    plain_decoder,
    sample_recomputing,
)
from models import ImageTransformer, ModelConfig
from utils import autocast

# Seconds of one measurement, which determine its number of bytes (at least two).
SECONDS = 0.3
# The batched sampler recomputes the prefix: the cost of the last byte of an image.
BATCHED_IMAGES = 4


def main():
    args = parse_arguments()
    keep_freed_memory()
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # so that compilation is measured
    device = torch.device(args.device)
    print(measure.describe_machine(device))
    rates = {name: measure.matrix_rate(measure.DTYPES[name], device) for name in args.precisions}
    for name, rate in rates.items():
        print(f"matrix products in {name}: {rate / 1e9:.0f} GFLOP/s")
    print(f"memory, beyond the caches: {measure.memory_rate(2**28, device) / 1e9:.0f} GB/s")
    records = []
    with torch.inference_mode():
        for config in args.configs:
            records += measure_config(config, args, rates, device)
        print("\nmilliseconds per byte of the whole batch")
        measure.table(records, COLUMNS)
    measure.write(records, args, label, "ratio", "times as fast as the library")


COLUMNS = {
    "config": "", "batch": "", "precision": "", "sampler": "", "ours_ms_per_byte": ".3f",
    "theirs_ms_per_byte": ".3f", "ratio": ".1f", "images_per_second": ".2f",
    "limit_fraction": ".0%", "compile_s": ".1f",
}  # fmt: skip


def label(record):
    return f"{record['config']} {record['batch']} {record['precision']} {record['sampler']}"


def measure_config(config, args, rates, device):
    """Records of one model: every sampler at every batch size and precision."""
    pair = measure.make_pair(ModelConfig(**measure.CONFIGS[config]))
    ours, theirs = (model and model.to(device).eval() for model in pair)
    compiled = {}
    if device.type == "cpu" and find_compiler():
        compiled = {precision: CompiledDecoder(ours, precision) for precision in args.precisions}
    records = []
    for batch in args.batches:
        runs = {}
        if theirs:
            runs["theirs", "fp32"] = loop(theirs, EagerDecoder(theirs), batch, "fp32", device)
        for precision in args.precisions:
            if compiled:
                decoder = compiled[precision]
                runs["recurrent", precision] = loop(ours, decoder, batch, precision, device)
            decoder = plain_decoder(ours)
            runs["uncompiled", precision] = loop(ours, decoder, batch, precision, device)
        ms = milliseconds_per_byte(runs, args.rounds, device)
        their_ms = ms.pop(("theirs", "fp32"), None)
        for (sampler, precision), our_ms in ms.items():
            limit = 1e3 * least_seconds(ours, batch, rates[precision], precision, device)
            is_compiled = sampler == "recurrent"
            records.append({
                "config": config, "batch": batch, "precision": precision, "sampler": sampler,
                "ours_ms_per_byte": our_ms, "theirs_ms_per_byte": their_ms,
                "ratio": their_ms and their_ms / our_ms,
                "images_per_second": batch / ours.config.length / our_ms * 1e3,
                "limit_fraction": limit / our_ms,
                "compile_s": compiled[precision].compile_seconds if is_compiled else None,
            })  # fmt: skip
    return [*records, measure_batched(config, ours, theirs, args.rounds, device)]


def milliseconds_per_byte(runs, rounds, device):
    """Median times of `runs`, {name: function that draws a given number of bytes}."""
    counts = {name: choose_count(run, device) for name, run in runs.items()}
    runs = {name: partial(run, counts[name]) for name, run in runs.items()}
    seconds = measure.interleaved(runs, rounds, device)
    return {name: 1e3 * seconds[name] / counts[name] for name in runs}


def new_batch(model, n, device):
    """A `Batch` of n images at their first byte."""
    images, noise = new_images(n, model.config.length, device)
    position = torch.zeros(1, dtype=torch.int64, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    return Batch(images, noise, 1.0, position, model.empty_states(n), finite)


def new_images(n, length, device):
    """Black images (n, length), int64, and noise (n, length, 2) to draw them with."""
    images = torch.zeros(n, length, dtype=torch.int64, device=device)
    return images, image_noise(0, [0], length).expand(n, -1, -1).contiguous().to(device)


def loop(model, decoder, n, precision, device):
    """A function that draws a given number of bytes of n images from the first one on."""
    batch = new_batch(model, n, device)

    def run(count):
        batch.position.zero_()
        with autocast(device, precision):
            decoder(batch, count)

    return run


def choose_count(run, device):
    """How many bytes take about SECONDS."""
    run(2)
    return max(2, min(700, int(SECONDS / (measure.timed(partial(run, 4), device) / 4))))


def least_seconds(model, batch, rate, precision, device):
    """A lower bound of a byte's time: its operations at the measured rate, or its memory traffic
    (weights read, states read and written), whichever takes longer."""
    weights = measure.count_weights(model)
    states = batch * measure.state_bytes(model.empty_states(1))
    weight_bytes = weights * measure.DTYPES[precision].itemsize
    memory = measure.memory_rate(weight_bytes + states, device)
    return max(2 * weights * batch / rate, (weight_bytes + 2 * states) / memory)


def measure_batched(config, ours, theirs, rounds, device):
    """The batched sampler's last byte of an image, which recomputes all bytes before it."""
    length = ours.config.length
    if device.type == "cpu":
        weights = ours.state_dict()
        ours = ImageTransformer(ours.config, measure.compiled_ops(ours.config)).eval()
        ours.load_state_dict(weights)

    def run(model):
        images, noise = new_images(BATCHED_IMAGES, length, device)
        sample_recomputing(model, images, length - 1, noise)

    models = {"ours": ours} | ({"theirs": theirs} if theirs else {})
    runs = {name: partial(run, model) for name, model in models.items()}
    seconds = measure.interleaved(runs, rounds, device)
    ms = {name: 1e3 * seconds[name] for name in runs}
    return {
        "config": config, "batch": BATCHED_IMAGES, "precision": "fp32",
        "sampler": "batched, last byte", "ours_ms_per_byte": ms["ours"],
        "theirs_ms_per_byte": ms.get("theirs"),
        "ratio": ms["theirs"] / ms["ours"] if theirs else None, "limit_fraction": None,
    }  # fmt: skip


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    measure.add_arguments(parser, batches=[1, 10, 64, 256])
    return parser.parse_args()


if __name__ == "__main__":
    main()

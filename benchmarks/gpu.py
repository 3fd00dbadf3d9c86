"""Everything about a GPU in one command: its tests, its speed in training and sampling, a table.

python -m benchmarks.gpu --json gpu.json

It ends within nine minutes and needs no network. Every step is a process of its own: one that
fails or takes too long says so, what it has measured counts, and the next step starts.
`--device cpu` does the same with tiny models, to develop this program without a GPU.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from datetime import date
from functools import partial
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks import sampling_speed as sampling
from benchmarks import training_speed as training
from cli.process import run
from engine.sampling import EagerDecoder, GraphDecoder
from engine.training import NegativeLogLikelihood
from layers.attention import chunk_length, linear_chunked
from models import ImageTransformer, ModelConfig
from prediction import store_as_bfloat16
from utils import is_out_of_memory, one_line, select_device

ROOT = Path(__file__).parent.parent
SECONDS = 510  # of all steps
ROUNDS = 3
TINY = {"length": 784, "n_layers": 1, "n_heads": 2, "d_query": 8}
CONFIGS = {"cuda": measure.CONFIGS, "cpu": {"mnist": TINY}}
SAMPLING_BATCHES = {"cuda": [1, 10, 64, 256, 2048], "cpu": [1, 2]}
# Training measures these without compilation and the fastest of them in every other mode.
TRAINING_BATCHES = {
    "cuda": {"mnist": [16, 64, 256], "cifar10": [4, 16, 48]},
    "cpu": {"mnist": [1, 2]},
}
CHUNK_LENGTHS = [16, 32, 64, 128]
COLUMNS = {
    "what": "", "config": "", "batch": "", "mode": "", "precision": "", "ms": ".3f",
    "bytes_per_s": ",.0f", "images_per_s": ",.1f", "of_matrix_rate": ".1%", "of_copy_rate": ".1%",
    "peak_mb": ",.0f",
}  # fmt: skip


def main():
    args = parse_arguments()
    device, end = select_device(args.device), time.monotonic() + SECONDS
    result = {"date": str(date.today()), "rates": {}, "steps": [], "records": []}
    for name, function, arguments, longest in list_steps(device):
        start = time.monotonic()
        records, error = run_step(function, arguments, max(0, min(longest, end - start)))
        seconds = time.monotonic() - start
        report(name, seconds, records, error)
        for record in records:
            result["rates"] |= record.get("rates", {})
        result["steps"].append({"name": name, "seconds": seconds, "error": error})
        result["records"] += [{**r, **fractions(r, result["rates"])} for r in records]
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    summarise(result, args.json)
    return 1 if failures(result) else 0


def list_steps(device):
    """Names, functions, arguments, and the most seconds that each may take."""
    steps = [
        ("machine", measure_machine, (device,), 60),
        ("tests marked cuda", run_tests, (device, 190), 200),
    ]
    configs = CONFIGS[device.type]
    steps += [(f"sampling, {c}", measure_sampling, (c, False, device), 60) for c in configs]
    steps += [(f"training, {c}", measure_training, (c, device), 120) for c in configs]
    steps += [(f"sampling compiled, {c}", measure_sampling, (c, True, device), 80) for c in configs]
    steps += [(f"the library, {c}", measure_library, (c, device), 40) for c in configs]
    return [*steps, ("chunk lengths", measure_chunks, (device,), 30)]


# A step as a process


def run_step(function, arguments, seconds):
    """What the generator `function(*arguments)` yields in a process of its own, and why it ended
    early, or None."""
    if seconds <= 0:
        return [], "no time was left"
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send, args=(sender, function, arguments))
    process.start()
    sender.close()  # only the new process has it now: its end is an EOFError here
    records, deadline = [], time.monotonic() + seconds
    try:
        while receiver.poll(max(0, deadline - time.monotonic())):
            record, error = receiver.recv()
            if record is None:
                process.join(10)
                break
            records.append(record)
        else:
            error = f"stopped after {seconds:.0f} s"
    except EOFError:
        process.join()
        error = f"the process ended with status {process.exitcode}"
    process.kill()
    process.join()
    return records, error


def send(connection, function, arguments):
    """Send (record, None) for each record, and (None, the error or None) at the end."""
    error = None
    try:
        for record in function(*arguments):
            connection.send((record, None))
    except Exception as failure:  # of any kind: the next step should start
        error = describe_error(failure)
    connection.send((None, error))
    connection.close()


def describe_error(error):
    if is_out_of_memory(error):
        return "out of memory"
    return f"{type(error).__name__}: {one_line(error)}"


def attempt(measured, function, *arguments):
    """A record of what was measured with the results of `function(*arguments)`, or its error."""
    try:
        return {**measured, **function(*arguments)}
    except Exception as error:  # of any kind: the next measurement should start
        return {**measured, "error": describe_error(error)}


# The steps


def measure_machine(device):
    yield {"text": measure.describe_machine(device)}
    rates = {name: measure.matrix_rate(dtype, device) for name, dtype in measure.DTYPES.items()}
    rates["copy"] = measure.memory_rate(2**30 if device.type == "cuda" else 2**26, device)
    text = ", ".join(f"{name} {rate / 1e12:.3g} T/s" for name, rate in rates.items())
    yield {"rates": rates, "text": f"operations of matrix products, and bytes copied: {text}"}


def run_tests(device, seconds):
    """pytest's last line; raises RuntimeError, with the failed tests, if there are any."""
    files = sorted(map(str, ROOT.glob("tests/*/test_cuda*.py")))  # the others need more packages
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-rf", "--tb=line", *files]
    environment = {**os.environ, "TEST_DEVICE": str(device)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
    )
    lines = done.stdout.splitlines() or done.stderr.splitlines() or ["no output"]
    for line in [*(line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1]]:
        yield {"text": line}
    if done.returncode:
        raise RuntimeError(f"pytest ended with status {done.returncode}")


def measure_sampling(config, compiled, device):
    """A byte of the whole batch, by the plain loop and by a CUDA graph of it."""
    prefix = "compiled " if compiled else ""
    for precision in ("bf16",) if compiled else ("bf16", "fp32"):
        model = make_model(config, device).eval()
        if precision == "bf16":
            store_as_bfloat16(model)
        step = torch.compile(model.step) if compiled else None
        decoders = {"loop": EagerDecoder(model, step)}
        if device.type == "cuda":
            decoders["graph"] = GraphDecoder(model, step)
        for batch in SAMPLING_BATCHES[device.type]:
            for mode, decoder in decoders.items():
                what = describe_case("sampling", config, batch, prefix + mode, precision)
                yield attempt(what, sampling_speed, model, decoder, batch, precision, device)


def measure_training(config, device):
    """Steps of main.py: uncompiled with several batches, then the fastest batch in other modes."""
    images_per_s = {}
    for batch in TRAINING_BATCHES[device.type][config]:
        what = describe_case("training", config, batch, "uncompiled", "bf16")
        record = attempt(what, training_speed, config, batch, "bf16", None, device)
        images_per_s[batch] = record.get("images_per_s", 0)
        yield record
    best = max(images_per_s, key=images_per_s.get)
    others = [("uncompiled", "fp32", None), ("compiled", "bf16", {})]
    if device.type == "cuda":  # a CUDA graph of each pass
        others += [("compiled graph", "bf16", {"mode": "reduce-overhead"})]
    for mode, precision, options in others:
        what = describe_case("training", config, best, mode, precision)
        yield attempt(what, training_speed, config, best, precision, options, device)


def measure_library(config, device):
    """pytorch-fast-transformers, where it is installed."""
    model = measure.make_pair(ModelConfig(**CONFIGS[device.type][config]))[1]
    if model is None:
        yield {"text": "pytorch-fast-transformers is not installed"}
        return
    model = model.to(device)
    batch = TRAINING_BATCHES[device.type][config][0]
    what = describe_case("training", config, batch, "library", "fp32")
    yield attempt(what, step_speed, NegativeLogLikelihood(model), batch, "fp32", device)
    model.eval()
    for batch in SAMPLING_BATCHES[device.type]:
        what = describe_case("sampling", config, batch, "library", "fp32")
        decoder = EagerDecoder(model)
        yield attempt(what, sampling_speed, model, decoder, batch, "fp32", device)


def measure_chunks(device):
    """Linear attention and its gradients with chunks of several lengths, for `chunk_length`."""
    shape = (16, 783, 3, 8, 32) if device.type == "cuda" else (1, 783, 3, 2, 8)
    qkv = torch.randn(shape, device=device, requires_grad=True)

    def attend(chunk):
        linear_chunked(*qkv.unbind(2), chunk=chunk)[0].sum().backward()

    for chunk in CHUNK_LENGTHS:
        seconds = measure.interleaved({chunk: partial(attend, chunk)}, ROUNDS, device)[chunk]
        yield {"text": f"chunks of {chunk}: {1e3 * seconds:.3f} ms", "chunk": chunk, "s": seconds}
    yield {"text": f"main.py and prediction.py use {chunk_length(device)}"}


# Speeds


def make_model(config, device):
    torch.manual_seed(0)
    return ImageTransformer(ModelConfig(**CONFIGS[device.type][config])).to(device)


def describe_case(what, config, batch, mode, precision):
    return {
        "what": what, "config": config, "batch": batch, "mode": mode, "precision": precision,
    }  # fmt: skip


@torch.no_grad()
def sampling_speed(model, decoder, batch, precision, device):
    """Milliseconds of a byte of the whole batch, and its least operations and memory traffic."""
    reset_peak(device)
    draw = sampling.loop(model, decoder, batch, precision, device)
    draw(8)  # compiles, and records a graph
    ms = sampling.milliseconds_per_byte({0: draw}, ROUNDS, device)[0]
    weights = measure.count_weights(model)
    traffic = None
    if type(model) is ImageTransformer:  # the library's keeps states of its own
        states = batch * measure.state_bytes(model.empty_states(1))
        traffic = weights * measure.DTYPES[precision].itemsize + 2 * states
    return {
        "ms": ms, "bytes_per_s": 1e3 * batch / ms, "operations": 2 * weights * batch,
        "images_per_s": 1e3 * batch / ms / model.config.length,
        "traffic": traffic, "peak_mb": measure.peak_mb(device),
    }  # fmt: skip


def training_speed(config, batch, precision, options, device):
    """As `step_speed`, for our model compiled with `options`, None for not at all."""
    torch._dynamo.reset()
    nll = NegativeLogLikelihood(make_model(config, device))
    if options is not None:
        nll.compile(**options)
    return step_speed(nll, batch, precision, device)


def step_speed(nll, batch, precision, device):
    """Milliseconds and memory of a training step on random images, and its least operations."""
    reset_peak(device)
    images = training.make_images(nll.model, batch, device)
    step = training.trainer(nll, images, precision)
    step()
    seconds = measure.interleaved({0: step}, ROUNDS, device)[0]
    n_bytes = images[:, 1:].numel()
    return {
        "ms": 1e3 * seconds, "bytes_per_s": n_bytes / seconds, "images_per_s": batch / seconds,
        "operations": 6 * measure.count_weights(nll.model) * n_bytes,
        "peak_mb": measure.peak_mb(device),
    }  # fmt: skip


def reset_peak(device):
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def fractions(record, rates):
    """The fractions of the machine's measured rates that a record reaches."""
    found = {}
    rate, seconds = rates.get(record.get("precision")), record.get("ms", 0) / 1e3
    if rate and seconds:
        found["of_matrix_rate"] = record["operations"] / seconds / rate
    if rates.get("copy") and seconds and record.get("traffic"):
        found["of_copy_rate"] = record["traffic"] / seconds / rates["copy"]
    return found


# Output


def report(name, seconds, records, error):
    print(f"{name} ({seconds:.0f} s)")
    for record in records:
        print("   ", record.get("text") or describe(record))
    if error:
        print(f"    FAILED: {error}")
    sys.stdout.flush()


def describe(record):
    """One line of a measurement."""
    words = [str(record[key]) for key in ("what", "config", "batch", "mode", "precision")]
    return " ".join(words) + ": " + (record.get("error") or f"{record['ms']:.3f} ms")


def failures(result):
    """The steps and measurements that failed."""
    steps = [step["name"] for step in result["steps"] if step["error"]]
    return steps + [describe(record) for record in result["records"] if record.get("error")]


def summarise(result, path):
    """The table of all measurements, and what failed."""
    print()
    measure.table([record for record in result["records"] if "ms" in record], COLUMNS)
    print(f"\n{path} has all numbers.")
    for failure in failures(result):
        print(f"FAILED: {failure}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", metavar="FILE", default="gpu.json", help="results (gpu.json)")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)

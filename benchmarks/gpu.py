"""Everything about a GPU in one command: its tests, its speed in training and sampling, a table.

python -m benchmarks.gpu --json gpu.json

It ends within nine minutes and needs no network. Every step is a process of its own: one that
fails or takes too long says so, what it has measured counts, and the next step starts.
`--device cpu` does the same with tiny models, to develop this program without a GPU.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path

import torch

from benchmarks import measure, sampling_speed, training_speed
from benchmarks.command_line import OUTPUTS, parse, print_table, write_json
from benchmarks.processes import describe_error, stream_from_process
from cli.flags import flag
from cli.process import run
from engine.checkpoint import NO_CHECKPOINT
from engine.construction import choose_ops, load_model
from engine.sampling import EagerDecoder, GraphDecoder, convert_weights
from engine.training import NegativeLogLikelihood
from layers.attention import chunk_length, linear_chunked
from models import ImageTransformer, ModelConfig
from utils import say, select_device

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
# What distinguishes the measurements.
CASE = "what", "config", "batch", "mode", "precision"
COLUMNS = {
    **dict.fromkeys(CASE, ""), "ms": ".3f", "bytes_per_s": ",.0f", "images_per_s": ",.1f",
    "of_matrix_rate": ".1%", "of_copy_rate": ".1%", "peak_mb": ",.0f",
}  # fmt: skip
FLAGS = {
    "device": flag("cpu: with tiny models", ("cuda", "cpu"), "cuda"),
    "json": {**OUTPUTS["json"], "default": "gpu.json"},
}


def main(argv: list[str] | None = None) -> int:
    args = parse(__doc__, FLAGS, argv)
    device, end = select_device(args.device), time.monotonic() + SECONDS
    result = {"date": str(date.today()), "rates": {}, "steps": [], "records": []}
    for name, function, arguments, longest in list_steps(device):
        start = time.monotonic()
        records, error = stream_from_process(function, arguments, max(0, min(longest, end - start)))
        seconds = time.monotonic() - start
        report(name, seconds, records, error)
        for record in records:
            result["rates"] |= record.get("rates", {})
        result["steps"].append({"name": name, "seconds": seconds, "error": error})
        result["records"] += [{**r, **fractions(r, result["rates"])} for r in records]
        write_json(result, args.json)
    summarise(result, args.json)
    return 1 if failures(result) else 0


def list_steps(device: torch.device) -> list[tuple[str, Callable, tuple, float]]:
    """Names, functions, arguments, and the most seconds that each may take."""
    steps = [
        ("machine", measure_machine, (device,), 60),
        ("tests marked cuda", run_tests, (device, 190), 200),
        ("Triton kernels", measure_triton, (device,), 60),
    ]
    configs = CONFIGS[device.type]
    steps += [(f"sampling, {c}", measure_sampling, (c, False, device), 60) for c in configs]
    steps += [(f"training, {c}", measure_training, (c, device), 120) for c in configs]
    steps += [(f"sampling compiled, {c}", measure_sampling, (c, True, device), 80) for c in configs]
    steps += [(f"the library, {c}", measure_library, (c, device), 40) for c in configs]
    return [*steps, ("chunk lengths", measure_chunks, (device,), 30)]


def attempt(measured: dict, function: Callable, *arguments) -> dict:
    """A record of what was measured with the results of `function(*arguments)`, or its error."""
    try:
        return {**measured, **function(*arguments)}
    except Exception as error:  # of any kind: the next measurement should start
        return {**measured, "error": describe_error(error)}


# The steps


def measure_machine(device: torch.device) -> Iterator[dict]:
    yield {"text": measure.describe_machine(device)}
    rates = {name: measure.matrix_rate(dtype, device) for name, dtype in measure.DTYPES.items()}
    rates["copy"] = measure.memory_rate(2**30 if device.type == "cuda" else 2**26, device)
    text = ", ".join(f"{name} {rate / 1e12:.3g} T/s" for name, rate in rates.items())
    yield {"rates": rates, "text": f"operations of matrix products, and bytes copied: {text}"}


def run_tests(device: torch.device, seconds: float) -> Iterator[dict]:
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


def measure_triton(device: torch.device) -> Iterator[dict]:
    """The kernels on tensors of the CIFAR-10 model: 16 images in training, 256 in sampling."""
    if device.type != "cuda":
        yield {"text": "the Triton kernels need a GPU"}
        return
    from benchmarks.gpu_kernels import measure_kernels  # needs triton

    copy_rate = measure.memory_rate(2**30, device)
    yield from measure_kernels(measure.CONFIGS["cifar10"], 16, 256, device, copy_rate, ROUNDS)


def measure_sampling(config: str, compiled: bool, device: torch.device) -> Iterator[dict]:
    """A byte of the whole batch, by the plain loop and by a CUDA graph of it."""
    prefix = "compiled " if compiled else ""
    for precision in ("bf16",) if compiled else ("bf16", "fp32"):
        model = make_model(config, device)
        convert_weights(model, precision)
        step = torch.compile(model.step) if compiled else None
        decoders = {"loop": EagerDecoder(model, step)}
        if device.type == "cuda":
            decoders["graph"] = GraphDecoder(model, step)
        for batch in SAMPLING_BATCHES[device.type]:
            for mode, decoder in decoders.items():
                what = case("sampling", config, batch, prefix + mode, precision)
                yield attempt(what, time_sampling, model, decoder, batch, precision, device)


def measure_training(config: str, device: torch.device) -> Iterator[dict]:
    """Steps of main.py: uncompiled with several batches, then the fastest batch in other modes."""
    images_per_s = {}
    for batch in TRAINING_BATCHES[device.type][config]:
        what = case("training", config, batch, "uncompiled", "bf16")
        record = attempt(what, time_training, config, batch, "bf16", None, device)
        images_per_s[batch] = record.get("images_per_s", 0)
        yield record
    best = max(images_per_s, key=images_per_s.get)
    others = [("uncompiled", "fp32", None), ("compiled", "bf16", {})]
    if device.type == "cuda":  # a CUDA graph of each pass, and no Triton kernels
        others += [("compiled graph", "bf16", {"mode": "reduce-overhead"})]
        others += [("plain", "bf16", None), ("plain compiled", "bf16", {})]
    for mode, precision, options in others:
        what = case("training", config, best, mode, precision)
        plain = mode.startswith("plain")
        yield attempt(what, time_training, config, best, precision, options, device, plain)


def measure_library(config: str, device: torch.device) -> Iterator[dict]:
    """pytorch-fast-transformers, where it is installed."""
    model = measure.make_models(ModelConfig(**CONFIGS[device.type][config]), device).get("theirs")
    if model is None:
        yield {"text": "pytorch-fast-transformers is not installed"}
        return
    batch = TRAINING_BATCHES[device.type][config][0]
    what = case("training", config, batch, "library", "fp32")
    yield attempt(what, step_speed, NegativeLogLikelihood(model), batch, "fp32", device)
    model.eval()
    for batch in SAMPLING_BATCHES[device.type]:
        what = case("sampling", config, batch, "library", "fp32")
        decoder = EagerDecoder(model)
        yield attempt(what, time_sampling, model, decoder, batch, "fp32", device)


def measure_chunks(device: torch.device) -> Iterator[dict]:
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


def make_model(config: str, device: torch.device, plain: bool = False) -> ImageTransformer:
    """On a GPU with the Triton kernels, unless they do not work there or it is to be `plain`."""
    sizes, ops = ModelConfig(**CONFIGS[device.type][config]), None
    if device.type == "cuda" and not plain:
        ops = choose_ops(sizes, device, None, "measuring")
    return load_model(NO_CHECKPOINT, sizes, device=device, ops=ops)


def case(*values) -> dict:
    return dict(zip(CASE, values, strict=True))


@torch.no_grad()
def time_sampling(
    model: ImageTransformer,
    decoder: EagerDecoder,
    batch: int,
    precision: str,
    device: torch.device,
) -> dict:
    """Milliseconds of a byte of the whole batch, and its least operations and memory traffic."""
    reset_peak(device)
    draw = sampling_speed.loop(model, decoder, batch, precision, device)
    draw(8)  # compiles, and records a graph
    ms = sampling_speed.milliseconds_per_byte({0: draw}, ROUNDS, device)[0]
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


def time_training(
    config: str,
    batch: int,
    precision: str,
    options: dict | None,
    device: torch.device,
    plain: bool = False,
) -> dict:
    """As `step_speed`, for our model compiled with `options`, None for not at all."""
    torch._dynamo.reset()
    nll = NegativeLogLikelihood(make_model(config, device, plain))
    if options is not None:
        nll.compile(**options)
    return step_speed(nll, batch, precision, device)


def step_speed(
    nll: NegativeLogLikelihood, batch: int, precision: str, device: torch.device
) -> dict:
    """Milliseconds and memory of a training step on random images, and its least operations."""
    reset_peak(device)
    images = training_speed.make_images(nll.model, batch, device)
    step = training_speed.trainer(nll, images, precision)
    step()
    seconds = measure.interleaved({0: step}, ROUNDS, device)[0]
    n_bytes = images[:, 1:].numel()
    return {
        "ms": 1e3 * seconds, "bytes_per_s": n_bytes / seconds, "images_per_s": batch / seconds,
        "operations": 6 * measure.count_weights(nll.model) * n_bytes,
        "peak_mb": measure.peak_mb(device),
    }  # fmt: skip


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def fractions(record: dict, rates: dict[str, float]) -> dict[str, float]:
    """The fractions of the machine's measured rates that a record reaches."""
    found = {}
    rate, seconds = rates.get(record.get("precision")), record.get("ms", 0) / 1e3
    if rate and seconds:
        found["of_matrix_rate"] = record["operations"] / seconds / rate
    if rates.get("copy") and seconds and record.get("traffic"):
        found["of_copy_rate"] = record["traffic"] / seconds / rates["copy"]
    return found


# Output


def report(name: str, seconds: float, records: list[dict], error: str | None) -> None:
    say(f"{name} ({seconds:.0f} s)")
    for record in records:
        say(f"    {record.get('text') or describe(record)}")
    if error:
        say(f"    FAILED: {error}")


def describe(record: dict) -> str:
    """One line of a measurement."""
    words = " ".join(str(record[key]) for key in CASE)
    return f"{words}: {record.get('error') or format(record['ms'], '.3f') + ' ms'}"


def failures(result: dict) -> list[str]:
    """The steps and measurements that failed."""
    steps = [step["name"] for step in result["steps"] if step["error"]]
    return steps + [describe(record) for record in result["records"] if record.get("error")]


def summarise(result: dict, path: str) -> None:
    """The table of all measurements, and what failed."""
    print()
    print_table([record for record in result["records"] if "ms" in record], COLUMNS)
    print(f"\n{path} has all numbers.")
    for failure in failures(result):
        print(f"FAILED: {failure}")


if __name__ == "__main__":
    run(main)

"""The compiled sampler: the same images as from the plain one, and fallbacks without a compiler."""

import os
import resource
import shutil
import signal
import stat
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, start
from imageio.v3 import imread

import datasets
from cpu import sampler as cpu_sampler
from cpu.build import find_compiler
from cpu.sampler import CompiledDecoder
from engine import sampling
from engine.sampling import (
    Batch,
    EagerDecoder,
    ignore_progress,
    image_noise,
    sample_recurrent,
)
from layers import mixture
from models import CONSTANT_STATE, NATIVE_ATTENTIONS, ImageTransformer, ModelConfig
from utils import CPU_INFO, UserError

pytestmark = pytest.mark.slow
LENGTH = 40
RECURRENT = ["--recurrent", "--index", "0-3", "--offset", 20]


def make_model(n_layers=2, n_heads=2, d_query=8, mixtures=3, **changes):
    torch.manual_seed(0)
    sizes = {"n_layers": n_layers, "n_heads": n_heads, "d_query": d_query, "mixtures": mixtures}
    config = ModelConfig(LENGTH, **sizes, **changes)
    return ImageTransformer(config).eval()


def complete(model, images, offset, noise, temperature=1.0, precision="fp32", **kwargs):
    """`sample_recurrent` with the compiled sampler."""
    decoder = CompiledDecoder(model, precision)
    sample_recurrent(model, images, offset, noise, temperature, decoder=decoder, **kwargs)


def make_batch(model, n_images=2, images=None, position=0, noise=None, states=None):
    """A `Batch` of images of which the bytes before `position` have been read."""
    images = torch.zeros(n_images, LENGTH, dtype=torch.int64) if images is None else images
    noise = image_noise(0, range(len(images)), LENGTH) if noise is None else noise
    states = model.empty_states(len(images)) if states is None else states
    return Batch(images, noise, 1.0, torch.tensor([position]), states, torch.tensor(True))


# Sizes that fill SIMD registers and sizes that do not.
SIZES = [(1, 1, 4, 1), (2, 2, 6, 2), (2, 3, 20, 5), (3, 8, 32, 10), (1, 1, 64, 30)]

LARGE = 2, 8, 64  # more weights than a cache holds
# The precisions, and whether bfloat16 numbers are multiplied in pairs, for which some CPUs have an
# instruction.
WAYS = [("fp32", False), ("bf16", False)]
if CPU_INFO.exists() and "avx512_bf16" in CPU_INFO.read_text().split():
    WAYS.append(("bf16", True))


RECURRENCES = pytest.mark.parametrize("attention_type", CONSTANT_STATE)


@RECURRENCES
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
@pytest.mark.parametrize("n_images", [1, 7, 37])
def test_it_draws_the_images_of_the_plain_sampler(sizes, n_images, attention_type):
    model = make_model(*sizes, attention_type=attention_type)
    noise = image_noise(5, range(n_images), LENGTH)
    expected = torch.randint(0, 256, (n_images, LENGTH))
    images = expected.clone()
    sample_recurrent(model, expected, 3, noise, temperature=1.3)
    complete(model, images, 3, noise, temperature=1.3)
    # Rounding may decide a byte between two values, after which the image is another one.
    assert (images != expected).any(1).sum() <= n_images // 20


@pytest.mark.parametrize("sizes", [(2, 2, 8), LARGE], ids=["small", "large"])
@pytest.mark.parametrize("n_images", [1, 18])
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_the_number_of_threads_does_not_matter(threads, n_images, sizes, monkeypatch):
    """Of a large model several threads share an image, of a small one none do."""
    model, noise = make_model(*sizes), image_noise(1, range(n_images), LENGTH)
    images = [torch.zeros(n_images, LENGTH, dtype=torch.int64) for _ in range(2)]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    complete(model, images[0], 1, noise)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    complete(model, images[1], 1, noise)
    assert torch.equal(*images)


@RECURRENCES
@pytest.mark.parametrize("sizes", [(3, 4, 16), LARGE], ids=["small", "large"])
@pytest.mark.parametrize(("precision", "pairs"), WAYS)
def test_its_distributions_and_states_equal_those_of_step(
    precision, pairs, sizes, attention_type, monkeypatch
):
    monkeypatch.setattr(cpu_sampler, "multiplies_pairs", lambda: pairs)
    tolerance = 1e-5 if precision == "fp32" else 5e-2
    model = make_model(*sizes, attention_type=attention_type)
    noise = image_noise(0, range(9), LENGTH)
    images = torch.randint(0, 256, (9, LENGTH))
    states, own = model.empty_states(9), model.empty_states(9)
    decoder = CompiledDecoder(model, precision)
    for position in range(LENGTH - 1):
        with torch.no_grad():
            expected = model.step(images, torch.tensor([position]), states)
        batch = make_batch(model, 9, images.clone(), position, noise, own)
        parameters = decoder.run(batch, 1)
        assert batch.position == position + 1
        torch.testing.assert_close(parameters, expected, rtol=tolerance, atol=tolerance)
    for state, expected in zip(own, states, strict=True):
        for sums, right in zip(state.attention, expected.attention, strict=True):
            assert (sums - right).abs().max() <= tolerance * right.abs().max()


def test_bfloat16_keeps_the_bits_per_dim(tiny_checkpoint):
    """To within 0.002, for a trained model on real images."""
    checkpoint = torch.load(tiny_checkpoint, weights_only=True)
    model = ImageTransformer(ModelConfig(**checkpoint["config"])).eval()
    model.load_state_dict(checkpoint["model_state"])
    images = datasets.load("digits", ".", False).images.long()
    noise = image_noise(0, range(len(images)), 64)

    def bits(precision):
        decoder, states = CompiledDecoder(model, precision), model.empty_states(len(images))
        total = 0.0
        for i in range(63):
            batch = make_batch(model, images=images.clone(), position=i, noise=noise, states=states)
            parameters = decoder.run(batch, 1)
            total -= mixture.log_prob(parameters, images[:, i + 1]).double().mean().item()
        return total / 63 / np.log(2)

    assert abs(bits("bf16") - bits("fp32")) < 0.002


def test_distributions_that_are_not_finite_are_an_error():
    model = make_model()
    with torch.no_grad():
        model.predictor.bias[0] = torch.nan
    batch = make_batch(model)
    CompiledDecoder(model, "fp32")(batch, 5)
    with pytest.raises(UserError, match="byte is not finite"):
        batch.check_finite()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["logit", "mean", "log-scale"])
def test_a_component_that_is_not_drawn_must_be_finite_too(kind, value):
    """Regression: the compiled sampler looked only at the drawn component and continued where the
    plain one stopped."""
    model = make_model(mixtures=3)
    with torch.no_grad():
        model.predictor.weight.zero_()
        # The last component has probability 0; with a logit of inf or nan, the others have.
        model.predictor.bias.copy_(torch.tensor([0, 0, -1e30, 0, 0, 0, -2, -2, -2]))
        model.predictor.bias[{"logit": 2, "mean": 5, "log-scale": 8}[kind]] = value
    errors = []
    for decoder in (EagerDecoder(model), CompiledDecoder(model, "fp32")):
        batch = make_batch(model)
        with torch.no_grad():
            decoder(batch, 5)
        assert batch.position == 5
        with pytest.raises(UserError) as error:
            batch.check_finite()
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    assert "give an earlier checkpoint" in errors[0]


@pytest.mark.parametrize("n_images", [1, 20])
@pytest.mark.parametrize("position", [4, 20, LENGTH - 2])
def test_both_samplers_stop_at_a_late_distribution_that_is_not_finite(position, n_images):
    """The first distributions, which are those of `prefill` in either sampler, are finite."""
    model, errors = make_model(), []
    model.pos_embedding.pe[:, position] = torch.nan
    for decoder in (EagerDecoder(model), CompiledDecoder(model, "fp32")):
        images = torch.zeros(n_images, LENGTH, dtype=torch.int64)
        noise = image_noise(0, range(n_images), LENGTH)
        with pytest.raises(UserError) as error:
            sample_recurrent(model, images, 2, noise, decoder=decoder)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize(("precision", "pairs"), WAYS)
@pytest.mark.parametrize(
    ("sizes", "neighbours"),
    [((2, 3, 16), False), ((2, 3, 16), True), (LARGE, False)],
    ids=["plain", "neighbours", "large"],
)
@pytest.mark.parametrize("offset", [1, 13])
@RECURRENCES
def test_samples_do_not_depend_on_the_batch(
    attention_type, offset, sizes, neighbours, precision, pairs, monkeypatch
):
    """Regression: image 0 of --offset 0 was another one with --batch_size 1, since the first byte
    went through torch's products. And on AMD CPUs with AVX2 an image that was drawn alone was
    rounded differently. Distributions and states are equal bit for bit, in several groups, too."""
    changes = {"neighbours": True, "width": 8, "channels": 1} if neighbours else {}
    model = make_model(*sizes, mixtures=5, attention_type=attention_type, **changes)
    monkeypatch.setattr(cpu_sampler, "multiplies_pairs", lambda: pairs)
    decoder = CompiledDecoder(model, precision)
    noise, images = image_noise(0, range(40), LENGTH), torch.randint(0, 256, (40, LENGTH))
    results = {}
    for n, threads in ((18, 1), (40, 1), (40, 2), (18, 3), (7, 1), (1, 1), (1, 2)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        states = model.empty_states(n)
        if neighbours and precision == "bf16":
            for state in states:
                state.inputs = state.inputs.bfloat16()
        monkeypatch.setattr(model, "empty_states", lambda n, states=states: states)
        decoder.read(model, images[:n], offset - 1, ignore_progress)
        batch = make_batch(model, n, images[:n].clone(), offset - 1, noise[:n], states)
        parameters = decoder.run(batch, LENGTH - offset)
        monkeypatch.undo()
        own = [*(x for state in states for x in state.attention), parameters, batch.images]
        results[n, threads] = [x[:1] for x in own]
    expected = results.pop((18, 1))
    for tensors in results.values():
        assert all(torch.equal(x, y) for x, y in zip(tensors, expected, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["query_projection", "key_projection", "value_projection"])
@pytest.mark.parametrize("number", [3, -3, -1])
@RECURRENCES
def test_a_nan_is_reported(attention_type, number, name, precision):
    """Regression: the compiled sampler turned NaN into a finite number. (The last of the value
    projection are a decay and a beta.)"""
    model = make_model(attention_type=attention_type)
    with torch.no_grad():
        getattr(model.transformer.layers[0].attention, name).bias[number] = torch.nan
    batch = make_batch(model)
    CompiledDecoder(model, precision)(batch, 5)
    assert not batch.finite


@pytest.mark.parametrize("part", ["linear1", "linear2", "norm1"])
def test_a_nan_in_any_weight_is_reported(part):
    model = make_model()
    with torch.no_grad():
        getattr(model.transformer.layers[0], part).weight[5] = torch.nan
    batch = make_batch(model)
    CompiledDecoder(model, "fp32")(batch, 5)
    assert not batch.finite


def cut(states, part):
    """States of which one tensor has a row less."""
    sums = list(states[1].attention)
    sums[part] = sums[part][:, :1].contiguous()
    states[1].attention = sums
    return states


SHAPES = {
    "noise": lambda model: {"noise": torch.zeros(2, 7, 2)},
    "images": lambda model: {"images": torch.zeros(2, 7, dtype=torch.int64)},
    "bytes": lambda model: {"images": torch.full((2, LENGTH), 256)},
    "negative": lambda model: {"images": torch.full((2, LENGTH), -1)},
    "position": lambda model: {"position": -1},
    "S": lambda model: {"states": cut(model.empty_states(2), 0)},
    "Z": lambda model: {"states": cut(model.empty_states(2), 1)},
    "batch": lambda model: {"states": model.empty_states(1)},
    "layers": lambda model: {"states": model.empty_states(2)[:1]},
}


@pytest.mark.parametrize("wrong", SHAPES.values(), ids=SHAPES)
def test_shapes_and_values_that_it_would_misread_are_a_value_error(wrong):
    """Regression: the C++ function read and wrote beyond tensors of another shape."""
    model = make_model()
    noise = image_noise(0, range(2), LENGTH)
    batch = make_batch(model, **{"noise": noise, **wrong(model)})
    with pytest.raises(ValueError, match=r"should be|no byte|not in an image|states of"):
        CompiledDecoder(model, "fp32")(batch, 5)


WRONG = {
    "images-float64": {"images": torch.zeros(2, LENGTH, dtype=torch.float64)},
    "images-uint8": {"images": torch.zeros(2, LENGTH, dtype=torch.uint8)},
    "images-columns": {"images": torch.zeros(LENGTH, 2, dtype=torch.int64).T},
    "noise-float64": {"noise": torch.zeros(2, LENGTH, 2, dtype=torch.float64)},
    "noise-columns": {"noise": torch.zeros(LENGTH, 2, 2).transpose(0, 1)},
    "noise-meta": {"noise": torch.zeros(2, LENGTH, 2, device="meta")},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_tensors_that_it_would_misread_are_a_type_error(wrong):
    """Regression: the C++ function read tensors of another type or order."""
    model = make_model()
    with pytest.raises(TypeError, match="the compiled sampler takes contiguous"):
        CompiledDecoder(model, "fp32")(make_batch(model, **wrong), 5)


CHANGES = {
    "float64": lambda x: x.double(),
    "columns": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "meta": lambda x: x.to("meta"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_states_that_it_would_misread_are_a_type_error(change, place):
    """As above, for S and Z of each layer."""
    model, (layer, which) = make_model(), place
    states = model.empty_states(2)
    sums = list(states[layer].attention)
    sums[which] = change(sums[which])
    states[layer].attention = sums
    with pytest.raises(TypeError, match="the compiled sampler takes contiguous"):
        CompiledDecoder(model, "fp32")(make_batch(model, states=states), 5)


def test_a_model_in_float64_is_a_type_error():
    """Its states are float64: the C++ function would have read them as float32."""
    model = make_model().double()
    images, noise = torch.zeros(2, LENGTH, dtype=torch.int64), image_noise(0, range(2), LENGTH)
    with pytest.raises(TypeError, match="float64"):
        complete(model, images, 3, noise)
    assert not images.any()


def test_a_model_on_another_device_is_a_type_error():
    """Its weights have no address in CPU memory."""
    with pytest.raises(TypeError, match="meta"):
        CompiledDecoder(make_model().to("meta"), "fp32")


def test_compilation_is_reported_and_cached(succeed, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = succeed("prediction.py", tiny_checkpoint, *RECURRENT, "--compile").out
    second = succeed("prediction.py", tiny_checkpoint, *RECURRENT, "--compile").out
    assert "compiled sampler.cpp in" in first
    assert "compiled" not in second


@pytest.mark.parametrize("attention_type", NATIVE_ATTENTIONS)
def test_recomputing_compiled_draws_the_same(succeed, tmp_path, attention_type):
    command = ["prediction.py", "-", "--dataset", "digits", "--n_layers", 2, "--n_heads", 2]
    command += ["--attention_type", attention_type, "--device", "cpu", "--index", "0-2"]
    command.append("--recompute")
    images = []
    for name, flag in (("a", "--compile"), ("b", "--no-compile")):
        succeed(*command, flag, "--save_image", f"{name}.{{}}.{{}}.png")
        images.append([imread(f"{name}.pred.{n}.png") for n in range(2)])
    assert np.array_equal(*images)


def test_without_flags_it_compiles_only_if_that_pays(succeed, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = ["prediction.py", "-", "--dataset", "digits", "--n_layers", 1, "--n_heads", 2]
    few, many = [*model, *RECURRENT], [*model, *RECURRENT, "--batch_size", 1]
    assert "compiled" not in succeed(*few).out
    monkeypatch.setattr(sampling, "STEPS_WORTH_COMPILING", 100)
    assert "compiled" not in succeed(*many, "--no-compile").out
    assert "compiled" in succeed(*many).out


def test_a_missing_compiler_is_reported_and_not_needed(call, succeed, tiny_checkpoint, monkeypatch):
    command = ["prediction.py", tiny_checkpoint, *RECURRENT, "--save_image", "x.{}.{}.png"]
    monkeypatch.setattr(sampling, "STEPS_WORTH_COMPILING", 10)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in succeed(*command).err
    result = call(*command, "--compile")
    assert result.status == 2
    assert "C++ compiler" in result.err


def library_of(command, cache, succeed, monkeypatch):
    """Run a command with an empty cache; the one library that it has compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    succeed(*command)
    (library,) = (cache / "image-transformers").glob("*.so")
    return library


DAMAGES = {
    "truncated": lambda content: content[:5000],
    "zeroed": lambda content: bytes(len(content)),
    "empty": lambda content: b"",
    "foreign": lambda content: Path(sys.executable).read_bytes(),
}


def test_a_damaged_library_is_compiled_again(call, succeed, tiny_checkpoint, tmp_path, monkeypatch):
    """Regression: a truncated file in the cache ended every later run with SIGBUS, a zeroed one
    with a segmentation fault, a foreign one with an AttributeError."""
    command = ["prediction.py", tiny_checkpoint, *RECURRENT, "--device", "cpu", "--compile"]
    library = library_of(command, tmp_path, succeed, monkeypatch)
    content = library.read_bytes()
    for damage in DAMAGES.values():
        library.unlink()  # it is in use in this process
        library.write_bytes(damage(content))
        result = call(*command)
        assert (result.status, result.err.count("was damaged and is replaced")) == (0, 1)
        assert library.read_bytes() == content
    assert "compiled" not in succeed(*command).out


def test_a_kill_while_compiling_leaves_nothing(succeed, tiny_checkpoint, tmp_path, monkeypatch):
    """Regression: the folder of a compiler that was killed stayed for ever."""
    slow = tmp_path / "slow"
    slow.write_text(f'#!/bin/sh\ncase "$*" in *-o*) touch $TMPDIR/x; sleep 60;; esac\n'
                    f'exec {find_compiler()} "$@"\n')  # fmt: skip
    slow.chmod(stat.S_IRWXU)
    command = [tiny_checkpoint, *RECURRENT, "--device", "cpu", "--compile"]
    cache = tmp_path / "image-transformers"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": str(slow)}
    process = start("prediction.py", *command, env=environment, start_new_session=True)
    while not list(cache.glob("*.tmp/x")):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(cache.glob("*.tmp"))
    library = library_of(["prediction.py", *command], tmp_path, succeed, monkeypatch)
    assert {path.name for path in cache.iterdir()} == {library.name, "lock"}


def test_two_processes_compile_once(tiny_checkpoint, tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = ["prediction.py", tiny_checkpoint, *RECURRENT, "--device", "cpu", "--compile"]
    processes = [start(*command, env=environment) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "".join(outputs).count("compiled sampler.cpp") == 1


def test_a_library_that_cannot_be_loaded_is_reported_and_not_needed(
    call, tiny_checkpoint, tmp_path, monkeypatch
):
    """As in a cache folder that is mounted noexec; here it is what the compiler writes."""
    script = tmp_path / "compiler"
    script.write_text('#!/bin/sh\nfor last; do :; done\necho text > "$last"\n')
    script.chmod(stat.S_IRWXU)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(sampling, "STEPS_WORTH_COMPILING", 10)
    command = ["prediction.py", tiny_checkpoint, *RECURRENT, "--device", "cpu"]
    result = call(*command)
    assert (result.status, result.err.count("cannot be loaded")) == (0, 1)
    result = call(*command, "--compile")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "set XDG_CACHE_HOME" in result.err
    cpu_sampler.multiplies_pairs.cache_clear()
    for _ in range(2):  # the second time, what compares two ways is in the cache
        result = call(*command, "--precision", "bf16")
        assert (result.status, result.err.count("cannot be loaded")) == (0, 1)


def sample_without_own_threads(checkpoint, **environment):
    """Status and error messages of a command that can start no threads but OpenMP's."""
    environment |= {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1", "OMP_STACKSIZE": "2M"}

    def limit_stacks():  # more than the address space has
        resource.setrlimit(resource.RLIMIT_STACK, (2**46, resource.RLIM_INFINITY))

    command = [checkpoint, *RECURRENT, "--device", "cpu", "--compile"]
    environment = {**os.environ, **environment}
    process = start("prediction.py", *command, env=environment, preexec_fn=limit_stacks)
    error = process.communicate()[1]
    return process.returncode, error


LIMITS_STACKS = pytest.mark.skipif(
    sys.platform != "linux", reason="only there a limit of stacks holds for threads"
)


@LIMITS_STACKS
def test_threads_that_cannot_be_started_are_an_error(tiny_checkpoint):
    """Regression: the exception crossed the C boundary and aborted the process."""
    status, error = sample_without_own_threads(tiny_checkpoint, OMP_THREAD_LIMIT="1")
    assert status == 2
    assert "cannot start the 2 threads" in error.splitlines()[-1]


@LIMITS_STACKS
def test_it_uses_the_threads_of_torch(tiny_checkpoint):
    """Regression: it started its own ones, beside those of torch, which spin for some milliseconds
    after each operation: on two cores, drawing took up to twice as long."""
    status, error = sample_without_own_threads(tiny_checkpoint)
    assert status == 0, error


def test_a_failing_compiler_is_reported_and_not_needed(call, tiny_checkpoint, monkeypatch):
    """In one line, with or without --compile."""
    broken = os.path.abspath("broken")
    with open(broken, "w") as file:
        file.write("#!/bin/sh\necho no room >&2\nexit 1\n")
    os.chmod(broken, stat.S_IRWXU)
    monkeypatch.setenv("CXX", broken)
    monkeypatch.setattr(sampling, "STEPS_WORTH_COMPILING", 10)
    result = call("prediction.py", tiny_checkpoint, *RECURRENT)
    assert result.status == 0
    assert "broken failed (no room)" in result.err
    result = call("prediction.py", tiny_checkpoint, *RECURRENT, "--compile")
    assert result.status == 2
    assert "broken failed (no room)" in result.err


def test_what_cannot_be_compiled_is_refused(call):
    model = ["-", "--dataset", "digits", *TINY, "--attention_type", "full"]
    result = call("prediction.py", *model, "--recurrent", "--device", "cpu", "--compile")
    assert result.status == 2
    assert "--compile" in result.err


@pytest.mark.skipif(not shutil.which("clang++"), reason="no second compiler here")
def test_another_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "clang++")
    assert "clang++" in find_compiler()
    for attention_type in CONSTANT_STATE:
        test_it_draws_the_images_of_the_plain_sampler((2, 3, 20, 5), 7, attention_type)

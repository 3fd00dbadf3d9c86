"""The compiled sampler: the same images as the loop in sampling.py, and fallbacks without it."""

import os
import shutil
import stat

import numpy as np
import pytest
import torch
from conftest import TINY
from imageio.v3 import imread

import compiling
import datasets
import mixture
import prediction
import recurrence
from compiling import find_compiler
from models import ImageTransformer, ModelConfig
from recurrence import CompiledRecurrence
from sampling import image_noise, sample_recurrent
from utils import UserError

LENGTH = 40
RECURRENT = ["--recurrent", "--index", "0-3", "--offset", 20]


def make_model(n_layers=2, n_heads=2, d_query=8, mixtures=3, length=LENGTH):
    torch.manual_seed(0)
    config = ModelConfig(
        length, n_layers=n_layers, n_heads=n_heads, d_query=d_query, mixtures=mixtures
    )
    return ImageTransformer(config).eval()


# Sizes that fill the registers' lanes and that do not.
SIZES = [(1, 1, 4, 1), (2, 2, 6, 2), (2, 3, 20, 5), (3, 8, 32, 10), (1, 1, 64, 30)]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
@pytest.mark.parametrize("n_images", [1, 7, 37])
def test_it_draws_the_images_of_the_loop(sizes, n_images):
    model = make_model(*sizes)
    noise = image_noise(5, range(n_images), LENGTH)
    expected = torch.randint(0, 256, (n_images, LENGTH))
    images = expected.clone()
    sample_recurrent(model, expected, 3, noise, temperature=1.3)
    CompiledRecurrence(model, "fp32")(images, 3, noise, temperature=1.3)
    assert torch.equal(images, expected)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_the_number_of_threads_does_not_matter(threads, monkeypatch):
    """Fewer threads than images, as many, and more."""
    model, noise = make_model(), image_noise(1, range(18), LENGTH)
    sampler = CompiledRecurrence(model, "fp32")
    images = [torch.zeros(18, LENGTH, dtype=torch.int64) for _ in range(2)]
    sampler(images[0], 1, noise)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    sampler(images[1], 1, noise)
    assert torch.equal(*images)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_its_distributions_and_states_are_the_steps(precision, tolerance):
    model, noise = make_model(3, 4, 16), image_noise(0, range(9), LENGTH)
    images = torch.randint(0, 256, (9, LENGTH))
    states, own = model.empty_states(9), model.empty_states(9)
    sampler = CompiledRecurrence(model, precision)
    for position in range(LENGTH - 1):
        with torch.no_grad():
            expected = model.step(images[:, position], position, states)
        parameters = sampler.run(images.clone(), position, position + 1, noise, own)
        torch.testing.assert_close(parameters, expected, rtol=tolerance, atol=tolerance)
    for state, expected in zip(own, states, strict=True):
        for sums, right in zip(state, expected, strict=True):
            assert (sums - right).abs().max() <= tolerance * right.abs().max()


def test_bfloat16_keeps_the_bits_per_dim(tiny_checkpoint):
    """Of a trained model, on real images, by less than 0.002."""
    checkpoint = torch.load(tiny_checkpoint, weights_only=True)
    model = ImageTransformer(ModelConfig(**checkpoint["config"])).eval()
    model.load_state_dict(checkpoint["model_state"])
    images = datasets.load("digits", ".", False).images.long()
    noise = image_noise(0, range(len(images)), 64)

    def bits(precision):
        sampler, states = CompiledRecurrence(model, precision), model.empty_states(len(images))
        total = 0.0
        for i in range(63):
            parameters = sampler.run(images.clone(), i, i + 1, noise, states)
            total -= mixture.log_prob(parameters, images[:, i + 1]).double().mean().item()
        return total / 63 / np.log(2)

    assert abs(bits("bf16") - bits("fp32")) < 0.002


def test_every_byte_is_reported():
    counts = []
    images = torch.zeros(3, LENGTH, dtype=torch.int64)
    noise = image_noise(0, range(3), LENGTH)
    CompiledRecurrence(make_model(), "fp32")(images, 10, noise, advance=counts.append)
    assert sum(counts) == 3 * (LENGTH - 10)


def test_a_full_image_stays():
    images = torch.full((2, LENGTH), 7)
    CompiledRecurrence(make_model(), "fp32")(images, LENGTH, image_noise(0, range(2), LENGTH))
    assert (images == 7).all()


def test_distributions_that_are_not_finite_are_an_error():
    model = make_model()
    with torch.no_grad():
        model.predictor.bias[0] = torch.nan
    images = torch.zeros(2, LENGTH, dtype=torch.int64)
    states = model.empty_states(2)
    sampler = CompiledRecurrence(model, "fp32")
    with pytest.raises(UserError, match="byte 1 is not finite"):
        sampler.run(images, 0, 5, image_noise(0, range(2), LENGTH), states)


def test_compilation_is_told_and_kept(succeed, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = succeed("prediction.py", tiny_checkpoint, *RECURRENT, "--compile").out
    second = succeed("prediction.py", tiny_checkpoint, *RECURRENT, "--compile").out
    assert "compiled recurrence.cpp in" in first
    assert "compiled" not in second


@pytest.mark.parametrize("attention_type", ["causal-linear", "full"])
def test_the_batched_sampler_compiled_draws_the_same(succeed, tmp_path, attention_type):
    command = ["prediction.py", "-", "--dataset", "digits", "--n_layers", 2, "--n_heads", 2]
    command += ["--attention_type", attention_type, "--device", "cpu", "--index", "0-2"]
    images = []
    for name, flag in (("a", "--compile"), ("b", "--no-compile")):
        succeed(*command, flag, "--save_image", f"{name}.{{}}.{{}}.png")
        images.append([imread(f"{name}.pred.{n}.png") for n in range(2)])
    assert np.array_equal(*images)


def test_without_being_asked_it_compiles_only_where_that_pays(succeed, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = ["prediction.py", "-", "--dataset", "digits", "--n_layers", 1, "--n_heads", 2]
    few, many = [*model, *RECURRENT], [*model, *RECURRENT, "--batch_size", 1]
    assert "compiled" not in succeed(*few).out
    monkeypatch.setattr(prediction, "STEPS_WORTH_COMPILING", 100)
    assert "compiled" not in succeed(*many, "--no-compile").out
    assert "compiled" in succeed(*many).out


def test_other_sources_and_sizes_are_other_libraries(monkeypatch, tmp_path):
    def path(precision="fp32", **sizes):
        config = ModelConfig(**{"length": LENGTH, **sizes})
        return compiling.kept_at(recurrence.SOURCE, recurrence.sizes(config, precision))[0]

    first = path()
    assert first != path(n_heads=2)
    assert first != path("bf16")
    assert first == path(length=99)  # the length is no constant
    for name in (recurrence.SOURCE, compiling.HEADER):
        (tmp_path / name).write_bytes((compiling.FOLDER / name).read_bytes())
    monkeypatch.setattr(compiling, "FOLDER", tmp_path)
    assert first == path()
    for name in (recurrence.SOURCE, compiling.HEADER):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b"\n")
        assert path() != first
        first = path()


def test_no_compiler_is_told_and_does_without(call, succeed, tiny_checkpoint, monkeypatch):
    command = ["prediction.py", tiny_checkpoint, *RECURRENT, "--save_image", "x.{}.{}.png"]
    monkeypatch.setattr(prediction, "STEPS_WORTH_COMPILING", 10)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in succeed(*command).err
    result = call(*command, "--compile")
    assert result.status == 2
    assert "C++ compiler" in result.err


def test_a_compiler_that_fails_is_told_and_does_without(call, tiny_checkpoint, monkeypatch):
    """In one line, whether it was asked for or not."""
    broken = os.path.abspath("broken")
    with open(broken, "w") as file:
        file.write("#!/bin/sh\necho no room >&2\nexit 1\n")
    os.chmod(broken, stat.S_IRWXU)
    monkeypatch.setenv("CXX", broken)
    monkeypatch.setattr(prediction, "STEPS_WORTH_COMPILING", 10)
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
    test_it_draws_the_images_of_the_loop((2, 3, 20, 5), 7)

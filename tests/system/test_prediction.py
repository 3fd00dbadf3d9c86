"""Sampling through the command line: the images, the files and the equality of the samplers."""

import re
import shutil

import imageio.v3
import numpy as np
import pytest
import torch
from helpers import TINY
from PIL import Image

import datasets
import models
import prediction
from cli import sampling_flags
from engine import pictures


@pytest.fixture
def sample(succeed, tiny_checkpoint, tmp_path):
    """Sample with flags; returns the images (N, H, W) written with --save_image."""

    def run(*flags, model=tiny_checkpoint):
        succeed("prediction.py", model, *flags, "--save_image", "i.{}.{}.png")
        files = sorted(tmp_path.glob("i.pred.*.png"), key=lambda p: int(p.name.split(".")[2]))
        images = np.stack([imageio.v3.imread(path) for path in files])
        for path in files:
            path.unlink()
        return images

    return run


def real_digits(n=300):
    return datasets.load("digits", ".", False).images.view(-1, 8, 8).numpy()[:n]


SAMPLERS = pytest.mark.parametrize("sampler", ["--recompute", "--recurrent"])


@pytest.mark.parametrize("offset", [0, 1, 2, 40, 63, 64])
def test_both_samplers_give_the_same_images(sample, offset):
    flags = ["--index", "0-5", "--offset", offset]
    assert np.array_equal(sample(*flags), sample(*flags, "--recompute"))


@SAMPLERS
def test_the_batch_size_does_not_matter(sample, sampler):
    flags = ["--index", "0-7", "--offset", 3, sampler]
    assert np.array_equal(sample(*flags), sample(*flags, "--batch_size", 2))


def test_the_seed_and_the_temperature_have_an_effect(sample):
    flags = ["--index", "0-4", "--recurrent"]
    assert np.array_equal(sample(*flags), sample(*flags, "--seed", 0))
    assert not np.array_equal(sample(*flags), sample(*flags, "--seed", 1))
    assert not np.array_equal(sample(*flags), sample(*flags, "--temperature", 0.5))


def test_given_bytes_are_the_real_ones(sample):
    real = real_digits(5).reshape(5, 64)
    assert np.array_equal(
        sample("--index", "0-5", "--offset", 20).reshape(5, 64)[:, :20], real[:, :20]
    )
    assert np.array_equal(sample("--index", "0-5", "--offset", 64).reshape(5, 64), real)


def test_one_index_several_times_gives_different_images(sample):
    images = sample("--index", "3*4", "--offset", 8)
    assert len({image.tobytes() for image in images}) == 4
    assert len({image[0].tobytes() for image in images}) == 1


def test_training_images(sample):
    real = datasets.load("digits", ".", True).images.view(-1, 8, 8).numpy()
    assert np.array_equal(sample("--index", "2", "--offset", 64, "--training_set")[0], real[2])


@pytest.fixture
def without_data(succeed, colour_folder, tmp_path):
    """A checkpoint of a folder that is gone."""
    folder = shutil.copytree(colour_folder, tmp_path / "gone")
    command = ["main.py", *TINY, "--iterations", 1, "--save_to", "c.pth"]
    succeed(*command, "--dataset", folder)
    shutil.rmtree(folder)
    return "c.pth"


def test_unconditional_images_need_no_data(sample, without_data):
    """The checkpoint has the shape and the histogram of first bytes: the folder may be gone."""
    images = sample("--index", "0*3", "--offset", 0, model=without_data)
    assert images.shape == (3, 6, 5, 3)


def test_a_data_set_that_is_gone_is_an_error_with_two_ways_out(call, without_data, tmp_path):
    """Regression: it did not say that new images need none."""
    result = call("prediction.py", without_data)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert f"{tmp_path}/gone does not exist: give it with --dataset; " in result.err
    assert "new images, with --offset 0, need no data set\n" in result.err
    # A surprisal is that of real images.
    assert "--offset 0" not in call("prediction.py", without_data, "--save_surprisal", "s.png").err


def test_an_evaluation_needs_test_images_alone(
    call, succeed, without_data, colour_folder, tmp_path
):
    """Neither training images nor the optimiser's moments. Regression: train.npy was missing."""
    command = ["main.py", "--continue_from", without_data]
    before = succeed(*command, "--evaluate_only", "--dataset", colour_folder).out
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test.npy").symlink_to(colour_folder / "test.npy")
    succeed(*command, "--export", "weights.pth")
    command = ["main.py", "--continue_from", "weights.pth", "--dataset", tmp_path / "test"]
    out = succeed(*command, "--evaluate_only").out
    assert ", 4 test images of 6x5x3\n" in out
    assert out.splitlines()[-1] == before.splitlines()[-1]
    assert "has neither train.npy nor" in call(*command, "--iterations", 2).err


@pytest.fixture
def other_digits(tmp_path):
    """A folder with the test images of `digits`, and others to train on."""
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other" / "test.npy", real_digits())
    np.save(tmp_path / "other" / "train.npy", 255 - real_digits())
    return tmp_path / "other"


def test_a_model_completes_images_of_another_data_set_of_its_shape(
    sample, succeed, tiny_checkpoint, other_digits
):
    """A model of mnist refused the digits of mnist-10k."""
    flags = ["--dataset", other_digits, "--index", 3, "--offset", 64]
    assert np.array_equal(sample(*flags)[0], real_digits()[3])
    assert np.array_equal(sample(*flags, "--training_set")[0], 255 - real_digits()[3])
    line = f"the images are those of {other_digits}; the model was trained on digits\n"
    assert succeed("prediction.py", tiny_checkpoint, *flags).out.count(line) == 1
    assert "trained on" not in succeed("prediction.py", tiny_checkpoint, "--dataset", "digits").out


def test_another_data_set_may_be_evaluated_but_not_trained_on(
    call, succeed, tiny_checkpoint, other_digits
):
    """Its first bytes are scored by the histogram of the images that the model was trained on."""
    command = ["main.py", "--continue_from", tiny_checkpoint]
    other = ["--dataset", other_digits]
    evaluated = succeed(*command, "--evaluate_only", *other).out
    assert evaluated.count("the model was trained on digits\n") == 1
    own = succeed(*command, "--evaluate_only").out
    assert evaluated.splitlines()[-1] == own.splitlines()[-1]
    result = call(*command, "--iterations", 31, *other)
    assert result.status == 2
    assert "contradicts the checkpoint, whose dataset is digits" in result.err


def test_random_weights_sample_from_flags_alone(sample):
    assert sample("--dataset", "digits", *TINY, "--recurrent", model="-").shape == (1, 8, 8)


def test_full_attention_samples_with_both_samplers(sample, succeed):
    command = ["main.py", "--dataset", "digits", *TINY, "--iterations", 5, "--save_to", "f.pth"]
    succeed(*command, "--attention_type", "full", "--evaluate_images", 4)
    flags = ["--index", "0-3", "--offset", 20]
    batched = sample(*flags, model="f.pth")
    assert np.array_equal(batched, sample(*flags, "--recurrent", model="f.pth"))


def test_colour_images_are_written_in_colour(succeed, colour_folder, tmp_path):
    command = ["main.py", "--dataset", colour_folder, *TINY, "--iterations", 2]
    succeed(*command, "--save_to", "w.{}.pth")
    succeed(
        "prediction.py", "w.{}.pth", "--index", "0-2", "--recurrent", "--save_image", "{}.{}.png",
        "--save_gif", "{}.gif", "--save_grid", "grid.png",
    )  # fmt: skip
    real = np.load(colour_folder / "test.npy")[0]
    assert np.array_equal(imageio.v3.imread(tmp_path / "real.0.png"), real)
    drawn = imageio.v3.imread(tmp_path / "pred.0.png")
    assert np.array_equal(drawn.ravel()[:45], real.ravel()[:45])
    with Image.open(tmp_path / "0.gif") as gif:
        frames = [gif.seek(i) or gif.info["duration"] for i in range(gif.n_frames)]
    assert sum(frames) == 6000  # a byte of 0 changes no pixel: frames merge


def test_the_gif_of_a_small_image_has_a_frame_per_byte_and_tints_the_given_part(
    succeed, tiny_checkpoint, tmp_path
):
    succeed(
        "prediction.py", tiny_checkpoint, "--recurrent", "--index", 4, "--offset", 16,
        "--save_gif", "s.gif", "--save_image", "{}.{}.png",
    )  # fmt: skip
    with Image.open(tmp_path / "s.gif") as gif:
        assert gif.n_frames == 64 - 16 + 1
    frames = imageio.v3.imread(tmp_path / "s.gif")[:, ::16, ::16].astype(int)
    drawn = imageio.v3.imread(tmp_path / "pred.0.png")
    final = frames[-1]
    assert np.abs(final[2:] - drawn[2:, :, None]).max() < 12  # a palette rounds
    assert (final[:2, :, 2] > final[:2, :, 0] + 50).all()  # the given rows are blue
    first = frames[0][2:].reshape(-1, 3)
    assert (first == first[0]).all()  # nothing is drawn yet


def read_gif(path):
    """The frames of an animation (F, H, W, 3), and how long each lasts, in milliseconds."""
    with Image.open(path) as gif:
        durations = [gif.seek(i) or gif.info["duration"] for i in range(gif.n_frames)]
    return imageio.v3.imread(path, mode="RGB").astype(int), durations


@pytest.mark.parametrize("shape", [(8, 8), (28, 28), (32, 32, 3)], ids=str)
def test_a_gif_is_short_and_small_whatever_the_image(shape, tmp_path):
    """With a frame of 20 ms for each byte, a CIFAR-10 image took a minute and several megabytes."""
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    offset = image.size // 4
    pictures.save_gif(tmp_path / "a.gif", image, offset, sampling_flags.GIF_SECONDS)
    frames, durations = read_gif(tmp_path / "a.gif")
    assert sum(durations) == pytest.approx(6000, rel=0.02)
    assert min(durations) >= 20  # browsers slow down what is faster
    assert len(frames) <= 200
    assert (tmp_path / "a.gif").stat().st_size < 500_000
    for frame, count in ((frames[0], offset), (frames[-1], image.size)):
        factor = len(frame) // shape[0]
        expected = pictures.partial_image(image, offset, count)
        difference = np.abs(frame[::factor, ::factor] - expected)
        assert difference.mean() < 12  # a GIF has 256 colours
        assert np.percentile(difference, 99) < 50
    rows = shape[0] // 4
    below = frames[0][len(frames[0]) * rows // shape[0] :]
    assert (np.abs(below - pictures.NOT_YET) < 12).all()  # nothing is drawn yet


def test_gif_seconds_has_an_effect(succeed, tiny_checkpoint, tmp_path):
    flags = ["--recurrent", "--offset", 16, "--save_gif", "a.gif"]
    lasting = []
    for more in ([], ["--gif_seconds", 2], ["--gif_seconds", 20]):
        succeed("prediction.py", tiny_checkpoint, *flags, *more)
        lasting.append(sum(read_gif(tmp_path / "a.gif")[1]))
    assert lasting == pytest.approx([6000, 2000, 20000], rel=0.02)


def test_the_pattern_of_the_original_is_written_as_png(succeed, tiny_checkpoint, tmp_path):
    """It ended in .pth, which is not an image format."""
    result = succeed(
        "prediction.py", tiny_checkpoint, "--index", "0-2", "--save_image", "images/d.{}.{}.pth"
    )
    names = sorted(p.name for p in (tmp_path / "images").iterdir())
    assert names == [f"d.{kind}.{i}.pth.png" for kind in ("pred", "real") for i in (0, 1)]
    lines = result.out.splitlines()
    said = next(i for i, line in enumerate(lines) if "images/d.pred.0.pth.png" in line)
    assert said < next(i for i, line in enumerate(lines) if line.startswith("sampled"))


def test_without_output_flags_samples_png(succeed, tiny_checkpoint, tmp_path):
    result = succeed("prediction.py", tiny_checkpoint)
    assert [p.name for p in tmp_path.iterdir()] == ["samples.png"]
    assert "samples.png" in result.out


def test_the_figure_has_a_row_per_image(succeed, tiny_checkpoint, tmp_path):
    succeed("prediction.py", tiny_checkpoint, "--index", "0-3", "--save_grid", "a.png")
    succeed("prediction.py", tiny_checkpoint, "--index", "0-6", "--save_grid", "b.png")
    succeed("prediction.py", tiny_checkpoint, "--index", "0*6", "--save_grid", "c.png")
    a, b, c = (imageio.v3.imread(tmp_path / f"{n}.png").shape for n in "abc")
    assert b[0] > a[0] * 1.5
    assert c[1] > b[1] * 1.2


def test_the_figure_is_written_in_other_formats(succeed, tiny_checkpoint, tmp_path):
    succeed("prediction.py", tiny_checkpoint, "--save_grid", "figure.pdf")
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")


def test_progress_reports_bytes_and_images_per_second(succeed, tiny_checkpoint):
    out = succeed("prediction.py", tiny_checkpoint, "--index", "0-3", "--offset", 4).out
    assert "sampled 3 images, 180 bytes" in out
    assert "bytes/s" in out
    assert "images/s" in out


def test_one_image_is_not_1_images(succeed, tiny_checkpoint):
    """It said "sampled 1 images"."""
    out = succeed("prediction.py", tiny_checkpoint, "--offset", 4).out
    assert "sampled 1 image, 60 bytes" in out


def test_image_shape_overrides(sample):
    assert sample("--index", "0-2", "--image_shape", "4,16").shape == (2, 4, 16)


def test_compile_samples_the_same(sample):
    flags = ["--index", "0-2", "--offset", 50, "--recurrent"]
    assert np.array_equal(sample(*flags), sample(*flags, "--compile"))


@SAMPLERS
def test_no_compile_says_so(succeed, tiny_checkpoint, sampler):
    """It did not say that it was slower."""
    flags = ["--device", "cpu", "--offset", 60, sampler]
    out = succeed("prediction.py", tiny_checkpoint, *flags, "--no-compile").out
    assert out.count("--no-compile: sampling in plain PyTorch, which is slower\n") == 1
    assert "--no-compile" not in succeed("prediction.py", tiny_checkpoint, *flags).out


def test_the_caption_evaluates_a_few_images_at_a_time(succeed, tiny_checkpoint, monkeypatch):
    """All images of a figure went through the model at once, which took gigabytes."""
    sizes = []
    nll = models.ImageTransformer.nll_per_byte

    def watched(model, images, keys=None):
        sizes.append(images.numel())
        return nll(model, images, keys)

    monkeypatch.setattr(models.ImageTransformer, "nll_per_byte", watched)
    many = ["--index", "0-150", "--offset", 1, "--save_grid", "a.png"]
    out = succeed("prediction.py", tiny_checkpoint, *many).out
    assert sum(sizes) == 2 * 150 * 64  # samples and real images
    assert max(sizes) <= models.POSITIONS_AT_ONCE
    real = re.search(r"real images (\d+\.\d+)\)", out)[1]
    evaluate = ["--continue_from", tiny_checkpoint, "--evaluate_only", "--evaluate_images", 150]
    bits = re.search(r"test (\d+\.\d+) bits/dim", succeed("main.py", *evaluate).out)[1]
    assert abs(float(real) - float(bits)) < 1e-3


def test_the_outputs_are_checked_before_sampling(call, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(prediction, "complete_images", None)
    result = call("prediction.py", tiny_checkpoint, "--save_image", "/proc/{}.{}.png")
    assert result.status == 2
    assert "/proc" in result.err


def test_an_index_expression():
    assert sampling_flags.index_list("0-3,7*2, 5") == [0, 1, 2, 7, 7, 5]


def test_weights_with_nan_are_not_sampled_silently(call, tiny_checkpoint, tmp_path):
    checkpoint = torch.load(tiny_checkpoint, weights_only=True)
    checkpoint["model_state"]["predictor.bias"][3] = torch.nan
    torch.save(checkpoint, tmp_path / "nan.pth")
    result = call("prediction.py", tmp_path / "nan.pth")
    assert result.status == 2
    assert "predictor.bias" in result.err

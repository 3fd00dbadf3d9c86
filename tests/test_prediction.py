"""Sampling through the command line: the images, the files and the equality of the samplers."""

import imageio.v3
import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import datasets
import prediction


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


@pytest.mark.parametrize("offset", [0, 1, 2, 40, 63, 64])
def test_both_samplers_give_the_same_images(sample, offset):
    flags = ["--index", "0-5", "--offset", offset]
    assert np.array_equal(sample(*flags), sample(*flags, "--recurrent"))


@pytest.mark.parametrize("sampler", ["batched", "recurrent"])
def test_the_batch_size_does_not_matter(sample, sampler):
    flags = ["--index", "0-7", "--offset", 3, "--sampler", sampler]
    assert np.array_equal(sample(*flags), sample(*flags, "--batch_size", 2))


def test_the_seed_and_the_temperature_act(sample):
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


def test_unconditional_images_need_no_data(sample, succeed, colour_folder, tmp_path):
    """The checkpoint knows the shape and the first bytes; the folder may be gone."""
    folder = tmp_path / "gone"
    folder.symlink_to(colour_folder)
    command = ["main.py", *TINY, "--iterations", 1, "--save_to", "c.pth"]
    succeed(*command, "--dataset", folder)
    folder.unlink()
    images = sample("--index", "0*3", "--offset", 0, model="c.pth")
    assert images.shape == (3, 6, 5, 3)


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
    assert sum(frames) == (90 - 45) * 20 + 2000  # a byte of 0 changes no pixel: frames merge


def test_a_gif_has_a_frame_a_byte_and_a_tinted_given_part(succeed, tiny_checkpoint, tmp_path):
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


def test_the_pattern_of_the_original_is_written_as_png(succeed, tiny_checkpoint, tmp_path):
    """The documented pattern ended in .pth, which no image writer takes."""
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


def test_the_figure_has_a_row_an_image(succeed, tiny_checkpoint, tmp_path):
    succeed("prediction.py", tiny_checkpoint, "--index", "0-3", "--save_grid", "a.png")
    succeed("prediction.py", tiny_checkpoint, "--index", "0-6", "--save_grid", "b.png")
    succeed("prediction.py", tiny_checkpoint, "--index", "0*6", "--save_grid", "c.png")
    a, b, c = (imageio.v3.imread(tmp_path / f"{n}.png").shape for n in "abc")
    assert b[0] > a[0] * 1.5
    assert c[1] > b[1] * 1.2


def test_the_figure_is_written_in_other_formats(succeed, tiny_checkpoint, tmp_path):
    succeed("prediction.py", tiny_checkpoint, "--save_grid", "figure.pdf")
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")


def test_progress_tells_bytes_and_images_a_second(succeed, tiny_checkpoint):
    out = succeed("prediction.py", tiny_checkpoint, "--index", "0-3", "--offset", 4).out
    assert "sampled 3 images, 180 bytes" in out
    assert "bytes/s" in out
    assert "images/s" in out


def test_image_shape_overrides(sample):
    assert sample("--index", "0-2", "--image_shape", "4,16").shape == (2, 4, 16)


def test_compile_samples_the_same(sample):
    flags = ["--index", "0-2", "--offset", 50, "--recurrent"]
    assert np.array_equal(sample(*flags), sample(*flags, "--compile"))


def test_nothing_is_drawn_before_the_outputs_are_known_to_work(call, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(prediction, "sample", None)
    result = call("prediction.py", tiny_checkpoint, "--save_image", "/proc/{}.{}.png")
    assert result.status == 2
    assert "/proc" in result.err


def test_an_index_expression():
    assert prediction.index_list("0-3,7*2, 5") == [0, 1, 2, 7, 7, 5]


def test_weights_with_nan_are_not_sampled_silently(call, tiny_checkpoint, tmp_path):
    checkpoint = torch.load(tiny_checkpoint, weights_only=True)
    checkpoint["model_state"]["predictor.bias"][3] = torch.nan
    torch.save(checkpoint, tmp_path / "nan.pth")
    result = call("prediction.py", tmp_path / "nan.pth")
    assert result.status == 2
    assert "predictor.bias" in result.err

"""The embedded 28x28 digits through both scripts, and how good samples of them are."""

import socket
from types import SimpleNamespace

import imageio.v3
import numpy as np
import pytest
import torch
from helpers import TINY, load
from torch import nn

import datasets
import main
import prediction
from benchmarks import digit_quality


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Every connection fails."""

    def refuse(*args):
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of a tiny model on mnist-10k, 3 iterations old."""
    path = tmp_path_factory.mktemp("mnist") / "w.pth"
    flags = ["--dataset", "mnist-10k", *TINY, "--recipe", "fast", "--iterations", 3]
    flags += ["--batch_size", 2, "--evaluate_images", 4, "--save_to", path]
    main.main([str(flag) for flag in flags])
    return path


def test_training_and_sampling_need_no_download(checkpoint, succeed, tmp_path):
    """Neither with given bytes, nor for a checkpoint alone."""
    out = succeed("main.py", "--continue_from", checkpoint, "--iterations", 4).out
    assert "mnist-10k, 10000 training and 1000 test images of 28x28" in out
    stored = load(checkpoint)
    assert stored["dataset"] == {"name": "mnist-10k", "image_shape": [28, 28]}
    assert stored["first_byte_counts"].sum() == 10000
    flags = ["--recurrent", "--index", "998-1000", "--save_image", "x.{}.{}.png"]
    succeed("prediction.py", checkpoint, "--offset", 700, *flags)
    test = datasets.load("mnist-10k", "nowhere", False).images.numpy()
    for n in range(2):
        real = imageio.v3.imread(tmp_path / f"x.real.{n}.png")
        assert np.array_equal(real.ravel(), test[998 + n])
        assert np.array_equal(
            imageio.v3.imread(f"x.pred.{n}.png").ravel()[:700], real.ravel()[:700]
        )


def test_samples_for_the_classifier_are_those_of_prediction(checkpoint, tmp_path):
    """Unconditional, all of them, in their order; the temperature and the seed act."""
    args = SimpleNamespace(checkpoint=str(checkpoint), n=3, temperature=0.7, seed=5)
    images = digit_quality.sample(args)
    assert images.shape == (3, 784)
    assert images.dtype == torch.uint8
    flags = ["--recurrent", "--offset", "0", "--index", "0-3", "--temperature", "0.7"]
    prediction.main([str(checkpoint), *flags, "--seed", "5", "--save_image", "x.{}.{}.png"])
    expected = [imageio.v3.imread(tmp_path / f"x.pred.{n}.png") for n in range(3)]
    assert np.array_equal(images.view(3, 28, 28), np.stack(expected))
    other = digit_quality.sample(SimpleNamespace(**{**vars(args), "seed": 6}))
    assert not torch.equal(images, other)


class Certain(nn.Module):
    """As sure of digit 0 as the brightness of an image."""

    def forward(self, images):
        assert images.max() <= 1
        p = images.mean(1, keepdim=True)  # (n, 1)
        return torch.cat([p, (1 - p).expand(-1, 9) / 9], dim=1).log()


def test_the_fraction_of_which_a_classifier_is_sure():
    """More than 0.8, of any digit."""
    bright = torch.tensor([255, 230, 207, 203, 128], dtype=torch.uint8)
    images = bright[:, None].expand(-1, 784)
    assert digit_quality.sure(Certain(), images) == pytest.approx(3 / 5)
    assert digit_quality.sure(Certain(), images[3:]) == 0


def test_the_classifier_learns_the_digits(monkeypatch):
    """From a part of them: 0.8 of the test images right, where guessing has 0.1."""
    images = datasets.load("mnist-10k", ".", True).images
    part = datasets.ImageDataset("mnist-10k", images[:2000], (28, 28))
    labels = digit_quality.mnist_10k_labels()[:2000]
    test = datasets.load("mnist-10k", ".", False).images
    monkeypatch.setattr(datasets, "load", lambda name, directory, train: part)
    monkeypatch.setattr(digit_quality, "mnist_10k_labels", lambda: labels)
    network = digit_quality.train_classifier(0, epochs=2)
    with torch.no_grad():
        guesses = network(test / 255).argmax(-1).numpy()
    truth = np.load(datasets.MNIST_10K)["test_labels"]
    assert (guesses == truth).mean() > 0.8
    noise = torch.randint(0, 256, (200, 784), dtype=torch.uint8)
    assert digit_quality.sure(network, noise) < digit_quality.sure(network, test)

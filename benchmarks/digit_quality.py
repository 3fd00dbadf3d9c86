"""How many of a model's samples look like digits to a small network trained on real ones.

python -m benchmarks.digit_quality 'demo/mnist.{}.pth'

A sample counts if the network gives one digit a probability above 0.8. It is trained on the
embedded 10,000 digits; of real test digits about 0.97 count.
"""

import argparse
import tempfile
from pathlib import Path

import imageio.v3
import numpy as np
import torch
from torch import nn

import datasets
import prediction
from cli.process import run

CONFIDENCE = 0.8


def main() -> None:
    args = parse_arguments()
    samples = sample(args)  # first, since a wrong checkpoint is an error
    classifier = train_classifier(args.seed)
    real = datasets.load("mnist-10k", ".", train=False).images
    print(f"real test digits: {sure(classifier, real):.3f} with confidence over {CONFIDENCE}")
    fraction, n = sure(classifier, samples), len(samples)
    error = (fraction * (1 - fraction) / n) ** 0.5  # standard error of a binomial proportion
    print(f"samples: {fraction:.3f} ± {error:.3f} of {n}, temperature {args.temperature:g}")


def mnist_10k_labels() -> torch.Tensor:
    """The labels (10000,), int64, of the training images of mnist-10k."""
    return torch.from_numpy(np.load(datasets.MNIST_10K)["train_labels"]).long()


def train_classifier(seed: int, epochs: int = 12) -> nn.Module:
    """A small convolutional network trained on the embedded digits, in about a minute."""
    torch.manual_seed(seed)
    images, labels = datasets.load("mnist-10k", ".", train=True).images, mnist_10k_labels()
    network = nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(images[batch] / 255), labels[batch])
            loss.backward()
            optimizer.step()
    return network.eval()


def sample(args: argparse.Namespace) -> torch.Tensor:
    """Unconditional samples (n, 784), uint8, of prediction.py."""
    with tempfile.TemporaryDirectory() as folder:
        command = [args.checkpoint, "--recurrent", "--offset", "0", "--index", f"0-{args.n}"]
        command += ["--temperature", str(args.temperature), "--seed", str(args.seed)]
        prediction.main([*command, "--save_image", f"{folder}/{{}}.{{}}.png"])
        files = [Path(folder) / f"pred.{i}.png" for i in range(args.n)]
        return torch.from_numpy(np.stack([imageio.v3.imread(f) for f in files])).flatten(1)


@torch.no_grad()
def sure(classifier: nn.Module, images: torch.Tensor) -> float:
    """The fraction of images (n, 784), uint8, with a class probability above CONFIDENCE."""
    confidence = classifier(images / 255).softmax(-1).amax(-1)  # (n,)
    return (confidence > CONFIDENCE).float().mean().item()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a checkpoint of 28x28 digits, or a pattern")
    parser.add_argument("--n", type=int, default=200, help="number of samples (200)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    run(main)

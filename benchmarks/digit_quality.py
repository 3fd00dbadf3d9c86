"""How many of a model's samples look like digits to a small network trained on real ones.

python -m benchmarks.digit_quality 'demo/mnist.{}.pth'

A sample counts if the network gives one digit a probability above 0.8. It is trained on the
embedded 10,000 digits; of real test digits about 0.97 count.
"""

import os
from argparse import Namespace

import numpy as np
import torch
from torch import nn

import datasets
from benchmarks.command_line import parse
from cli.flags import flag
from cli.process import run
from cli.sampling_flags import MAX_IMAGES, SAMPLING
from engine.checkpoint import Checkpoint
from engine.construction import check_memory, sampling_memory
from options import SEED, Number
from prediction import load_model, sample_images
from utils import UserError, select_device

CONFIDENCE = 0.8
BATCH_SIZE = 64
CHECKPOINT = {"help": "a checkpoint of 28x28 digits, or a pattern", "type": os.path.expanduser}
FLAGS = {
    "n": flag("number of samples", Number(int, 1, MAX_IMAGES), 200),
    "temperature": SAMPLING["temperature"],
    "seed": flag("of the samples and of the network's training", SEED, 0),
}


def main(argv: list[str] | None = None) -> None:
    args = parse(__doc__, FLAGS, argv, checkpoint=CHECKPOINT)
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


def sample(args: Namespace) -> torch.Tensor:
    """New images (n, 784), uint8. Raises `UserError` unless the checkpoint is of 28x28 digits."""
    checkpoint, device = Checkpoint.newest(args.checkpoint), select_device("auto")
    if checkpoint.image_shape != (28, 28) or checkpoint.dataset == "fashion-mnist":
        raise UserError(
            f"{checkpoint.path} does not store that it is a model of 28x28 digits: give one that "
            "main.py trained with --dataset mnist or mnist-10k"
        )
    config = checkpoint.config
    check_memory(sampling_memory(config, min(args.n, BATCH_SIZE)), device)
    backend = "native" if config.has_recurrence else "fast-transformers"
    model = load_model(checkpoint, device=device, backend=backend)
    noise = {"seed": args.seed, "temperature": args.temperature}
    return sample_images(model, args.n, **noise, batch_size=BATCH_SIZE)


@torch.no_grad()
def sure(classifier: nn.Module, images: torch.Tensor) -> float:
    """The fraction of images (n, 784), uint8, with a class probability above CONFIDENCE."""
    confidence = classifier(images / 255).softmax(-1).amax(-1)  # (n,)
    return (confidence > CONFIDENCE).float().mean().item()


if __name__ == "__main__":
    run(main)

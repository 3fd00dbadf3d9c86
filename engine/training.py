"""One step of training, and an evaluation."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch

from engine import distributed
from engine.optimizers import rates
from engine.progress import progress_bar
from layers.mixture import NATS_PER_BIT
from models import ImageTransformer
from utils import UserError, autocast, to_device


class NegativeLogLikelihood(torch.nn.Module):
    """`model.nll` as a module: what DistributedDataParallel wraps and torch.compile compiles."""

    def __init__(self, model: ImageTransformer):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        return self.model.nll(images, keys)


def train_step(
    nll: torch.nn.Module,
    optimizer: Any,
    images: torch.Tensor,
    *,
    seed: int,
    iteration: int,
    accumulate: int,
    precision: str,
    clip_norm: float,
) -> torch.Tensor:
    """One step of the optimiser on images (N, L); returns the loss in nats per byte, detached.

    `nll` is a `NegativeLogLikelihood`, or one that `distributed.parallel` has wrapped. The batch
    goes through it in `accumulate` parts, and each process takes its shard of every part. The
    noise of dropout depends on (seed, iteration) and the image's place in the batch alone: neither
    a restart nor another split of the batch changes it. Raises `UserError`, and changes no weight,
    if the loss or the gradient is not finite.
    """
    device = next(nll.parameters()).device
    images = to_device(images, device)
    keys = to_device(seed_iteration(seed, iteration, len(images)), device)
    values = images[:, 1:].numel()
    loss = torch.zeros((), device=device)
    optimizer.zero_grad()
    parts = list(zip(images.chunk(accumulate), keys.chunk(accumulate), strict=True))
    for n, (part, part_keys) in enumerate(parts, 1):
        own = distributed.shard(len(part))
        with distributed.no_sync(nll, n < len(parts)):
            with autocast(device, precision):
                part_loss = nll(part[own], part_keys[own]).sum() / values
            # DistributedDataParallel averages the gradients over the processes.
            (part_loss * distributed.world_size()).backward()
        loss += part_loss.detach()
    distributed.all_reduce(loss)
    if not clip(nll.parameters(), clip_norm, loss):
        with autocast(device, precision):
            name = first_non_finite(getattr(nll, "module", nll).model, images, keys)
        flags = " and ".join(f"--{flag} (now {rate:g})" for flag, rate in rates(optimizer).items())
        clipping = "lower --clip_norm" if clip_norm else "clip with --clip_norm 1"
        way_out = f"lower {flags}, or {clipping}"
        raise UserError(f"iteration {iteration}: {name} is not finite: {way_out}")
    optimizer.step()
    return loss


def seed_iteration(seed: int, iteration: int, n_images: int) -> torch.Tensor:
    """The dropout keys (n_images,), int64, of an iteration. Also seeds torch's generator, which
    attention dropout uses, differently in each process."""
    noise = np.random.SeedSequence((seed, iteration))
    keys = noise.generate_state(n_images, np.uint64).view(np.int64)
    own = np.random.SeedSequence((seed, iteration, distributed.rank()))
    torch.manual_seed(int(own.generate_state(1)[0]))
    return torch.from_numpy(keys)


def clip(parameters: Iterable[torch.Tensor], max_norm: float, loss: torch.Tensor) -> bool:
    """Clip the global gradient norm at `max_norm` (0: never). Returns False, with the gradients
    unchanged, if the norm or the loss is not finite."""
    parameters = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    # The only synchronisation of a step with a GPU.
    if not (norm.isfinite() & loss.isfinite()):
        return False
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm or math.inf, norm)
    return True


@torch.no_grad()
def first_non_finite(model: ImageTransformer, images: torch.Tensor, keys: torch.Tensor) -> str:
    """The first parameter, output of a module or gradient that was not finite, in words."""
    if name := non_finite_parameter(model):
        return f"the parameter {name}"
    plain = type(model)(model.config).to(images.device)  # plain PyTorch: hooks see every module
    plain.load_state_dict(model.state_dict())
    found = []

    def watch(name, module, inputs, output):
        if torch.is_tensor(output) and not output.isfinite().all():
            found.append(f"the output of {name}")

    for name, module in plain.named_modules():
        if not any(module.children()):
            module.register_forward_hook(partial(watch, name))
    for image, key in zip(images.split(1), keys.split(1), strict=True):
        plain.nll(image, key)
    # Backpropagation starts at the last layer.
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            found.append(f"the gradient of {name}")
    return found[0] if found else "the loss, or the norm of the gradient,"


def non_finite_parameter(model: torch.nn.Module) -> str | None:
    """The name of the first parameter that is not finite, or None."""
    return next((name for name, p in model.named_parameters() if not p.isfinite().all()), None)


@torch.no_grad()
def evaluate(
    nll: torch.nn.Module,
    images: torch.Tensor,
    *,
    batch_size: int,
    precision: str,
    stop: Any = False,
) -> tuple[float, float] | None:
    """Bits/dim of images (n, L): the mean over the L - 1 bytes after the first (the paper's
    convention), and over all L bytes.

    Each process evaluates its shard, `batch_size` images at a time; the sums are float64. Returns
    None as soon as `stop` is true, a `StopSignals` for example.
    """
    nll = getattr(nll, "module", nll)  # without DistributedDataParallel
    device = next(nll.parameters()).device
    training = nll.training
    nll.eval()
    total = 0.0
    own = images[distributed.shard(len(images))]
    with progress_bar(total=len(own), unit="images", desc="evaluating", leave=False) as bar:
        for batch in own.split(batch_size) if len(own) else ():
            with autocast(device, precision):
                total += nll(batch.to(device)).cpu().double().sum().item()
            bar.update(len(batch))
            if stop:
                break
    nll.train(training)
    total, stopped = distributed.total(total, bool(stop))
    if stopped:
        return None
    n, length = images.shape
    all_bytes = total + nll.model.first_byte_nll(images).sum().item()
    scale = n * NATS_PER_BIT
    return total / (length - 1) / scale, all_bytes / length / scale

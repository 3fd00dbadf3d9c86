"""A step of training, and an evaluation: what main.py's loop and the benchmarks run."""

import math
from functools import partial

import numpy as np
import torch

import checkpoints
import distributed
import kernels
from compiling import check_compiler, compiled
from mixture import first_byte_log_probs
from reporting import NATS_PER_BIT, progress_bar
from utils import UserError, autocast


class Nats(torch.nn.Module):
    """`model.nats` as a module, which is what DistributedDataParallel takes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, keys):
        return self.model.nats(images, keys)


def compile_model(model, args, device):
    """--compile: this program's kernels on a processor, torch.compile elsewhere."""
    if device.type == "cpu" and args.backend == "native":
        compiled(partial(kernels.accelerate, model), args.compile, "training")
    elif args.compile:
        if device.type == "cpu":
            check_compiler()
        model.nats = torch.compile(model.nats)


def make_optimizer(model, args, checkpoint):
    """The optimiser, with the moments of the checkpoint and the rates of the flags."""
    rates = {"lr": args.lr, "weight_decay": args.weight_decay}
    if args.optimizer == "radam":
        optimizer = torch.optim.RAdam(model.parameters(), decoupled_weight_decay=True, **rates)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **rates)
    if state := checkpoint.get("optimizer_state"):
        try:
            checkpoints.import_optimizer_state(state, optimizer)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"the optimiser's state in {args.continue_from} is not this model's: {error}"
            ) from None
    return optimizer


def train_step(nats, optimizer, images, seed, iteration, args):
    """One step of the optimiser on images (N, L); returns the loss in nats per byte, detached.

    The batch goes through the model in --accumulate parts, and of each part the processes take
    their shares. Dropout's noise depends on (seed, iteration) and the image alone: a restart, or
    a batch otherwise divided, drops the same. Raises `UserError`, and changes no weight, where
    the loss or the gradient is not finite.
    """
    noise = np.random.SeedSequence((seed, iteration))
    keys = torch.from_numpy(noise.generate_state(len(images), np.uint64).view(np.int64))
    keys = keys.to(images.device)
    values = images[:, 1:].numel()
    loss = torch.zeros((), device=images.device)
    torch.manual_seed(int(noise.generate_state(1)[0]))  # for the attention's dropout
    optimizer.zero_grad()
    parts = torch.arange(len(images)).chunk(args.accumulate)
    for n, part in enumerate(parts, 1):
        own = part[distributed.share(len(part))]
        with distributed.without_exchange(nats, n < len(parts)):
            with autocast(images.device, args.precision):
                part_loss = nats(images[own], keys[own]).sum() / values
            (part_loss * distributed.world()).backward()  # the gradients will be averaged
        loss += part_loss.detach()
    distributed.add_up(loss)
    if not (clip(nats.parameters(), args.clip_norm or math.inf) and loss.isfinite()):
        with autocast(images.device, args.precision):
            what = first_non_finite(getattr(nats, "module", nats).model, images, keys)
        raise UserError(
            f"iteration {iteration}: {what} is not finite: lower --lr {args.lr:g} or --clip_norm; "
            "the last checkpoint saved is from before"
        )
    optimizer.step()
    return loss


def clip(parameters, max_norm):
    """Clip the norm of the whole gradient; False, with no gradient changed, if it is not finite."""
    try:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm, error_if_nonfinite=True)
    except RuntimeError as error:
        if "non-finite" not in str(error):
            raise
        return False
    return True


@torch.no_grad()
def first_non_finite(model, images, keys):
    """What was not finite first in a step on these images: a parameter, the output of a module,
    or a gradient."""
    if name := non_finite_parameter(model):
        return f"the parameter {name}"
    for module in model.modules():  # every one as itself, uncompiled: the run ends here
        vars(module).pop("forward", None)
    found = []

    def note(name, module, inputs, output):
        if torch.is_tensor(output) and not output.isfinite().all():
            found.append(f"the output of {name}")

    leaves = [(name, m) for name, m in model.named_modules() if not any(m.children())]
    hooks = [module.register_forward_hook(partial(note, name)) for name, module in leaves]
    for image, key in zip(images.split(1), keys.split(1), strict=True):
        type(model).nats(model, image, key)
    for hook in hooks:
        hook.remove()
    for name, parameter in reversed(list(model.named_parameters())):  # gradients come from behind
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            found.append(f"the gradient of {name}")
    return found[0] if found else "the loss, or the norm of the gradient,"


def non_finite_parameter(model):
    """The name of the first parameter that is not finite, or None."""
    return next((name for name, p in model.named_parameters() if not p.isfinite().all()), None)


@torch.no_grad()
def evaluate(model, images, counts, args, device, stop):
    """Bits/dim of images (n, L), the mean over the L - 1 bytes after the first (the paper's
    convention) and over all L bytes; None if a signal stopped it. Summed in float64, each
    process over its share of the images."""
    training = model.training
    model.eval()
    total = 0.0
    own = images[distributed.share(len(images))]
    with progress_bar(total=len(own), unit="images", desc="evaluating", leave=False) as bar:
        for batch in own.split(args.batch_size) if len(own) else ():
            with autocast(device, args.precision):
                total += model.nats(batch.to(device)).cpu().double().sum().item()
            bar.update(len(batch))
            if stop:
                break
    model.train(training)
    total, stopped = distributed.total(total, float(bool(stop)))
    first = -first_byte_log_probs(counts)[images[:, 0].long()].sum().item()
    n, length = images.shape
    scale = n * NATS_PER_BIT
    return None if stopped else (total / (length - 1) / scale, (total + first) / length / scale)

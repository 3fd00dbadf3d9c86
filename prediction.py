"""Sample images from a trained model, byte by byte, and write them as PNG, GIF or a figure.

python prediction.py weights.{}.pth --index 0-10 --save_grid grid.png

Other programs import `load_model`, `sample_images`, `complete_images` and `surprisal` from here
(docs/python.md).
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import math
from argparse import Namespace
from functools import partial

import torch

import datasets
from cli import outputs, sampling_flags
from cli.flags import choose_model
from cli.process import run
from engine import construction, distributed
from engine.checkpoint import NO_CHECKPOINT, Checkpoint
from engine.construction import load_model
from engine.precision import Choices, layer_candidates, sampling_candidates
from engine.sampling import complete_batches, complete_images, first_bytes, sample_images
from engine.surprisal import surprisal
from models import ImageTransformer, ModelConfig
from options import typed
from utils import UserError, is_first_process, say, select_device, select_precision

__all__ = ["complete_images", "load_model", "sample_images", "surprisal"]


def main(argv: list[str] | None = None) -> None:
    args = sampling_flags.parse(argv)
    device = select_device(args.device)
    with distributed.process_group(device):
        complete(args, device)


def complete(args: Namespace, device: torch.device) -> None:
    """Load the model and the images, complete the images, write them."""
    outputs.check_outputs(args)
    checkpoint = load_checkpoint(args)
    model_options = choose_model(args, checkpoint, recipe={})
    with distributed.first_process_first():
        real, shape, counts = open_images(args, checkpoint)
    config = ModelConfig.for_images(shape, **model_options)
    offset = choose_offset(args, config.length)
    precision = select_precision(args.precision, device, args.backend)
    check_flags(args, config, precision, device)
    model = build_model(args, config, checkpoint, device)
    if counts is not None:
        model.first_byte_counts.copy_(counts)
    noise = {"seed": args.seed, "temperature": args.temperature}
    given = first_bytes(model, args.index, **noise) if real is None else real
    if precision == "auto":
        precision = measure_precision(args, model, len(given), max(1, offset))
    options = noise | {"index": args.index, "precision": precision, "recompute": args.recompute}
    written = outputs.Outputs(args, real, args.image_shape or shape, offset)
    draw_samples(args, model, given, max(1, offset), options, written)


def measure_precision(args: Namespace, model: ImageTransformer, n: int, offset: int) -> str:
    """The faster one to draw the bytes of n images from `offset` on, or to evaluate them."""
    device, config = model.first_byte_counts.device, model.config
    size = min(args.batch_size, math.ceil(n / distributed.world_size()))  # images at a time
    if config.has_recurrence and not args.recompute and offset < config.length:
        steps = math.ceil(n / size / distributed.world_size()) * (config.length - offset)
        candidates = partial(sampling_candidates, model, size, args.compile, steps)
    else:
        candidates = partial(layer_candidates, model, size, train=False)
    choices = Choices()
    precision = choices.choose("sampling", "auto", candidates)
    say(choices.describe(device, {"sampling": precision}))
    return precision


def draw_samples(
    args: Namespace,
    model: ImageTransformer,
    given: torch.Tensor,
    offset: int,
    options: dict,
    written: outputs.Outputs,
) -> None:
    """Complete images (N, L) from byte `offset` on, with `options` that determine them, and write
    each as soon as it is finished."""
    speed = {"batch_size": args.batch_size, "compile": args.compile}
    draw = partial(complete_batches, model, given, offset, **options, **speed)
    bits_of = partial(surprisal, model, precision=options["precision"])
    with outputs.unfinished_samples(args, model, given[:, :offset], options) as unfinished:
        for batch in unfinished.continue_with(draw):
            written.add(batch)
        if is_first_process():  # the others have no images
            written.finish(bits_of)


def load_checkpoint(args: Namespace) -> Checkpoint:
    """The checkpoint to sample from, or `NO_CHECKPOINT` for random weights."""
    if args.model == "-":
        say("random weights: the samples will be noise")
        return NO_CHECKPOINT
    checkpoint = Checkpoint.newest(args.model)
    return checkpoint.upgraded() if args.load_pytorch else checkpoint


def open_images(
    args: Namespace, checkpoint: Checkpoint
) -> tuple[torch.Tensor | None, tuple[int, ...], torch.Tensor | None]:
    """The images to complete (N, L), uint8, None with --offset 0; the shape of an image; and the
    histogram (256,) of first bytes, None if it is neither stored nor needed.

    With --offset 0 no data set is needed if the checkpoint has the shape and the histogram.
    """
    shape, counts = checkpoint.image_shape, checkpoint.first_byte_counts
    if counts is None and (args.offset == 0 or args.save_surprisal):
        training = load_data(args, checkpoint, train=True)
        shape, counts = training.image_shape, training.first_byte_counts()
    real = None
    if args.offset == 0:
        datasets.choose_name(args.dataset, checkpoint.dataset)
    else:
        data = load_data(args, checkpoint, train=args.training_set)
        if max(args.index) >= len(data):
            problem = f"--index {max(args.index)} is beyond the {len(data)} images of {data.name}"
            raise UserError(f"{problem}: the last is {len(data) - 1}")
        real, shape = data.images[args.index], data.image_shape
    if args.image_shape and math.prod(args.image_shape) != math.prod(shape):
        given, own = map(datasets.describe, (args.image_shape, shape))
        raise UserError(f"--image_shape {given} does not fit images of {own}: leave it out")
    return real, shape, counts


def load_data(args: Namespace, checkpoint: Checkpoint, train: bool) -> datasets.ImageDataset:
    name = datasets.choose_name(args.dataset, checkpoint.dataset, may_differ=True)
    try:
        return datasets.load_matching(name, args.dataset_directory, train, checkpoint.image_shape)
    except UserError as error:
        if checkpoint.first_byte_counts is None or args.save_surprisal:
            raise
        raise UserError(f"{error}; new images, with --offset 0, need no data set") from None


def choose_offset(args: Namespace, length: int) -> int:
    """How many bytes of an image are given: all if no output shows samples, else the flag, else
    300, or half of an image of fewer than 600."""
    if not sampling_flags.shows_samples(args):
        return length
    if args.offset is None:
        return min(sampling_flags.DEFAULT_OFFSET, length // 2)
    if args.offset > length:
        raise UserError(f"--offset {args.offset} exceeds the {length} bytes of an image: give less")
    return args.offset


def check_flags(args: Namespace, config: ModelConfig, precision: str, device: torch.device) -> None:
    """Raise a `UserError` for flags that this model cannot follow, or too little memory."""
    if args.recurrent and not config.has_recurrence:
        raise UserError(
            f"--attention_type {config.attention_type} has no recurrent form: leave --recurrent out"
        )
    recurrent = config.has_recurrence and not args.recompute
    construction.check_backend(args.backend, config, device, precision, args.compile)
    compiles = recurrent or args.compile is False  # on a GPU, without the Triton kernels
    if device.type == "cpu":
        compiles = config.attention_type != "full" or not recurrent
    if args.compile is not None and not compiles:
        raise UserError(
            f"{typed('compile', args.compile)} has no effect on a CPU with --attention_type full "
            "and without --recompute; nor has --compile on a GPU with --recompute: leave it out"
        )
    n_states = min(args.batch_size, len(args.index)) if recurrent else 0
    construction.check_memory(construction.sampling_memory(config, n_states), device)


def build_model(
    args: Namespace, config: ModelConfig, checkpoint: Checkpoint, device: torch.device
) -> ImageTransformer:
    """The model; on a CPU with compiled operations only if it recomputes prefixes. (The recurrence
    has a compiled sampler instead.)"""
    ops = None
    if args.backend == "native" and (args.recompute or device.type != "cpu"):
        ops = construction.choose_ops(config, device, args.compile, "sampling")
    options = {"backend": args.backend, "ops": ops, "seed": args.seed}
    return load_model(checkpoint, config, device=device, **options)


if __name__ == "__main__":
    run(main)

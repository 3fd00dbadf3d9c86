"""Sample images from a trained model, byte by byte, and write them as PNG, GIF or a figure.

python prediction.py weights.{}.pth --recurrent --index 0-10 --save_grid grid.png
"""

import math
from functools import partial

import torch

import cpu.ops
import cpu.sampler
import datasets
from cli import outputs, sampling_flags
from cli.flags import model_fields
from cli.process import run
from cpu.build import is_cached, try_compile
from engine import checkpoint as checkpoints
from engine import construction, distributed, restoring
from engine.progress import SamplingProgress
from engine.sampling import (
    EagerDecoder,
    GraphDecoder,
    image_noise,
    sample_batched,
    sample_first_byte,
    sample_recurrent,
)
from engine.surprisal import first_byte_surprisal, surprisal
from utils import UserError, autocast, check_memory, say, select_device, select_precision

# Compiling takes two seconds, once, and saves some milliseconds per step.
STEPS_WORTH_COMPILING = 200


def main(argv=None):
    args = sampling_flags.parse(argv)
    device = select_device(args.device)
    with distributed.process_group(device):
        complete(args, device)


def complete(args, device):
    """Load the model and the images, complete the images, write them."""
    precision = select_precision(args.precision, device)
    outputs.check_outputs(args)
    checkpoint, path = load_checkpoint(args)
    stored = restoring.stored_config(checkpoint, path, args.n_heads, args.d_query)
    fields = model_fields(args, stored)
    with distributed.first_process_first():
        given, real, shape = open_images(args, checkpoint)
    length = given.shape[1]
    offset = choose_offset(args, length)
    config = construction.make_config(fields, shape)
    n_states = min(args.batch_size, len(given)) if args.sampler == "recurrent" else 0
    check_memory(construction.sampling_memory(config, n_states), device)
    construction.check_backend(args.backend, config, device, precision, args.compile)
    steps = math.ceil(len(given) / args.batch_size) * (length - offset)
    model, sampler = make_sampler(config, args, precision, device, checkpoint, path, steps)

    completed = sample(sampler, given, offset, args, precision, device)
    if completed is None:
        return  # only the first process writes images
    shape = args.image_shape or shape
    completions = completed.view(-1, *shape).numpy()
    originals = None if real is None else real.view(-1, *shape).numpy()
    score = partial(surprisal, model, precision=precision, device=device)

    def bits():
        first = first_byte_surprisal(real, first_byte_counts(args, checkpoint))
        return torch.cat([first, score(real)], dim=1).view(-1, *shape).numpy()

    caption = partial(describe_samples, args, offset, score, completed, real)
    outputs.write_outputs(args, completions, originals, offset, caption, bits)


def load_checkpoint(args):
    """The checkpoint to sample from and its path, or ({}, None) for random weights."""
    if args.model == "-":
        say("random weights: the samples will be noise")
        return {}, None
    checkpoint, path = checkpoints.load_newest(args.model)
    if args.load_pytorch:
        restoring.upgrade_layout(checkpoint, path)
    return checkpoint, path


def open_images(args, checkpoint):
    """The images to complete (N, L), the real ones (N, L), both uint8, and their shape.

    With --offset 0 nothing is given: the first byte is drawn from the training set's histogram,
    and there are no real images.
    """
    if args.offset == 0:
        shape, counts = unconditional_source(args, checkpoint)
        real, given = None, torch.zeros(len(args.index), math.prod(shape), dtype=torch.uint8)
        noise = image_noise(args.seed, range(len(given)), 1)[:, 0, 0]
        given[:, 0] = sample_first_byte(counts, noise, args.temperature)
    else:
        data = load_data(args, checkpoint, train=args.training_set)
        if max(args.index) >= len(data):
            raise UserError(
                f"--index {max(args.index)} is beyond the {len(data)} images of {data.name}: "
                f"the last is {len(data) - 1}"
            )
        real, shape = data.images[args.index], data.image_shape
        given = real.clone()
    if args.image_shape and math.prod(args.image_shape) != math.prod(shape):
        raise UserError(
            f"--image_shape {datasets.describe(args.image_shape)} has "
            f"{math.prod(args.image_shape)} bytes and the images have {math.prod(shape)}: "
            f"leave it out for {datasets.describe(shape)}"
        )
    return given, real, shape


def unconditional_source(args, checkpoint):
    """The shape of an image and the histogram of first bytes; no data set is needed if the
    checkpoint has both."""
    if "format_version" in checkpoint:
        stored = checkpoint["dataset"]
        datasets.choose_name(args.dataset, stored["name"])
        return tuple(stored["image_shape"]), checkpoint["first_byte_counts"]
    training = load_data(args, checkpoint, train=True)
    return training.image_shape, training.first_byte_counts()


def first_byte_counts(args, checkpoint):
    """The histogram (256,) of first bytes in the training set, which the checkpoint has unless it
    is one of the original."""
    if "format_version" in checkpoint:
        return checkpoint["first_byte_counts"]
    return load_data(args, checkpoint, train=True).first_byte_counts()


def load_data(args, checkpoint, train):
    stored = checkpoint.get("dataset", {})
    name = datasets.choose_name(args.dataset, stored.get("name"), may_differ=True)
    return datasets.load_matching(name, args.dataset_directory, train, stored)


def choose_offset(args, length):
    """How many bytes of an image are given: all if no output shows samples, else the flag, else
    300, or half of an image of fewer than 600."""
    if not sampling_flags.shows_samples(args):
        return length
    if args.offset is None:
        return min(sampling_flags.DEFAULT_OFFSET, length // 2)
    if args.offset > length:
        raise UserError(
            f"--offset {args.offset} is beyond the {length} bytes of an image: give less"
        )
    return args.offset


def make_sampler(config, args, precision, device, checkpoint, path, steps):
    """The model, and a function that completes a batch of images with it."""
    check_compile_flag(config, args, device)
    recurrent = args.sampler == "recurrent"
    compiles = compiles_on_cpu(config, args, precision, device, steps)
    ops = None
    if compiles and not recurrent:
        ops = construction.choose_ops(config, device, args.compile, "sampling")
    model = construction.build_model(
        config,
        device,
        backend=args.backend,
        ops=ops,
        seed=args.seed,
        checkpoint=checkpoint,
        path=path,
    ).eval()
    sampler = partial(sample_batched, model)
    if recurrent:
        decoder = make_decoder(model, args, precision, device, compiles)
        sampler = partial(sample_recurrent, model, decoder=decoder)
    if precision == "bf16":
        store_as_bfloat16(model)
    return model, sampler


def check_compile_flag(config, args, device):
    """Raise a `UserError` for --compile or --no-compile if nothing can be compiled."""
    recurrent = args.sampler == "recurrent"
    possible = recurrent
    if device.type == "cpu":
        possible = config.attention_type == "causal-linear" or not recurrent
    if args.compile is not None and not possible:
        raise UserError(
            f"--{'compile' if args.compile else 'no-compile'} has no effect with these flags, only "
            "on a CPU with --attention_type causal-linear or the batched sampler, and on a GPU "
            "with --recurrent: leave it out"
        )


def compiles_on_cpu(config, args, precision, device, steps):
    """Whether to try the compiled code of cpu/. With neither --compile nor --no-compile, only if
    there are enough `steps` to make up for the compilation, or the library is cached."""
    recurrent = args.sampler == "recurrent"
    if device.type != "cpu" or args.backend != "native":
        return False
    if recurrent and config.attention_type != "causal-linear":
        return False
    if args.compile is not None or steps >= STEPS_WORTH_COMPILING:
        return True
    if recurrent:
        return is_cached(cpu.sampler.SOURCE, cpu.sampler.sizes(config, precision))
    return is_cached(cpu.ops.SOURCE, cpu.ops.sizes(config))


def make_decoder(model, args, precision, device, compiles):
    """The decoder of the recurrent sampler (engine/sampling.py)."""
    if device.type == "cpu":
        build = partial(cpu.sampler.CompiledDecoder, model, precision)
        decoder = try_compile(build, args.compile, "sampling") if compiles else None
        return decoder or EagerDecoder(model)
    step = torch.compile(model.step) if args.compile else None
    graph = device.type == "cuda" and model.has_constant_state
    return (GraphDecoder if graph else EagerDecoder)(model, step)


def store_as_bfloat16(model):
    """Round the weights of linear layers once; autocast would round them for every byte."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.bfloat16()


def sample(sampler, given, offset, args, precision, device):
    """Complete the images (N, L) after `offset` bytes, --batch_size at a time: (N, L), uint8.

    Each process completes its shard; the first one gets them all, the others None.
    """
    own, length = torch.arange(len(given))[distributed.shard(len(given))], given.shape[1]
    start = max(1, offset)
    completed = [given[:0]]
    with SamplingProgress(len(own), length - start) as progress:
        for numbers in own.split(args.batch_size) if len(own) else ():
            images = given[numbers].to(device).long()
            noise = image_noise(args.seed, numbers.tolist(), length).to(device)
            with autocast(device, precision):
                sampler(images, start, noise, args.temperature, advance=progress.advance)
            completed.append(images.to("cpu", torch.uint8))
    return distributed.gather(torch.cat(completed))


def describe_samples(args, offset, score, completed, real):
    """The caption of the figure: how the samples were drawn, and the model's bits/dim of them."""
    text = f"seed {args.seed}, offset {offset}, temperature {args.temperature:g}; "
    text += f"samples {score(completed).mean():.3f} bits/dim"
    return text if real is None else f"{text}, real images {score(real).mean():.3f}"


if __name__ == "__main__":
    run(main)

"""Sample images from a trained model, byte by byte, and write them as PNG, GIF or a figure.

python prediction.py weights.{}.pth --recurrent --index 0-10 --save_grid grid.png
"""

import math
import re
from argparse import ArgumentTypeError
from functools import partial

import torch

import checkpoints
import datasets
import distributed
import kernels
import recurrence
from compiling import compiled, is_kept
from models import ModelConfig
from pictures import check_outputs, figure_rows, show_figure, write_files
from reporting import NATS_PER_BIT, SamplingProgress, say
from sampling import SAMPLERS, image_noise, sample_first_byte
from utils import (
    ArgumentParser,
    UserError,
    add_machine_arguments,
    add_model_arguments,
    autocast,
    build_model,
    check_memory,
    check_precision,
    model_fields,
    number,
    positive_int,
    run,
    select_device,
)

# An index expression may not ask for more images than this.
MAX_IMAGES = 10**6
DEFAULT_OFFSET = 300
# Compiling takes two seconds, once, and saves some milliseconds a step.
STEPS_WORTH_COMPILING = 200


def main(argv=None):
    args = parse_arguments(argv)
    device = select_device(args.device)
    check_precision(args, device)
    with distributed.joined(device):
        complete(args, device)


def complete(args, device):
    check_outputs(args)
    checkpoint = load_checkpoint(args)
    stored = checkpoints.stored_config(checkpoint, args.model, args.n_heads, args.d_query)
    fields = model_fields(args, stored)
    with distributed.first_process_first():
        given, real, shape = open_images(args, checkpoint)
    offset = choose_offset(args.offset, given.shape[1])
    config = ModelConfig(length=given.shape[1], **fields)
    check_memory(least_memory(config, min(args.batch_size, len(given))), device)
    model = make_model(args, checkpoint, config, device)
    steps = math.ceil(len(given) / args.batch_size) * (config.length - offset)
    sampler = make_sampler(model, args, device, steps)

    completed = sample(sampler, given, offset, device, args)
    if completed is None:
        return  # the first process writes the images of all
    shape = args.image_shape or shape
    completions = completed.view(-1, *shape).numpy()
    originals = None if real is None else real.view(-1, *shape).numpy()
    write_files(args, completions, originals, offset)
    if args.save_grid or args.plot:
        caption = describe_samples(args, model, completed, real, offset, device)
        show_figure(args, figure_rows(args.index, completions, originals), offset, caption)


def load_checkpoint(args):
    """The checkpoint to sample from, or {} for random weights."""
    if args.model == "-":
        say("random weights: the samples will be noise")
        return {}
    checkpoint, path = checkpoints.load_newest(args.model)
    if checkpoint is None:
        raise UserError(f"no file matches {args.model}: give a checkpoint or a pattern")
    if args.load_pytorch:
        checkpoints.upgrade_layout(checkpoint, path)
    say(f"loaded {path}, iteration {checkpoint['iteration']}")
    args.model = path
    return checkpoint


def open_images(args, checkpoint):
    """The images to complete (N, L), the real ones (N, L), both uint8, and their shape.

    With --offset 0 nothing is given: the first byte is drawn from the training set's histogram,
    there are no real images, and a checkpoint that knows its data set replaces it.
    """
    if args.offset == 0:
        shape, counts = unconditional_source(args, checkpoint)
        real, given = None, torch.zeros(len(args.index), math.prod(shape), dtype=torch.uint8)
        noise = image_noise(args.seed, range(len(given)), 1)[:, 0, 0]
        given[:, 0] = sample_first_byte(counts, noise, args.temperature)
    else:
        data = datasets.load_for(args, checkpoint, args.training_set)
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
    """The shape of an image and the histogram of first bytes."""
    if "format_version" in checkpoint:
        datasets.choose_name(args.dataset, checkpoint["dataset"]["name"])
        return tuple(checkpoint["dataset"]["image_shape"]), checkpoint["first_byte_counts"]
    training = datasets.load_for(args, checkpoint, train=True)
    return training.image_shape, training.first_byte_counts()


def choose_offset(offset, length):
    """How many bytes of an image are given: the flag, else 300, else half of a small image."""
    if offset is None:
        return min(DEFAULT_OFFSET, length // 2)
    if offset > length:
        raise UserError(f"--offset {offset} is beyond the {length} bytes of an image: give less")
    return offset


def least_memory(config, n_images):
    """Bytes that sampling takes for certain: the weights, and what is kept of each image."""
    per_channel = 2 * config.length if config.attention_type == "full" else config.d_query
    states = n_images * config.n_layers * config.d_model * per_channel
    return 4 * (config.n_parameters + states)


def make_model(args, checkpoint, config, device):
    """The model of the checkpoint, or a random one, ready to sample."""
    torch.manual_seed(args.seed)
    model = build_model(config, device, args).eval()
    if checkpoint:
        checkpoints.load_model_state(model, checkpoint, args.model)
    return model


def make_sampler(model, args, device, steps):
    """--sampler for this model, compiled if asked for, or if that pays off in so many steps."""
    sampler = partial(SAMPLERS[args.sampler], model)
    recurrent, native = args.sampler == "recurrent", args.backend == "native"
    on_processor = device.type == "cpu" and native
    if on_processor and (model.has_constant_state or not recurrent):
        sampler = compile_for_processor(model, args, steps) or sampler
    elif args.compile and native and recurrent and device.type != "cpu":
        model.step = torch.compile(model.step)
    elif args.compile:
        raise UserError(
            "--compile samples with --backend native only, and --recurrent with --attention_type "
            "causal-linear: leave it out"
        )
    if args.precision == "bf16":
        store_as_bfloat16(model)
    return sampler


def compile_for_processor(model, args, steps):
    """A `CompiledRecurrence`, or None with, for the batched sampler, kernels in the model; None
    where that is not to be, cannot be, or does not pay."""
    config = model.config
    if args.sampler == "recurrent":
        module, sizes = recurrence, recurrence.sizes(config, args.precision)
        make = partial(recurrence.CompiledRecurrence, model, args.precision)
    else:
        module, sizes = kernels, kernels.sizes(config)
        make = partial(kernels.accelerate, model)
    if not args.compile and steps < STEPS_WORTH_COMPILING and not is_kept(module.SOURCE, sizes):
        return None
    return compiled(make, args.compile, "sampling")


def store_as_bfloat16(model):
    """Keep the weights of the products as autocast would round them anew for every byte."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.bfloat16()


def sample(sampler, given, offset, device, args):
    """Complete the images (N, L) after `offset` bytes, --batch_size at a time: (N, L), uint8.

    Each process completes its share; the first one gets them all, the others None.
    """
    own, length = torch.arange(len(given))[distributed.share(len(given))], given.shape[1]
    start = max(1, offset)
    completed = [given[:0]]
    with SamplingProgress(len(own), length - start) as progress:
        for numbers in own.split(args.batch_size) if len(own) else ():
            images = given[numbers].to(device).long()
            noise = image_noise(args.seed, numbers.tolist(), length).to(device)
            with autocast(device, args.precision):
                sampler(images, start, noise, args.temperature, progress.advance)
            completed.append(images.to("cpu", torch.uint8))
    return distributed.gather(torch.cat(completed))


@torch.no_grad()
def describe_samples(args, model, completed, real, offset, device):
    """The caption of the figure: how the samples were drawn and what the model thinks of them."""

    def bits(images):
        with autocast(device, args.precision):
            parts = [model.nats(x.to(device)).cpu() for x in images.split(args.batch_size)]
        return torch.cat(parts).double().mean().item() / (images.shape[1] - 1) / NATS_PER_BIT

    text = f"seed {args.seed}, offset {offset}, temperature {args.temperature:g}; "
    text += f"samples {bits(completed):.3f} bits/dim"
    return text if real is None else f"{text}, real images {bits(real):.3f}"


def index_list(text):
    """An argparse type: "0-3,7*2" is [0, 1, 2, 7, 7]. Ranges end before their second number."""
    indices = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)|\*(\d+))?", part.strip(), re.ASCII)
        if not match:
            raise ArgumentTypeError(f"{part!r} in {text!r} is no index: write 3, 0-10 or 7*4")
        first, stop, times = (int(group or 0) for group in match.groups())
        many = stop - first if match[2] else times if match[3] else 1
        if many < 1:
            raise ArgumentTypeError(f"{part!r} in {text!r} is empty: a range is FIRST-AFTER_LAST")
        if len(indices) + many > MAX_IMAGES:
            raise ArgumentTypeError(f"{text!r} asks for more than {MAX_IMAGES} images at once")
        indices += range(first, stop) if match[2] else [first] * many
    return indices


def shape_list(text):
    """An argparse type: "28,28" is (28, 28), "32,32,3" a colour image."""
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) not in (2, 3) or min(shape) < 1 or shape[2:] not in ((), (3,)):
        raise ArgumentTypeError(f"{text!r} is no image shape: write 28,28 or 32,32,3")
    return shape


def parse_arguments(argv):
    parser = ArgumentParser(
        description="Sample images from a trained model: the first --offset bytes of real images "
        "are given, the model draws the rest. The same seed gives the same images."
    )
    parser.add_argument(
        "model",
        help="a checkpoint, a pattern such as weights.{}.pth for the newest, or - for "
        "random weights",
    )
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--index",
        type=index_list,
        default=[0],
        metavar="I",
        help="which images: 0-10 is 0 to 9; 3,5; 7*4 is 7 four times",
    )
    group.add_argument(
        "--offset",
        type=number(int, 0),
        metavar="BYTES",
        help="given bytes of each image: 0 is unconditional, 1 the original's unconditional "
        f"(default: {DEFAULT_OFFSET}, or half of a smaller image)",
    )
    group.add_argument(
        "--sampler",
        choices=SAMPLERS,
        default=None,
        help="batched recomputes the prefix for every byte (default), recurrent keeps a state",
    )
    group.add_argument("--recurrent", action="store_true", help="the same as --sampler recurrent")
    group.add_argument(
        "--temperature",
        type=number(float, 1e-3, 1e3),
        default=1.0,
        metavar="T",
        help="below 1 for safer, above for wilder images",
    )
    group.add_argument(
        "--seed", type=number(int, 0, 2**63 - 1), default=0, metavar="N", help="of the noise"
    )
    group.add_argument(
        "--batch_size",
        type=positive_int,
        default=64,
        metavar="N",
        help="images at a time; changes speed only",
    )
    datasets.add_dataset_arguments(parser).add_argument(
        "--training_set", action="store_true", help="take training, not test images"
    )

    group = parser.add_argument_group("output", "Without any of these: --save_grid samples.png")
    group.add_argument(
        "--save_image",
        metavar="PATTERN",
        help="an image file each: the first {} becomes pred or real, the second a number",
    )
    group.add_argument(
        "--save_gif",
        metavar="PATTERN",
        help="each image appearing byte by byte, the given part in blue; {} becomes a number",
    )
    group.add_argument(
        "--save_grid", metavar="FILE", help="a figure: given part, real image, completions"
    )
    group.add_argument("--plot", action="store_true", help="show that figure in a window")
    group.add_argument(
        "--image_shape",
        type=shape_list,
        metavar="H,W[,3]",
        help="reshape the images (default: as in the data set)",
    )

    add_model_arguments(parser).add_argument(
        "--load_pytorch",
        action="store_true",
        help="the checkpoint has the original's older layout (self_attn.in_proj_weight)",
    )
    pays_off = "some seconds, once; default: where it pays off"
    add_machine_arguments(parser, pays_off).add_argument(
        "--force_cpu", action="store_true", help="the same as --device cpu"
    )
    args = parser.parse_args(argv)
    if args.recurrent and args.sampler == "batched":
        raise UserError("--recurrent contradicts --sampler batched: give one of them")
    if args.force_cpu and args.device not in ("auto", "cpu"):
        raise UserError(f"--force_cpu contradicts --device {args.device}: give one of them")
    args.sampler = "recurrent" if args.recurrent else args.sampler or "batched"
    args.device = "cpu" if args.force_cpu else args.device
    return args


if __name__ == "__main__":
    run(main)

"""The command line of prediction.py."""

import re
from argparse import ArgumentTypeError, Namespace

from cli.flags import DATA, MACHINE, MODEL, MODEL_TEXT, Parser, flag, path, refuse_given, switch
from options import COUNT, SEED, Number
from utils import UserError

MAX_IMAGES = 10**6  # in an index expression
GIF_SECONDS = 6
DEFAULT_OFFSET = 300


def index_list(text: str) -> list[int]:
    """An argparse type: "0-3,7*2" is [0, 1, 2, 7, 7]. Ranges end before their second number."""
    indices = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)|\*(\d+))?", part.strip(), re.ASCII)
        if not match:
            raise ArgumentTypeError(f"{part!r} in {text!r} is not an index: write 3, 0-10 or 7*4")
        first, stop, times = (int(group or 0) for group in match.groups())
        many = stop - first if match[2] else times if match[3] else 1
        if many < 1:
            raise ArgumentTypeError(f"{part!r} in {text!r} is empty: write FIRST-STOP, as in 0-10")
        if len(indices) + many > MAX_IMAGES:
            raise ArgumentTypeError(f"{text!r} asks for more than {MAX_IMAGES} images at once")
        indices += range(first, stop) if match[2] else [first] * many
    return indices


def shape_list(text: str) -> tuple[int, ...]:
    """An argparse type: "28,28" is (28, 28), "32,32,3" a colour image."""
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) not in (2, 3) or min(shape) < 1 or shape[2:] not in ((), (3,)):
        raise ArgumentTypeError(f"{text!r} is not an image shape: write 28,28 or 32,32,3")
    return shape


SAMPLING = {
    "index": flag(
        "which images (of those that can be drawn, if no bytes are given): 0-10 is 0 to 9; 3,5; "
        "7*4 is 7 four times",
        "I",
        "0",
        type=index_list,
    ),
    "offset": flag(
        "number of given bytes: 0 is unconditional (the original used 1 for that) (default: "
        f"{DEFAULT_OFFSET}, or half of the bytes if there are fewer than {2 * DEFAULT_OFFSET})",
        Number(int, 0),
    ),
    "recurrent": switch("keep a state after every byte: what happens anyway where it is possible"),
    "recompute": switch("recompute the prefix for every byte instead: slow, for comparison"),
    "temperature": flag(
        "below 1 for more likely, above for more varied images", Number(float, 1e-3, 1e3), 1.0
    ),
    "seed": flag("random seed of the samples", SEED, 0),
    "batch_size": flag(
        "images at a time; changes speed, and how many images an interruption loses", COUNT, 64
    ),
}
OUTPUT = {
    "save_image": flag(
        "write image files: the first {} becomes pred or real, the second 0, 1, ... in the order "
        "in which they are asked for",
        "PATTERN",
    ),
    "save_gif": flag(
        "animate each image, byte by byte, the given part in blue; {} becomes 0, 1, ... likewise",
        "PATTERN",
    ),
    # A frame of a GIF lasts 655 seconds at most.
    "gif_seconds": flag("seconds that an animation lasts", Number(float, 0.1, 600), GIF_SECONDS),
    "save_grid": flag("write a figure: given part, completions, real image", "FILE"),
    "plot": switch("show that figure in a window"),
    "save_surprisal": flag(
        "write a figure: each real image beside the bits that its pixels cost, -log2 of the "
        "probability that the model gave them; alone, it samples nothing",
        "FILE",
    ),
    "image_shape": flag(
        "reshape the images (default: as in the data set)", "H,W[,3]", type=shape_list
    ),
}
COMPILE = flag(
    "compile first, which takes seconds; changes speed only (default: if that is faster); "
    "--no-compile also leaves out the Triton kernels of a GPU",
    bool,
)
LOAD_PYTORCH = switch("the checkpoint has the original's older layout (self_attn.in_proj_weight)")
FORCE_CPU = switch("the same as --device cpu")


def parse(argv: list[str] | None = None) -> Namespace:
    """The arguments of prediction.py, checked as far as the command line alone allows."""
    parser = Parser(
        description="Sample images from a trained model: the first --offset bytes of real images "
        "are given, the model draws the rest. The same seed gives the same images. After an "
        "interruption the same command continues."
    )
    model = "a checkpoint, a pattern such as weights.{}.pth for the newest, or - for random weights"
    parser.add_argument("model", type=path, help=model)
    parser.add_flags("sampling", SAMPLING)
    training_set = switch("complete training images instead of test images")
    parser.add_flags("data", {**DATA, "training_set": training_set})
    parser.add_flags("output", OUTPUT, "Without any of these: --save_grid samples.png")
    parser.add_flags("model", {**MODEL, "load_pytorch": LOAD_PYTORCH}, MODEL_TEXT)
    parser.add_flags("machine", {**MACHINE, "compile": COMPILE, "force_cpu": FORCE_CPU})
    args = parser.parse_args(argv)
    check_flags(args)
    args.device = "cpu" if args.force_cpu else args.device
    if not (shows_samples(args) or args.save_surprisal):
        args.save_grid = "samples.png"
    return args


def shows_samples(args: Namespace) -> bool:
    """Whether any output shows samples, and not only real images."""
    return bool(args.save_image or args.save_gif or args.save_grid or args.plot)


def check_flags(args: Namespace) -> None:
    """Raise a `UserError` for flags that contradict each other or have no effect."""
    if args.recurrent and args.recompute:
        raise UserError("--recurrent contradicts --recompute: give one of them")
    if args.force_cpu and args.device not in ("auto", "cpu"):
        raise UserError(f"--force_cpu contradicts --device {args.device}: give one of them")
    if args.model == "-":
        refuse_given(args, ["load_pytorch"], "with random weights")
    if args.offset == 0:
        refuse_given(args, ["training_set"], "with --offset 0")
    if not args.save_gif:
        refuse_given(args, ["gif_seconds"], "without --save_gif")
    if args.save_surprisal and not shows_samples(args):
        without_effect = ["offset", "recurrent", "recompute", "temperature"]
        refuse_given(args, without_effect, "with --save_surprisal alone, which samples nothing")
    if args.save_surprisal and args.offset == 0:
        reason = "--save_surprisal shows real images, and --offset 0 uses none"
        raise UserError(f"{reason}: give another offset")

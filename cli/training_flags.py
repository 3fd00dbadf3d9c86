"""The command line of main.py."""

import os
from argparse import Namespace
from pathlib import Path

from cli.flags import DATA, MACHINE, MODEL, MODEL_TEXT, SETTINGS, Parser, flag, refuse_given, switch
from cli.process import YIELDED
from engine.checkpoint import format_path, is_pattern
from engine.pictures import FORMATS
from engine.recipes import Settings
from files import check_writable
from options import COUNT, SEED, options
from utils import UserError

EVALUATE_IMAGES = flag("evaluate on the first N test or validation images (default: all)", COUNT)
OPTIMISATION = {
    "batch_size": flag("images per batch, split over the processes of torchrun", COUNT, 4),
    "accumulate": flag("add the gradients of N batches: as one batch N times as large", COUNT, 1),
    "no_shuffle": switch("keep the images in file order, as the original does"),
    "iterations": flag("total number of iterations", COUNT, 100),
    "seed": flag(
        "random seed of weights, image order and dropout (default: 0, or the checkpoint's)", SEED
    ),
}
SAVING = {
    "save_to": flag("where to save; {} becomes the iteration, as in weights.{}.pth", "PATTERN"),
    "continue_from": flag(
        "continue from a checkpoint, or from the newest of a pattern; if no file matches the "
        "pattern, start from scratch",
        "PATTERN",
    ),
    "init_from": flag(
        "start a new run from the weights of a checkpoint, or of the newest of a pattern, on "
        "images of the same shape, those of --dataset (default: mnist); without effect on a run "
        "that --continue_from continues",
        "PATTERN",
    ),
    "save_frequency": flag("save every N iterations, and at the end", COUNT, 3000),
    "keep_checkpoints": flag("keep only the newest N of --save_to (default: all)", COUNT),
    "evaluate_frequency": flag(
        "evaluate on the test or validation images every N iterations, and at the end", COUNT, 3000
    ),
    "yield_frequency": flag(
        f"save and exit with status {YIELDED} after N iterations, for a queue that starts the job "
        "again",
        COUNT,
        10**9,
    ),
    "evaluate_only": switch("print the test bits/dim of --continue_from and exit"),
    "export": flag(
        "write --continue_from to FILE without the optimiser's moments (a third or half of the "
        "size), and exit",
        "FILE",
    ),
}
LOGGING = {
    "log_frequency": flag("show and record the mean loss of every N iterations", COUNT, 100),
    "metrics_file": flag("append records as JSON lines", "FILE"),
    "log_dir": flag("write TensorBoard events", "FOLDER"),
    "samples": flag(
        "draw new images and completions at every evaluation, with the same noise each time; {} "
        "becomes the iteration, as in samples/{}.png; with --log_dir also for TensorBoard",
        "PATTERN",
    ),
}
COMPILE = flag(
    "compile first; changes speed only (default on CPUs, where it takes seconds; on GPUs it takes "
    "minutes and is off); --no-compile also leaves out the Triton kernels of a GPU",
    bool,
)


def parse(argv: list[str] | None = None) -> Namespace:
    """The arguments of main.py, checked as far as the command line alone allows."""
    parser = Parser(
        description="Train a transformer on the bytes of images. The same command starts a run "
        "and, with --continue_from, continues it. Ctrl-C saves and exits."
    )
    parser.add_flags("data", {**DATA, "evaluate_images": EVALUATE_IMAGES})
    parser.add_flags("model", MODEL, MODEL_TEXT)
    description = (
        "A checkpoint stores --seed and the flags from --recipe to --validation. A run continues "
        "with them; all but --seed, --recipe, --optimizer and --validation may be changed."
    )
    parser.add_flags("optimisation", {**SETTINGS, **OPTIMISATION}, description)
    parser.add_flags("checkpoints and evaluation", SAVING)
    parser.add_flags("logging", LOGGING)
    parser.add_flags("machine", {**MACHINE, "compile": COMPILE})
    args = parser.parse_args(argv)
    check_flags(args)
    return args


def check_flags(args: Namespace) -> None:
    """Raise a `UserError` for flags that contradict each other or have no effect."""
    for name in ("evaluate_only", "export"):
        if name in args.given and not args.continue_from:
            raise UserError(f"--{name} needs --continue_from: give the checkpoint")
    if args.export:
        refuse_given(args, sorted(args.given - {"continue_from", "export"}), "with --export")
        check_writable(format_path(args.export, 0), "--export")
    if args.evaluate_only:
        without_effect = {*options(Settings), *OPTIMISATION, *SAVING, "log_frequency", "samples"}
        without_effect -= {"batch_size", "continue_from", "evaluate_only"}
        refuse_given(args, sorted(without_effect), "with --evaluate_only")
    if args.save_to:
        check_writable(format_path(args.save_to, 0), "--save_to")
    else:
        refuse_given(args, ["save_frequency"], "without --save_to")
        if "yield_frequency" in args.given:
            reason = "or each start would begin at iteration 0: give --save_to and --continue_from"
            raise UserError(f"--yield_frequency needs --save_to, {reason}")
    if args.keep_checkpoints and not is_pattern(args.save_to or ""):
        raise UserError("--keep_checkpoints needs a --save_to with {}, as in weights.{}.pth")
    if args.metrics_file:
        check_writable(args.metrics_file, "--metrics_file")
        check_names_differ(args, "metrics_file", "save_to", "continue_from", "init_from")
        check_records(args.metrics_file)
    if args.samples:
        check_writable(format_path(args.samples, 0), "--samples")
        check_names_differ(args, "samples", "save_to", "continue_from", "init_from", "metrics_file")
        if Path(args.samples).suffix.lower() not in FORMATS:
            known = ", ".join(FORMATS)
            raise UserError(f"--samples {args.samples} must end in one of {known}")
    if args.log_dir:
        check_writable(Path(args.log_dir) / "events", "--log_dir")


def check_records(path: str) -> None:
    """Raise a `UserError` for a file of something else, to which records would be appended."""
    if not os.path.isfile(path):
        return
    with open(path, "rb") as file:
        if file.read(1) not in (b"", b"{"):
            raise UserError(f"--metrics_file {path} holds something else: give another name")


def check_names_differ(args: Namespace, flag: str, *others: str) -> None:
    """Raise a `UserError` if a flag names a file that one of the others names, too."""
    for name in others:
        if os.path.realpath(getattr(args, flag)) == os.path.realpath(getattr(args, name) or ""):
            raise UserError(f"--{flag} and --{name} name one file: give two")

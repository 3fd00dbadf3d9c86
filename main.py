"""Train an autoregressive transformer on the bytes of images.

python main.py --dataset mnist --n_layers 8 --n_heads 8 --save_to weights.{}.pth
"""

from pathlib import Path

import torch

import checkpoints
import datasets
import distributed
from models import ModelConfig
from reporting import Metrics, TrainingLog, say, warn
from training import (
    Nats,
    compile_model,
    evaluate,
    make_optimizer,
    non_finite_parameter,
    train_step,
)
from utils import (
    YIELDED,
    ArgumentParser,
    StopSignals,
    UserError,
    add_machine_arguments,
    add_model_arguments,
    build_model,
    check_memory,
    check_precision,
    check_writable,
    model_fields,
    number,
    positive_int,
    run,
    select_device,
    to_device,
)


def main(argv=None):
    args = parse_arguments(argv)
    device = select_device(args.device)
    check_precision(args, device)
    with distributed.joined(device):
        return train(args, device)


def train(args, device):
    if args.batch_size % distributed.world():
        raise UserError(
            f"--batch_size {args.batch_size} is shared by {distributed.world()} processes: "
            "give a multiple of that"
        )
    checkpoint = load_checkpoint(args)
    stored = checkpoints.stored_config(checkpoint, args.continue_from, args.n_heads, args.d_query)
    fields = model_fields(args, stored)
    seed = choose("seed", args.seed, checkpoint, default=0)
    args.optimizer = choose("optimizer", args.optimizer, checkpoint, default="radam")
    with distributed.first_process_first():
        training, test = datasets.load_both(args, checkpoint)
    config = ModelConfig(length=training.images.shape[1], **fields)
    check_memory(least_memory(config, args), device)
    order = None if args.no_shuffle else seed

    torch.manual_seed(seed)
    model = build_model(config, device, args)
    start = checkpoint.get("iteration", 0)
    distributed.check_agreement("the iteration to go on from", start)
    if checkpoint:
        checkpoints.load_model_state(model, checkpoint, args.continue_from)
    optimizer = make_optimizer(model, args, checkpoint)
    compile_model(model, args, device)
    # The reformer's keys are its queries: one of its projections never gets a gradient.
    nats = distributed.parallel(Nats(model), device, config.attention_type == "reformer")
    counts = checkpoint.get("first_byte_counts")
    counts = training.first_byte_counts() if counts is None else counts
    metrics = Metrics(args.metrics_file, args.log_dir)
    describe(model, training, test, device, args)

    def evaluate_at(iteration, stop):
        with log.paused():
            bits = evaluate(model, test.images[: args.evaluate_images], counts, args, device, stop)
        if bits:
            report_test(iteration, *bits, metrics, log.seconds)

    def save_at(iteration, last=False):
        state = {
            "model_state": model.state_dict(),
            "optimizer_state": checkpoints.optimizer_state(optimizer),
            "iteration": iteration,
            "config": vars(config),
            "dataset": {"name": training.name, "image_shape": list(training.image_shape)},
            "first_byte_counts": counts,
            "seed": seed,
            "optimizer": args.optimizer,
        }
        if name := non_finite_parameter(model):
            raise UserError(f"iteration {iteration}: the parameter {name} is not finite: not saved")
        with log.paused():
            if distributed.rank() == 0:
                save(state, args, last)

    log = TrainingLog(args, start, metrics)
    with StopSignals() as stop, log:
        if args.evaluate_only or start >= args.iterations:
            say(f"no more iterations to train: evaluating iteration {start}")
            evaluate_at(start, stop)
            return stop.exit_status
        model.train()
        for iteration in range(start + 1, args.iterations + 1):
            images = training.batch(iteration - 1, args.batch_size * args.accumulate, order)
            loss = train_step(nats, optimizer, to_device(images, device), seed, iteration, args)
            log.step(iteration, loss)

            finished = iteration == args.iterations
            stopping = iteration - start == args.yield_frequency or distributed.any_of(stop)
            stopping = stopping and not finished
            if iteration % args.save_frequency == 0 or finished or stopping:
                log.write()
                save_at(iteration, last=finished or stopping)
            if stopping:
                say(f"stopped at iteration {iteration} by {stop.name or '--yield_frequency'}")
                return stop.exit_status or YIELDED
            if iteration % args.evaluate_frequency == 0 or finished:
                evaluate_at(iteration, stop)
    return stop.exit_status


def report_test(iteration, bits, bits_all_bytes, metrics, seconds):
    say(f"iteration {iteration}: test {bits:.4f} bits/dim ({bits_all_bytes:.4f} over all bytes)")
    metrics.write(
        "test",
        iteration,
        bits_per_dim=bits,
        bits_per_dim_all_bytes=bits_all_bytes,
        seconds=seconds,
    )


def least_memory(config, args):
    """Bytes that training takes for certain: weights, gradients and moments; ten values of two
    bytes a channel, layer and byte of the images at a time; the images of an iteration. An
    evaluation keeps one layer."""
    layers = 1 if args.evaluate_only else config.n_layers
    activations = 20 * layers * config.d_model * args.batch_size // distributed.world()
    batch = args.batch_size * args.accumulate
    return 16 * config.n_parameters + config.length * (activations + batch)


def load_checkpoint(args):
    """The checkpoint to go on from, or {} where the run begins from scratch."""
    if not args.continue_from:
        return {}
    checkpoint, path = checkpoints.load_newest(args.continue_from)
    if checkpoint is None and args.evaluate_only:
        raise UserError(f"--evaluate_only: no file matches {args.continue_from}: check the path")
    if checkpoint is None:
        say(f"no file matches {args.continue_from}: starting from scratch")
        return {}
    say(f"continuing from {path}, iteration {checkpoint['iteration']}")
    args.continue_from = path
    return checkpoint


def choose(flag, given, checkpoint, default):
    """What the checkpoint's run was started with, else what was given, else the default."""
    stored = checkpoint.get(flag)
    if None not in (given, stored) and given != stored:
        raise UserError(
            f"--{flag} {given} contradicts the checkpoint, whose run has {stored}: "
            "leave the flag out, or start another run"
        )
    return next(value for value in (stored, given, default) if value is not None)


def save(state, args, last):
    """Save if --save_to was given. A failed save is a warning while another one will follow."""
    if not args.save_to:
        return
    try:
        path = checkpoints.save(args.save_to, state, args.keep_checkpoints)
    except OSError as error:
        problem = f"{args.save_to} cannot be written at iteration {state['iteration']}: "
        problem += error.strerror or str(error)
        if last:
            raise UserError(f"{problem}; the previous checkpoint is whole") from None
        warn(f"{problem}; trying again in {args.save_frequency} iterations")
    else:
        say(f"iteration {state['iteration']}: saved {path}")


def describe(model, train, test, device, args):
    """What is about to happen, in three lines."""
    config = model.config
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    say(
        f"model: {config.attention_type}, {config.n_layers} layers, {config.n_heads} heads of "
        f"{config.d_query}, {config.mixtures} mixtures, {parameters:.2f} M parameters"
    )
    say(
        f"data: {train.name}, {len(train)} training and {len(test)} test images of "
        f"{datasets.describe(train.image_shape)}"
    )
    say(f"machine: {device}, {args.precision}")
    if not (args.save_to or args.evaluate_only):
        warn("without --save_to the trained weights are not kept")


def parse_arguments(argv):
    parser = ArgumentParser(
        description="Train a transformer on the bytes of images. The same command starts a run "
        "and, with --continue_from, goes on with it. Ctrl-C saves and leaves.",
    )
    datasets.add_dataset_arguments(parser).add_argument(
        "--evaluate_images",
        type=positive_int,
        metavar="N",
        help="evaluate on the first N test images only (default: all)",
    )
    add_model_arguments(parser)

    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--optimizer",
        choices=["radam", "adam"],
        help="algorithm (default: radam, or the checkpoint's)",
    )
    group.add_argument(
        "--lr", type=number(float, 0, above=True), default=1e-4, metavar="X", help="learning rate"
    )
    group.add_argument(
        "--weight_decay",
        type=number(float, 0),
        default=0.01,
        metavar="X",
        help="decoupled from the gradient",
    )
    group.add_argument(
        "--clip_norm",
        type=number(float, 0),
        default=1.0,
        metavar="X",
        help="clip the norm of the whole gradient at X, 0 for never",
    )
    group.add_argument(
        "--batch_size",
        type=positive_int,
        default=4,
        metavar="N",
        help="images at a time, shared by the processes of torchrun",
    )
    group.add_argument(
        "--accumulate",
        type=positive_int,
        default=1,
        metavar="N",
        help="take N such batches an iteration: the same as a batch N times as large",
    )
    group.add_argument(
        "--no_shuffle", action="store_true", help="take the images in their order, as the original"
    )
    group.add_argument(
        "--iterations", type=positive_int, default=100, metavar="N", help="of the whole run"
    )
    group.add_argument(
        "--seed",
        type=number(int, 0, 2**63 - 1),
        metavar="N",
        help="of the initial weights, the order of images and dropout (default: 0, or the "
        "checkpoint's)",
    )

    group = parser.add_argument_group("checkpoints and evaluation")
    group.add_argument(
        "--save_to",
        metavar="PATTERN",
        help="where to save; {} becomes the iteration, as in weights.{}.pth",
    )
    group.add_argument(
        "--continue_from",
        metavar="PATTERN",
        help="go on from a checkpoint, or from the newest of a pattern; from scratch where "
        "none matches the pattern",
    )
    frequency = {"type": positive_int, "metavar": "N"}
    group.add_argument(
        "--save_frequency",
        default=3000,
        help="save every N iterations, and at the end",
        **frequency,
    )
    group.add_argument(
        "--keep_checkpoints", help="keep only the newest N of --save_to (default: all)", **frequency
    )
    group.add_argument(
        "--evaluate_frequency",
        default=3000,
        help="evaluate on the test images every N iterations, and at the end",
        **frequency,
    )
    group.add_argument(
        "--yield_frequency",
        default=10**9,
        help=f"save and leave with status {YIELDED} after N iterations, for a queue that starts "
        "the job again",
        **frequency,
    )
    group.add_argument(
        "--evaluate_only",
        action="store_true",
        help="print the test bits/dim of --continue_from and leave",
    )

    group = parser.add_argument_group("logging")
    group.add_argument(
        "--log_frequency",
        default=100,
        help="a line or a record every N iterations, their mean",
        **frequency,
    )
    group.add_argument("--metrics_file", metavar="FILE", help="append records as JSON lines")
    group.add_argument("--log_dir", metavar="FOLDER", help="write TensorBoard events")

    add_machine_arguments(parser, "some seconds on a processor, and the default; else minutes")
    args = parser.parse_args(argv)
    if args.evaluate_only and not args.continue_from:
        raise UserError("--evaluate_only needs --continue_from: give the checkpoint to evaluate")
    if args.save_to:
        check_writable(checkpoints.format_path(args.save_to, 0), "--save_to")
    if args.metrics_file:
        check_writable(args.metrics_file, "--metrics_file")
    if args.log_dir:
        check_writable(Path(args.log_dir) / "events", "--log_dir")
    if args.keep_checkpoints and not checkpoints.is_pattern(args.save_to or ""):
        raise UserError("--keep_checkpoints needs a --save_to with {}, as in weights.{}.pth")
    return args


if __name__ == "__main__":
    run(main)

"""Train an autoregressive transformer on the bytes of images.

python main.py --dataset mnist --n_layers 8 --n_heads 8 --save_to weights.{}.pth
"""

from dataclasses import asdict

import torch

import datasets
from cli import training_flags
from cli.flags import model_fields
from cli.process import YIELDED, StopSignals, run
from engine import checkpoint as checkpoints
from engine import construction, distributed, restoring
from engine.metrics import Metrics
from engine.optimizers import make_optimizer, set_rates
from engine.progress import TrainingLog
from engine.recipes import RECIPES, choose_seed, choose_settings, stored_settings
from engine.training import (
    NegativeLogLikelihood,
    evaluate,
    non_finite_parameter,
    train_step,
)
from utils import (
    UserError,
    check_memory,
    say,
    select_device,
    select_precision,
    to_device,
    warn,
)


def main(argv=None):
    args = training_flags.parse(argv)
    if args.export:
        return export(args)
    device = select_device(args.device)
    with distributed.process_group(device):
        return train(args, device)


def export(args):
    """Write the weights of --continue_from without the optimiser's moments."""
    checkpoint, source = checkpoints.load_newest(args.continue_from)
    path = checkpoints.format_path(args.export, checkpoint["iteration"])
    if path.resolve() == source.resolve():
        raise UserError(f"--export {path} would replace the checkpoint itself: give another file")
    checkpoints.export(path, checkpoint)
    say(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB, without the optimiser's moments)")


def train(args, device):
    """Train, evaluate and save; returns the exit status."""
    trainer = Trainer(args, device)
    start, log = trainer.start, trainer.log
    with StopSignals() as stop, log:
        if args.evaluate_only or start >= args.iterations:
            say(f"no more iterations to train: evaluating iteration {start}")
            trainer.evaluate(start, stop)
            return stop.exit_status
        if start and not trainer.optimizer.state_dict()["state"]:
            say("the checkpoint has no moments of the optimiser: they start at zero")
        for iteration in range(start + 1, args.iterations + 1):
            loss = trainer.step(iteration)
            log.step(iteration, loss, trainer.rates)

            finished = iteration == args.iterations
            yielding = iteration - start == args.yield_frequency
            stopping = (yielding or distributed.any_of(stop)) and not finished
            if iteration % args.save_frequency == 0 or finished or stopping:
                log.write()
                trainer.save(iteration, last=finished or stopping)
            if stopping:
                cause = "--yield_frequency" if yielding else "a signal to another process"
                say(f"stopped at iteration {iteration} by {stop.name or cause}")
                return stop.exit_status or YIELDED
            if iteration % args.evaluate_frequency == 0 or finished:
                trainer.evaluate(iteration, stop)
    return stop.exit_status


class Trainer:
    """The data, model, optimiser and log of a run that starts or continues."""

    def __init__(self, args, device):
        self.args, self.device = args, device
        self.precision = select_precision(args.precision, device)
        check_batch_size(args)
        checkpoint, path = load_checkpoint(args)
        stored = restoring.stored_config(checkpoint, path, args.n_heads, args.d_query)
        self.settings = choose_settings(
            training_flags.given_settings(args), stored_settings(checkpoint), args.iterations
        )
        architecture = model_fields(args, stored, RECIPES[self.settings.recipe][1])
        self.seed = choose_seed(args.seed, checkpoint)
        self.start = checkpoint.get("iteration", 0)
        distributed.check_agreement("the iteration to continue from", self.start)
        construction.warn_about_threads(checkpoint, device)

        self.training, self.test = load_data(args, checkpoint)
        self.counts = checkpoint.get("first_byte_counts")
        if self.counts is None:
            self.counts = self.training.first_byte_counts()
        self.training = self.training.on_device_if_small(device)
        config = construction.make_config(architecture, self.training.image_shape)
        self.model = build_model(config, args, self.precision, device, self.seed, checkpoint, path)
        self.optimizer = make_optimizer(self.model, self.settings)
        restoring.load_optimizer_state(self.optimizer, checkpoint, path)
        self.nll = parallel_nll(self.model, args, device)

        self.images_per_iteration = args.batch_size * args.accumulate
        self.metrics = Metrics(args.metrics_file, args.log_dir)
        self.log = TrainingLog(
            self.metrics,
            self.start,
            args.iterations,
            images_per_iteration=self.images_per_iteration,
            frequency=args.log_frequency,
        )
        self.describe()

    def step(self, iteration):
        """Train on the images of an iteration; returns the loss in nats per byte."""
        self.model.train()
        factor = self.settings.rate_factor(iteration, self.args.iterations)
        self.rates = set_rates(self.optimizer, self.settings, factor)
        order = None if self.args.no_shuffle else self.seed
        images = self.training.batch(iteration - 1, self.images_per_iteration, order)
        return train_step(
            self.nll,
            self.optimizer,
            to_device(images, self.device),
            seed=self.seed,
            iteration=iteration,
            accumulate=self.args.accumulate,
            precision=self.precision,
            clip_norm=self.settings.clip_norm,
        )

    def evaluate(self, iteration, stop):
        """Report the test bits/dim, unless a signal interrupts the evaluation."""
        with self.log.paused():
            bits = evaluate(
                self.nll,
                self.test.images[: self.args.evaluate_images],
                self.counts,
                batch_size=self.args.batch_size,
                precision=self.precision,
                device=self.device,
                stop=stop,
            )
        if bits:
            paper, all_bytes = bits
            say(
                f"iteration {iteration}: test {paper:.4f} bits/dim ({all_bytes:.4f} over all bytes)"
            )
            self.metrics.write(
                "test",
                iteration,
                images=iteration * self.images_per_iteration,
                bits_per_dim=paper,
                bits_per_dim_all_bytes=all_bytes,
                seconds=self.log.seconds,
            )

    def save(self, iteration, last):
        """Save a checkpoint if --save_to was given. A failure is a warning, or an error if this is
        the `last` save."""
        if name := non_finite_parameter(self.model):
            raise UserError(f"iteration {iteration}: the parameter {name} is not finite: not saved")
        if not self.args.save_to or distributed.rank() > 0:
            return
        with self.log.paused():
            try:
                path = checkpoints.save(
                    self.args.save_to, self.state(iteration), self.args.keep_checkpoints
                )
            except OSError as error:
                problem = f"{self.args.save_to} cannot be written at iteration {iteration}: "
                problem += error.strerror or str(error)
                if last:
                    raise UserError(f"{problem}; the previous checkpoint is intact") from None
                warn(f"{problem}; trying again in {self.args.save_frequency} iterations")
            else:
                say(f"iteration {iteration}: saved {path}")

    def state(self, iteration):
        """The entries of a checkpoint."""
        training = self.training
        return {
            "model_state": self.model.state_dict(),
            "optimizer_state": restoring.optimizer_state(self.optimizer),
            "iteration": iteration,
            "config": vars(self.model.config),
            "dataset": {"name": training.name, "image_shape": list(training.image_shape)},
            "first_byte_counts": self.counts,
            "seed": self.seed,
            "optimizer": self.settings.optimizer,
            "settings": asdict(self.settings),
            "threads": torch.get_num_threads(),
        }

    def describe(self):
        """Print one line each about the model, the data and the machine."""
        config, training = self.model.config, self.training
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        say(
            f"model: {config.attention_type}, {config.n_layers} layers, {config.n_heads} heads of "
            f"{config.d_query}, {config.mixtures} mixture components, {parameters:.2f} M parameters"
        )
        say(
            f"data: {training.name}, {len(training)} training and {len(self.test)} test images of "
            f"{datasets.describe(training.image_shape)}"
        )
        threads = f" ({torch.get_num_threads()} threads)" if self.device.type == "cpu" else ""
        say(f"machine: {self.device}{threads}, {self.precision}")
        if not (self.args.save_to or self.args.evaluate_only):
            warn("without --save_to the trained weights are not saved")


def check_batch_size(args):
    processes = distributed.world_size()
    if args.batch_size % processes:
        raise UserError(
            f"--batch_size {args.batch_size} is shared by {processes} processes: "
            f"give a multiple of {processes}"
        )


def load_checkpoint(args):
    """The checkpoint to continue from and its path, or ({}, None) for a run from scratch."""
    if not args.continue_from:
        return {}, None
    return checkpoints.load_newest(args.continue_from, or_none=not args.evaluate_only)


def load_data(args, checkpoint):
    """The training and the test images; only an evaluation may use another data set."""
    stored = checkpoint.get("dataset", {})
    name = datasets.choose_name(args.dataset, stored.get("name"), may_differ=args.evaluate_only)
    with distributed.first_process_first():
        return datasets.load_both(name, args.dataset_directory, stored)


def build_model(config, args, precision, device, seed, checkpoint, path):
    """The model to train, with the checkpoint's weights if there is one."""
    needed = construction.training_memory(
        config, args.batch_size, args.accumulate, args.evaluate_only
    )
    check_memory(needed, device)
    construction.check_backend(args.backend, config, device, precision, args.compile)
    ops = None
    if args.backend == "native":
        ops = construction.choose_ops(config, device, args.compile, "training")
    return construction.build_model(
        config,
        device,
        backend=args.backend,
        ops=ops,
        seed=seed,
        checkpoint=checkpoint,
        path=path,
    )


def parallel_nll(model, args, device):
    """The loss, with torch.compile on a GPU if --compile is given, wrapped for all processes."""
    nll = NegativeLogLikelihood(model)
    if args.compile and device.type != "cpu":
        nll.compile()
    # The reformer shares queries and keys: its key projection never gets a gradient.
    return distributed.parallel(nll, device, model.config.attention_type == "reformer")


if __name__ == "__main__":
    run(main)

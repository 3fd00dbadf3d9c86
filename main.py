"""Train an autoregressive transformer on the bytes of images.

python main.py --dataset mnist --n_layers 8 --n_heads 8 --save_to weights.{}.pth
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import math
from argparse import Namespace
from dataclasses import asdict
from functools import partial

import torch

import datasets
from cli import training_flags
from cli.flags import choose_model, given_options
from cli.process import YIELDED, StopSignals, run
from engine import construction, distributed
from engine.checkpoint import NO_CHECKPOINT, Checkpoint, find_files, format_path, is_pattern
from engine.construction import load_model
from engine.metrics import Metrics
from engine.optimizers import export_state, make_optimizer, set_rates
from engine.precision import Choices, layer_candidates, muon_candidates
from engine.progress import TrainingLog
from engine.recipes import Settings, choose_recipe
from engine.sample_grid import SampleGrid
from engine.training import NegativeLogLikelihood, evaluate, non_finite_parameter, train_step
from models import ImageTransformer, ModelConfig
from options import choose, choose_all
from utils import UserError, is_first_process, say, select_device, select_precision, warn


def main(argv: list[str] | None = None) -> int | None:
    args = training_flags.parse(argv)
    if args.export:
        return export(args)
    device = select_device(args.device)
    with distributed.process_group(device):
        return train(args, device)


def export(args: Namespace) -> None:
    """Write the weights of --continue_from without the optimiser's moments."""
    checkpoint = load_checkpoint(args)
    path = format_path(args.export, checkpoint.iteration)
    if path.resolve() == checkpoint.path.resolve():
        raise UserError(f"--export {path} would replace the checkpoint itself: give another file")
    checkpoint.export(path)
    say(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB, without the optimiser's moments)")


def load_checkpoint(args: Namespace) -> Checkpoint:
    """The checkpoint to continue from, else the weights of --init_from as one of iteration 0, else
    `NO_CHECKPOINT` for a run from scratch."""
    checkpoint = NO_CHECKPOINT
    if args.continue_from:
        missing_ok = not (args.evaluate_only or args.export)
        checkpoint = Checkpoint.newest(args.continue_from, missing_ok)
    if args.init_from and not checkpoint:
        checkpoint = Checkpoint.newest(args.init_from).initial_weights()
        say("starting a new run from these weights")
    elif args.continue_from and not checkpoint:
        say(f"no file matches {args.continue_from}: starting from scratch")
    return checkpoint


def train(args: Namespace, device: torch.device) -> int:
    """Train, evaluate and save; returns the exit status."""
    trainer = Trainer(args, device)
    start, log = trainer.start, trainer.log
    with StopSignals(saves=bool(args.save_to)) as stop, log:
        if args.evaluate_only or start >= args.iterations:
            reason = "" if args.evaluate_only else "no more iterations to train: "
            say(f"{reason}evaluating iteration {start}")
            trainer.evaluate(start, stop)
            trainer.draw_samples(start, stop)
            return stop.exit_status
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
                trainer.draw_samples(iteration, stop)
    return stop.exit_status


class Trainer:
    """The data, model, optimiser and log of a run that starts or continues."""

    def __init__(self, args: Namespace, device: torch.device):
        self.args, self.device = args, device
        check_batch_size(args)
        self.images_at_once = args.batch_size // distributed.world_size()  # in this process
        checkpoint = load_checkpoint(args)
        self.settings, recipe = choose_settings(args, checkpoint)
        choose_model(args, checkpoint, recipe)  # for its errors, before the data are loaded
        self.seed = choose_seed(args, checkpoint)
        self.start = checkpoint.iteration
        check_other_run(args, checkpoint)
        distributed.check_agreement("the iteration to continue from", self.start)
        if not args.evaluate_only:
            checkpoint.warn_about_threads(device)

        validation = 0 if args.evaluate_only else self.settings.validation
        self.split = "validation" if validation else "test"
        self.training, self.held_out = load_data(args, checkpoint, validation, self.seed)
        shape = self.held_out.image_shape
        if args.backend == "native":  # the library has no gated attention
            self.settings, recipe = choose_settings(args, checkpoint, shape)
        config = ModelConfig.for_images(shape, **choose_model(args, checkpoint, recipe))
        precision = select_precision(args.precision, device, args.backend)
        self.model = build_model(config, args, precision, device, self.seed, checkpoint)
        self.choices = Choices(checkpoint.measured)
        self.precisions = self.choose_precisions(precision)
        if checkpoint.first_byte_counts is None:
            self.model.first_byte_counts.copy_(self.training.first_byte_counts())
        if not args.evaluate_only:
            self.training = self.training.on_device_if_small(device)
            muon_precision = self.muon_precision(precision)
            self.optimizer = make_optimizer(self.model, self.settings, muon_precision)
            checkpoint.restore_optimizer(self.optimizer)
        self.nll = parallel_nll(self.model, args, device)

        images = self.images_per_iteration = args.batch_size * args.accumulate
        self.sample_grid = make_sample_grid(args, self.held_out, config)
        metrics = Metrics(args.metrics_file, args.log_dir, self.start)
        self.log = TrainingLog(metrics, self.start, args.iterations, images, args.log_frequency)
        self.describe()
        if self.start and self.start < args.iterations and not args.evaluate_only:
            self.describe_rates(checkpoint.lr)

    def choose_precisions(self, precision: str) -> dict[str, str]:
        """Those of the parts of the run; "auto" is measured with the images of a process."""
        parts = ("evaluation",) if self.args.evaluate_only else ("training", "evaluation")
        candidates = {
            part: partial(
                layer_candidates, self.model, self.images_at_once, train=part == "training"
            )
            for part in parts
        }
        return {part: self.choices.choose(part, precision, candidates[part]) for part in parts}

    def muon_precision(self, precision: str) -> str:
        """That of Muon's products; "auto" is measured."""
        if self.settings.optimizer != "muon":
            return precision
        return self.choices.choose("Muon", precision, partial(muon_candidates, self.model))

    def step(self, iteration: int) -> torch.Tensor:
        """Train on the images of an iteration; returns the loss in nats per byte."""
        self.model.train()
        factor = self.settings.rate_factor(iteration, self.args.iterations)
        self.rates = set_rates(self.optimizer, self.settings, factor)
        order = None if self.args.no_shuffle else self.seed
        images = self.training.batch(iteration - 1, self.images_per_iteration, order)
        return train_step(
            self.nll,
            self.optimizer,
            images,
            seed=self.seed,
            iteration=iteration,
            accumulate=self.args.accumulate,
            precision=self.precisions["training"],
            clip_norm=self.settings.clip_norm,
        )

    def evaluate(self, iteration: int, stop: StopSignals) -> None:
        """Report the test or validation bits/dim, unless a signal interrupts the evaluation."""
        self.held_out.check_file()
        with self.log.paused():
            images = self.held_out.images[: self.args.evaluate_images]
            precision = self.precisions["evaluation"]
            options = {"batch_size": self.images_at_once, "precision": precision}
            bits = evaluate(self.nll, images, **options, stop=stop)
        if not bits:
            return
        paper, all_bytes = bits
        if not math.isfinite(paper):
            problem = f"iteration {iteration}: {self.split} bits/dim is {paper}"
            raise UserError(f"{problem}: the training diverged: give an earlier checkpoint")
        text = f"{paper:.4f} bits/dim ({all_bytes:.4f} over all bytes)"
        say(f"iteration {iteration}: {self.split} {text}")
        record = {"bits_per_dim": paper, "bits_per_dim_all_bytes": all_bytes}
        self.log.record(self.split, iteration, record)

    def draw_samples(self, iteration: int, stop: StopSignals) -> None:
        """Draw the picture of --samples, unless a signal has come."""
        if self.sample_grid and not stop:
            with self.log.paused():
                self.sample_grid.write(self.model.eval(), iteration, self.log.metrics)

    def save(self, iteration: int, last: bool) -> None:
        """Save a checkpoint for --save_to. A failure is a warning, or for the `last` an error."""
        if name := non_finite_parameter(self.model):
            raise UserError(f"iteration {iteration}: the parameter {name} is not finite: not saved")
        if not self.args.save_to or not is_first_process():
            return
        with self.log.paused():
            try:
                checkpoint = self.checkpoint(iteration)
                path = checkpoint.save(self.args.save_to, self.args.keep_checkpoints)
            except OSError as error:
                problem = f"{self.args.save_to} cannot be written at iteration {iteration}: "
                problem += error.strerror or str(error)
                if last:
                    raise UserError(f"{problem}; older checkpoints are as they were") from None
                warn(f"{problem}; trying again in {self.args.save_frequency} iterations")
            else:
                say(f"iteration {iteration}: saved {path}")

    def checkpoint(self, iteration: int) -> Checkpoint:
        return Checkpoint(
            model_state=self.model.state_dict(),
            optimizer_state=export_state(self.optimizer),
            iteration=iteration,
            config=self.model.config,
            dataset=self.training.name,
            image_shape=self.training.image_shape,
            first_byte_counts=self.model.first_byte_counts.cpu(),
            seed=self.seed,
            settings=asdict(self.settings),
            threads=torch.get_num_threads(),
            measured=self.choices.stored,
        )

    def describe(self) -> None:
        """Print one line each about the model, the data and the machine."""
        config, training = self.model.config, self.training
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        say(
            f"model: {config.attention_type}, {config.n_layers} layers, {config.n_heads} heads of "
            f"{config.d_query}, {config.mixtures} mixture components, {parameters:.2f} M parameters"
        )
        numbers = f"{len(training)} training and " if training else ""
        numbers += f"{len(self.held_out)} {self.split} images of "
        say(f"data: {self.held_out.name}, {numbers}{datasets.describe(self.held_out.image_shape)}")
        say(self.choices.describe(self.device, self.precisions))
        if not (self.args.save_to or self.args.evaluate_only):
            warn("without --save_to the trained weights are not saved")

    def describe_rates(self, before: float | None) -> None:
        """Print from which rate to which a run goes on whose schedule is not the one before."""
        planned, first, last = (
            self.settings.lr * self.settings.rate_factor(iteration, self.args.iterations)
            for iteration in (self.start, self.start + 1, self.args.iterations)
        )
        if before is not None and math.isclose(before, planned, rel_tol=1e-6):
            return
        text = "" if before is None else f"{before:.3g} at iteration {self.start}, "
        text += f"{first:.3g} from iteration {self.start + 1} on, "
        say(f"learning rate: {text}{last:.3g} at iteration {self.args.iterations}")


def check_batch_size(args: Namespace) -> None:
    processes = distributed.world_size()
    if args.batch_size % processes:
        problem = f"--batch_size {args.batch_size} is shared by {processes} processes"
        raise UserError(f"{problem}: give a multiple of {processes}")


def check_other_run(args: Namespace, checkpoint: Checkpoint) -> None:
    """Raise a `UserError` if --save_to has checkpoints of a run that is not continued, and warn if
    they are of later iterations of the run."""
    if not args.save_to:
        return
    found = [path for path in find_files(args.save_to) if path.exists()]
    continues = checkpoint.iteration and checkpoint.path.resolve() in {p.resolve() for p in found}
    if found and not continues:
        raise UserError(
            f"--save_to {args.save_to}: {found[0]} is there, from another run: give another name, "
            f"continue that run with --continue_from {args.save_to}, or delete its files"
        )
    goes_back = found and not is_pattern(args.continue_from)
    if goes_back and found[0].resolve() != checkpoint.path.resolve():
        warn(
            f"{found[0]} is there, too: the run replaces the checkpoints of later iterations that "
            "it reaches; give another --save_to to keep them"
        )


def choose_settings(
    args: Namespace, checkpoint: Checkpoint, image_shape: tuple[int, ...] = ()
) -> tuple[Settings, dict]:
    """The `Settings` of a run, and the values that its recipe sets, for images of this shape."""
    given, stored = given_options(args, Settings), checkpoint.settings
    recipe = choose_recipe(given, stored, args.iterations, image_shape)
    return Settings(**choose_all(Settings, given, stored, recipe)), recipe


def choose_seed(args: Namespace, checkpoint: Checkpoint) -> int:
    """The seed of a run, which stays the same when it continues."""
    seeds = [{} if seed is None else {"seed": seed} for seed in (args.seed, checkpoint.seed, 0)]
    return choose("seed", *seeds)


def load_data(
    args: Namespace, checkpoint: Checkpoint, validation: int, seed: int
) -> tuple[datasets.ImageDataset | None, datasets.ImageDataset]:
    """The training images, and those to evaluate on: the test images, or `validation` training
    images. --evaluate_only may use another data set, and needs no training images if the checkpoint
    has their histogram of first bytes."""
    name = datasets.choose_name(args.dataset, checkpoint.dataset, may_differ=args.evaluate_only)
    place = args.dataset_directory
    with distributed.first_process_first():
        if args.evaluate_only and checkpoint.first_byte_counts is not None:
            return None, datasets.load_matching(name, place, False, checkpoint.image_shape)
        training, test = datasets.load_both(name, place, checkpoint.image_shape)
    return training.hold_out(validation, seed) if validation else (training, test)


def build_model(
    config: ModelConfig,
    args: Namespace,
    precision: str,
    device: torch.device,
    seed: int,
    checkpoint: Checkpoint,
) -> ImageTransformer:
    """The model to train, with the checkpoint's weights if there is one."""
    needed = construction.evaluation_memory(config, args.batch_size)
    if not args.evaluate_only:
        batches = args.batch_size, args.accumulate
        needed = construction.training_memory(config, *batches, device, precision)
    construction.check_memory(needed, device)
    construction.check_backend(args.backend, config, device, precision, args.compile)
    ops = None
    if args.backend == "native":
        ops = construction.choose_ops(config, device, args.compile, "training")
    return load_model(checkpoint, config, device=device, backend=args.backend, ops=ops, seed=seed)


def make_sample_grid(
    args: Namespace, held_out: datasets.ImageDataset, config: ModelConfig
) -> SampleGrid | None:
    """What draws the picture of --samples, in the first process."""
    if args.samples and not config.has_recurrence:
        problem = f"would take minutes with --attention_type {config.attention_type}"
        raise UserError(f"--samples {problem}, which has no recurrent form: leave it out")
    if not (args.samples and is_first_process()):
        return None
    compile = False if args.compile is False else None  # with --compile a GPU would take minutes
    return SampleGrid(args.samples, held_out.images, held_out.image_shape, compile)


def parallel_nll(model: ImageTransformer, args: Namespace, device: torch.device) -> torch.nn.Module:
    """The loss, with torch.compile on a GPU if --compile is given, wrapped for all processes."""
    nll = NegativeLogLikelihood(model)
    if args.compile and device.type != "cpu":
        nll.compile()
    # The reformer shares queries and keys: its key projection never gets a gradient.
    return distributed.parallel(nll, device, model.config.attention_type == "reformer")


if __name__ == "__main__":
    run(main)

"""What both scripts share: errors, arguments, signals, device and precision."""

import argparse
import ctypes
import difflib
import errno
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path

import torch

from models import ImageTransformer, ModelConfig

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# Where Linux lists a processor's instructions, and those for bfloat16 (x86; ARM).
CPU_FLAGS = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
# The system's words for a path that cannot be what it is given for.
BAD_PATHS = {errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR,
             errno.EISDIR, errno.ELOOP, errno.EINVAL}  # fmt: skip
# Exit statuses, documented in the README.
MISUSE = 2
YIELDED = 75  # "temporary failure, try again" in sysexits.h


class UserError(Exception):
    """Something a user can mend: one line that names the value, the reason and the way out."""


def run(main):
    """Run a script's `main()`: a `UserError` is one line on stderr and exit status 2."""
    name = Path(sys.argv[0]).name
    keep_freed_memory()
    sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold what it cannot show
    try:
        status = main()
        sys.stdout.flush()
    except UserError as error:
        tell(f"{name}: error: {error}")
        status = MISUSE
    except KeyboardInterrupt:
        tell(f"{name}: interrupted")
        status = 128 + signal.SIGINT
    except BrokenPipeError:  # as in `| head`: nobody reads on, and Python must not try at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except OSError as error:  # a disk that is full or gone in the middle of writing
        tell(f"{name}: error: {error}")
        status = MISUSE if error.errno in BAD_PATHS else 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        tell(f"{name}: error: out of memory: lower --batch_size, or the size of the model")
        status = MISUSE
    sys.exit(status)


def tell(text):
    """A line on stderr, if anybody listens; what a terminal would act upon is spelled out."""
    with suppress(OSError):
        print("".join(c if c.isprintable() else repr(c)[1:-1] for c in text), file=sys.stderr)


def is_out_of_memory(error):
    """Whether Python, torch or CUDA had no memory left; torch has no type for a processor's."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text


def check_memory(needed, device):
    """A `UserError` where `needed` bytes, a lower bound, are more than the device has."""
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"this model and --batch_size need {needed / 1e9:.1f} GB of memory at the very least, "
            f"and the {device.type} device has {there / 1e9:.1f}: lower one of them"
        )


def keep_freed_memory():
    """Let glibc keep the memory of freed tensors for the next ones.

    It would return it to the system, which fills it with zeros anew, page by page: on virtual
    machines several times slower than what is then computed in it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(M_MMAP_THRESHOLD, 2**30)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one-line errors that suggest the flag that was meant."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def parse_args(self, argv=None):
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, 1)
            hint = f"did you mean {near[0]}?" if near else "see --help"
            raise UserError(f"unrecognized argument {unknown[0]}: {hint}")
        return args

    def error(self, message):
        raise UserError(f"{message} (see --help)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """A wide column for the flags, and the default of those that have one."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=min(100, shutil.get_terminal_size()[0]))

    def _get_help_string(self, action):
        if action.default in (None, False, argparse.SUPPRESS) or not action.option_strings:
            return action.help
        return super()._get_help_string(action)


def number(convert, low=-math.inf, high=math.inf, above=False):
    """An argparse type: a number from `low` (excluded with `above`) to `high`."""
    bounds = f"{'above' if above else 'at least'} {low}"
    bounds += "" if high == math.inf else f" and at most {high}"
    kind = "a whole number" if convert is int else "a number"

    def parse(text):
        try:
            value = convert(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind}") from None
        if not (low <= value <= high and math.isfinite(value)) or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text} is out of range: give {kind} {bounds}")
        return value

    return parse


positive_int = number(int, 1, 2**62)


def add_model_arguments(parser):
    """The architecture. Every default is None: what was not given comes from a checkpoint, and
    without one from `ModelConfig`."""
    defaults = {field.name: field.default for field in fields(ModelConfig)}
    group = parser.add_argument_group(
        "model", "A checkpoint knows its model: these are for a new one, or one of the original's."
    )

    def add(name, help, **kwargs):
        default = defaults[name]
        if default not in (MISSING, None, False):
            help = f"{help} (default: {default})"
        group.add_argument(f"--{name}", default=None, help=help, **kwargs)

    probability = {"type": number(float, 0, 0.999), "metavar": "P"}
    count = {"type": positive_int, "metavar": "N"}
    add(
        "attention_type",
        "linear, softmax (full), or with --backend fast-transformers one of the others",
        choices=ATTENTIONS,
    )
    add("n_layers", "transformer layers", **count)
    add("n_heads", "attention heads", **count)
    add("d_query", "size of a head's queries, keys and values", **count)
    add("mixtures", "logistics in the mixture over a byte", **count)
    add("dropout", "dropout in the layers", **probability)
    add("attention_dropout", "dropout of softmax's attention weights", **probability)
    add(
        "softmax_temp",
        "what multiplies q.k before softmax (default: 1/sqrt(d_query))",
        type=number(float, 0, above=True),
        metavar="X",
    )
    add("bits", "hash bits (reformer only)", **count)
    add("rounds", "hashing rounds (reformer only)", **count)
    add("chunk_size", "queries in a block (reformer), bytes seen (local)", **count)
    add(
        "unmasked_reformer",
        "let a query attend to itself (reformer only)",
        action="store_true",
    )
    return group


NATIVE_ATTENTIONS = ["causal-linear", "full"]
ATTENTIONS = [*NATIVE_ATTENTIONS, "reformer", "exact-topk", "local"]
SOFTMAX_ATTENTIONS = ["full", "reformer", "exact-topk", "local"]
# The flags that act with some attentions only.
ONLY_FOR = {
    "softmax_temp": SOFTMAX_ATTENTIONS,
    "attention_dropout": SOFTMAX_ATTENTIONS,
    "bits": ["reformer"],
    "rounds": ["reformer"],
    "chunk_size": ["reformer", "local"],
    "unmasked_reformer": ["reformer"],
}
# A run may go on with another dropout; everything else makes another model.
MAY_CHANGE = ("dropout", "attention_dropout")


def model_fields(args, stored):
    """The fields of ModelConfig, but `length`: those `stored` in a checkpoint, else the flags.

    A flag that contradicts the checkpoint is a `UserError`, and so is one without effect.
    """
    names = [field.name for field in fields(ModelConfig) if field.name != "length"]
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    for name, value in given.items():
        if name not in MAY_CHANGE and stored.get(name, value) != value:
            raise UserError(
                f"--{name} {value} contradicts the checkpoint, which has {stored[name]}: "
                "leave the flag out, or give another checkpoint"
            )
    chosen = {**{name: stored[name] for name in names if name in stored}, **given}
    config = ModelConfig(length=2, **chosen)
    for name in given:
        if config.attention_type not in ONLY_FOR.get(name, (config.attention_type,)):
            raise UserError(
                f"--{name} has no effect with --attention_type {config.attention_type}: "
                f"leave it out, or use --attention_type {ONLY_FOR[name][0]}"
            )
    if config.attention_type not in NATIVE_ATTENTIONS and args.backend == "native":
        raise UserError(
            f"--attention_type {config.attention_type} needs --backend fast-transformers: "
            "give that, or use causal-linear or full"
        )
    if config.d_model % 4:
        raise UserError(
            f"--n_heads {config.n_heads} times --d_query {config.d_query} is {config.d_model}: "
            "it must be a multiple of 4, for sines and cosines in half of it"
        )
    return chosen


def add_machine_arguments(parser, when_compiled):
    """Where and how to compute; the text says when --compile is worth it."""
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--device",
        default="auto",
        help="auto (a GPU if there is one), cpu, cuda, cuda:N or mps",
    )
    group.add_argument(
        "--precision",
        choices=["fp32", "bf16", "bf16-emulated"],
        default="fp32",
        help="of the matrix products; attention sums and the loss stay fp32; bf16-emulated also "
        "where the device has no bfloat16 and is slow with it",
    )
    group.add_argument(
        "--backend",
        choices=["native", "fast-transformers"],
        default="native",
        help="the layers of this program, or those of pytorch-fast-transformers (make reference)",
    )
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help=f"compile first; changes speed only ({when_compiled})",
    )
    return group


def select_device(name):
    """The torch.device of --device; a `UserError` where this machine lacks it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        name = "mps" if name == "cpu" and torch.backends.mps.is_available() else name
    kind, _, index = name.partition(":")
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # of torchrun: a device for each process
        index = os.environ["LOCAL_RANK"]
        name = f"cuda:{index}"
    if kind not in ("cpu", "cuda", "mps") or (name != kind and not index.isdecimal()):
        raise UserError(f"--device {name} is unknown: give auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UserError(f"--device {name}: torch finds {found} CUDA devices here; try --device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch finds no Apple GPU here; try --device cpu")
    return torch.device(name)


def to_device(images, device):
    """The images there; a GPU gets them while the processor goes on."""
    if device.type == "cuda":
        images = images.pin_memory()
    return images.to(device, non_blocking=True)


def check_precision(args, device):
    """Refuse --precision bf16 where it would be slow; bf16-emulated is bf16 all the same."""
    if args.precision == "bf16" and not has_bfloat16(device):
        raise UserError(
            f"--precision bf16: this {device.type} device has no bfloat16 and would emulate it "
            "slowly: use fp32, or bf16-emulated to do it anyway"
        )
    args.precision = args.precision.removesuffix("-emulated")


def has_bfloat16(device):
    """Whether the device multiplies in bfloat16; on a processor as Linux or macOS tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "mps":
        return True
    if CPU_FLAGS.exists():
        return not BFLOAT16_FLAGS.isdisjoint(CPU_FLAGS.read_text().split())
    if not shutil.which("sysctl"):
        return False
    command = ["sysctl", "-n", "hw.optional.arm.FEAT_BF16"]
    return subprocess.run(command, capture_output=True).stdout.strip() == b"1"


def autocast(device, precision):
    """The context in which a model runs with --precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def build_model(config, device, args):
    """A new model of the --backend, with random weights, on the device."""
    if args.backend == "native":
        return ImageTransformer(config).to(device)
    import reference  # needs a library that is not in requirements.txt

    reference.check(config, device, args)
    return reference.ReferenceTransformer(config).to(device)


def check_writable(path, flag):
    """A `UserError` where the file `path` could not be written; makes nothing.

    Its folder may be missing as long as it can be made: then the nearest one that exists counts.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder: give a file's path")
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"{flag} {path} is write-protected: choose another path")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{flag} {path} cannot be written, {folder} refuses ({error.strerror}): "
            "choose another path"
        ) from None


class StopSignals:
    """Notes the first SIGINT or SIGTERM, or that nobody reads the output any more (SIGPIPE), so
    that the loop can save and leave; a second one ends the program at once."""

    NUMBERS = signal.SIGINT, signal.SIGTERM, signal.SIGPIPE

    def __enter__(self):
        self.number = None
        self.previous = {s: signal.signal(s, self.note) for s in self.NUMBERS}
        return self

    def note(self, number, frame):
        self.number = number
        signal.signal(number, self.previous[number])
        tell(f"{self.name}: saving and leaving; once more to leave at once")

    def __exit__(self, *exception):
        for signal_number, handler in self.previous.items():
            signal.signal(signal_number, handler)

    def __bool__(self):
        return self.number is not None

    @property
    def name(self):
        return signal.Signals(self.number).name if self else None

    @property
    def exit_status(self):
        """As a shell reports a program that a signal ended, 0 without one."""
        return 128 + self.number if self else 0

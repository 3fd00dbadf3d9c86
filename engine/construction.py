"""The model of a run: its backend, its operations, its weights, and the memory it needs."""

from functools import partial
from pathlib import Path

import torch

from cpu.build import try_compile
from cpu.ops import CompiledOps
from engine import distributed
from engine.checkpoint import Checkpoint
from layers.ops import PlainOps
from models import ImageTransformer, ModelConfig
from utils import UserError, device_memory, one_line, warn


def load_model(
    source: Checkpoint | str | Path,
    config: ModelConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    backend: str = "native",
    ops: PlainOps | None = None,
    seed: int = 0,
) -> ImageTransformer:
    """The model of a checkpoint, in evaluation mode.

    `source` is a checkpoint, its path, or a pattern such as weights.{}.pth for the newest. `config`
    is the checkpoint's unless given; checkpoints of the original store none. With `NO_CHECKPOINT`
    the weights are random, from the seed. `ops` computes the layers of a native model. Raises
    `UserError` for a file that is missing, damaged or of another model.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.newest(source)
    if config is None:
        config = ModelConfig.for_images(checkpoint.image_shape, **checkpoint.model_options())
    torch.manual_seed(seed)
    if backend == "native":
        model = ImageTransformer(config, ops)
    else:
        from reference.model import ReferenceTransformer  # not in requirements.txt

        model = ReferenceTransformer(config)
    model = model.to(device)
    if checkpoint:
        checkpoint.restore_model(model)
    return model.eval()


def choose_ops(
    config: ModelConfig, device: torch.device, compile: bool | None, purpose: str
) -> PlainOps:
    """The operations of a native model: compiled on a CPU if --compile (None: if possible), else
    plain; on CUDA in Triton unless --no-compile. Messages name the `purpose`, "training"."""
    if device.type == "cuda" and compile is not False:
        return triton_ops(config, device, purpose)
    if device.type != "cpu":
        return PlainOps()
    return try_compile(partial(CompiledOps, config), compile, purpose) or PlainOps()


def triton_ops(config: ModelConfig, device: torch.device, purpose: str) -> PlainOps:
    """The Triton operations, or the plain ones, with a warning, where they do not work."""
    try:
        from gpu.ops import TritonOps  # needs triton, which not every machine with CUDA has

        return TritonOps(config, device)
    except Exception as error:  # of any kind: Triton's compiler, its assembler and CUDA have theirs
        reason = one_line(error)
        warn(f"no Triton kernels ({reason}); {purpose} in plain PyTorch, which is slower")
        return PlainOps()


def check_backend(
    backend: str, config: ModelConfig, device: torch.device, precision: str, compile: bool | None
) -> None:
    """Raise a `UserError` for flags with which --backend cannot run this model."""
    if backend == "fast-transformers":
        from reference import model as reference  # not in requirements.txt

        reference.check(config, device, precision, compile)


def training_memory(
    config: ModelConfig, batch_size: int, accumulate: int, device: torch.device, precision: str
) -> int:
    """A lower bound of the bytes that training needs: weights, gradients and at least one moment;
    the activations of a batch; the images of an iteration.

    Measured on a CPU, a position takes 43 to 50 bytes for each channel of a layer in float32 (27 to
    36 in bfloat16), at least 40 more for each channel, and 24 for each mixture component.
    """
    if device.type == "cpu":
        per_channel = 42 if precision == "fp32" else 26
        per_position = (per_channel * config.n_layers + 40) * config.d_model + 24 * config.mixtures
    else:
        per_position = 20 * config.n_layers * config.d_model
    activations = per_position * batch_size // distributed.world_size()
    images = config.length * (activations + batch_size * accumulate)
    return 12 * config.n_parameters + images


def evaluation_memory(config: ModelConfig, batch_size: int) -> int:
    """The same for an evaluation, which keeps the weights and the activations of one layer."""
    activations = 12 * config.d_model * batch_size // distributed.world_size()
    return 4 * config.n_parameters + config.length * (activations + batch_size)


def sampling_memory(config: ModelConfig, n_states: int) -> int:
    """A lower bound of the bytes that sampling needs: the weights, and the states of images."""
    # Keys and values of softmax attention may be bfloat16: two 2-byte numbers for each position.
    per_channel = config.length if config.attention_type == "full" else config.d_query
    # The last inputs of a short convolution (or none) may be bfloat16, too.
    per_channel += config.channels * config.width // 2
    states = n_states * config.n_layers * config.d_model * per_channel
    return 4 * (config.n_parameters + states)


def check_memory(needed: int, device: torch.device) -> None:
    """Raise a `UserError` if `needed` bytes, a lower bound, exceed the memory of the device."""
    available = device_memory(device)
    if needed > available:
        raise UserError(
            f"this model and --batch_size need at least {needed / 1e9:.1f} GB of memory, "
            f"and the {device.type} device has {available / 1e9:.1f}: reduce one of them"
        )

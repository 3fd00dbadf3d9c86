"""Whether a checkpoint file can be used: its checksums, and the type of every entry."""

import math
import zipfile

import torch

from engine.recipes import OPTIMIZERS, is_settings
from layers.neighbours import REACH
from models import ATTENTIONS, ModelConfig


def check_checksums(file):
    """Raise ValueError if the file is a zip archive, as torch writes, whose checksums do not
    match: torch does not verify them. torch never compresses, so a compressed one is refused."""
    if not zipfile.is_zipfile(file):
        file.seek(0)
        return  # written by a torch before 1.6, or by another program
    with zipfile.ZipFile(file) as content:
        if any(info.compress_type != zipfile.ZIP_STORED for info in content.infolist()):
            raise ValueError("compressed")
        if bad := content.testzip():
            raise ValueError(f"the checksum of {bad} does not match")
    file.seek(0)


def is_count(x, least=0):
    return type(x) is int and least <= x < 2**63


def is_weight(x):
    """Whether it is a plain CPU tensor with as many elements in memory as in its shape."""
    plain = isinstance(x, torch.Tensor) and x.layout == torch.strided and x.device.type == "cpu"
    plain = plain and x.is_floating_point()
    return plain and x.numel() * x.element_size() <= x.untyped_storage().nbytes()


def is_model_state(x):
    if not isinstance(x, dict):
        return False
    return all(isinstance(name, str) and is_weight(tensor) for name, tensor in x.items())


def is_optimizer_state(x):
    """Whether it has the structure that `import_optimizer_state` reads."""
    if not (isinstance(x, dict) and isinstance(x.get("state"), dict)):
        return False
    groups = x.get("param_groups")
    return isinstance(groups, list) and all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    )


FLAGS = ("unmasked_reformer", "neighbours")  # of ModelConfig


def is_config(x):
    try:
        config = ModelConfig(**x)
    except TypeError:
        return False
    dropouts, temperature = (config.dropout, config.attention_dropout), config.softmax_temp
    others = {"attention_type", "dropout", "attention_dropout", "softmax_temp", *FLAGS}
    least = 1 if config.neighbours else 0
    return (
        all(is_count(x[name], 1) for name in set(x) - others - {"width", "channels"})
        and all(is_count(n, least) for n in (config.width, config.channels))
        and (config.channels in REACH or not config.neighbours)
        and config.attention_type in ATTENTIONS
        and all(type(p) in (int, float) and 0 <= p < 1 for p in dropouts)
        and (temperature is None or (type(temperature) is float and 0 < temperature < math.inf))
        and all(type(getattr(config, name)) is bool for name in FLAGS)
    )


def is_dataset(x):
    if not (isinstance(x, dict) and isinstance(x.get("name"), str)):
        return False
    shape = x.get("image_shape")
    return isinstance(shape, list) and len(shape) in (2, 3) and all(is_count(n, 1) for n in shape)


def is_histogram(x):
    plain = isinstance(x, torch.Tensor) and x.dtype == torch.int64 and x.shape == (256,)
    return plain and bool((x >= 0).all())


CHECKS = {
    "model_state": is_model_state,
    "optimizer_state": is_optimizer_state,
    "iteration": is_count,
    "config": is_config,
    "dataset": is_dataset,
    "first_byte_counts": is_histogram,
    "seed": is_count,
    "optimizer": OPTIMIZERS.__contains__,
    "settings": is_settings,
    "threads": is_count,
    "format_version": is_count,
}
# Entries that older checkpoints do not have.
OPTIONAL = {"settings", "threads"}

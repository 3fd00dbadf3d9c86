"""Restores a model and an optimiser from a checkpoint, including checkpoints of the original."""

import math

import torch

from engine.checkpoint import damaged
from engine.optimizers import is_muon
from models import ModelConfig
from utils import UserError

# The moments that an optimiser keeps of each parameter.
ADAM_MOMENTS, MUON_MOMENTS = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)


def upgrade_layout(checkpoint, path):
    """Rename, in place, the weights of the original's older layout (its --load_pytorch), in which
    a layer's attention is torch's own: in_proj stacks the query, key and value projections.

    The position table is left out: the original, too, replaced it by the model's own.
    """
    upgraded = {}
    for name, tensor in checkpoint["model_state"].items():
        prefix, found, rest = name.partition("self_attn.")
        kind = rest.rpartition("in_proj_")[2]  # weight or bias
        if found and rest.startswith("in_proj_"):
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                upgraded[f"{prefix}attention.{part}_projection.{kind}"] = piece
        elif found:
            # Temperatures, once stored beside the weights, are left out too.
            if rest != "softmax_temp":
                rest = rest.replace("out_proj.", "out_projection.")
                upgraded[f"{prefix}attention.{rest}"] = tensor
        elif name != "pos_embedding.pe":
            upgraded[name] = tensor
    if not any("self_attn." in name for name in checkpoint["model_state"]):
        raise UserError(f"--load_pytorch: {path} has no self_attn weights: leave the flag out")
    checkpoint["model_state"] = upgraded


def stored_config(checkpoint, path, n_heads=None, d_query=None):
    """The fields of ModelConfig that a checkpoint ({} for none) determines.

    A checkpoint of the original does not determine the number of heads, since 8 heads of 32 and 4
    of 64 have equal shapes: `n_heads` or `d_query` must be given.
    """
    if not checkpoint:
        return {}
    seen = config_from_tensors(checkpoint["model_state"], path)
    d_model = seen["d_model"]
    if "format_version" in checkpoint:
        config = vars(ModelConfig(**checkpoint["config"]))
        seen["length"] = math.prod(checkpoint["dataset"]["image_shape"])
        expected = {**config, "d_model": config["n_heads"] * config["d_query"]}
        if any(expected[name] != size for name, size in seen.items()):
            raise damaged(path, "its config does not match its weights and images")
        return config
    if not (n_heads or d_query):
        raise UserError(
            f"{path} does not determine how many heads its {d_model} channels have: "
            "give --n_heads or --d_query"
        )
    n_heads = n_heads or d_model // d_query
    d_query = d_query or d_model // n_heads
    if n_heads * d_query != d_model:
        raise UserError(
            f"{path} has {d_model} channels: --n_heads {n_heads} times --d_query {d_query} is "
            f"{n_heads * d_query}"
        )
    sizes = {name: seen[name] for name in ("n_layers", "mixtures")}
    return {**sizes, "n_heads": n_heads, "d_query": d_query}


def config_from_tensors(state, path):
    """What the shapes in a `model_state` determine: n_layers, d_model, mixtures and, if it has
    a position table, length."""
    try:
        outputs = len(state["predictor.bias"])
        (d_model,) = state["transformer.norm.weight"].shape
        layers = {name.split(".")[2] for name in state if name.startswith("transformer.layers.")}
        seen = {"n_layers": len(layers), "d_model": d_model, "mixtures": outputs // 3}
        if "pos_embedding.pe" in state:
            seen["length"] = state["pos_embedding.pe"].shape[1] + 1
    except (KeyError, ValueError, IndexError):
        raise UserError(f"{path} is not a checkpoint of an image transformer") from None
    return seen


def optimizer_state(optimizer):
    """The state of an optimiser, with the entries that the original's RAdam expects in a group."""
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group |= {"max_grad_norm": 1.0, "buffer": [[None, None, None] for _ in range(10)]}
    return state


def load_optimizer_state(optimizer, checkpoint, path):
    """Move the moments from a checkpoint to the optimiser; without any they start at zero. Raises
    `UserError` for those of another model."""
    state = checkpoint.pop("optimizer_state", None)
    if not state:
        return
    try:
        import_optimizer_state(state, optimizer)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"the optimiser's state in {path} does not belong to this model: {error}"
        ) from None


def import_optimizer_state(state, optimizer):
    """Give an optimiser the moments of a saved state, ours or the original's, in order.

    The optimiser keeps its own groups: torch would take over those of the file, and the
    original's have no decoupled_weight_decay, which would turn the decay into the coupled kind.
    Raises ValueError for moments of another model.
    """
    names = [name for group in state["param_groups"] for name in group["params"]]
    expected = [
        (parameter, MUON_MOMENTS if is_muon(group) else ADAM_MOMENTS)
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    if len(names) != len(expected):
        raise ValueError(f"it has {len(names)} parameters, not {len(expected)}")
    imported = {}
    for i, (name, (parameter, keys)) in enumerate(zip(names, expected, strict=True)):
        moments = state["state"].get(name)
        if not moments:
            continue  # never trained
        for key in keys:
            if moments[key].shape != parameter.shape:
                raise ValueError(f"parameter {i} has another shape")
            if not moments[key].isfinite().all():
                raise ValueError(f"a moment of parameter {i} is not finite")
        imported[i] = dict(moments)
        if keys is ADAM_MOMENTS:
            imported[i]["step"] = torch.as_tensor(moments["step"], dtype=torch.float32)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": imported, "param_groups": groups})


def load_model_state(model, checkpoint, path):
    """Move the weights from a checkpoint to the model. Raises `UserError` unless every name and
    shape agrees and every number is finite."""
    weights = checkpoint.pop("model_state")
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} is not finite: give an earlier checkpoint")
    # Positions are not trained: if an upgraded layout has none, the model keeps its own.
    weights = {"pos_embedding.pe": model.pos_embedding.pe, **weights}
    if difference := first_difference(model.state_dict(), weights):
        raise UserError(f"the weights in {path} do not fit the model: {difference}")
    model.load_state_dict(weights)


def first_difference(expected, weights):
    """How the names and shapes of `weights` differ from those expected, in words, or None."""
    if missing := expected.keys() - weights.keys():
        return f"{min(missing)} is missing"
    if unknown := weights.keys() - expected.keys():
        return f"{min(unknown)} is not part of the model"
    for name, tensor in expected.items():
        if tensor.shape != weights[name].shape:
            return f"{name} is {list(weights[name].shape)} and should be {list(tensor.shape)}"

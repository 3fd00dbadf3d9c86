"""The optimisers: those of the paper's experiment, and Muon for the layers' matrices."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from layers.mixture import mean_rows
from utils import warn

# The moments that an optimiser keeps of each parameter.
ADAM_MOMENTS, MUON_MOMENTS = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)
# Muon's learning rates are an order of magnitude above AdamW's, and so is its weight decay.
MUON_WEIGHT_DECAY = 0.1
# AdamW's beside Muon. The usual 0.999 remembers gradients for longer than a short run lasts: after
# 700 iterations it was 0.016 bits/dim worse.
BETA2 = 0.95


def make_optimizer(model: nn.Module, settings: Any, muon_precision: str = "bf16") -> Any:
    """The optimiser of `Settings`, with weight decay decoupled from the gradient.

    "muon" is Muon for the matrices inside the layers and AdamW for everything else, with a lower
    rate for the means; `muon_precision` is that of Muon's products.
    """
    options = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.optimizer == "radam":
        return torch.optim.RAdam(model.parameters(), **options, decoupled_weight_decay=True)
    # One kernel updates all parameters on a GPU; None is torch's default.
    options["fused"] = model.predictor.weight.is_cuda or None
    if settings.optimizer == "adam":
        return torch.optim.AdamW(model.parameters(), **options)
    modules = model.transformer.modules()
    matrices = [module.weight for module in modules if isinstance(module, nn.Linear)]
    chosen = set(matrices)
    others = [p for p in model.parameters() if p not in chosen]
    options |= {"betas": (0.9, BETA2), "mean_rate": settings.mean_rate}
    means = SlowMeans(mean_rows(model.predictor), others, **options)
    muon = Muon(matrices, settings.muon_lr, MUON_WEIGHT_DECAY, muon_precision)
    return OptimizerPair(muon, means)


class Muon(torch.optim.Muon):
    """Muon, with products in bfloat16, torch's choice, or in float32."""

    def __init__(
        self, matrices: list[torch.Tensor], lr: float, weight_decay: float, precision: str = "bf16"
    ):
        super().__init__(matrices, lr, weight_decay)
        self.in_float32 = precision == "fp32"

    def step(self) -> None:
        if not self.in_float32:
            return super().step()
        with InsteadOfBfloat16() as mode:
            super().step()
        if not mode.used:
            warn("this release of torch computes Muon's products in bfloat16 with any --precision")
            self.in_float32 = False


class InsteadOfBfloat16(TorchFunctionMode):
    """Inside, `Tensor.bfloat16` returns a copy in float32, which torch's Muon changes in place."""

    used = False

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is torch.Tensor.bfloat16:
            self.used = True
            return args[0].to(torch.float32, copy=True)
        return function(*args, **kwargs or {})


class SlowMeans(torch.optim.AdamW):
    """AdamW, with `mean_rate` times the rate for the predictor's rows that compute the `means`.

    A mean is measured in the width of its logistic. For black and white pixels that is a fraction
    of a byte, and at the full rate every step moves the mean by more.
    """

    def __init__(
        self,
        means: list[torch.Tensor],
        parameters: list[torch.Tensor],
        mean_rate: float,
        **options: Any,
    ):
        super().__init__(parameters, **options)
        self.means, self.mean_rate = means, mean_rate

    def step(self) -> None:
        before = [rows.clone() for rows in self.means]
        super().step()
        # The rows are parts of tensors, which can only have one rate: go part of the way back.
        for rows, old in zip(self.means, before, strict=True):
            rows.lerp_(old, 1 - self.mean_rate)


def set_rates(optimizer: Any, settings: Any, factor: float) -> dict[str, float]:
    """Set the learning rates to `factor` times those of `Settings`; returns them by name."""
    for group in optimizer.param_groups:
        group["lr"] = factor * (settings.muon_lr if is_muon(group) else settings.lr)
    return rates(optimizer)


def rates(optimizer: Any) -> dict[str, float]:
    """The current learning rates, {name of the flag: rate}."""
    return {"muon_lr" if is_muon(g) else "lr": g["lr"] for g in optimizer.param_groups}


def is_muon(group: dict) -> bool:
    """Whether a group of parameters belongs to Muon."""
    return "ns_steps" in group


class OptimizerPair:
    """Two optimisers of different parameters that are used, saved and loaded as one."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer):
        self.parts = first, second

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.step()


def parts_of(optimizer: Any) -> tuple:
    return getattr(optimizer, "parts", (optimizer,))


def export_state(optimizer: Any) -> dict:
    """The state of an optimiser, with the parameters of all parts numbered consecutively, and with
    the entries that the original's RAdam expects in a group."""
    state, groups, start = {}, [], 0
    for part in parts_of(optimizer):
        own = part.state_dict()
        state |= {start + number: moments for number, moments in own["state"].items()}
        for group in own["param_groups"]:
            group |= {"max_grad_norm": 1.0, "buffer": [[None, None, None] for _ in range(10)]}
            groups.append({**group, "params": [start + number for number in group["params"]]})
        start = sum(len(group["params"]) for group in groups)
    return {"state": state, "param_groups": groups}


def import_state(optimizer: Any, state: dict) -> None:
    """Give an optimiser the moments of a saved state, ours or the original's, in order.

    The optimiser keeps its own groups: torch would take over those of the file, and the
    original's have no decoupled_weight_decay, which would turn the decay into the coupled kind.
    Raises ValueError for moments of another model.
    """
    names = [name for group in state["param_groups"] for name in group["params"]]
    expected = sum(len(group["params"]) for group in optimizer.param_groups)
    if len(names) != expected:
        raise ValueError(f"it has {len(names)} parameters, not {expected}")
    saved = (state["state"].get(name) for name in names)
    for part in parts_of(optimizer):
        parameters = [(p, group) for group in part.param_groups for p in group["params"]]
        imported = {i: import_moments(next(saved), *own) for i, own in enumerate(parameters)}
        trained = {i: moments for i, moments in imported.items() if moments}
        part.load_state_dict({**part.state_dict(), "state": trained})


def import_moments(moments: dict | None, parameter: torch.Tensor, group: dict) -> dict:
    """The saved moments of a parameter of a group, checked; {} if it was never trained."""
    if not moments:
        return {}
    for key in MUON_MOMENTS if is_muon(group) else ADAM_MOMENTS:
        if moments[key].shape != parameter.shape:
            raise ValueError(f"a parameter has the shape {list(moments[key].shape)}")
        if not moments[key].isfinite().all():
            raise ValueError("a moment is not finite")
    if is_muon(group):
        return dict(moments)
    return {**moments, "step": torch.as_tensor(moments["step"], dtype=torch.float32)}

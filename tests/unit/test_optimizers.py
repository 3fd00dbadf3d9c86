"""The optimisers: which parameters Muon gets, and two optimisers that are kept as one."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from engine import optimizers, restoring
from engine.optimizers import (
    MEAN_RATE,
    MUON_WEIGHT_DECAY,
    Muon,
    OptimizerPair,
    make_optimizer,
    set_rates,
)
from engine.recipes import RECIPES, Settings
from engine.training import NegativeLogLikelihood, train_step
from models import ImageTransformer, ModelConfig

FAST = RECIPES["fast"][0]
SIZES = {"n_layers": 2, "n_heads": 2, "d_query": 4, "mixtures": 2, "dropout": 0.1}
NEIGHBOURS = pytest.mark.parametrize("neighbours", [False, True], ids=["plain", "neighbours"])


def make_model(neighbours=True, seed=0):
    torch.manual_seed(seed)
    fields = {"neighbours": True, "width": 6, "channels": 1} if neighbours else {}
    return ImageTransformer(ModelConfig(24, **SIZES, **fields)).train()


def train(model, optimizer, iterations, settings=FAST):
    """Steps of a run of 10 iterations, with these numbers."""
    images = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(1))
    for iteration in iterations:
        set_rates(optimizer, settings, settings.rate_factor(iteration, 10))
        train_step(
            NegativeLogLikelihood(model), optimizer, images,
            seed=0, iteration=iteration, accumulate=1, precision="fp32", clip_norm=1.0,
        )  # fmt: skip


def equal(a, b):
    """Whether two states of optimisers hold the same."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@NEIGHBOURS
def test_muon_gets_the_matrices_inside_the_layers(neighbours):
    """Not the embedding, the neighbours' projection or the predictor; every other parameter,
    and none twice, belongs to AdamW."""
    model = make_model(neighbours)
    muon, adamw = make_optimizer(model, FAST).parts
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    names = {parameter: name for name, parameter in model.named_parameters()}
    own, others = (
        [names[p] for group in part.param_groups for p in group["params"]] for part in (muon, adamw)
    )
    matrices = ["query_projection", "key_projection", "value_projection", "out_projection"]
    matrices = [*(f"attention.{name}" for name in matrices), "linear1", "linear2"]
    expected = {f"transformer.layers.{i}.{name}.weight" for i in range(2) for name in matrices}
    assert set(own) == expected
    assert sorted(own + others) == sorted(names.values())
    outside = {"value_embedding.weight", "predictor.weight", "predictor.bias"}
    assert outside <= set(others)
    assert ("neighbour_projection.weight" in others) == neighbours


def test_each_part_has_its_rate_and_decay():
    settings = Settings(optimizer="muon", lr=3e-3, muon_lr=0.05, weight_decay=0.3)
    muon, adamw = make_optimizer(make_model(), settings).parts
    assert [(g["lr"], g["weight_decay"]) for g in muon.param_groups] == [(0.05, MUON_WEIGHT_DECAY)]
    assert [(g["lr"], g["weight_decay"]) for g in adamw.param_groups] == [(3e-3, 0.3)]


@NEIGHBOURS
def test_beside_muon_the_means_move_at_a_lower_rate(neighbours):
    """And everything else of AdamW's exactly as at the full rate."""
    model, plain = (make_model(neighbours) for _ in range(2))
    start = copy.deepcopy(model.state_dict())
    _, adamw = make_optimizer(model, FAST).parts
    others = make_optimizer(plain, FAST).parts[1].param_groups[0]["params"]
    full = torch.optim.AdamW(others, FAST.lr, (0.9, 0.95), weight_decay=FAST.weight_decay)
    for net, optimizer in ((model, adamw), (plain, full)):
        generator = torch.Generator().manual_seed(2)
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    means = slice(2, 4)  # of 2 components
    for name, moved in model.state_dict().items():
        expected = plain.state_dict()[name]
        if name.startswith("predictor."):
            first = start[name]
            assert not torch.equal(expected[means], first[means])
            expected = expected.clone()
            expected[means] = first[means] + MEAN_RATE * (expected[means] - first[means])
        torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(8, 8), (32, 8), (8, 32)])
@pytest.mark.parametrize(("instructions", "error"), [(True, 3e-3), (False, 1e-6)])
def test_muon_multiplies_in_float32_without_bfloat16_instructions(
    shape, instructions, error, monkeypatch
):
    """Emulated bfloat16 made a step of the paper's model take 21 s."""
    monkeypatch.setattr(optimizers, "has_bfloat16", lambda device: instructions)
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape))
    weight.grad = torch.randn(shape)
    before, gradient = weight.detach().clone(), weight.grad.clone()
    Muon([weight], 0.02, 0.0).step()
    update = (before - weight.detach()) / 0.02 / max(1, shape[0] / shape[1]) ** 0.5
    difference = (update - orthogonalised(gradient)).norm() / update.norm()
    assert error / 10 < difference < 10 * error
    assert torch.equal(weight.grad, gradient)


def orthogonalised(gradient):
    """Five Newton-Schulz iterations with Muon's coefficients, through the singular values, in
    float64."""
    u, s, v = torch.linalg.svd(gradient.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ v


@pytest.mark.parametrize("name", ["radam", "adam"])
def test_the_others_have_all_parameters_and_decoupled_decay(name):
    model = make_model()
    settings = Settings(optimizer=name, lr=3e-3, weight_decay=0.3)
    optimizer = make_optimizer(model, settings)
    (group,) = optimizer.param_groups
    assert group["params"] == list(model.parameters())
    assert (group["lr"], group["weight_decay"]) == (3e-3, 0.3)
    assert group["decoupled_weight_decay"]


@pytest.mark.parametrize("name", ["radam", "adam", "muon"])
def test_rates_follow_the_factor(name):
    settings = Settings(optimizer=name, lr=0.25, muon_lr=0.5)
    optimizer = make_optimizer(make_model(), settings)
    for factor in (0.5, 0.125):  # of the settings' rates, not of the last ones
        rates = {"lr": 0.25 * factor} | ({"muon_lr": 0.5 * factor} if name == "muon" else {})
        assert set_rates(optimizer, settings, factor) == rates
        assert sorted(g["lr"] for g in optimizer.param_groups) == sorted(rates.values())


@NEIGHBOURS
def test_a_state_that_is_loaded_goes_on_as_if_it_had_not_been_saved(neighbours):
    """To the bit, in weights and moments; through a state dict of its own and as a checkpoint
    keeps it."""
    whole = make_model(neighbours)
    optimizer = make_optimizer(whole, FAST)
    train(whole, optimizer, range(1, 6))
    weights, state = copy.deepcopy(whole.state_dict()), copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(restoring.optimizer_state(optimizer))
    train(whole, optimizer, range(6, 11))
    for load in (
        lambda other: other.load_state_dict(copy.deepcopy(state)),
        lambda other: restoring.import_optimizer_state(kept, other),
    ):
        model = make_model(neighbours, seed=1)
        model.load_state_dict(weights)
        resumed = make_optimizer(model, FAST)
        load(resumed)
        assert equal(resumed.state_dict()["state"], state["state"])
        train(model, resumed, range(6, 11))
        assert equal(model.state_dict(), whole.state_dict())
        assert equal(resumed.state_dict(), optimizer.state_dict())


def test_without_its_moments_a_run_goes_another_way():
    """Else the test above would say nothing."""
    models = [make_model() for _ in range(2)]
    for model, parts in zip(models, ([range(1, 6)], [range(1, 4), range(4, 6)]), strict=True):
        for part in parts:
            train(model, make_optimizer(model, FAST), part)
    assert not equal(*(model.state_dict() for model in models))


def test_a_state_numbers_the_parameters_through_both_parts():
    """As that of one optimiser of all parameters, which the original's loader and the checks of a
    checkpoint expect."""
    model = make_model()
    optimizer = make_optimizer(model, FAST)
    train(model, optimizer, [1])
    state = optimizer.state_dict()
    names = [name for group in state["param_groups"] for name in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert names == list(range(len(list(model.parameters()))))
    assert state["state"].keys() == set(names)
    for name, parameter in zip(names, parameters, strict=True):
        moments = state["state"][name]
        key = "momentum_buffer" if name < 12 else "exp_avg"
        assert moments[key].shape == parameter.shape


def test_the_groups_are_those_of_the_parts():
    """Setting a rate in `param_groups` sets it for the next step."""
    optimizer = make_optimizer(make_model(), FAST)
    for group in optimizer.param_groups:
        group["lr"] = 0.125
    assert all(g["lr"] == 0.125 for part in optimizer.parts for g in part.param_groups)


def test_both_parts_step_and_forget_gradients():
    calls = []
    parts = [
        SimpleNamespace(step=lambda: calls.append("step"), zero_grad=lambda: calls.append("zero"))
        for _ in range(2)
    ]
    pair = OptimizerPair(*parts)
    pair.zero_grad()
    pair.step()
    assert calls == ["zero", "zero", "step", "step"]


def test_moments_of_another_optimiser_are_refused():
    """Adam's do not become Muon's, nor the reverse."""
    model = make_model()
    adam, muon = (make_optimizer(model, Settings(optimizer=name)) for name in ("adam", "muon"))
    for optimizer in (adam, muon):
        train(model, optimizer, [1], Settings())
    for one, other in ((adam, muon), (muon, adam)):
        state = copy.deepcopy(restoring.optimizer_state(one))
        with pytest.raises((ValueError, KeyError)):
            restoring.import_optimizer_state(state, other)

"""The optimisers: which parameters Muon gets, their rates, and what a step of Muon is."""

import copy

import pytest
import torch
from torch import nn

from engine.optimizers import MUON_WEIGHT_DECAY, InsteadOfBfloat16, Muon, make_optimizer, set_rates
from engine.recipes import Settings
from models import ImageTransformer, ModelConfig

MUON = Settings(optimizer="muon", lr=4e-3)
SIZES = {"n_layers": 2, "n_heads": 2, "d_query": 4, "mixtures": 2, "dropout": 0.1}
NEIGHBOURS = pytest.mark.parametrize("neighbours", [False, True], ids=["plain", "neighbours"])


def make_model(neighbours=True):
    torch.manual_seed(0)
    fields = {"neighbours": True, "width": 6, "channels": 1} if neighbours else {}
    return ImageTransformer(ModelConfig(24, **SIZES, **fields)).train()


@NEIGHBOURS
def test_muon_gets_the_matrices_inside_the_layers(neighbours):
    """Not the embedding, the neighbours' projection or the predictor; every other parameter,
    and none twice, belongs to AdamW."""
    model = make_model(neighbours)
    muon, adamw = make_optimizer(model, MUON).parts
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
    _, adamw = make_optimizer(model, MUON).parts
    others = make_optimizer(plain, MUON).parts[1].param_groups[0]["params"]
    full = torch.optim.AdamW(others, MUON.lr, (0.9, 0.95), weight_decay=MUON.weight_decay)
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
            expected[means] = first[means] + MUON.mean_rate * (expected[means] - first[means])
        torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(8, 8), (32, 8), (8, 32)])
@pytest.mark.parametrize(("precision", "error"), [("bf16", 3e-3), ("fp32", 1e-6)])
def test_muon_multiplies_in_either_precision(shape, precision, error):
    """Regression: emulated bfloat16 made a step of the paper's model take 21 s."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape))
    weight.grad = torch.randn(shape)
    before, gradient = weight.detach().clone(), weight.grad.clone()
    Muon([weight], 0.02, 0.0, precision).step()
    update = (before - weight.detach()) / 0.02 / max(1, shape[0] / shape[1]) ** 0.5
    difference = (update - orthogonalised(gradient)).norm() / update.norm()
    assert error / 10 < difference < 10 * error
    assert torch.equal(weight.grad, gradient)


def test_muon_warns_if_torch_does_not_multiply_in_float32(monkeypatch, capsys):
    """As a later release of torch might, if it converts to bfloat16 in another way."""
    monkeypatch.setattr(InsteadOfBfloat16, "__torch_function__", lambda *_: None)
    monkeypatch.setattr(torch.optim.Muon, "step", lambda self: None)
    muon = Muon([nn.Parameter(torch.randn(4, 4))], 0.02, 0.0, "fp32")
    for _ in range(2):
        muon.step()
    assert capsys.readouterr().err.count("products in bfloat16 with any --precision") == 1


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

"""Checkpoints of the original scripts load here, and ours load there.

The originals are made as those scripts made them: the model from pytorch-fast-transformers, the
optimiser's state as the RAdam class beside those scripts kept it.
"""

import math
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, load, require_library
from torch import nn

from engine.checkpoint import Checkpoint
from engine.optimizers import import_state
from models import ImageTransformer, ModelConfig

pytestmark = pytest.mark.slow
MNIST, CIFAR10, DIGIT = 784, 3072, 64  # bytes of an image
SIZES = {"n_layers": 2, "n_heads": 4, "d_query": 8, "mixtures": 3}


@pytest.fixture(scope="module")
def library():
    """pytorch-fast-transformers. Without it a test is skipped; in CI it fails."""
    require_library()
    from fast_transformers.builders import TransformerEncoderBuilder
    from fast_transformers.masking import TriangularCausalMask

    return SimpleNamespace(build=TransformerEncoderBuilder.from_kwargs, mask=TriangularCausalMask)


def make_config(length, **changes):
    return ModelConfig(length, **{**SIZES, "dropout": 0.0, "attention_dropout": 0.0, **changes})


class OriginalModel(nn.Module):
    """The original's model around a transformer, with its names and its own table of positions."""

    def __init__(self, transformer, config):
        super().__init__()
        half = config.d_model // 2
        self.pos_embedding = nn.Module()
        self.pos_embedding.register_buffer("pe", original_table(config.length - 1, half))
        self.value_embedding = nn.Embedding(256, half)
        self.transformer = transformer
        self.predictor = nn.Linear(config.d_model, 3 * config.mixtures)

    def forward(self, images, mask):
        """(N, L) -> (N, L, 3K)"""
        table = self.pos_embedding.pe[:, : images.shape[1]].expand(len(images), -1, -1)
        x = torch.cat([self.value_embedding(images), table], dim=-1)
        return self.predictor(self.transformer(x, mask))


def original_table(length, size):
    """(1, length, size), all in float32: its late rows differ from ours by some 1e-4."""
    exponents = torch.arange(0, size, 2).float() * (-math.log(10000.0) / size)
    angles = torch.arange(length).float()[:, None] * exponents.exp()
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[None]


def make_original(library, config):
    transformer = library.build(
        attention_type=config.attention_type,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        query_dimensions=config.d_query,
        value_dimensions=config.d_query,
        feed_forward_dimensions=4 * config.d_model,
        dropout=config.dropout,
    ).get()
    return OriginalModel(transformer, config).eval()


def new_state(parameters, names=None):
    """The state dict of the original's optimiser before its first step. Parameters are numbered
    or, by torch before 1.6, named by their address."""
    group = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    group |= {"max_grad_norm": 1.0, "buffer": [[None, None, None] for _ in range(10)]}
    names = list(range(len(parameters))) if names is None else names
    return {"state": {}, "param_groups": [{**group, "params": names}]}


@torch.no_grad()
def original_step(parameters, gradients, state):
    """One step of the original's optimiser, on its state dict: RAdam (Liu et al., 2020,
    algorithm 2) with decoupled decay, for gradients too small to be clipped."""
    group = state["param_groups"][0]
    lr, (beta1, beta2) = group["lr"], group["betas"]
    longest = 2 / (1 - beta2) - 1
    for name, p, gradient in zip(group["params"], parameters, gradients, strict=True):
        empty = {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        moments = state["state"].setdefault(name, empty)
        moments["step"] += 1
        m, v, t = moments["exp_avg"], moments["exp_avg_sq"], moments["step"]
        m.mul_(beta1).add_(gradient, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        p.mul_(1 - lr * group["weight_decay"])
        length = longest - 2 * t * beta2**t / (1 - beta2**t)
        update = m / (1 - beta1**t)
        if length >= 5:
            rectification = (length - 4) * (length - 2) * longest
            rectification /= (longest - 4) * (longest - 2) * length
            update *= math.sqrt(rectification * (1 - beta2**t)) / (v.sqrt() + group["eps"])
        p.sub_(lr * update)


def random_gradients(parameters):
    return [(torch.rand_like(p) - 0.5) / p.numel() for p in parameters]  # norms below 1


@pytest.fixture
def original_file(library, tmp_path):
    """Writes a checkpoint as the original did: file(config) -> (path, model)."""

    def write(config, iteration=3000):
        model = make_original(library, config)
        parameters = list(model.parameters())
        state = new_state(parameters)
        for _ in range(2):
            original_step(parameters, random_gradients(parameters), state)
        path = tmp_path / f"original.{iteration}.pth"
        entries = model.state_dict(), state, iteration
        names = "model_state", "optimizer_state", "iteration"
        torch.save(dict(zip(names, entries, strict=True)), path)
        return path, model

    return write


@torch.no_grad()
@pytest.mark.parametrize("length", [MNIST, CIFAR10], ids=["mnist", "cifar10"])
def test_weights_of_the_original_load_strictly_and_predict_the_same(library, original_file, length):
    path, original = original_file(make_config(length))
    checkpoint = Checkpoint.read(path)
    assert checkpoint.sizes() == {"n_layers": 2, "d_model": 32, "mixtures": 3, "length": length}

    model = ImageTransformer(make_config(length)).eval()
    assert list(model.state_dict()) == list(checkpoint.model_state)
    checkpoint.restore_model(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, original.state_dict()[name]), name
    images = torch.randint(256, (1, length - 1))
    expected = original(images, library.mask(length - 1))
    assert (model(images) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("names", ["numbers", "addresses"])
def test_the_originals_optimiser_continues_in_torchs(names):
    """Torch's RAdam takes over the groups of a state it loads: those of the original have no
    decoupled_weight_decay, so that the decay would silently become coupled."""
    theirs = [nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4))]
    state = new_state(theirs, [140234866534576, 140234866534432] if names == "addresses" else None)
    # The first five steps of RAdam follow another rule than later ones.
    for _ in range(4):
        original_step(theirs, random_gradients(theirs), state)

    ours = [nn.Parameter(p.detach().clone()) for p in theirs]
    optimizer = torch.optim.RAdam(ours, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True)
    groups = [{**group, "params": None} for group in optimizer.param_groups]
    import_state(optimizer, deepcopy(state))
    assert [{**group, "params": None} for group in optimizer.param_groups] == groups
    for _ in range(6):
        gradients = random_gradients(ours)
        for p, gradient in zip(ours, gradients, strict=True):
            p.grad = gradient
        optimizer.step()
        original_step(theirs, gradients, state)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_parameter_that_was_never_trained_has_no_moments():
    """The original's reformer: the projection of its keys, which are its queries."""
    parameters = [nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))]
    state = new_state(parameters)
    original_step(parameters, random_gradients(parameters), state)
    del state["state"][0]
    optimizer = torch.optim.AdamW(parameters)
    import_state(optimizer, state)
    assert [len(optimizer.state[p]) for p in parameters] == [0, 3]


def make_older(config):
    """A model as the original had them before it used the library: torch's own layers."""
    layer = nn.TransformerEncoderLayer(
        config.d_model, config.n_heads, 4 * config.d_model, config.dropout, batch_first=True
    )
    norm = nn.LayerNorm(config.d_model)
    return OriginalModel(nn.TransformerEncoder(layer, config.n_layers, norm), config)


@torch.no_grad()
@pytest.mark.parametrize("table", ["as ours", "longer", "none"])
def test_the_older_layout_predicts_the_same(table):
    """The original overwrote the positions of such a file with its own, whatever they were."""
    config = make_config(DIGIT, attention_type="full")
    older = make_older(config)
    state = older.state_dict()
    if table == "longer":
        state["pos_embedding.pe"] = original_table(5000, config.d_model // 2)
    elif table == "none":
        del state["pos_embedding.pe"]
    model = ImageTransformer(config).eval()
    Checkpoint(state).upgraded().restore_model(model)

    # In training mode (without dropout) torch does not use its fused kernels.
    mask = nn.Transformer.generate_square_subsequent_mask(DIGIT - 1)
    images = torch.randint(256, (2, DIGIT - 1))
    assert (model(images) - older.train()(images, mask)).abs().max() < 1e-5


def test_our_checkpoint_loads_in_the_original(library, succeed):
    """What its loader did: the default torch.load, three entries, the weights by name."""
    train = ["--dataset", "digits", *TINY, "--iterations", 2, "--evaluate_images", 2]
    succeed("main.py", *train, "--save_to", "w.pth")
    data = torch.load("w.pth", map_location="cpu")
    model = ImageTransformer(ModelConfig(**data["config"])).eval()
    model.load_state_dict(data["model_state"])
    original = make_original(library, model.config)
    original.load_state_dict(data["model_state"], strict=True)
    images = torch.randint(256, (1, DIGIT - 1))
    difference = model(images) - original(images, library.mask(DIGIT - 1))
    assert difference.abs().max() < 1e-5
    group = data["optimizer_state"]["param_groups"][0]
    assert len(group["params"]) == len(list(original.parameters()))
    assert data["iteration"] == 2


def test_heads_that_the_tensors_do_not_determine_must_be_given(original_file, call):
    """Four heads of 8 and two of 16 have equal shapes: the original loaded one as the other."""
    path, _ = original_file(make_config(DIGIT))
    for command in (["prediction.py", path], ["main.py", "--continue_from", path]):
        result = call(*command, "--dataset", "digits")
        assert result.status == 2
        assert "--n_heads" in result.err
        assert "--d_query" in result.err


@pytest.mark.parametrize(
    "flags",
    [["--n_layers", 3], ["--mixtures", 10], ["--d_query", 7], ["--n_heads", 2]],
    ids=lambda flags: flags[0],
)
def test_flags_that_contradict_the_tensors_are_refused(original_file, call, flags):
    path, _ = original_file(make_config(DIGIT))
    heads = [] if flags[0] == "--n_heads" else ["--n_heads", 4]
    heads += ["--d_query", 8] if flags[0] == "--n_heads" else []
    result = call("prediction.py", path, "--dataset", "digits", *heads, *flags)
    assert result.status == 2
    assert flags[0] in result.err


@pytest.mark.parametrize("heads", [["--n_heads", 4], ["--d_query", 8]], ids=lambda heads: heads[0])
def test_a_checkpoint_of_the_original_is_sampled(original_file, call, tmp_path, heads):
    path, _ = original_file(make_config(DIGIT))
    output = tmp_path / "grid.png"
    result = call("prediction.py", path, "--dataset", "digits", *heads, "--save_grid", output)
    assert (result.status, output.exists()) == (0, True), result.err


def test_a_checkpoint_of_the_original_is_exported(original_file, call):
    path, _ = original_file(make_config(DIGIT))
    assert call("main.py", "--continue_from", path, "--export", "w.pth").status == 0
    exported = load("w.pth")
    assert exported.keys() == {"model_state", "optimizer_state", "iteration"}
    assert exported["optimizer_state"]["state"] == {}
    result = call("prediction.py", "w.pth", "--dataset", "digits", "--n_heads", 4)
    assert result.status == 0, result.err


def test_training_continues_from_a_checkpoint_of_the_original(original_file, call, tmp_path):
    path, _ = original_file(make_config(DIGIT))
    arguments = ["--dataset", "digits", "--n_heads", 4, "--iterations", 3002, "--batch_size", 2]
    arguments += ["--continue_from", path, "--save_to", tmp_path / "ours.{}.pth"]
    result = call("main.py", *arguments, "--evaluate_images", 2)
    assert result.status == 0, result.err
    saved = load("ours.3002.pth")
    assert saved["config"]["n_heads"] == 4
    assert saved["optimizer_state"]["state"][0]["step"] == 4  # two of the original's, two of ours
    (group,) = saved["optimizer_state"]["param_groups"]
    assert group["decoupled_weight_decay"]
    # Without these the original would load it and fail at its first step.
    (original,) = new_state([])["param_groups"]
    assert original.keys() <= group.keys()
    assert group["buffer"] == original["buffer"]

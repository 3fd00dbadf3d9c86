"""A step whose gradient is not finite changes nothing and names it."""

import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.optimizers import make_optimizer
from engine.recipes import Settings
from engine.training import NegativeLogLikelihood, train_step
from models import ImageTransformer, ModelConfig
from utils import UserError


@pytest.mark.parametrize("name", ["radam", "adam", "muon"])
def test_a_gradient_that_is_not_finite_changes_nothing(name):
    """Neither weights nor moments, and is named: a run that is started again continues as if the
    step had not been tried."""
    model = ImageTransformer(ModelConfig(8, n_layers=1, n_heads=1, d_query=4))
    settings = Settings(optimizer=name)
    optimizer, nll = make_optimizer(model, settings), NegativeLogLikelihood(model)
    images = torch.randint(0, 256, (4, 8), dtype=torch.uint8)
    step = {"seed": 0, "accumulate": 2, "precision": "fp32", "clip_norm": 1}
    train_step(nll, optimizer, images, iteration=1, **step)
    weight = model.transformer.layers[0].linear1.weight
    moments = {p: copy.deepcopy(state) for part in getattr(optimizer, "parts", [optimizer])
               for p, state in part.state.items()}  # fmt: skip
    assert len(moments) == len(list(model.parameters()))
    before = copy.deepcopy(model.state_dict())
    weight.register_hook(lambda gradient: gradient * math.inf)
    message = "iteration 2: the gradient of transformer.layers.0.linear1.weight is not finite"
    with pytest.raises(UserError, match=message):
        train_step(nll, optimizer, images, iteration=2, **step)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for part in getattr(optimizer, "parts", [optimizer]):
        for parameter, state in part.state.items():
            for key, value in state.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(moments[parameter][key]))


def test_a_step_reads_one_value():
    """Regression: it waited for a GPU twice, for the gradient and for the loss."""
    model = ImageTransformer(ModelConfig(8, n_layers=1, n_heads=1, d_query=4))
    images = torch.randint(0, 256, (4, 8), dtype=torch.uint8)
    options = {"seed": 0, "iteration": 1, "accumulate": 2, "precision": "fp32", "clip_norm": 1}
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    with CountReadings() as readings:
        train_step(NegativeLogLikelihood(model), optimizer, images, **options)
    assert readings.count == 1


class CountReadings(TorchDispatchMode):
    """Counts how often Python reads a value of a tensor."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ == "_local_scalar_dense"
        return func(*args, **(kwargs or {}))

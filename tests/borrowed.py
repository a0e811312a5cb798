"""What tests of growing inside other frameworks' loops train, and what they look at in the end."""

import torch
from torch import nn

from torchgrow import Budget, Grower

BUDGET = Budget(params="50%")
X, Y = torch.randn(64, 6, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 3


class KilledError(Exception):
    pass


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))


def same(model: nn.Module, other: nn.Module) -> bool:
    one, two = model.state_dict(), other.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def on_budget(grower: Grower) -> bool:
    assert grower.limits.params is not None
    return grower.finished and 0.8 * grower.limits.params < grower.cost().params <= grower.limits.params

"""What tests of growing inside other frameworks' loops look at in the end."""

import torch
from torch import nn

from torchgrow import Grower


def same(model: nn.Module, other: nn.Module) -> bool:
    one, two = model.state_dict(), other.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def on_budget(grower: Grower) -> bool:
    assert grower.limits.params is not None
    return grower.finished and 0.8 * grower.limits.params < grower.cost().params <= grower.limits.params

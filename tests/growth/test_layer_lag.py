"""Layers come after channels."""

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from growing import view_of
from layered import Residual, batch
from torchgrow import Budget, Grower, Limits, Space, trace
from torchgrow.policies import Default


class TwoStages(nn.Module):
    """A stem and two stages of unequal depth."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.first = nn.Sequential(*(Residual(6, 5) for _ in range(9)))
        self.last = nn.Sequential(*(Residual(6, 5) for _ in range(5)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(self.stem(x)))


@functools.cache
def two_stages() -> Space:
    return trace(TwoStages().double(), batch()[0], depth=True)


@pytest.mark.parametrize("lag", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.8, 0.97, 1.0])
def test_layers_come_after_channels_by_the_lag(lag: float, share: float) -> None:
    """At a share p of every group, stages have p^lag of their layers, the last one half a layer ahead."""
    space = two_stages()
    policy = Default(layer_lag=lag)
    policy.seed(view_of(space, Limits(params=None, flops=None), updates=8))
    drawn = policy.rank < share
    for stage, layers, ahead in (("first", 8, 0.0), ("last", 4, 0.5)):
        units = torch.tensor([block.unit for block in space.blocks if block.stage == stage])
        assert int(drawn[units].sum()) == min(layers, math.floor(share**lag * layers + ahead))
    channels = space.unit_of[("first.0.conv1.weight", 0)]
    assert int(drawn[channels].sum()) == math.floor(share * 5)


@pytest.mark.parametrize("lag", [1.0, 3.0])
def test_a_peak_widens_what_is_there_and_no_layer_comes_for_it_alone(lag: float) -> None:
    """Beyond the budget only channels come, up to the peak, and all layers stay when it falls."""
    method = Default(layer_lag=lag, peak=1.5, hold=0.6, settle=0.2)
    torch.manual_seed(0)
    model = TwoStages().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    settings: dict[str, Any] = {"example_inputs": batch()[0], "budget": Budget(params="45%"), "updates": 20}
    grower = Grower(model, optimizer, depth=True, policy=method, **settings)
    seen = [(sum(grower.depths().values()), grower.cost().params)]
    for _ in range(20):
        grower.update()
        seen.append((sum(grower.depths().values()), grower.cost().params))
    limit = grower.limits.params
    assert limit is not None
    layers = [count for count, _ in seen]
    peak = max(cost for _, cost in seen)
    assert limit < peak <= 1.5 * limit
    assert layers == sorted(layers), "a layer left"
    assert all(count <= layers[-1] for count, _ in seen)
    assert seen[-1][1] <= limit

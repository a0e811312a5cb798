"""A second run with layers: what an earlier one left out is not there, and one block of every stage stays."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchgrow import Budget, BudgetError, Grower, TraceError, shrink_, trace


def staged() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.Sequential(*[Stepping(16, 12) for _ in range(4)]), nn.Linear(16, 3))


class Stepping(nn.Module):
    """A residual block of two linear layers."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.into, self.out_of = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Add a branch."""
        return x + self.out_of(torch.relu(self.into(x)))


@pytest.mark.parametrize("seed", range(3))
def test_every_stage_keeps_a_block_in_a_second_run_too(seed: int) -> None:
    """One that was left out before is not the one that stays; the network grows on in its frame afterwards."""
    torch.manual_seed(seed)
    model, x = staged(), torch.randn(8, 6)

    def train(network: nn.Module, budget: Budget, start: Any) -> Grower:
        optimizer = torch.optim.SGD(network.parameters(), 0.05)
        settings: Any = {
            "depth": True,
            "protect": ["0"],
            "updates": 4,
            "start": start,
            "preset": "shrink:importance=l2",
        }
        grower = Grower(network, optimizer, example_inputs=x, budget=budget, **settings)
        for _ in range(4):
            network(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            grower.update()
        return grower

    first = train(model, Budget(params="55%"), "frame")
    assert first.depths()["1"] < 4
    stays = {name for name, _ in model.named_modules()} - {path for one in first.space.blocks for path in one.modules}
    second = train(model, Budget(params=600), "frame")
    assert "1.0" in stays
    assert all(block.modules != ("1.0",) for block in second.space.blocks)
    with pytest.raises(BudgetError, match=r"what cannot be removed costs"):
        train(model, Budget(params=150), "frame")
    assert second.depths()["1"] >= 1
    on = train(staged(), Budget(params="70%"), model)
    assert on.cost().params <= on.limits.params  # type: ignore[operator]


def test_where_only_the_blocks_that_stay_are_left_no_layer_can_go() -> None:
    model, x = nn.Sequential(nn.Linear(6, 16), nn.Sequential(Stepping(16, 12), Stepping(16, 12))), torch.randn(8, 6)
    space = trace(model, x, depth=True)
    keep = space.everything()
    keep[space.blocks[0].unit] = False
    shrink_(model, space, keep)
    assert trace(model, x, depth=True).blocks == ()
    with pytest.raises(TraceError, match=r"no container of the model holds blocks of one class"):
        trace(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2)), x, depth=True)

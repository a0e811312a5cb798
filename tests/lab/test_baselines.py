"""The uniform network: one factor for every width. What is of a structure from scratch."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchgrow import shrink_, trace
from torchgrow.lab.attention import ViT
from torchgrow.lab.baselines import initialised, uniform_width
from torchgrow.lab.models import ResNet

BUILD = partial(ResNet, depth=8, widths=(4, 8, 16), in_channels=1)


@pytest.mark.parametrize("share", [0.05, 0.36, 0.9])
def test_uniform_twin_is_the_widest_that_fits(share: str) -> None:
    def count(width: float) -> Any:
        return sum(p.numel() for p in BUILD(width).parameters())

    limit = int(count(1.0) * share)
    width = uniform_width(BUILD, limit)
    assert count(width) <= limit
    assert count(width + 1e-6) > limit


def test_uniform_twin_at_the_ends() -> None:
    assert uniform_width(BUILD, 10**9) == 1.0
    smallest = BUILD(uniform_width(BUILD, 1))
    assert smallest.conv1.out_channels == 1


def test_uniform_twin_draws_no_random_numbers() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    uniform_width(BUILD, 1000)
    assert torch.equal(before, torch.get_rng_state())


class Biased(nn.Module):
    """c3(1, 4) - relu - two blocks, x + c3(4, 4)(relu(bn(c3(4, 4)(x)))) - pool - fc; all with biases. Blocks may go."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.bn, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = x + self.b(self.bn(self.a(x)).relu())
            return found

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 2)
        self.blocks = nn.Sequential(self.Block(), self.Block())

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc(self.blocks(self.stem(x).relu()).mean((2, 3)))
        return found


@pytest.mark.parametrize(
    ("build", "shape"),
    [(Biased, (2, 1, 8, 8)), (partial(ViT, size=8, features=16, layers=2, heads=2, head=8, neurons=16), (2, 3, 8, 8))],
)
def test_a_structure_without_a_block_that_has_biases_begins_anew(build: Any, shape: Any) -> None:
    """Nothing is left of the block to draw; PyTorch's layers cannot tell how many inputs such a weight has."""
    model, x = build(), torch.randn(shape)
    space = trace(model, x, depth=True)
    keep = space.everything()
    keep[space.blocks[-1].unit] = False
    shrink_(model, space, keep, store=False)
    expect = model.eval()(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    assert any(parameter.shape == (0,) for parameter in model.parameters())
    found = initialised(model)(x)
    assert found.shape == expect.shape
    assert not any(bool((parameter == 7).any()) for parameter in model.parameters())

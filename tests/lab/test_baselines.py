"""The uniform twin: one factor for every width."""

from functools import partial
from typing import Any

import pytest
import torch

from torchgrow.lab.baselines import uniform_width
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

"""Warm up, stay, decay: by hand, with any optimizer, and as the recipes have it."""

import re
from typing import Any

import pytest
import torch
from torch import nn

import torchgrow
from torchgrow import TorchgrowError


def test_by_hand() -> None:
    factor = torchgrow.warmup_stable_decay(10, warmup=0.2, decay=0.3)
    expected = [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3, 0, 0]
    assert [factor(step) for step in range(12)] == pytest.approx(expected)
    assert [torchgrow.warmup_stable_decay(4, decay=1.0)(step) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_with_any_optimizer(make: Any) -> None:
    optimizer = make(nn.Linear(2, 2).parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, torchgrow.warmup_stable_decay(10))
    seen = []
    for _ in range(10):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx([0.5] * 8 + [0.5 * 2 / 3, 0.5 / 3])
    assert optimizer.param_groups[0]["lr"] == 0


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"steps": 0}, "steps=0 must be a whole number >= 1: the optimizer steps of the whole training"),
        ({"steps": 10, "warmup": 1.0}, "warmup=1.0 must lie in [0, 1) and decay=0.3 above 0"),
        ({"steps": 10, "warmup": 0.5, "decay": 0.6}, "decay=0.6 above 0 and at most at 1 - warmup"),
        ({"steps": 10, "decay": 0.0}, "decay=0.0 above 0"),
    ],
)
def test_what_is_no_schedule_is_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(TorchgrowError, match=re.escape(text)):
        torchgrow.warmup_stable_decay(settings.pop("steps"), **settings)


@pytest.mark.parametrize(("steps", "warmup", "decay"), [(10, 0.9, 0.1), (10, 0.8, 0.2), (3, 0.5, 0.5), (11, 0.5, 0.5)])
def test_shares_that_leave_nothing_between_still_reach_the_full_rate(steps: int, warmup: float, decay: float) -> None:
    factors = [torchgrow.warmup_stable_decay(steps, warmup=warmup, decay=decay)(step) for step in range(steps)]
    assert max(factors) == 1.0

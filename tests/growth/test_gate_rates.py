"""The rate of the indicators follows that of the weights, whatever the schedule."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from literal import OPTIMIZERS, batch, make_pair, train
from oracle import SmallResNet
from torchgrow import Budget, Grower


@pytest.mark.parametrize("early", [True, False])
def test_scheduler(early: bool) -> None:
    """The indicators' rate follows the weights': 0.1 x present / initial rate. The scheduler may come first."""
    made: list[torch.optim.lr_scheduler.LRScheduler] = []

    def make(m: nn.Module) -> torch.optim.Optimizer:
        optimizer = OPTIMIZERS["momentum"](m)
        if early:
            made.append(torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5))
        return optimizer

    pair = make_pair(make)
    if not early:
        both = (pair.grower.optimizer, pair.oracle.optimizer)
        made = [torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5) for optimizer in both]
    for step in range(12):
        rate = 0.5 ** (step // 4)
        assert pair.grower.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * rate)
        train(pair, 1, rate=rate)
        for scheduler in made:
            scheduler.step()
    pair.compare()


def test_warm_up() -> None:
    """A scheduler made before the grower has lowered the rate already; what counts is the rate it started from."""
    made: list[torch.optim.lr_scheduler.LRScheduler] = []

    def make(m: nn.Module) -> torch.optim.Optimizer:
        optimizer = OPTIMIZERS["momentum"](m)
        made.append(torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=9))
        return optimizer

    pair = make_pair(make)
    for step in range(12):
        train(pair, 1, rate=min(1.0, 0.1 + 0.1 * step))
        for scheduler in made:
            scheduler.step()
    pair.compare()


Cycle = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
CYCLES: dict[str, Cycle] = {
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=12),
    "one cycle, peak elsewhere": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, [0.5] * 2, total_steps=12),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.0005, 0.05, step_size_up=5),
    "cyclic, plain momentum": lambda o: torch.optim.lr_scheduler.CyclicLR(
        o, 0.0005, 0.05, step_size_up=5, cycle_momentum=False
    ),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.7**step),
}


@pytest.mark.parametrize("name", CYCLES)
@pytest.mark.parametrize("early", [True, False])
def test_the_indicators_rate_is_the_share_of_the_full_rate_whenever_the_schedule_is_made(
    name: str, early: bool
) -> None:
    """Cyclic schedules begin 25 to 100 times below the rate they lead to, and note that as the initial one."""
    model = SmallResNet().double()
    wide = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": wide}, {"params": rest, "lr": 0.01}]
    optimizer = torch.optim.SGD(groups, 0.05, momentum=0.9)
    schedule = CYCLES[name](optimizer) if early else None
    grower = Grower(model, optimizer, example_inputs=batch(0)[0], budget=Budget(params="50%"), updates=4)
    schedule = schedule or CYCLES[name](optimizer)
    full = 0.5 if name.endswith("elsewhere") else 0.05
    for _ in range(11):
        assert grower.run.state.rate(grower.optimizer) == pytest.approx(optimizer.param_groups[0]["lr"] / full)
        optimizer.step()
        schedule.step()


def test_a_group_with_a_rate_of_its_own_keeps_it_as_the_full_one() -> None:
    """Also under a schedule made before, and where the other groups have the rate the optimizer was made with."""
    model = SmallResNet().double()
    wide = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": wide, "lr": 0.001}, {"params": rest}]
    optimizer = torch.optim.SGD(groups, 0.05)
    torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=9)
    grower = Grower(model, optimizer, example_inputs=batch(0)[0], budget=Budget(params="50%"), updates=4)
    assert grower.run.state.rate(grower.optimizer) == pytest.approx(0.1)


def test_a_rate_that_rises_beyond_the_first_carries_the_indicators_no_further() -> None:
    pair = make_pair(OPTIMIZERS["sgd"])
    group = pair.grower.optimizer.param_groups[0]
    group["lr"] = 5.0
    assert pair.grower.run.state.rate(pair.grower.optimizer) == 1.0
    group["lr"] = 0.5
    assert pair.grower.run.state.rate(pair.grower.optimizer) == pytest.approx(0.1)

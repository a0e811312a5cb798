"""What a grower says: its course, its summary, and a warning where a model looks trained."""

import logging
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgrow import Budget, Grower
from torchgrow.growth.advice import trained
from torchgrow.policies import Default, View

X = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))


def grow(model: nn.Module, **more: Any) -> Grower:
    settings: dict[str, Any] = {"budget": Budget(params="30%"), "updates": 20, **more}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return Grower(model, optimizer, example_inputs=X, **settings)


def fit(model: nn.Module, steps: int) -> torch.optim.Optimizer:
    """Learn the sign of two sums."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(64, 8, generator=generator)
        labels = (x.sum(1) > 0).long() + (x[:, :4].sum(1) > 0).long()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_the_course_is_what_happens() -> None:
    """Seed, peak and end of the course are costs that the run has; it is at its largest and settles when it says."""
    grower = grow(plain(), preset="default:peak=1.5,ramp=0.2,hold=0.5,settle=0.3")
    course, costs = grower.course(), [grower.cost().params]
    for _ in range(20):
        fit(grower.model, 0)
        grower.model(X).square().mean().backward()
        grower.optimizer.step()
        grower.update()
        costs.append(grower.cost().params)
    assert course.seed == costs[0]
    assert course.end == grower.limits.params
    assert course.end >= costs[-1] > 0.9 * course.end
    assert course.peak is not None
    assert course.full_size is not None
    assert course.peak == int(1.5 * course.end) >= max(costs) > 0.9 * course.peak
    assert len(set(costs[course.settled + 1 :])) == 1
    assert max(costs[: course.full_size + 2]) == max(costs)


def test_the_course_of_very_many_updates_is_looked_at_some() -> None:
    """It took as long as there are updates: with one a step, minutes; with data of no length, for ever."""
    settings: dict[str, Any] = {"ramp": 0.2, "peak": 1.5, "hold": 0.5, "settle": 0.3}
    asked = []

    class Counted(Default):
        def planned(self, view: View) -> Tensor:
            asked.append(view.update)
            return super().planned(view)

    grower = grow(plain(), updates=1_000_000, policy=Counted(**settings))
    course, exact = grower.course(), grow(plain(), updates=1000, policy=Default(**settings)).course()
    assert len(asked) < 3000
    assert course.full_size is not None
    assert exact.full_size is not None
    assert abs(course.full_size - 1000 * exact.full_size) <= 1000
    assert (course.seed, course.peak, course.end, course.updates) == (exact.seed, exact.peak, exact.end, 1_000_000)


def test_the_course_in_words() -> None:
    grower = grow(plain(), preset="default:peak=1.5,ramp=0.2,hold=0.5,settle=0.3")
    course, frame = grower.course(), grower.frame_cost.params
    assert course.peak is not None
    seed, peak, end = (f"{100 * cost / frame:.3g} %" for cost in (course.seed, course.peak, course.end))
    assert str(course) == (
        f"from {seed} of the parameters to {end} by way of {peak}, at its largest after 4 of 20 updates, final after 14"
    )
    flops = grow(plain(), budget=Budget(flops="50%"), preset="default:peak=1")
    assert "of the FLOPs to 50 %, at its largest" in str(flops.course())
    assert "on no planned way; the structure is final after" in str(grow(plain(), preset="paper").course())


def test_the_start_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "torchgrow"):
        grower = grow(plain())
    assert caplog.messages == [f"Sequential goes {grower.course()}"]


def test_a_summary_names_what_grows_and_what_stays() -> None:
    grower = grow(plain())
    text = grower.summary()
    assert "budget params <= 30%" in text
    assert f"goes   {grower.course()}" in text
    assert "grows  96 units in 2 groups, 2 of them live" in text
    assert "0: 1 of 64" in text
    assert len(text.splitlines()) <= 24
    assert "after 0 updates" in text


def test_a_grower_shows_where_it_stands() -> None:
    grower = grow(plain())
    now = grower.cost().params
    share = f"{now / grower.frame_cost.params:.2%}"
    assert repr(grower) == f"<Grower of Sequential: params <= 30%, update 0 of 20, {now:,} parameters ({share})>"
    grower.finish()
    assert "finished" in repr(grower)


@pytest.mark.parametrize("seed", range(20))
def test_fresh_networks_do_not_look_trained(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 32, 3),
        nn.Linear(32, 64),
        nn.LSTM(64, 32),
        nn.Linear(32, 9),
    )
    assert trained(model) == ""
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.kaiming_normal_(p)
    assert trained(model) == ""
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.orthogonal_(p)
    assert trained(model) == ""


def test_trained_networks_are_told() -> None:
    """By their weights alone, by batch norm's count, by the optimizer's state."""
    model = plain()
    optimizer = fit(model, 200)
    assert trained(model, [optimizer]) == "its optimizer has stepped"
    assert "weight matrices are far from random ones" in trained(model)
    with pytest.warns(UserWarning, match='Sequential looks trained .*use Grower.*start="frame".*build the model anew'):
        grow(model)
    assert trained(plain(), [torch.optim.Adagrad(plain().parameters())]) == ""  # has state before its first step
    norm = nn.Sequential(nn.BatchNorm1d(4))
    norm(torch.randn(4, 4))
    assert trained(norm) == "0.num_batches_tracked is 1"


def test_what_the_warning_advises_works() -> None:
    """The start that it names is all of the network, without a warning."""
    model = plain()
    fit(model, 200)
    before = model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grower = grow(model, start="frame")
    assert torch.equal(model(X), before)
    assert grower.cost() == grower.frame_cost

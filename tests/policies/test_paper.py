"""The paper's policy: what its reading means, and the same course in fewer steps."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from chains import chain
from growing import view_of
from torchgrow import Limits, TorchgrowError
from torchgrow.policies import Paper, View, kit
from torchgrow.policies.pace import STEPS, UPDATES
from torchgrow.structure.cost import CostModel

SPACE = chain([64, 48, 32], [1, 1, 1, 1], 0)
ALLOWED = Limits(int(0.3 * CostModel(SPACE).cost(SPACE.everything()).params), None)


def course(policy: Paper, updates: int, steps: int, until: int) -> tuple[Tensor, Tensor, View]:
    """Cost over the budget after every update, the last indicators, and the last view. No unit feels any task."""
    view = view_of(SPACE, ALLOWED, updates)
    keep, nothing, found = policy.seed(view), torch.zeros(SPACE.n_units, dtype=torch.float64), []
    policy.applied(view := replace(view, keep=keep))
    for update in range(1, until + 1):
        for _ in range(steps):
            policy.step(replace(view, update=update - 1), nothing)
        view = replace(view, update=update)
        view = replace(view, keep=policy.update(view)[0])
        policy.applied(view)
        found.append(float(view.cost(view.keep)[0] / view.limits[0]))
    return torch.tensor(found), policy.s, view


@cache
def whole(paced: bool = True) -> tuple[Tensor, Tensor]:
    """The first quarter of a run as long as the paper's."""
    return course(Paper(paced=paced), UPDATES, STEPS, UPDATES // 4)[:2]


def test_at_the_papers_schedule_its_constants_are_as_they_are() -> None:
    """Bit for bit: one step is one step."""
    assert torch.equal(whole()[1], whole(paced=False)[1])


@pytest.mark.parametrize("part", [4, 8])
def test_fewer_steps_are_the_same_course(part: int) -> None:
    """Over the same progress the same cost after every one of 40 updates, and then the same indicators.

    Draws are the same numbers, so costs differ only where a probability crossed one in between. Probabilities differ by
    rounding k = 390 / S to whole parts and by momentum's memory of 10 steps out of 390; one unit that comes or goes is
    up to 2 % of the budget here and is answered by lambda, in any direction. Another seed is 10 % apart in the mean;
    a rate of s that is wrong by a fifth makes 0.65 between indicators, whose mean size is 3.
    """
    found, s, _ = course(Paper(), UPDATES, STEPS // part, UPDATES // 4)
    assert (found - whole()[0]).abs().mean() <= 0.02
    assert (s - whole()[1]).abs().mean() <= 0.01


def test_without_pace_they_are_another() -> None:
    """What the test above would see."""
    found = course(Paper(paced=False), UPDATES, STEPS // 8, UPDATES // 4)[0]
    assert (found - whole()[0]).abs().mean() > 0.05


@pytest.mark.parametrize("updates", [20, 40])
def test_fewer_updates_reach_the_budget_as_early(updates: int) -> None:
    """The budget is first met, within a tenth, by a sixteenth of the run or in the first update but one.

    So few draws cannot give the same course: one is an eighth (or a quarter) of the paper's first 20.
    """
    early = max(2, updates // 16)
    assert whole()[0][: UPDATES // 16].max() > 0.9
    assert course(Paper(), updates, 49, early)[0].max() > 0.9
    assert course(Paper(paced=False), updates, 49, early)[0].max() < 0.5


def test_the_first_update_makes_up_for_steps_that_were_not_counted_yet() -> None:
    """In the first one nothing is known of steps yet: what is missing follows at its end, with the same lambda."""
    longer, shorter = (course(Paper(), UPDATES, steps, 1)[1] for steps in (STEPS, 10))
    assert torch.allclose(longer, shorter, atol=1e-9)
    assert not torch.allclose(longer, course(Paper(paced=False), UPDATES, 10, 1)[1], atol=1e-2)


def test_an_update_before_any_step_says_nothing_of_steps() -> None:
    """As where a loop calls update() before it trains: the pace is that of the first update with steps."""
    policy, view = Paper(), view_of(SPACE, ALLOWED, UPDATES)
    policy.applied(view := replace(view, keep=policy.seed(view)))
    for update, steps in enumerate((0, 10, 20), start=1):
        for _ in range(steps):
            policy.step(view, torch.zeros(SPACE.n_units, dtype=torch.float64))
        view = replace(view, update=update)
        policy.applied(view := replace(view, keep=policy.update(view)[0]))
    assert policy.pace == STEPS / 10


@pytest.mark.parametrize("penalised", ["present", "all"])
def test_whose_gates_are_counted(penalised: str) -> None:
    """A unit that is absent stays where it was, but for weight decay, or rises with all the others."""
    policy = Paper(penalised=penalised)
    view = view_of(SPACE, ALLOWED, UPDATES)
    keep = policy.seed(view)
    before = policy.s.clone()
    policy.applied(view := replace(view, keep=keep))
    policy.step(view, torch.zeros_like(policy.s))
    moved = (policy.s - before).abs() > 1e-5
    assert torch.equal(moved, keep if penalised == "present" else torch.ones_like(keep))
    assert bool((policy.s >= before)[moved].all())


@pytest.mark.parametrize("start", [0.5, 1.0])
def test_the_start(start: float) -> None:
    policy = Paper(start=start)
    policy.seed(view_of(SPACE, ALLOWED, UPDATES))
    for pool in kit.pools(SPACE):
        assert torch.allclose(torch.sigmoid(policy.s[pool]), torch.tensor(pool.numel() ** -start, dtype=torch.float64))


def test_no_first_draw_is_expected_beyond_the_budget() -> None:
    """Two updates in all: eighty draws in one would let everything in."""
    policy = Paper()
    view = view_of(SPACE, ALLOWED, 2)
    policy.seed(view)
    size = torch.bincount(SPACE.group_of)
    live = torch.tensor([float(torch.sigmoid(policy.s[SPACE.group_of == g]).sum()) for g in range(SPACE.n_groups)])
    assert bool((live < size - 1).all())
    cost = view.costs.both(live.floor().long().clamp(min=1))[0]
    assert cost <= view.limits[0]


def test_readings_are_checked() -> None:
    with pytest.raises(
        TorchgrowError, match=r"Paper\(penalised='some'\): penalised must be one of \('present', 'all'\)"
    ):
        Paper(penalised="some")
    with pytest.raises(TorchgrowError, match=r"Paper\(start=-1\): start must lie in \[0, 10\]"):
        Paper(start=-1)

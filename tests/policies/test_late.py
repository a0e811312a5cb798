"""Late growth: small until the time has come, then at the budget at once, never more than twice as wide."""

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import layered
from growing import batch, differences, everything, make, run, sgd, train
from torchgrow import Budget, Grower, TorchgrowError, load_checkpoint, save_checkpoint
from torchgrow.policies import Late, named
from torchgrow.structure.cost import CostModel


def stages_grower(policy: Late, updates: int = 10, budget: str = "60%") -> Grower:
    torch.manual_seed(0)
    model = layered.Stages(blocks=4).double()
    x = layered.batch()[0]
    return Grower(
        model, sgd(model), example_inputs=x, budget=Budget(params=budget), updates=updates, policy=policy, depth=True
    )


def trained(grower: Grower) -> list[tuple[dict[str, int], dict[str, int]]]:
    """Widths and depths after every update, the seed first."""
    seen = [(grower.widths(), grower.depths())]
    for step in range(grower.updates):
        x, target = layered.batch(step)
        grower.optimizer.zero_grad()
        F.cross_entropy(grower.model(x), target).backward()
        grower.optimizer.step()
        grower.update()
        seen.append((grower.widths(), grower.depths()))
    return seen


@pytest.mark.parametrize("updates", [2, 5, 10])
@pytest.mark.parametrize("until", [0.0, 0.5, 0.8, 1.0])
def test_it_grows_once_at_its_time_and_at_most_twice_as_wide(until: float, updates: int) -> None:
    grower = make(policy=Late(until=until), updates=updates)
    widths = [grower.widths()]
    for epoch in range(updates):
        train(grower, 2 * epoch)
        grower.update()
        widths.append(grower.widths())
    at = max(1, min(updates - 1, math.ceil(until * updates)))
    assert all(found == widths[0] for found in widths[:at])
    assert all(found == widths[at] for found in widths[at:])
    assert widths[0] != widths[at]
    for name, wide in widths[at].items():
        assert widths[0][name] == math.ceil(wide / 2), name
    costs, limit = CostModel(grower.space), grower.limits.params
    assert limit is not None
    assert grower.cost().params <= limit
    for unit in torch.nonzero(~grower.keep).flatten().tolist():
        more = grower.keep
        more[unit] = True
        assert costs.cost(more).params > limit


@pytest.mark.parametrize(("grow", "factor"), [("layers", 2.0), ("width", 4.0), ("both", 2.0)])
def test_what_grows_is_what_was_asked_for(grow: str, factor: float) -> None:
    seen = trained(stages_grower(Late(grow=grow, factor=factor, layer_lag=1.0)))
    (small, few), (wide, many) = seen[0], seen[-1]
    outside = [name for name in wide if name in ("stem", "stage.0.conv1")]
    assert outside
    for name in outside:
        assert small[name] == (wide[name] if grow == "layers" else math.ceil(wide[name] / factor)), name
    assert few["stage"] == (many["stage"] if grow == "width" else 1)
    assert many["stage"] > 1


@pytest.mark.parametrize("grow", ["width", "both"])
@pytest.mark.parametrize("stop", [2, 5, 7])
def test_a_resumed_run_is_the_unbroken_one(grow: str, stop: int, tmp_path: Any) -> None:
    """Law 4: before, at and after the growth."""
    whole, first, second = (make(policy=Late(grow=grow)) for _ in range(3))
    run(whole)
    run(first, stop)
    save_checkpoint(tmp_path, first)
    load_checkpoint(tmp_path, second)
    for epoch in range(stop, second.updates):
        train(second, 2 * epoch)
        second.update()
    assert not differences(everything(whole, run=False), everything(second, run=False))


def test_ended_early_it_is_at_the_budget_all_the_same() -> None:
    whole, early = make(policy=Late()), make(policy=Late())
    run(whole)
    run(early, 2)
    early.finish()
    assert torch.equal(early.keep, whole.keep)


def test_what_lives_goes_on() -> None:
    """Weights of units that were there before are in the larger network as they were."""
    grower = make(policy=Late(until=0.5), updates=4)
    run(grower, 1)
    train(grower, 2)
    weight = dict(grower.model.named_parameters())["fc1.weight"]
    before, kept = weight.detach().clone(), grower.keep
    grower.update()
    group = grower.space.unit_of["fc1.weight", 0], grower.space.unit_of["fc1.weight", 1]
    rows, columns = (torch.nonzero(kept[units[grower.keep[units]]]).flatten() for units in group)
    assert torch.equal(weight[rows][:, columns], before)
    assert rows.numel() < int(grower.keep[group[0]].sum())


def test_the_course_tells_both_sizes() -> None:
    grower = make(policy=Late(until=0.5))
    planned = [grower.policy.planned(grower.run.view(number)) for number in range(11)]
    sizes = [int(cost[0]) for cost in planned if cost is not None]
    assert sizes[:5] == [grower.cost().params] * 5
    run(grower)
    assert sizes[5:] == [grower.cost().params] * 6


def test_by_name_and_with_settings() -> None:
    assert named("late") == Late() or vars(named("late")) == vars(Late())
    policy = named("late:until=0.8,grow=layers")
    assert isinstance(policy, Late)
    assert (policy.until, policy.grow) == (0.8, "layers")
    with pytest.raises(TorchgrowError, match=re.escape("Late(grow='depth'): grow must be one of")):
        Late(grow="depth")
    with pytest.raises(TorchgrowError, match=re.escape("Late(factor=0.5): factor must lie in [1, ")):
        Late(factor=0.5)


def test_a_run_with_a_start_keeps_it_and_grows_from_it() -> None:
    grower = make(policy=Late())
    start = grower.keep
    torch.manual_seed(0)
    from oracle import SmallResNet

    model = SmallResNet().double()
    again = Grower(
        model,
        sgd(model),
        example_inputs=batch(0)[0],
        budget=Budget(params="50%"),
        updates=4,
        start=start,
        policy=Late(),
    )
    assert torch.equal(again.keep, start)
    run(again)
    assert bool((again.keep | ~start).all())
    assert again.cost().params <= again.limits.params  # type: ignore[operator]


def test_what_would_grow_nothing_is_told() -> None:
    """Layers that are to come late, where none may be left out."""
    with pytest.warns(UserWarning, match=r"Late\(grow='layers', factor=2\) grows nothing here: .*depth=True"):
        grower = make(policy=Late(grow="layers"))
    assert torch.equal(grower.keep, grower.policy.grown)  # type: ignore[attr-defined]

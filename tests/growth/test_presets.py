"""Presets: the seed decides alone, budgets are approached as planned, the paper's formulas to the letter."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from growing import (
    differences,
    indicators_of,
    make,
    run,
    sgd,
    timeless,
    train,
)
from planned import Planned
from torchgrow import (
    Budget,
    Grower,
)
from torchgrow.policies import Default, Paper, kit


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_the_seed_decides(preset: str) -> None:
    first, again, other = (run(make(preset, Budget(params="25%"), seed=seed)) for seed in (0, 0, 1))
    a, b, c = (
        {"history": [timeless(e) for e in g.history], **dict(g.model.state_dict()), "keep": g.keep}
        for g in (first, again, other)
    )
    assert differences(a, b) == []
    assert "/keep" in differences(a, c)


def test_global_random_state_is_not_touched() -> None:
    grower = make()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    grower.update()
    grower.finish()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_generators_of_accelerators_are_not_seeded(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by a proof with random numbers nor by a birth: their states would not come back."""

    def seeded(seed: int) -> None:
        raise AssertionError(f"every accelerator was given the seed {seed}")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded)
    monkeypatch.setattr(torch, "manual_seed", seeded)
    with torch.device(device):
        model = nn.Sequential(
            nn.Linear(5, 8), nn.RReLU(), nn.Dropout(0.5), nn.Linear(8, 8), nn.RReLU(), nn.Linear(8, 3)
        )
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    grower = Grower(model, sgd(model), example_inputs=x, budget=Budget(params="60%"), updates=3)
    for _ in range(3):
        model(x).square().mean().backward()
        grower.optimizer.step()
        grower.update()
    assert sum(event.born for event in grower.history) > 0


@pytest.mark.parametrize(
    "budget", [Budget(params="50%"), Budget(flops="40%"), Budget(params="50%", flops="40%")], ids=str
)
@pytest.mark.parametrize("ramp", [0.0, 0.5, 1.0])
def test_the_plan_is_kept(budget: Budget, ramp: float) -> None:
    """At every update the cost is within a line from the seed's to the budget's."""
    grower = run(make(Planned(ramp=ramp, align=8), budget, updates=10))
    seed = grower.history[0]
    for event in grower.history[1:9]:  # at update T-1 the rest of the budget is filled
        progress = min(1.0, event.update / max(1, round(10 * ramp)))
        for limit, now, start in (
            (grower.limits.params, event.params, seed.params),
            (grower.limits.flops, event.flops, seed.flops),
        ):
            assert limit is None or now <= start + (limit - start) * progress
    assert grower.history[5].params > grower.history[0].params


@pytest.mark.parametrize(
    "budget",
    [Budget(params="30%"), Budget(flops="40%"), Budget(params="50%", flops="20%"), Budget(params="70%")],  # peak: all
    ids=str,
)
@pytest.mark.parametrize("prune", ["alike", "worth"])
@pytest.mark.parametrize("align", [1, 2])
def test_it_grows_beyond_the_budget_and_back_as_planned(budget: Budget, prune: str, align: int) -> None:
    """Never above a line up to the peak, the peak, and a line down to the budget; what leaves is worth least."""
    method = Default(prune=prune, align=align, ramp=0.25, peak=1.8, hold=0.5, settle=0.25)
    grower = make(method, budget, updates=20)
    full = grower.frame_cost
    seed = grower.history[0]
    indicators, space = indicators_of(grower), grower.space
    for number in range(1, 20):
        train(grower, 2 * number)
        before, worth = grower.keep.clone(), indicators.importance.clone()
        event = grower.update()
        gone = before & ~grower.keep
        for group in space.group_of[gone].unique().tolist():
            stayed = before & grower.keep & space.removable & (space.group_of == group)
            if bool(stayed.any()):
                assert worth[gone & (space.group_of == group)].max() <= worth[stayed].min()
        for limit, now, start, most in (
            (grower.limits.params, event.params, seed.params, full.params),
            (grower.limits.flops, event.flops, seed.flops, full.flops),
        ):
            if limit is None:
                continue
            peak = min(1.8 * limit, most)
            up, down = min(1.0, number / 5), min(1.0, max(0.0, (number - 10) / 5))
            assert now <= start + (peak - start) * up
            assert now <= peak + (limit - peak) * down + 1
    costs = [event.params for event in grower.history]
    assert max(costs) == max(costs[5:11]) > costs[-1]
    assert len(set(costs[15:])) == 1


@pytest.mark.parametrize(
    "budget", [Budget(params="50%"), Budget(flops="30%"), Budget(params="50%", flops="20%")], ids=str
)
@pytest.mark.parametrize(("penalised", "start"), [("present", 0.5), ("all", 1.0)])
def test_paper_to_the_letter(budget: Budget, penalised: str, start: float) -> None:
    """Eq 4: lambda = lambda^base (u - u_G). Eq 7: beta = gamma^t_s. q ~ Bernoulli(sigma(beta s)), anew every time."""
    grower = make(policy=Paper(penalised=penalised, start=start, paced=False), budget=budget, updates=12)
    frame = grower.frame_cost
    t = torch.zeros(grower.space.n_units)
    indicators, space = indicators_of(grower), grower.space
    for pool in kit.pools(space):
        at_first = float(torch.sigmoid(indicators.s[pool]).sum())
        assert at_first == pytest.approx(pool.numel() * min(0.5, pool.numel() ** -start))
    for epoch in range(11):
        event = grower.history[-1]
        gaps = []
        if grower.limits.params is not None:
            gaps.append((1 - grower.limits.params / frame.params) - (1 - event.params / frame.params))
        if grower.limits.flops is not None:
            gaps.append((1 - grower.limits.flops / frame.flops) - (1 - event.flops / frame.flops))
        assert event.pressure == pytest.approx(0.5 * max(gaps), rel=1e-12)
        counted = grower.keep if penalised == "present" else torch.ones_like(grower.keep)
        policy: Any = grower.policy
        assert torch.equal(policy.penalty, event.pressure * counted.double())
        train(grower, 2 * epoch)
        expected = torch.sigmoid(100 ** (t / 12) * indicators.s)
        twin = torch.Generator()
        twin.set_state(grower.run.state.generator.get_state())
        q = (torch.rand(space.n_units, generator=twin, dtype=torch.float64) < expected) | ~space.removable
        grower.update()
        if epoch < 10:  # then it is brought to the budget
            for group in range(space.n_groups):
                units = torch.nonzero(space.group_of == group).flatten()
                if not q[units].any():
                    q[units[expected[units].argmax()]] = True
            assert torch.equal(grower.keep, q)
        t += grower.keep
        torch.testing.assert_close(indicators.beta, 100 ** (t.double() / 12), rtol=1e-12, atol=0)
        torch.testing.assert_close(indicators.gate[space.removable], gates(indicators.s, t)[space.removable])
        means = {n: float(indicators.beta[space.group_of == g].mean()) for g, n in enumerate(space.group_names)}
        assert grower.history[-1].temperature == pytest.approx(means)


def gates(s: Tensor, t: Tensor) -> Tensor:
    return torch.sigmoid(100 ** (t.double() / 12) * s)


def test_history_says_what_happened() -> None:
    grower = run(make("paper", updates=12))
    seen = torch.zeros(grower.space.n_units, dtype=torch.bool)
    assert grower.history[0].born == len(grower.history[0].widths)
    assert grower.history[0].widths == dict.fromkeys(grower.full_widths(), 1)
    assert grower.full_widths() == {"conv1": 6, "conv2": 5, "conv4": 8, "fc1": 7}
    total = 0
    for event in grower.history:
        total += event.born + event.regrown - event.detached
        assert sum(event.widths.values()) == total
        assert event.seconds > 0
    assert grower.widths() == grower.history[-1].widths
    assert seen.numel() == 26

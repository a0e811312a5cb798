"""Every option of the method beside the literal form of what it names (Eq 6, 7, Table 5, A.10)."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chains import chain
from growing import (
    batch,
    begun_as,
    indicators_of,
    run,
    same_indicators,
    same_parameters,
    sgd,
    step_both,
    view_of,
)
from oracle import Eq6, SmallResNet
from torchgrow import Budget, Grower, TorchgrowError, trace
from torchgrow.policies import Paper, Policy, Random
from torchgrow.structure.budget import fit
from torchgrow.structure.cost import CostModel
from torchgrow.structure.limits import Limits

WARM = Paper(lambda_base=1.0, final_inverse_temperature=50.0, penalised="all", paced=False)
"""One step of it is one step of Eq 6, with one lambda for all units."""


class Variant(Eq6):
    """Eq 6 with the relaxation of 3.2 that the method names."""

    generator: torch.Generator
    noise: Tensor

    def relaxed(self) -> Tensor:
        if self.method.relaxation == "sigmoid":
            return super().relaxed()
        tau = 1 / self.beta  # falls, as the Gumbel-softmax form wants
        noise = self.noise if hasattr(self, "noise") else torch.zeros(2, self.space.n_units, dtype=torch.float64)
        absent, present = torch.exp((torch.stack([torch.zeros_like(self.s), self.s]) + noise) / tau)
        return present / (absent + present)

    def zero_grad(self) -> None:
        if self.method.relaxation == "gumbel":
            uniform = torch.rand(2, self.space.n_units, generator=self.generator, dtype=torch.float64)
            self.noise = -torch.log(-torch.log(uniform))
        super().zero_grad()

    def update(self, q: Tensor, gamma: float, t: Tensor, shift: float = 0.0) -> None:
        with torch.no_grad():
            self.s += shift
        self.q, self.beta = q.clone(), gamma ** t.double()
        super().zero_grad() if self.method.relaxation == "sigmoid" else Eq6.zero_grad(self)


def pair(method: Paper, updates: int = 20) -> tuple[Grower, Variant]:
    torch.manual_seed(0)
    model = SmallResNet().double()
    frame = copy.deepcopy(model)
    grower = Grower(
        model, sgd(model), example_inputs=batch(0)[0], budget=Budget(params="50%"), updates=updates, policy=method
    )
    indicators = indicators_of(grower)
    begun_as(grower, frame)
    oracle = Variant(frame, sgd(frame), grower.space, method, s=indicators.s, q=grower.keep, beta=indicators.beta)
    oracle.generator = torch.Generator()
    return grower, oracle


def both(grower: Grower, oracle: Variant, epoch: int, steps: int = 3) -> None:
    oracle.generator.set_state(grower.run.state.generator.get_state())
    for step in range(3 * epoch, 3 * epoch + steps):
        x, target = batch(step)
        grower.optimizer.zero_grad()
        live, literal = F.cross_entropy(grower.model(x), target), F.cross_entropy(oracle(x), target)
        policy: Any = grower.policy
        step_both(grower, oracle, live, literal, float(policy.penalty[0]))


@pytest.mark.parametrize("relaxation", ["sigmoid", "gumbel"])
def test_relaxations(relaxation: str) -> None:
    method = replace(WARM, relaxation=relaxation)
    grower, oracle = pair(method)
    for epoch in range(3):
        both(grower, oracle, epoch)
        same_indicators(grower, oracle)
        raw = {**dict(grower.model.named_parameters()), **grower.run.live.raw()}
        same_parameters(grower, oracle, raw, f"in epoch {epoch}")
        grower.update()
        oracle.update(grower.keep, indicators_of(grower).gamma, indicators_of(grower).exponent)


def test_gumbel_noise_is_drawn_at_every_step() -> None:
    grower, oracle = pair(replace(WARM, relaxation="gumbel"))
    seen = set()
    for step in range(4):
        both(grower, oracle, step, steps=1)
        seen.add(round(float(indicators_of(grower).noise[0]), 9))
    assert len(seen) == 4


@pytest.mark.parametrize("temperature", ["unit", "global", "learning_rate"])
def test_temperatures(temperature: str) -> None:
    """Eq 7's counters, one schedule for all, and gamma that decays with the learning rate."""
    grower, _ = pair(replace(WARM, temperature_rises=temperature, final_inverse_temperature=100.0), updates=10)
    schedule = torch.optim.lr_scheduler.MultiStepLR(grower.optimizer, [2, 4], gamma=0.1)
    exponent = torch.zeros(grower.space.n_units, dtype=torch.float64)
    absent = torch.zeros(grower.space.n_units, dtype=torch.bool)
    for epoch in range(6):
        x, target = batch(epoch)
        grower.optimizer.zero_grad()
        F.cross_entropy(grower.model(x), target).backward()
        grower.optimizer.step()
        rate = [1.0, 1.0, 0.1, 0.1, 0.01, 0.01][epoch]
        grower.update()
        schedule.step()
        keep = grower.keep
        absent |= ~keep
        added: dict[str, Any] = {"unit": keep.double(), "global": 1.0, "learning_rate": rate * keep.double()}
        exponent += added[temperature]
        torch.testing.assert_close(indicators_of(grower).beta, 100 ** (exponent / 10), rtol=1e-12, atol=0)
    assert bool(absent.any())
    if temperature != "global":
        assert exponent.unique().numel() > 1


def test_random_draws_all_units_alike_at_the_budget() -> None:
    """Table 5: the same probability for every unit of the space; the budget is kept, by the draw already."""
    space = trace(SmallResNet().double(), batch(0)[0])
    limits = Limits(int(CostModel(space).both(CostModel(space).sizes)[0]) // 2, None)
    drawn = []
    for seed in range(60):
        policy, view = Random(), view_of(space, limits, updates=3, seed=seed)
        keep, exactly = policy.update(replace(view, update=1, keep=policy.seed(view)))
        assert exactly
        assert int(view.cost(keep)[0]) <= limits.tensor()[0]
        drawn.append(keep.double())
    often = torch.stack(drawn).mean(0)[space.removable]
    spread = 4 * (0.25 / 60) ** 0.5  # four standard errors of a share
    assert float(often.max() - often.min()) < 2 * spread
    assert torch.stack(drawn).unique(dim=0).shape[0] > 50


def test_random_draws_do_not_drift() -> None:
    """150 updates of one run: a unit's share of them is p up to the error of the draw, however often it was there."""
    space = chain([12, 12, 12], [4, 4, 4, 4])
    costs, ones = CostModel(space), torch.ones(3, dtype=torch.int64)
    limits = Limits(int(costs.both(costs.sizes)[0]) * 6 // 10, None)
    policy, view, drawn = Random(), view_of(space, limits, updates=200), []
    keep = policy.seed(view)
    for update in range(1, 151):
        view = replace(view, update=update, keep=keep)
        keep, _ = policy.update(view)
        keep = fit(space, costs, keep, policy.score(view), limits.tensor(), ones)
        policy.applied(replace(view, keep=keep))
        drawn.append(keep)
    often = torch.stack(drawn).double().mean(0).reshape(3, 12)
    error = 4 * (0.25 / 150) ** 0.5
    assert float((often - often.mean(1, keepdim=True)).abs().max()) < error


def test_options_are_checked() -> None:
    with pytest.raises(TorchgrowError, match=r"temperature_rises='hot'\): temperature_rises must be one of"):
        Paper(temperature_rises="hot")
    with pytest.raises(TorchgrowError, match=r"relaxation='softmax'\): relaxation must be one of"):
        Paper(relaxation="softmax")


def test_every_variant_ends_within_the_budget() -> None:
    policies: list[Policy] = [
        Paper(temperature_rises="global"),
        Paper(relaxation="gumbel"),
        Paper(temperature_rises="learning_rate", relaxation="gumbel"),
        Random(),
    ]
    for policy in policies:
        torch.manual_seed(0)
        model = SmallResNet().double()
        grower = run(
            Grower(model, sgd(model), example_inputs=batch(0)[0], budget=Budget(flops="40%"), updates=6, policy=policy)
        )
        assert grower.finished
        assert grower.cost().flops <= (grower.limits.flops or 0)

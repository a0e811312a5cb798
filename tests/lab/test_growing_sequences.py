"""The laws on the recipes' own sequence models: Eq 6 under their optimizers, live graphs over updates, the budget."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from growing import begun_as, indicators_of, same_indicators, same_parameters, sgd, step_both
from oracle import Eq6
from planned import Planned
from torchgrow import Budget, Grower, measure
from torchgrow.lab import from_recipe
from torchgrow.lab.attention import GPT, ViT
from torchgrow.lab.recipes import get

PLAN = Planned(ramp=0.5)
RECIPES = {
    "gpt-ptb": lambda: GPT(words=11, features=8, layers=1, heads=3, head=2, neurons=7, context=6, dropout=0.0),
    "vit-cifar10": lambda: ViT(size=8, features=8, layers=1, heads=3, head=2, neurons=7),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = RECIPES[name]().double()
    with torch.no_grad():  # its own beginning is so small that the gates would have no gradient to speak of
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def inputs(name: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if name == "gpt-ptb":
        return torch.randint(11, (2, 6), generator=generator)
    return torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)


def loss(out: Tensor) -> Tensor:
    return (out - torch.arange(out.numel()).reshape(out.shape).sin()).square().mean()


def pair(name: str, optimizer: str, updates: int = 8) -> tuple[Grower, Eq6]:
    """A live network and Eq 6 written out, from the same weights, with the recipe's optimizer or plain SGD."""
    recipe = replace(get(name), lr=0.01)
    made = sgd if optimizer == "sgd" else lambda model: from_recipe.make_optimizer(model, recipe)
    model, frame = build(name), build(name)
    budget = Budget(params="90%")
    grower = Grower(
        model, made(model), example_inputs=inputs(name), budget=budget, updates=updates, policy=PLAN, seed=1
    )
    n = grower.space.n_units
    s, q = indicators_of(grower).s, grower.keep
    begun_as(grower, frame)
    return grower, Eq6(frame, made(frame), grower.space, PLAN, s=s, q=q, beta=torch.ones(n, dtype=torch.float64))


def update_both(grower: Grower, oracle: Eq6, t: Tensor, updates: int = 8) -> int:
    event = grower.update()
    t += grower.keep
    oracle.update(grower.keep, 100 ** (1 / updates), t, event.pressure)
    return event.born + event.regrown + event.detached


@pytest.mark.parametrize("name", RECIPES)
def test_heads_and_neurons_grow_as_eq6_says(name: str) -> None:
    grower, oracle = pair(name, "sgd")
    t, changed = torch.zeros(grower.space.n_units, dtype=torch.int64), 0
    for epoch in range(7):
        for step in range(2):
            x = inputs(name, 2 * epoch + step)
            grower.optimizer.zero_grad()
            step_both(grower, oracle, loss(grower.model(x)), loss(oracle(x)), 0.0)
        same_indicators(grower, oracle)
        changed += update_both(grower, oracle, t)
        raw = {**dict(grower.model.named_parameters()), **grower.run.live.raw()}
        same_parameters(grower, oracle, raw, f"in epoch {epoch}")
    assert changed > 0


@pytest.mark.parametrize("name", RECIPES)
def test_adamw_warm_up_and_weight_decay_see_raw_weights(name: str) -> None:
    """Two updates first, then steps of AdamW at rates that rise and fall, as of Eq 6 written out."""
    grower, oracle = pair(name, "adamw")
    t = torch.zeros(grower.space.n_units, dtype=torch.int64)
    assert update_both(grower, oracle, t) + update_both(grower, oracle, t) > 0
    recipe = replace(get(name), lr=0.01, epochs=2)
    schedules = [from_recipe.make_schedule(optimizer, recipe, 5) for optimizer in (grower.optimizer, oracle.optimizer)]
    for step in range(10):
        x = inputs(name, step)
        grower.optimizer.zero_grad()
        rate = grower.optimizer.param_groups[0]["lr"] / 0.01
        live, literal = loss(grower.model(x)), loss(oracle(x))
        assert abs(live.item() - literal.item()) <= 1e-9
        live.backward()
        literal.backward()
        grower.optimizer.step()
        oracle.step(0.0, rate)
        for schedule in schedules:
            schedule.step()
    same_indicators(grower, oracle)
    raw = {**dict(grower.model.named_parameters()), **grower.run.live.raw()}
    same_parameters(grower, oracle, raw, "after ten steps")


@pytest.mark.parametrize("name", RECIPES)
def test_a_live_loss_over_an_update(name: str) -> None:
    """Law 11: the next gradients are those of a copy that no graph was alive on; the old graph refuses its own."""
    grower, _ = pair(name, "adamw")
    grower.update()
    alive = loss(grower.model(inputs(name, 1)))
    grower.update()
    twin = copy.deepcopy(grower.model)
    for model in (grower.model, twin):
        loss(model(inputs(name, 2))).backward()
    for a, b in zip(grower.model.parameters(), twin.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        alive.backward()


@pytest.mark.parametrize("name", RECIPES)
def test_from_one_head_and_one_neuron_to_the_budget(name: str) -> None:
    grower, _ = pair(name, "adamw")
    assert set(grower.widths().values()) == {1}
    for step in range(8):
        loss(grower.model(inputs(name, step))).backward()
        grower.optimizer.step()
        grower.optimizer.zero_grad()
        grower.update()
    assert grower.finished
    assert measure(grower.model, inputs(name)) == grower.cost()
    assert 0.85 * grower.frame_cost.params < grower.cost().params <= (grower.limits.params or 0)
    assert max(grower.widths().values()) > 1

"""Optimizer slots through growth: what is a copy, a direction or a magnitude, and how those of newborn units begin."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lookalikes import SERVED, Make, SlowWeights
from torchgrow import Bank, Space, trace
from torchgrow.structure.optimizer_slots import Layout

LR = 1e-3
TORCH: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, LR, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, LR, amsgrad=True, maximize=True),
    "adam single": lambda p: torch.optim.Adam(p, LR, foreach=False),
    "adamw fused": lambda p: torch.optim.AdamW(p, LR, weight_decay=0, fused=True),
    "adamax": lambda p: torch.optim.Adamax(p, LR),
    "nadam": lambda p: torch.optim.NAdam(p, LR),
    "radam": lambda p: torch.optim.RAdam(p, LR),
    "rmsprop": lambda p: torch.optim.RMSprop(p, LR, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, LR),
    "adagrad": lambda p: torch.optim.Adagrad(p, LR, initial_accumulator_value=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, LR),
    "asgd": lambda p: torch.optim.ASGD(p, LR, lambd=0, t0=3),
}
KINDS: dict[str, dict[str, str]] = {
    "sgd": {"momentum_buffer": "direction"},
    "adam": {"exp_avg": "direction", "exp_avg_sq": "magnitude", "max_exp_avg_sq": "magnitude"},
    "adamax": {"exp_avg": "direction", "exp_inf": "magnitude"},
    "rmsprop": {"square_avg": "magnitude", "momentum_buffer": "direction", "grad_avg": "direction"},
    "rprop": {"prev": "direction", "step_size": "magnitude"},
    "adagrad": {"sum": "magnitude"},
    "adadelta": {"square_avg": "magnitude", "acc_delta": "magnitude"},
    "asgd": {"ax": "copy"},
    "schedule-free": {"z": "copy"},
    "madgrad": {"grad_sum_sq": "magnitude", "s": "direction", "x0": "copy"},
    "slow weights": {"momentum": "direction", "slow": "copy"},
    "prodigy": {"p0": "copy", "s": "direction", "exp_avg_sq": "magnitude"},
    "gains": {"gain": "magnitude", "last": "direction"},
}
ALL = {**TORCH, **SERVED}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 2))


def made(make: Make, model: nn.Module) -> torch.optim.Optimizer:
    optimizer = make(model.parameters())
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, size: float, steps: int = 1) -> None:
    """With random gradients of both signs."""
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p) * size
        optimizer.step()
    optimizer.zero_grad()


def some(space: Space, *positions: int) -> Tensor:
    """The units at these positions of every group."""
    keep = ~space.removable
    for group in range(space.n_groups):
        keep[torch.nonzero(space.group_of == group).flatten()[list(positions)]] = True
    return keep


@pytest.mark.parametrize("name", KINDS)
def test_kinds_are_told_by_what_the_slots_follow(name: str) -> None:
    model = network()
    layout = Layout(ALL[name](model.parameters()))
    for p in model.parameters():
        known = layout.known(p, p.dim())
        assert {key: slot.kind for key, slot in known.items() if slot.kind != "number"} == KINDS[name]


@pytest.mark.parametrize("name", ALL)
def test_with_gradients_of_zero_nothing_newborn_moves(name: str) -> None:
    model = network()
    space = trace(model, torch.randn(2, 3))
    optimizer = made(ALL[name], model)
    bank = Bank(model, space, optimizer)
    bank.resize_(some(space, 0, 1, 2))
    step(model, optimizer, 0.01, 8)
    bank.resize_(some(space, 0, 1, 2, 3))
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    step(model, optimizer, 0.0, 7)
    for key, axis in [("0.weight", 0), ("0.bias", 0), ("2.weight", 0), ("2.weight", 1), ("2.bias", 0), ("4.weight", 1)]:
        moved = (model.get_parameter(key).detach() - before[key]).abs()
        assert float(moved.select(axis, 3).max()) < 1e-6, key


@pytest.mark.parametrize("name", ALL)
def test_what_never_lived_together_begins_as_newborn(name: str) -> None:
    """Units 0 trained, then 1 in their place: the weights from a unit 0 to a unit 1 have never had a slot."""
    model = network()
    space = trace(model, torch.randn(2, 3))
    optimizer = made(ALL[name], model)
    bank = Bank(model, space, optimizer)
    for live in ((0,), (1,)):
        bank.resize_(some(space, *live))
        step(model, optimizer, 0.01, 8)
    bank.resize_(some(space, 0, 1))
    weight = model.get_parameter("2.weight")
    before = weight.detach().clone()
    step(model, optimizer, 0.0, 7)
    moved = (weight.detach() - before).abs()
    assert float(moved[0, 1]) < 1e-6
    assert float(moved[1, 0]) < 1e-6
    bank.resize_(some(space, 0, 1, 2))
    before = weight.detach().clone()
    step(model, optimizer, 0.01)
    limit = {"adadelta": 1.0, "madgrad": 0.1, "prodigy": 1e-2}.get(name, 8 * LR)
    assert float((weight.detach() - before).abs().max()) <= limit


@pytest.mark.parametrize("name", ALL)
def test_slots_come_back_as_they_left(name: str) -> None:
    model = network()
    space = trace(model, torch.randn(2, 3))
    optimizer = made(ALL[name], model)
    step(model, optimizer, 0.01, 8)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    bank = Bank(model, space, optimizer)
    bank.resize_(some(space, 0, 4))
    bank.restore_()
    after = optimizer.state_dict()["state"]
    for index, slots in before.items():
        for key, slot in slots.items():
            assert not isinstance(slot, Tensor) or torch.equal(slot, after[index][key]), key


def test_a_step_count_in_a_vector_of_one_stays_one_beside_a_bias_of_one() -> None:
    """Its shape is that of the bias of a layer of one unit, which grows."""

    class Counted(SlowWeights):
        def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
            state["count"] = state.get("count", torch.zeros(1)) + 1
            super().move(p, g, state, group)

    model = network()
    space = trace(model, torch.randn(2, 3))
    optimizer = Counted(model.parameters())
    bank = Bank(model, space, optimizer)
    bank.resize_(some(space, 0))
    step(model, optimizer, 0.01, 3)
    bank.restore_()
    assert all(torch.equal(state["count"], torch.tensor([3.0])) for state in optimizer.state.values())
    step(model, optimizer, 0.01)


def test_a_group_added_later_and_a_setting_changed_later_are_tried_out_then() -> None:
    model = network()
    space = trace(model, torch.randn(2, 3))
    optimizer = torch.optim.SGD(model[0].parameters(), LR)
    bank = Bank(model, space, optimizer)
    bank.resize_(some(space, 0, 1))
    optimizer.add_param_group({"params": list(model[2].parameters()), "momentum": 0.5})
    optimizer.param_groups[0]["momentum"] = 0.9
    step(model, optimizer, 0.01, 3)
    for p in (model.get_parameter("0.weight"), model.get_parameter("2.weight")):
        optimizer.state[p]["momentum_buffer"].abs_()
    bank.resize_(some(space, 0, 1, 2))
    for p in (model.get_parameter("0.weight"), model.get_parameter("2.weight")):
        assert not bool(optimizer.state[p]["momentum_buffer"][2].any())
        assert bool(optimizer.state[p]["momentum_buffer"][:2, :2].all())

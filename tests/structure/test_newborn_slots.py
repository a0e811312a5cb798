"""Optimizer slots of newborn units: second moments of the living, no direction, and step counts that belong to them."""

import copy

import pytest
import torch
from torch import Tensor, nn

import zoo
from cutting import OPTIMIZERS, half, step
from torchgrow import shrink_, trace


def test_newborn_second_moments_are_the_mean_of_the_living_and_directions_are_zero() -> None:
    model, example = zoo.build("residual"), zoo.inputs("residual")
    space = zoo.space("residual")
    optimizer = OPTIMIZERS["adam"](model.parameters())
    bank = shrink_(model, space, half(space), optimizer)
    step(model, optimizer, example)
    live = {n: {k: s.clone() for k, s in optimizer.state[p].items() if s.dim()} for n, p in model.named_parameters()}
    old, axis0 = bank.keep, space.unit_of["a.weight", 0]
    bank.restore_()
    born, lived = torch.nonzero(~old[axis0]).flatten(), torch.nonzero(old[axis0]).flatten()
    state = optimizer.state[model.a.weight]
    for key in ("exp_avg_sq", "max_exp_avg_sq"):
        mean = live["a.weight"][key].mean()
        assert mean > 0
        torch.testing.assert_close(state[key][born], mean.expand_as(state[key][born]), rtol=1e-6, atol=0)
        live_columns = torch.nonzero(old[space.unit_of["a.weight", 1]]).flatten()
        assert torch.equal(state[key][lived][:, live_columns], live["a.weight"][key])
    assert not bool(state["exp_avg"][born].any())
    bank.resize_(old)  # they have slots of their own now: stored and back, nothing is filled in again
    state["exp_avg_sq"].mul_(3)
    bank.restore_()
    mean = live["a.weight"]["exp_avg_sq"].mean()
    torch.testing.assert_close(state["exp_avg_sq"][born], mean.expand(len(born), 6, 3, 3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["adam", "adamw", "adam-fused"])
def test_a_tensor_that_is_nearly_all_newborn_learns_as_with_a_new_optimizer(kind: str) -> None:
    """Second moments of the one unit there was would hold the others back; tensors that hardly grow keep theirs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(5, 3)
    space = trace(model, x)
    first, second = (torch.nonzero(space.group_of == group).flatten() for group in range(2))
    keep = space.everything()
    keep[first[1:]] = keep[second[6:]] = False
    optimizer = OPTIMIZERS[kind](model.parameters())
    bank = shrink_(model, space, keep, optimizer)
    step(model, optimizer, x, steps=5)
    bank.restore_()
    fresh = copy.deepcopy(model)
    anew = OPTIMIZERS[kind](fresh.parameters())
    for seed in range(3):
        for network, its in ((model, optimizer), (fresh, anew)):
            torch.manual_seed(seed)
            its.zero_grad()
            for p in network.parameters():
                p.grad = torch.randn_like(p)
            its.step()
    alike = {n for (n, p), q in zip(model.named_parameters(), fresh.parameters(), strict=True) if torch.equal(p, q)}
    assert alike == {"0.weight", "0.bias", "2.weight"}


def test_a_tensor_whose_trained_units_are_stored_keeps_the_step_count_that_their_slots_belong_to() -> None:
    """Else they would come back with second moments of a thousand steps, taken for those of none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 2))
    x = torch.randn(5, 3)
    space = trace(model, x)
    hidden = torch.nonzero(space.group_of == 0).flatten()

    def keep(*live: int) -> Tensor:
        chosen = space.everything()
        chosen[hidden] = False
        chosen[hidden[list(live)]] = True
        return chosen

    optimizer = OPTIMIZERS["adam"](model.parameters())
    bank = shrink_(model, space, keep(0, 1), optimizer)
    step(model, optimizer, x, steps=6)
    for live in (keep(0), keep(0, *range(2, 32)), space.everything()):
        bank.resize_(live)
        assert float(optimizer.state[model.get_parameter("0.weight")]["step"]) == 6


@pytest.mark.parametrize("kind", ["momentum", "rmsprop", "rprop", "adagrad"])
def test_what_no_step_count_corrects_does_not_begin_anew(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 2))
    x = torch.randn(5, 3)
    space = trace(model, x)
    keep = space.everything()
    keep[torch.nonzero(space.group_of == 0).flatten()[1:]] = False
    optimizer = OPTIMIZERS[kind](model.parameters())
    bank = shrink_(model, space, keep, optimizer)
    step(model, optimizer, x, steps=5)
    weight = model.get_parameter("0.weight")
    before = {k: v.clone() for k, v in optimizer.state[weight].items() if isinstance(v, Tensor)}
    assert before
    bank.restore_()
    for key, slot in before.items():
        assert torch.equal(optimizer.state[weight][key][:1] if slot.dim() else optimizer.state[weight][key], slot), key


def test_momentum_that_happens_to_be_positive_is_no_magnitude() -> None:
    model, example = zoo.build("plain"), zoo.inputs("plain")
    space = zoo.space("plain")
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    bank = shrink_(model, space, half(space), optimizer)
    step(model, optimizer, example)
    optimizer.state[model.bn.weight]["momentum_buffer"].abs_()
    born = ~bank.keep[space.unit_of["bn.weight", 0]]
    bank.restore_()
    assert not bool(optimizer.state[model.bn.weight]["momentum_buffer"][born].any())

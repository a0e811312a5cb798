"""A grower that is no longer heard of says so: other optimizers, none at all, copies of the grower itself."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchgrow import Budget, Grower, OptimizerError, TorchgrowError, TrainingError

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
Optimizers = Callable[[nn.Module], Any]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))


def grown(preset: str = "default", optimizers: Optimizers | None = None, updates: int = 6) -> Grower:
    model = network()
    optimizer = optimizers(model) if optimizers else torch.optim.SGD(model.parameters(), 0.05)
    budget = Budget(params="50%")
    return Grower(model, optimizer, example_inputs=X[:2], budget=budget, updates=updates, preset=preset)


def two(model: nn.Module) -> list[torch.optim.Optimizer]:
    parameters = list(model.parameters())
    return [torch.optim.SGD(parameters[:2], 0.05), torch.optim.Adam(parameters[2:], 0.01)]


def train(grower: Grower, *optimizers: torch.optim.Optimizer) -> None:
    grower.model.zero_grad()
    grower.model(X).square().mean().backward()
    for optimizer in optimizers or grower.optimizers:
        optimizer.step()


def weights(grower: Grower) -> list[Tensor]:
    return [p.detach().clone() for p in grower.model.parameters()]


@pytest.mark.parametrize("preset", ["default", "paper", "random"])
@pytest.mark.parametrize("end", ["update", "finish"])
def test_a_new_optimizer_in_the_middle_of_a_run(preset: str, end: str) -> None:
    """Refused with nothing changed; once the given one steps again, the run goes on."""
    grower = grown(preset)
    train(grower)
    grower.update()
    train(grower, torch.optim.Adam(grower.model.parameters(), 0.01))
    before = weights(grower)
    with pytest.raises(TrainingError, match=r"0\.weight, .* changed .* the SGD that Grower was given took no step"):
        getattr(grower, end)()
    assert all(map(torch.equal, before, weights(grower)))
    assert len(grower.history) == 2
    train(grower)
    grower.update()
    assert len(grower.history) == 3


@pytest.mark.parametrize("preset", ["default", "late", "random"])
@pytest.mark.parametrize("end", ["update", "finish"])
@pytest.mark.parametrize("ago", [0, 2])
def test_the_best_weights_come_back_before_the_run_ends(preset: str, end: str, ago: int) -> None:
    """Early stopping: update(), load the best state dict (of this structure, or an earlier one), no step, the end."""
    grower, states = grown(preset), []
    for _ in range(4):
        train(grower)
        grower.update()
        states.append(copy.deepcopy(grower.model.state_dict()))
    train(grower)
    if ago:
        grower.update()
    grower.model.load_state_dict(states[-1 - ago])
    getattr(grower, end)()
    train(grower, torch.optim.Adam(grower.model.parameters(), 0.01))
    if not grower.finished:
        with pytest.raises(TrainingError, match=r"such as the best ones, come in by model\.load_state_dict"):
            grower.update()


def test_a_state_that_a_follower_loads_hides_no_other_optimizer() -> None:
    grower = grown()
    average = copy.deepcopy(grower.model)
    grower.follow(average)
    train(grower)
    grower.update()
    train(grower, torch.optim.Adam(grower.model.parameters(), 0.01))
    average.load_state_dict(average.state_dict())
    copy.deepcopy(grower.model).load_state_dict(grower.model.state_dict())
    with pytest.raises(TrainingError, match=r"the SGD that Grower was given took no step"):
        grower.update()


def by_hand(grower: Grower) -> None:
    with torch.no_grad():
        for parameter in grower.model.parameters():
            assert parameter.grad is not None
            parameter.sub_(0.1 * parameter.grad)


def through_data(grower: Grower) -> None:
    for parameter in grower.model.parameters():
        parameter.data.mul_(0.9)


def only_the_head(grower: Grower) -> None:
    torch.optim.SGD(grower.model[4].parameters(), 0.1).step()  # type: ignore[index]


@pytest.mark.parametrize("move", [by_hand, through_data, only_the_head])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_weights_that_something_else_moves(preset: str, move: Callable[[Grower], None]) -> None:
    grower = grown(preset)
    grower.model(X).square().mean().backward()
    move(grower)
    with pytest.raises(TrainingError, match=r"another optimizer trains the network, .* Go on with the one"):
        grower.update()


def test_one_of_two_optimizers_is_exchanged() -> None:
    grower = grown("paper", two)
    train(grower, grower.optimizers[0], torch.optim.SGD(list(grower.model.parameters())[2:], 0.05))
    with pytest.raises(TrainingError, match=r"2\.weight, .* the Adam \(number 1 of the list\) that Grower"):
        grower.update()


def test_a_parameter_that_no_given_optimizer_holds() -> None:
    with pytest.raises(OptimizerError, match=r"4\.weight can be cut and requires grad, but no optimizer .* \[first"):
        grown(optimizers=lambda m: torch.optim.Adam(m[:4].parameters()))  # type: ignore[index]
    model = network()
    model[4].requires_grad_(False)
    optimizer = torch.optim.Adam(model[:4].parameters())
    grower = Grower(model, optimizer, example_inputs=X[:2], budget=Budget(params="50%"), updates=3)
    train(grower)
    grower.update()
    model[4].requires_grad_(True)  # unfrozen, and trained by another one
    train(grower, optimizer, torch.optim.Adam(model[4].parameters()))
    with pytest.raises(TrainingError, match=r"4\.weight changed .* no optimizer given to Grower holds it"):
        grower.update()


def test_an_unfrozen_parameter_that_joins_the_given_optimizer() -> None:
    model = network()
    model[4].requires_grad_(False)
    optimizer = torch.optim.Adam(model[:4].parameters())
    grower = Grower(model, optimizer, example_inputs=X[:2], budget=Budget(params="50%"), updates=3)
    for epoch in range(3):
        if epoch == 1:
            model[4].requires_grad_(True)
            optimizer.add_param_group({"params": list(model[4].parameters())})
        train(grower)
        grower.update()
    assert grower.finished


def test_an_update_after_no_step_at_all_is_told() -> None:
    grower = grown()
    elsewhere = copy.deepcopy(grower.model)
    elsewhere(X).square().mean().backward()
    torch.optim.SGD(elsewhere.parameters(), 0.1).step()
    with pytest.warns(UserWarning, match=r"no optimizer that Grower was given took a step .* a copy of the network"):
        grower.update()
    with pytest.warns(UserWarning, match=r"Where a GradScaler skipped every step"):
        grower.update()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(grower)
        grower.update()
        grower.finish()  # asked for when nothing more is to come


def test_indicators_that_wait_in_vain() -> None:
    grower = grown("paper", two)
    train(grower, grower.optimizers[0])
    with pytest.warns(UserWarning, match=r"indicators did not move .* wait for a step of Adam \(number 1\)"):
        grower.update()


def test_what_was_counted_survives_a_resume() -> None:
    grower, other = grown("paper", two), grown("paper", two)
    train(grower)
    other.load_state_dict(grower.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.update()
    other.load_state_dict(grower.state_dict())
    train(other, torch.optim.SGD(other.model.parameters(), 0.1))
    other.update()  # the given ones stepped in this time as well
    assert len(other.history) == len(grower.history) + 1


@pytest.mark.parametrize("act", [copy.copy, copy.deepcopy, pickle.dumps], ids=["copy", "deepcopy", "pickle"])
def test_a_grower_is_neither_copied_nor_pickled(act: Callable[[Any], Any]) -> None:
    grower = grown()
    with pytest.raises(TorchgrowError, match=r"cannot be copied or pickled: .*save_checkpoint\(folder, grower\)"):
        act({"run": grower} if act is not copy.copy else grower)
    copy.deepcopy((grower.model, grower.optimizer))  # these can


@pytest.mark.parametrize("wrong", [list(network().parameters()), network().state_dict(), None, "ema"])
def test_follow_takes_a_module(wrong: Any) -> None:
    with pytest.raises(TorchgrowError, match=r"follow takes a torch\.nn\.Module .* such as copy\.deepcopy\(model\)"):
        grown().follow(wrong)


@pytest.mark.parametrize("early", [False, True])
def test_a_run_that_is_over_names_the_updates_that_suffice(early: bool) -> None:
    grower = grown(updates=4)
    for _ in range(1 if early else 4):
        train(grower)
        grower.update()
    if early:
        grower.finish()
    with pytest.raises(TorchgrowError, match="call it only when no" if early else r"updates=5\) or with more"):
        grower.update()

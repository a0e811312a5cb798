"""Which optimizers are served: found out by a trial step of a copy, which must leave the original alone."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from oracle import TwoLayers
from torchgrow import OptimizerError
from torchgrow.optimizers import check_optimizer

SERVED = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "Rprop", "ASGD")


def stepped(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("used", [False, True])
def test_served(name: str, used: bool) -> None:
    """Fresh, and resumed with state."""
    model = TwoLayers()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
    if used:
        stepped(optimizer, model)
    check_optimizer(optimizer, model)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
@pytest.mark.parametrize("form", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_forms(name: str, form: dict[str, bool]) -> None:
    model = TwoLayers()
    check_optimizer(getattr(torch.optim, name)(model.parameters(), lr=0.01, **form), model)


REFUSED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "LBFGS": lambda p: torch.optim.LBFGS(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "SparseAdam": lambda p: torch.optim.SparseAdam(list(p)),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_refused_by_name(name: str, scheduled: bool, used: bool) -> None:
    """Also under a learning rate scheduler, which sets a `step` of its own on the optimizer; also when resumed."""
    model = TwoLayers()
    optimizer = REFUSED[name](model.parameters())
    if used and name == "Adafactor":
        stepped(optimizer, model)
    if scheduled:
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(OptimizerError, match=rf"^{name} cannot be served: .*use SGD, Adam, AdamW or RMSprop"):
        check_optimizer(optimizer, model)


@pytest.mark.parametrize("scheduled", [False, True])
def test_the_trial_leaves_everything_alone(scheduled: bool) -> None:
    """With gradients waiting and hooks of the user's: no weight, slot, hook or flag of the original moves."""
    model = TwoLayers()
    optimizer = torch.optim.Adam([{"params": model.fc1.parameters()}, {"params": model.fc2.parameters(), "lr": 0.1}])
    if scheduled:
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    stepped(optimizer, model)
    calls: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    model(torch.ones(2, 5)).sum().backward()
    optimizer._opt_called = False  # type: ignore[attr-defined]
    before, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    check_optimizer(optimizer, model)
    after = optimizer.state_dict()
    assert calls == []
    assert optimizer._opt_called is False  # type: ignore[attr-defined]
    assert before["param_groups"] == after["param_groups"]
    for slots, others in zip(before["state"].values(), after["state"].values(), strict=True):
        assert all(torch.equal(slots[key], others[key]) for key in slots)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert list(optimizer.state) == list(model.parameters())


def test_a_tensor_rate_is_not_changed() -> None:
    model = TwoLayers()
    rate = torch.tensor(0.1)
    check_optimizer(torch.optim.Adam(model.parameters(), lr=rate, foreach=False), model)
    assert float(rate) == pytest.approx(0.1)


def test_not_an_optimizer() -> None:
    scheduler: Any = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(TwoLayers().parameters(), 0.1), 1)
    with pytest.raises(OptimizerError, match=r"optimizer must be a torch\.optim\.Optimizer, got StepLR"):
        check_optimizer(scheduler, TwoLayers())


def test_none_of_the_models_parameters() -> None:
    with pytest.raises(OptimizerError, match=r"SGD holds none of the model's trainable parameters; build it from this"):
        check_optimizer(torch.optim.SGD(TwoLayers().parameters(), 0.1), TwoLayers())


def test_only_untrained_parameters() -> None:
    model = TwoLayers().requires_grad_(False)
    with pytest.raises(OptimizerError, match="holds none of the model's trainable parameters"):
        check_optimizer(torch.optim.SGD(model.parameters(), 0.1), model)


def test_foreign_parameters() -> None:
    model, other = TwoLayers(), nn.Linear(4, 9, bias=False)
    optimizer = torch.optim.AdamW([*model.parameters(), *other.parameters()], 0.1)
    with pytest.raises(OptimizerError, match=r"AdamW also holds 1 parameters that are not the model's.*\(9, 4\)"):
        check_optimizer(optimizer, model)


class Squared(torch.optim.Optimizer):
    """A user's optimizer whose state is an outer product: it cannot be re-cut."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                flat = p.grad.flatten()
                self.state[p]["outer"] = torch.outer(flat, flat)


def test_an_unknown_layout() -> None:
    model = TwoLayers()
    with pytest.raises(OptimizerError, match=r"Squared cannot be served: it keeps 'outer' of shape \(15, 15\) for a"):
        check_optimizer(Squared(model.parameters()), model)


class Eager(torch.optim.Optimizer):
    """A user's optimizer that makes its slots at construction, as Adagrad did for long."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"sum": torch.zeros_like(p), "step": torch.tensor(0.0)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                self.state[p]["sum"].add_(p.grad)
                self.state[p]["step"] += 1


def test_slots_made_at_construction() -> None:
    model = TwoLayers()
    optimizer = Eager(model.parameters())
    check_optimizer(optimizer, model)
    assert all(float(slots["step"]) == 0 and not slots["sum"].any() for slots in optimizer.state.values())

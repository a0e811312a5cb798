"""Which optimizers are served: found out by a trial step of a copy, which must leave the original alone."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lookalikes as like
from oracle import TwoLayers
from torchgrow import Budget, Grower, OptimizerError, TorchgrowError
from torchgrow.structure.optimizers import check_optimizer

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
    groups: list[dict[str, Any]] = [{"params": model.fc1.parameters()}, {"params": model.fc2.parameters(), "lr": 0.1}]
    optimizer = torch.optim.Adam(groups)
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
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(OptimizerError, match=r"all parameters of TwoLayers are frozen.*thaw.*model\.requires_grad_"):
        check_optimizer(optimizer, model)
    model.register_parameter("other", nn.Parameter(torch.zeros(1)))
    with pytest.raises(OptimizerError, match="holds none of the model's trainable parameters"):
        check_optimizer(optimizer, model)


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


# --- optimizers of other packages -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (like.Listed, r"Listed .*keeps 'bufs' as a list with tensors \(\(5, 3\)\) for a parameter of shape \(5, 3\)"),
        (like.Factored, r"Factored .*keeps 'row' of shape \(40,\) for a parameter of shape \(40, 50\)"),
        (like.Sized, r"Sized .*depends on a parameter's size \(for one of shape \(40, 50\) 'large' is not as"),
        (like.Packed, r"Packed .*keeps 'packed' as torch\.uint8 of shape"),
        (like.Subclassed, r"Subclassed .*keeps 'moment' as a Mine"),
        (like.Projected, r"Projected .*keeps 'projector' as a Held with tensors"),
        (like.Square, r"Square .*keeps 'left' of shape \(5, 5\) for a parameter of shape \(5, 3\)"),
        (like.Shadowed, r"Shadowed .*keeps shadow\[\d\] of shape .*beside its state"),
        (like.LateShadow, r"LateShadow .*keeps shadow.* beside its state"),
        (like.Global, r"Global .*keeps state\['total'\], which belongs to no parameter"),
        (like.Sharp, r"Sharp cannot be served: it needs a closure for every step"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_cut_is_refused_at_once(make: Any, says: str) -> None:
    """Also where it shows only at the real size, in containers, or outside of the state; nothing is touched."""
    model = nn.Sequential(nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 40))
    optimizer = make(model.parameters())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OptimizerError, match=says):
        check_optimizer(optimizer, model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not optimizer.state


def test_an_optimizer_that_reaches_the_real_weights_is_refused_and_they_are_put_back() -> None:
    model = TwoLayers()
    before = copy.deepcopy(model.state_dict())
    optimizer = like.Reaching(model.parameters())
    with pytest.raises(OptimizerError, match=r"Reaching .* a step of a copy of it moved \d of the model's weights"):
        check_optimizer(optimizer, model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not optimizer.state


@pytest.mark.parametrize("wrap", [like.Lookahead, like.Engine, lambda o: like.AcceleratedOptimizer(like.Lookahead(o))])
def test_an_optimizer_that_steps_another_is_refused_by_name(wrap: Any) -> None:
    model = TwoLayers()
    model(torch.ones(2, 5)).sum().backward()
    before = copy.deepcopy(model.state_dict())
    inner = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    says = r"(Lookahead|Engine) cannot be served: it holds another optimizer \(SGD, in \.(_base_opt|parts)"
    with pytest.raises(OptimizerError, match=says):
        Grower(model, wrap(inner), example_inputs=torch.ones(2, 5), budget=Budget(params="60%"), updates=4)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not inner.state


def test_a_wrapper_that_hands_everything_on_is_served_as_what_it_holds() -> None:
    """Also one around another."""
    model = TwoLayers()
    inner = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    outer = like.AcceleratedOptimizer(like.AcceleratedOptimizer(inner))
    grower = Grower(model, outer, example_inputs=torch.ones(2, 5), budget=Budget(params="60%"), updates=4)
    assert grower.optimizers == (inner,)
    for _ in range(4):
        model(torch.ones(2, 5)).sum().backward()
        outer.step()
        outer.zero_grad()
        grower.update()
    assert all(inner.state[p]["momentum_buffer"].shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("name", like.SERVED)
def test_look_alikes_are_served(name: str) -> None:
    """ScheduleFree too, before the user has called its `train`; random numbers and warnings stay the user's."""
    model = TwoLayers()
    optimizer = like.SERVED[name](model.parameters())
    state = torch.get_rng_state()
    check_optimizer(optimizer, model)
    assert torch.equal(state, torch.get_rng_state())
    assert not optimizer.state
    assert "d_numerator" not in optimizer.param_groups[0]


def test_muon_alone_is_told_to_take_others_along() -> None:
    """It trains matrices only, so the gates on the norms would stay untrained."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has no Muon")
    model = nn.Sequential(nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2, bias=False))
    optimizer = torch.optim.Muon([p for p in model.parameters() if p.dim() == 2])
    with pytest.raises(TorchgrowError, match=r"Grower\(model, \[muon, torch\.optim\.AdamW\("):
        Grower(model, optimizer, example_inputs=torch.ones(4, 5), budget=Budget(params="60%"), updates=4)

"""Several optimizers on one model: Law 3 holds for all of them together, each unfolds what it trains."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growing import (
    batch,
    begun_as,
    indicators_of,
    make,
    outputs,
    run,
    same_indicators,
    same_parameters,
    sgd,
    step_both,
    train,
)
from oracle import Eq6, SmallResNet, TwoLayers
from planned import Planned
from torchgrow import Budget, Grower, OptimizerError, TrainingError

METHOD = Planned(ramp=0.5)


class Both(torch.optim.Optimizer):
    """Two optimizers that step together, for the oracle."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        return {parameter: slots for part in self.parts for parameter, slots in part.state.items()}

    def step(self) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)


Split = Callable[[nn.Module], list[torch.optim.Optimizer]]


def by_kind(model: nn.Module) -> list[torch.optim.Optimizer]:
    """SGD for convolutions, AdamW for what follows; there are gates in both."""
    head = [p for name, p in model.named_parameters() if name.startswith("fc")]
    body = [p for name, p in model.named_parameters() if not name.startswith("fc")]
    return [torch.optim.SGD(body, 0.05, momentum=0.9), torch.optim.AdamW(head, 0.01, weight_decay=0.1)]


def weight_and_bias(model: nn.Module) -> list[torch.optim.Optimizer]:
    """The gated places of every unit are shared between the two: its weight here, its bias there."""
    first = [p for name, p in model.named_parameters() if name.endswith("weight")]
    second = [p for name, p in model.named_parameters() if name.endswith("bias")]
    return [torch.optim.SGD(first, 0.05, momentum=0.9), torch.optim.SGD(second, 0.02, weight_decay=1e-2)]


def ungated(model: nn.Module) -> list[torch.optim.Optimizer]:
    """No gate at all in the second."""
    last = [p for name, p in model.named_parameters() if name.startswith("fc2")]
    rest = [p for name, p in model.named_parameters() if not name.startswith("fc2")]
    return [torch.optim.SGD(rest, 0.05, momentum=0.9), torch.optim.SGD(last, 0.01, momentum=0.5, nesterov=True)]


@pytest.mark.parametrize(
    ("split", "first_steps"),
    [(by_kind, 4), (weight_and_bias, 0), (ungated, 0)],  # in Adam newborn units have slots of their own: no births
    ids=lambda x: getattr(x, "__name__", None),
)
@pytest.mark.parametrize("backwards", [False, True])
def test_several_optimizers_are_literal_eq6(split: Split, first_steps: int, backwards: bool) -> None:
    """Whichever steps first, over updates that change the structure; with `first_steps`, trained only after those."""
    grower = make(METHOD, updates=8, seed=1, optimizer=split)
    torch.manual_seed(0)
    frame = SmallResNet().double()
    both = Both(split(frame))
    space, indicators = grower.space, indicators_of(grower)
    t = torch.zeros(space.n_units, dtype=torch.int64)
    ones = torch.ones(space.n_units).double()
    begun_as(grower, frame)
    oracle = Eq6(frame, both, space, METHOD, s=indicators.s, q=grower.keep, beta=ones)
    changed = 0
    grower.optimizer = Both(list(grower.optimizers[::-1] if backwards else grower.optimizers))
    for epoch in range(8):
        for step in range(4 * epoch, 4 * epoch + 4) if not first_steps else range(20) if epoch == first_steps else ():
            x, target = batch(step)
            grower.optimizer.zero_grad()
            live, literal = F.cross_entropy(grower.model(x), target), F.cross_entropy(oracle(x), target)
            step_both(grower, oracle, live, literal, 0.0)
        same_indicators(grower, oracle)
        raw = {**dict(grower.model.named_parameters()), **grower.run.live.raw()}
        same_parameters(grower, oracle, raw, f"in epoch {epoch}")
        if epoch == first_steps > 0:
            break
        event = grower.update()
        t += grower.keep
        oracle.update(grower.keep, 100 ** (1 / 8), t, event.pressure)
        changed += event.born + event.detached + event.regrown
    assert changed > 10


def test_indicators_wait_for_every_optimizer_that_holds_gates() -> None:
    """They move by the sum of what the steps gave."""
    grower = make(METHOD, optimizer=by_kind)
    train_both(grower, 6)
    first, second = grower.optimizers
    s, gate = indicators_of(grower).s.clone(), indicators_of(grower).gate.clone()
    gradients: list[Tensor] = []
    step = indicators_of(grower).step

    def noted(view: Any, sensitivity: Tensor) -> None:
        gradients.append(sensitivity)
        step(view, sensitivity)

    indicators_of(grower).step = noted
    for k in range(3):
        backward(grower, k)
        first.step()
        assert torch.equal(indicators_of(grower).s, s)
        assert gradients == []
    backward(grower, 3)
    second.step()
    assert not torch.equal(indicators_of(grower).gate, gate)
    assert len(gradients) == 1
    assert int((gradients[0] != 0).sum()) >= 4  # units of both
    fold = grower.run.live.gates.fold
    assert fold is not None
    grower.run.live.raw()
    for parameter, raw, factor in zip(fold.parameters, fold.raw, fold.factors(indicators_of(grower).gate), strict=True):
        assert torch.equal(parameter, raw * factor)  # the first one's weights are folded with the new gates too


def train_both(grower: Grower, updates: int) -> None:
    for k in range(updates):
        backward(grower, k)
        for optimizer in grower.optimizers:
            optimizer.step()
        grower.update()


def backward(grower: Grower, step: int) -> None:
    x, target = batch(step)
    for optimizer in grower.optimizers:
        optimizer.zero_grad()
    F.cross_entropy(grower.model(x), target).backward()


def test_a_list_of_one_is_that_one() -> None:
    one, listed = make(), make(optimizer=lambda m: [sgd(m)])
    run(one, 4)
    run(listed, 4)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), listed.model.parameters(), strict=True))


def test_a_step_that_fails_in_one_of_them() -> None:
    """It is put right at the next step of that one, though the other has stepped meanwhile."""
    grower = make(METHOD, optimizer=by_kind)
    first, second = grower.optimizers
    backward(grower, 0)
    rate, first.param_groups[0]["lr"] = first.param_groups[0]["lr"], "broken"
    with pytest.raises(TypeError):
        first.step()
    first.param_groups[0]["lr"] = rate
    second.step()
    with pytest.raises(TrainingError, match="did not finish"):
        first.step()
    twin = copy.deepcopy(grower.model)
    backward(grower, 1)
    assert float(outputs(grower).abs().max()) < 10
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), grower.model.parameters(), strict=True))
    first.step()
    grower.update()
    train(grower, 3)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_the_budget_holds_and_every_slot_is_cut(preset: str) -> None:
    grower = make(preset, Budget(params="40%"), updates=6, optimizer=weight_and_bias)
    for _ in range(6):
        train_both(grower, 1)
        for optimizer in grower.optimizers:
            for parameter, slots in optimizer.state.items():
                assert all(slot.shape == parameter.shape for slot in slots.values() if slot.dim())
    assert grower.limits.params is not None
    assert grower.cost().params <= grower.limits.params


def test_overflow_in_one_of_them_leaves_the_indicators_waiting() -> None:
    """A GradScaler leaves out the step of an optimizer whose gradients are infinite."""
    grower = make(METHOD, optimizer=by_kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    s = indicators_of(grower).s.clone()
    x, target = batch(0)
    scaler.scale(F.cross_entropy(grower.model(x), target)).backward()
    grower.model.fc1.weight.grad.fill_(float("inf"))  # type: ignore[union-attr, operator]
    for optimizer in grower.optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert torch.equal(indicators_of(grower).s, s)
    for optimizer in grower.optimizers:
        optimizer.zero_grad()
    scaler.scale(F.cross_entropy(grower.model(x), target)).backward()
    for optimizer in grower.optimizers:
        scaler.step(optimizer)
    assert not torch.equal(indicators_of(grower).s, s)


def test_refused() -> None:
    model = TwoLayers()
    arguments: dict[str, Any] = {"example_inputs": torch.randn(2, 5), "budget": Budget(params="50%"), "updates": 3}
    twice = [sgd(model), torch.optim.Adam(model.fc2.parameters())]
    with pytest.raises(OptimizerError, match=r"fc2\.weight is held by optimizers 0 and 1 of the list \(SGD and Adam\)"):
        Grower(model, twice, **arguments)
    with pytest.raises(OptimizerError, match="there is no optimizer; pass one, or a list"):
        Grower(model, [], **arguments)
    with pytest.raises(OptimizerError, match="LBFGS cannot be served"):
        Grower(model, [torch.optim.SGD(model.fc1.parameters()), torch.optim.LBFGS(model.fc2.parameters())], **arguments)
    assert model.fc1.weight.shape == (12, 5)

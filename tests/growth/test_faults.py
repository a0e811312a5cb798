"""Growing when things go wrong: failures and interrupts in an update, and bad input."""

import copy
import gc
import os
import signal
import threading
import time
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchgrow.exchange
import torchgrow.growth.live_network
import torchgrow.growth.run_state
import torchgrow.structure.cost
import torchgrow.structure.store
from growing import breaking, differences, everything, failing, make, run, sgd, train
from oracle import TwoLayers
from torchgrow import (
    Bank,
    Budget,
    BudgetError,
    Event,
    Grower,
    OptimizerError,
    StructureError,
    TorchgrowError,
)
from torchgrow.growth.gates import Fold
from torchgrow.growth.run import Run
from torchgrow.policies import Random

# --- transactions ---

RISING = "default:ramp=0.9,peak=1,settle=0"
"""Grows at every update but the last; where nothing changes, an update swaps nothing in that could fail."""


PLACES = [
    *[(torchgrow.exchange, "run", call) for call in (0, 1, 2, 9, 40, -40, -10, -1)],
    *[(torchgrow.structure.store, "scatter_", call) for call in (1, 5)],
    *[(torchgrow.structure.store, "gather", call) for call in (1, 7)],
    (torchgrow.growth.live_network, "Fold", 1),
    (torchgrow.growth.run_state, "Event", 1),
    (Bank, "stage", 1),
    (torchgrow.exchange.Exchange, "make", 1),
    (Fold, "factors", 1),
    (torchgrow.structure.cost.CostModel, "cost", 1),
    (torchgrow.policies.Policy, "copied", 1),
]


@pytest.mark.parametrize(("owner", "name", "call"), PLACES, ids=lambda p: p if isinstance(p, (str, int)) else "")
@pytest.mark.parametrize(("preset", "error"), [(RISING, MemoryError("none left")), ("paper", KeyboardInterrupt())])
def test_a_failed_update_changes_nothing(
    owner: Any, name: str, call: int, preset: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit the old state; and the run goes on to just where it would have come without the failure."""
    grower = make(preset)
    run(grower, 4)
    train(grower, 8)
    before = everything(grower)
    with monkeypatch.context() as patch:
        within = name == "run"
        patch.setattr(owner, name, breaking(call, error) if within else failing(error, call, getattr(owner, name)))
        with pytest.raises(type(error)):
            grower.update()
    assert differences(before, everything(grower)) == []
    grower.update()
    train(grower, 10)
    assert differences(undisturbed(preset), everything(grower)) == []


@cache
def undisturbed(preset: str) -> dict[str, Any]:
    """Where the run of the test above comes without a failure."""
    grower = make(preset)
    run(grower, 4)
    train(grower, 8)
    grower.update()
    train(grower, 10)
    return everything(grower)


def test_ctrl_c_while_swapping_in_waits_until_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real SIGINT in the middle of the swap: KeyboardInterrupt comes, after a whole update."""
    grower, undisturbed = run(make(RISING), 4), run(make(RISING), 4)
    with monkeypatch.context() as patch:
        patch.setattr(torchgrow.exchange, "run", breaking(50, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            grower.update()
    undisturbed.update()
    assert differences(everything(undisturbed), everything(grower)) == []


def test_ctrl_c_at_any_time_leaves_a_whole_network() -> None:
    """SIGINT from a timer at times spread over the update: what is left is the state before or that after it."""
    grower = run(make("paper", updates=40), 3)
    before = everything(grower)
    start = time.perf_counter()
    grower_after = copy_of_update(grower)
    span = time.perf_counter() - start
    hits = 0
    for i in range(12):
        grower = run(make("paper", updates=40), 3)
        timer = threading.Timer(span * i / 12, lambda: os.kill(os.getpid(), signal.SIGINT))
        try:
            timer.start()
            grower.update()
            timer.join()
            time.sleep(0.05)  # it may arrive only now
        except KeyboardInterrupt:
            hits += 1
        state = everything(grower)
        assert differences(before, state) == [] or differences(grower_after, state) == []
        if len(grower.history) == 4:
            grower.update()
    assert hits == 12


def test_a_second_thread_is_refused_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    grower, undisturbed = run(make("paper"), 2), run(make("paper"), 2)
    state, real = grower.state_dict(), Run.update
    entered, leave = threading.Event(), threading.Event()

    def slow(own: Run, batches: Any = None) -> Event:
        entered.set()
        leave.wait(20)
        return real(own, batches)

    monkeypatch.setattr(Run, "update", slow)
    first = threading.Thread(target=grower.update)
    first.start()
    assert entered.wait(20)
    for call in (grower.update, grower.finish, grower.release, lambda: grower.load_state_dict(state)):
        with pytest.raises(TorchgrowError, match=r"another thread is changing .* hold one threading\.Lock around"):
            call()
    leave.set()
    first.join()
    monkeypatch.undo()
    undisturbed.update()
    assert differences(everything(undisturbed), everything(grower)) == []
    grower.update()  # free again


def copy_of_update(grower: Grower) -> dict[str, Any]:
    grower.update()
    return everything(grower)


def test_ctrl_c_in_finish_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    grower = run(make(), 3)
    monkeypatch.setattr(torchgrow.exchange, "run", breaking(50, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        grower.finish()
    assert grower.finished
    assert not grower.optimizer._optimizer_step_pre_hooks


def test_a_grower_that_fails_to_start_leaves_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchgrow.growth.live_network, "Fold", failing(MemoryError(), 1, Fold))
    made: list[torch.optim.Optimizer] = []
    with pytest.raises(MemoryError):
        make(optimizer=lambda m: made.append(sgd(m)) or made[0])  # type: ignore[func-returns-value]
    assert not made[0]._optimizer_step_pre_hooks
    assert not made[0]._optimizer_step_post_hooks


def test_a_frame_without_values_can_be_tried_again_after_a_failed_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed inside the trace holds weak references to the parameters, which would forbid their exchange."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 2))
    arguments: dict[str, Any] = {"example_inputs": torch.randn(2, 5), "budget": Budget(params="50%"), "updates": 3}
    with monkeypatch.context() as patch:
        patch.setattr(F, "relu", failing(KeyboardInterrupt(), 1, F.relu))
        with pytest.raises(KeyboardInterrupt):
            Grower(model, sgd(model), **arguments)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert Grower(model, sgd(model), **arguments).history[0].update == 0


# --- what updates leave behind ---


@pytest.mark.parametrize("optimizer", [sgd, lambda m: torch.optim.AdamW(m.parameters())], ids=["sgd", "adamw"])
def test_updates_leave_nothing_behind(optimizer: Any) -> None:
    """No more tensors after 30 updates than after 10, and optimizer state of the model's parameters only."""
    churn = Random()
    grower, counts = make(churn, updates=32, optimizer=optimizer), []
    for update in range(30):
        train(grower, 2 * update, 1)
        grower.update()
        if update % 20 == 9:
            gc.collect()
            counts.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
    assert counts[1] <= counts[0]  # what other tests left may go in between
    assert sum(event.regrown for event in grower.history) > 20
    shapes = {parameter: parameter.shape for parameter in grower.model.parameters()}
    assert grower.optimizer.state.keys() <= shapes.keys()
    for parameter, slots in grower.optimizer.state.items():
        assert all(slot.numel() == 1 or slot.shape == parameter.shape for slot in slots.values())


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a budget needs params or flops"),
        ({"params": 0}, "params=0 is neither a share below 1 nor a positive whole number; use a share such as"),
        ({"params": -3}, "params=-3 is neither"),
        ({"flops": True}, "flops=True is neither"),
        ({"params": 1.0}, "params=1.0 may mean all or a single one; use"),
        ({"params": "1.0"}, "params='1.0' may mean all or a single one; use"),
        ({"params": 1.5}, "params=1.5 is neither a share below 1 nor a positive whole number; use"),
        ({"params": "1.5"}, "params='1.5' is neither a share below 1 nor a positive whole number; use"),
        ({"params": float("nan")}, "params=nan is neither"),
        ({"params": float("inf")}, "params=inf is neither"),
        ({"params": "0%"}, "params='0%' must lie above 0% and at most at 100%"),
        ({"flops": "101%"}, "flops='101%' must lie above 0% and at most at 100%"),
        ({"params": "-5%"}, "params='-5%' is neither a share nor a positive number"),
        ({"params": "a third"}, 'or params=0.36, or a number such as params=100_000 or params="100k"'),
        ({"params": "0.0001k"}, "params='0.0001k' is neither"),
        ({"params": [3]}, "params=[3] is neither"),
    ],
)
def test_malformed_budgets(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(params="1%"), r"what cannot be removed costs 71; feasible here: params from 71 \(5\.59%\) to 1,271"),
        (Budget(params=70), r"params <= 70 allows 70 params, but what cannot be removed costs 71"),
        (Budget(params="50%", flops=10), r"allows 10 flops, but .* feasible here: flops from [\d,]+ \([\d.]+%\) to"),
        (Budget(params=10**9), r"allows 1,000,000,000 params, more than the whole frame has \(1,"),
    ],
)
def test_infeasible_budgets_name_the_range(budget: Budget, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        make(budget=budget)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": "36%"}, r"budget must be a torchgrow\.Budget such as Budget"),
        ({"rescale": "no"}, r"rescale='no' must be True or False"),
        ({"updates": 0}, r"updates=0 must be a whole number >= 1"),
        ({"updates": 2.0}, r"updates=2\.0 must be a whole number >= 1"),
        ({"updates": True}, r"updates=True must be"),
        (
            {"preset": "papr"},
            r"preset 'papr' is unknown; use one of \['default', 'global', .*\], or give policy= an object",
        ),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    model = TwoLayers()
    arguments: dict[str, Any] = {"example_inputs": torch.randn(2, 5), "budget": Budget(params="50%"), "updates": 3}
    with pytest.raises(TorchgrowError, match=message):
        Grower(model, sgd(model), **{**arguments, **change})
    assert model.fc1.weight.shape == (12, 5)


def test_a_refused_grower_leaves_the_model_alone() -> None:
    model = TwoLayers()
    optimizer = torch.optim.LBFGS(model.parameters())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OptimizerError, match="LBFGS cannot be served"):
        Grower(model, optimizer, example_inputs=torch.randn(2, 5), budget=Budget(params="50%"), updates=3)
    assert differences(dict(before), dict(model.state_dict())) == []
    assert not optimizer._optimizer_step_pre_hooks


class Rigid(nn.Module):
    """Every hidden unit is an output of the model as well."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.fc1(x))
        return hidden, self.fc2(hidden)


def test_nothing_can_grow() -> None:
    model = Rigid()
    with pytest.raises(StructureError, match=r"nothing can grow here, because .*is an output of the model"):
        Grower(model, sgd(model), example_inputs=torch.randn(2, 5), budget=Budget(params="50%"), updates=3)


def test_nothing_can_grow_where_no_gate_is_trained() -> None:
    model = TwoLayers()
    optimizer = torch.optim.SGD(model.fc2.parameters(), 0.1)
    with pytest.raises(StructureError, match=r"nothing can grow here, because .*does not train"):
        Grower(model, optimizer, example_inputs=torch.randn(2, 5), budget=Budget(params="50%"), updates=3)


@pytest.mark.parametrize("name", ["budget", "updates", "model", "space", "policy", "seed", "limits"])
def test_what_a_run_is_planned_with_cannot_be_exchanged(name: str) -> None:
    grower = make()
    before = getattr(grower, name)
    with pytest.raises(
        TorchgrowError,
        match=rf"^{name} of a Grower cannot be changed .*; finish\(\) this one and construct Grower\(\.\.\.\) anew",
    ):
        setattr(grower, name, torchgrow.Budget(params="10%"))
    assert getattr(grower, name) is before

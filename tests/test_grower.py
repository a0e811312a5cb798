"""The grower: Laws 3 (across updates), 7, 8, 10 and 11, transactions, errors, and the presets' formulas."""

import copy
import math
import os
import signal
import threading
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchgrow.grower
import torchgrow.surgery
from oracle import Eq6, SmallResNet, TwoLayers
from torchgrow import (
    Bank,
    Budget,
    BudgetError,
    Event,
    Grower,
    Method,
    OptimizerError,
    StructureError,
    TorchgrowError,
    measure,
    shrink_,
)
from torchgrow.fold import Fold

STILL = Method(controller="pressure", draws="independent", lambda_base=0.0, heat=1.0, align=1, settle=0.0)
"""No pressure and a constant temperature: an update changes the structure and nothing else."""


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, 6, 6, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(0, 4, (8,), generator=generator)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


def make(
    preset: str | Method = "default",
    budget: Budget | None = None,
    updates: int = 10,
    seed: int = 0,
    optimizer: Any = sgd,
) -> Grower:
    torch.manual_seed(0)
    model = SmallResNet().double()
    return Grower(
        model,
        optimizer(model),
        example_inputs=batch(0)[0],
        budget=budget or Budget(params="50%"),
        updates=updates,
        preset=preset,
        seed=seed,
    )


def train(grower: Grower, first: int = 0, steps: int = 2) -> None:
    for step in range(first, first + steps):
        x, target = batch(step)
        grower.optimizer.zero_grad()
        F.cross_entropy(grower.model(x), target).backward()
        grower.optimizer.step()


def run(grower: Grower, updates: int | None = None) -> Grower:
    """Epochs of two steps, an update after each."""
    for epoch in range(updates or grower.updates):
        train(grower, 2 * epoch)
        grower.update()
    return grower


def outputs(grower: Grower) -> Tensor:
    """In evaluation mode, without a trace in the model."""
    model = copy.deepcopy(grower.model).eval()
    with torch.no_grad():
        return model(batch(99)[0])


def everything(grower: Grower) -> dict[str, Any]:
    """All that must survive a failed update, as copies."""
    state: dict[str, Any] = {name: tensor.clone() for name, tensor in grower.model.state_dict().items()}
    indicators = grower._indicators
    for name in ("s", "velocity", "gate", "beta", "t", "uniform"):
        state[name] = getattr(indicators, name).clone()
    for name, parameter in grower.model.named_parameters():
        for key, slot in grower.optimizer.state.get(parameter, {}).items():
            state[f"{key} of {name}"] = copy.deepcopy(slot)
        state[f"gradient of {name}"] = copy.deepcopy(parameter.grad)
    return {
        **state,
        "generator": indicators.generator.get_state(),
        "keep": grower._bank.keep.clone(),
        "history": [timeless(event) for event in grower.history],
        "attributes": [{k: v for k, v in vars(m).items() if isinstance(v, int)} for m in grower.model.modules()],
        "record": copy.deepcopy(vars(getattr(grower.model, torchgrow.surgery.RECORD))["attributes"]),
        "outputs": outputs(grower),
        "penalty": grower._penalty,
        "raw": {name: raw.clone() for name, raw in grower._folding.raw().items()},
    }


def timeless(event: Event) -> dict[str, Any]:
    return {name: value for name, value in vars(event).items() if name != "seconds"}


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    """Where two nested structures are not bit for bit the same."""
    if isinstance(a, dict) and isinstance(b, dict):
        names = sorted(a.keys() | b.keys(), key=str)
        return [d for n in names for d in differences(a.get(n), b.get(n), f"{at}/{n}")]
    equal = torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b) and a == b
    return [] if equal else [at]


# --- Law 3 across updates ---


@pytest.mark.parametrize("preset", ["paper", "plan"])
def test_growing_is_literal_eq6(preset: str) -> None:
    """SGD in float64, the oracle following the structure event by event: detached units come back as they left."""
    method = Method.paper() if preset == "paper" else Method(ramp=0.5, align=1, settle=0.0)
    grower = make(method, updates=12, seed=1)
    torch.manual_seed(0)
    frame = SmallResNet().double()
    space, indicators = grower.space, grower._indicators
    t = torch.zeros(space.n_units, dtype=torch.int64)
    oracle = Eq6(
        frame, sgd(frame), space, method, s=indicators.s, q=grower._bank.keep, beta=torch.ones(space.n_units).double()
    )
    changed = 0
    for epoch in range(12):
        for step in range(4 * epoch, 4 * epoch + 4):
            x, target = batch(step)
            grower.optimizer.zero_grad()
            live = F.cross_entropy(grower.model(x), target)
            literal = F.cross_entropy(oracle(x), target)
            assert abs(live.item() - literal.item()) <= 1e-9
            live.backward()
            literal.backward()
            grower.optimizer.step()
            oracle.step(grower.history[-1].pressure if preset == "paper" else 0.0)
        removable = space.removable
        torch.testing.assert_close(indicators.s[removable], oracle.s.detach()[removable], rtol=1e-9, atol=1e-9)
        event = grower.update()
        t += grower._bank.keep
        shift = 0.0 if preset == "paper" else event.pressure
        oracle.update(grower._bank.keep, 100 ** (1 / 12), t, shift)
        raw = {**dict(grower.model.named_parameters()), **grower._folding.raw()} if epoch < 11 else {}
        for name, parameter in raw.items():
            full = oracle.live(oracle.parameters, name)
            torch.testing.assert_close(parameter.detach(), full, rtol=1e-9, atol=1e-9, msg=f"{name} in epoch {epoch}")
        changed += event.born + event.detached + event.regrown
    assert changed > 10
    assert preset != "paper" or sum(event.regrown for event in grower.history) > 3


# --- Law 7 ---

BUDGETS = [
    Budget(params="36%"),
    Budget(params=700),
    Budget(flops="30%"),
    Budget(flops=30_000),
    Budget(params="60%", flops="40%"),
    Budget(params="20%", flops="90%"),
    Budget(params="100%"),
]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize(("seed", "early"), [(0, False), (1, False), (2, True)])
def test_the_budget_is_a_guarantee(budget: Budget, preset: str, seed: int, early: bool) -> None:
    """Measured on the network itself: never above, and with any one absent unit more it would be."""
    torch.manual_seed(0)
    frame, x = SmallResNet().double(), batch(0)[0]
    full = measure(frame, x)
    grower = make(preset, budget, updates=6, seed=seed)
    run(grower, 3 if early else 6)
    if early:
        grower.finish()
    limits = budget.limits(full)

    def fits(model: nn.Module) -> bool:
        cost = measure(model, x)
        return all(a is None or b <= a for a, b in ((limits.params, cost.params), (limits.flops, cost.flops)))

    assert fits(grower.model)
    assert measure(grower.model, x) == grower.cost()
    assert grower.cost().params == sum(p.numel() for p in grower.model.parameters())
    for unit in torch.nonzero(~grower._bank.keep).flatten().tolist():
        keep = grower._bank.keep.clone()
        keep[unit] = True
        more = copy.deepcopy(frame)
        shrink_(more, grower.space, keep)
        assert not fits(more), f"unit {unit} still fits"
    if budget.params == "100%":
        assert bool(grower._bank.keep.all())


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("share", ["7%", "36%", "50%", "98.5%"])
def test_the_budget_is_used(preset: str, share: str) -> None:
    """A unit costs 0.5 % of this frame: at least 98 % of the budget is used."""
    torch.manual_seed(0)
    model = TwoLayers(200)
    x = torch.randn(4, 5)
    optimizer = torch.optim.Adam(model.parameters())
    grower = Grower(model, optimizer, example_inputs=x, budget=Budget(params=share), updates=5, preset=preset)
    for _ in range(5):
        model(x).square().mean().backward()
        optimizer.step()
        grower.update()
    limit = grower.limits.params
    assert limit is not None
    assert limit - 9 < grower.cost().params <= limit
    assert grower.cost().params >= (0.98 if share != "7%" else 0.9) * limit


def test_the_structure_is_final_from_the_last_but_one_update_on() -> None:
    for method in (Method(settle=0.0), Method.paper(), Method(settle=0.4)):
        grower = make(method, updates=10)
        settled = grower.updates - max(1, math.ceil(method.settle * 10))
        run(grower, settled)
        keep, cost = grower._bank.keep.clone(), grower.cost()
        for epoch in range(settled, 10):
            train(grower, 2 * epoch)
            event = grower.update()
            assert torch.equal(grower._bank.keep, keep)
            assert event.born == event.regrown == event.detached == 0
        assert grower.finished
        assert grower.cost() == cost


# --- Law 8 ---


def test_what_leaves_takes_only_its_own_part() -> None:
    """The compact network is the one before with the gated weights of the leaving units zeroed."""
    grower = make(STILL, Budget(params="100%"))
    grow_to(grower, grower.space.everything())
    train(grower, steps=5)
    keep = grower.space.everything()
    keep[grower.space.removable.nonzero().flatten()[::3]] = False
    predicted = copy.deepcopy(grower)
    with torch.no_grad():
        for (name, axis), units in grower.space.fold.items():
            leaving = torch.nonzero((units >= 0) & ~keep[units.clamp(min=0)]).flatten()
            dict(predicted.model.named_parameters())[name].index_fill_(axis, leaving, 0)
    before = outputs(grower)
    grow_to(grower, keep)
    torch.testing.assert_close(outputs(grower), outputs(predicted), rtol=1e-12, atol=1e-12)
    assert float((outputs(grower) - before).abs().max()) > 1e-3


def test_detach_then_regrow_is_the_identity() -> None:
    """Laws 2 and 8: weights, statistics, slots and outputs, bit for bit."""
    grower = make(STILL, Budget(params="100%"))
    grow_to(grower, grower.space.everything())
    train(grower, steps=5)
    grower.optimizer.zero_grad()
    before = everything(grower)
    grow_to(grower, grower._indicators.seed_structure())
    event = grow_to(grower, grower.space.everything())
    after = everything(grower)
    ignored = {"/t", "/history", "/generator", "/record"}
    assert set(differences(before, after)) <= ignored
    assert event.regrown == grower.space.n_units - len(grower.history[-2].widths)
    assert event.born == 0


def test_finish_grows_in_silence() -> None:
    """Units that enter at the end put out nothing: the function is what was trained."""
    grower = run(make("default", Budget(params="80%"), updates=40), 2)
    before, width = outputs(grower), sum(grower.widths().values())
    event = grower.finish()
    assert event.born > 0
    assert event.detached == 0
    assert sum(grower.widths().values()) == width + event.born + event.regrown
    torch.testing.assert_close(outputs(grower), before, rtol=1e-12, atol=1e-12)


def grow_to(grower: Grower, keep: Tensor) -> Event:
    """An update that draws this structure."""
    grower._indicators.draw = lambda: keep.clone()  # type: ignore[method-assign]
    return grower.update()


# --- Laws 10 and 11 ---


def test_objects_keep_their_identity() -> None:
    torch.manual_seed(0)
    model = SmallResNet().double()
    optimizer = torch.optim.Adam(model.parameters())
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    grower = Grower(model, optimizer, example_inputs=batch(0)[0], budget=Budget(params="50%"), updates=6)
    run(grower)
    assert all(modules[name] is module for name, module in model.named_modules())
    assert modules.keys() == dict(model.named_modules()).keys()
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(a is b for a, b in zip(held, parameters.values(), strict=True))
    assert optimizer.state.keys() <= set(parameters.values())
    for parameter in parameters.values():
        assert isinstance(parameter, nn.Parameter)
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    assert all(not m._forward_hooks for m in model.modules())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_live_loss_does_not_disturb_the_next_backward(set_to_none: bool) -> None:
    """A graph still bound keeps the accumulators of the old shapes alive; the next gradients are right all the same."""
    grower = make(STILL, Budget(params="100%"))
    x, target = batch(0)
    total = F.cross_entropy(grower.model(x), target)
    total.backward(retain_graph=True)
    grower.optimizer.step()
    kept = F.cross_entropy(grower.model(x), target)  # alive over the update
    grow_to(grower, grower.space.everything())
    assert all(p.grad is None for p in grower.model.parameters())
    grower.optimizer.zero_grad(set_to_none=set_to_none)
    twin = copy.deepcopy(grower.model)
    for model in (grower.model, twin):
        F.cross_entropy(model(x), target).backward()
    for (name, a), b in zip(grower.model.named_parameters(), twin.parameters(), strict=True):
        assert a.grad is not None
        assert torch.equal(a.grad, b.grad), name
    grower.optimizer.step()
    with pytest.raises(RuntimeError):
        kept.backward()
    with pytest.raises(RuntimeError):
        total.backward()


def test_an_old_graph_refuses_backward_though_no_shape_changed() -> None:
    """Nothing came or went, but the gates did change: gradients at the new weights would be wrong without a word."""
    grower = make(STILL)
    x, target = batch(0)
    kept = F.cross_entropy(grower.model(x), target)
    event = grow_to(grower, grower._bank.keep)
    assert event.born == event.regrown == event.detached == 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_gradients_of_before_the_update_are_not_used_after_it() -> None:
    grower = make()
    x, target = batch(0)
    F.cross_entropy(grower.model(x), target).backward()
    grower.update()
    before = everything(grower)
    grower.optimizer.step()
    for name, parameter in grower.model.named_parameters():
        assert parameter.grad is None
        if name not in grower._gated:  # gated ones move with their indicators
            assert torch.equal(before[name], parameter)


def test_user_hooks_survive() -> None:
    grower = make(STILL, Budget(params="100%"))
    seen: list[tuple[int, ...]] = []
    accumulated: list[tuple[int, ...]] = []
    grower.model.conv2.weight.register_hook(lambda g: seen.append(tuple(g.shape)))  # type: ignore[union-attr]
    grower.model.conv2.weight.register_post_accumulate_grad_hook(  # type: ignore[union-attr]
        lambda p: accumulated.append(tuple(p.grad.shape))
    )
    train(grower, steps=1)
    grow_to(grower, grower.space.everything())
    train(grower, steps=1)
    assert seen == accumulated == [(1, 1, 3, 3), (5, 6, 3, 3)]


# --- the end of a run ---


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("updates", [1, 2, 3])
def test_short_runs(preset: str, updates: int) -> None:
    grower = run(make(preset, updates=updates))
    assert grower.finished
    assert [event.update for event in grower.history] == list(range(updates + 1))
    limit = grower.limits.params
    assert limit is not None
    assert grower.cost().params <= limit
    with pytest.raises(TorchgrowError, match=rf"the run is over: update\(\) was called {updates} times or finish"):
        grower.update()
    with pytest.raises(TorchgrowError, match=r"finish\(\) was called before; the network is final, save it with"):
        grower.finish()


def test_after_the_end_training_is_plain() -> None:
    grower = run(make())
    twin = copy.deepcopy(grower.model)
    optimizer = sgd(twin)
    optimizer.load_state_dict(copy.deepcopy(grower.optimizer.state_dict()))
    train(grower, 50, 3)
    for step in range(50, 53):
        x, target = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(twin(x), target).backward()
        optimizer.step()
    for a, b in zip(grower.model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


# --- transactions ---


def failing(error: BaseException, call: int, original: Any) -> Any:
    """A function that fails at one of its calls, and only once."""
    count = 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            raise error
        return original(*args, **kwargs)

    return wrapper


PLACES = [
    *[(torchgrow.surgery, "replace_", call) for call in (1, 2, 9)],
    *[(torchgrow.surgery, "scatter_", call) for call in (1, 5)],
    *[(torchgrow.surgery, "gather", call) for call in (1, 7)],
    (torchgrow.grower, "Fold", 1),
    (torchgrow.grower, "Event", 1),
    *[(nn.Module, "__setattr__", call) for call in (4, 9)],
    (Bank, "stage", 1),
    (Bank, "commit", 1),
    (Fold, "factors", 1),
    (torchgrow.grower.CostModel, "cost", 1),
    (torchgrow.grower.Indicators, "advance", 1),
]


@pytest.mark.parametrize(("owner", "name", "call"), PLACES, ids=lambda p: p if isinstance(p, (str, int)) else "")
@pytest.mark.parametrize(("preset", "error"), [("default", MemoryError("none left")), ("paper", KeyboardInterrupt())])
def test_a_failed_update_changes_nothing(
    owner: Any, name: str, call: int, preset: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit the old state; and the run goes on to just where it would have come without the failure."""
    grower, undisturbed = make(preset), make(preset)
    for one in (grower, undisturbed):
        run(one, 4)
        train(one, 8)
    before = everything(grower)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(error, call, getattr(owner, name)))
        with pytest.raises(type(error)):
            grower.update()
    assert differences(before, everything(grower)) == []
    for one in (grower, undisturbed):
        one.update()
        train(one, 10)
    assert differences(everything(undisturbed), everything(grower)) == []


def test_ctrl_c_while_swapping_in_waits_until_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real SIGINT in the middle of the swap: KeyboardInterrupt comes, after a whole update."""
    grower, undisturbed = run(make(), 4), run(make(), 4)
    replace_, calls = torchgrow.surgery.replace_, 0

    def interrupting(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            os.kill(os.getpid(), signal.SIGINT)
        replace_(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torchgrow.surgery, "replace_", interrupting)
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


def copy_of_update(grower: Grower) -> dict[str, Any]:
    grower.update()
    return everything(grower)


def test_ctrl_c_in_finish_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    grower = run(make(), 3)
    remove = grower._folding.remove

    def interrupting() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        remove()

    monkeypatch.setattr(grower._folding, "remove", interrupting)
    with pytest.raises(KeyboardInterrupt):
        grower.finish()
    assert grower.finished
    assert not grower.optimizer._optimizer_step_pre_hooks


def test_a_grower_that_fails_to_start_leaves_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchgrow.grower, "Fold", failing(MemoryError(), 1, Fold))
    made: list[torch.optim.Optimizer] = []
    with pytest.raises(MemoryError):
        make(optimizer=lambda m: made.append(sgd(m)) or made[0])  # type: ignore[func-returns-value]
    assert not made[0]._optimizer_step_pre_hooks
    assert not made[0]._optimizer_step_post_hooks


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a budget needs params or flops"),
        ({"params": 0}, "params=0 is not a positive whole number; use a share such as"),
        ({"params": -3}, "params=-3 is not a positive"),
        ({"flops": True}, "flops=True is not a positive"),
        ({"params": 0.36}, 'params=0.36 is not a positive whole number; did you mean params="36%"?'),
        ({"flops": 0.005}, 'did you mean flops="0.5%"?'),
        ({"params": 1.5}, "params=1.5 is not a positive whole number; use"),
        ({"params": float("nan")}, "params=nan is not a positive"),
        ({"params": float("inf")}, "params=inf is not a positive"),
        ({"params": "0%"}, "params='0%' must lie above 0% and at most at 100%"),
        ({"flops": "101%"}, "flops='101%' must lie above 0% and at most at 100%"),
        ({"params": "-5%"}, "params='-5%' is not a share"),
        ({"params": "a third"}, "params='a third' is not a share; use a share such as params=\"36%\""),
        ({"params": "36"}, "params='36' is not a share"),
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
        ({"updates": 0}, r"updates=0 must be a whole number >= 1"),
        ({"updates": 2.0}, r"updates=2\.0 must be a whole number >= 1"),
        ({"updates": True}, r"updates=True must be"),
        ({"preset": "papr"}, r"preset 'papr' is unknown; use one of \['default', 'paper'\] or a torchgrow\.Method"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    model = TwoLayers()
    arguments = {"example_inputs": torch.randn(2, 5), "budget": Budget(params="50%"), "updates": 3}
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


# --- reproducible; the presets ---


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_the_seed_decides(preset: str) -> None:
    first, again, other = (run(make(preset, seed=seed)) for seed in (0, 0, 1))
    a, b, c = (
        {"history": [timeless(e) for e in g.history], **dict(g.model.state_dict()), "keep": g._bank.keep}
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


@pytest.mark.parametrize(
    "budget", [Budget(params="50%"), Budget(flops="40%"), Budget(params="50%", flops="40%")], ids=str
)
@pytest.mark.parametrize("ramp", [0.0, 0.5, 1.0])
def test_the_plan_is_kept(budget: Budget, ramp: float) -> None:
    """At every update the cost is within a line from the seed's to the budget's."""
    grower = run(make(Method(ramp=ramp, settle=0.0), budget, updates=10))
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
    "budget", [Budget(params="50%"), Budget(flops="30%"), Budget(params="50%", flops="20%")], ids=str
)
def test_paper_to_the_letter(budget: Budget) -> None:
    """Eq 4: lambda = lambda^base (u - u_G). Eq 7: beta = gamma^t_s. q ~ Bernoulli(sigma(beta s)), anew every time."""
    grower = make("paper", budget, updates=12)
    frame = grower.frame_cost
    t = torch.zeros(grower.space.n_units)
    indicators, space = grower._indicators, grower.space
    assert float(torch.sigmoid(indicators.s).sum()) == pytest.approx(
        len(grower.widths()) + (~space.removable).sum() / 2
    )
    for epoch in range(11):
        event = grower.history[-1]
        gaps = []
        if grower.limits.params is not None:
            gaps.append((1 - grower.limits.params / frame.params) - (1 - event.params / frame.params))
        if grower.limits.flops is not None:
            gaps.append((1 - grower.limits.flops / frame.flops) - (1 - event.flops / frame.flops))
        assert event.pressure == pytest.approx(0.5 * max(gaps), rel=1e-12)
        assert grower._penalty == event.pressure
        train(grower, 2 * epoch)
        expected = torch.sigmoid(100 ** (t / 12) * indicators.s)
        twin = torch.Generator()
        twin.set_state(indicators.generator.get_state())
        q = (torch.rand(space.n_units, generator=twin, dtype=torch.float64) < expected) | ~space.removable
        grower.update()
        if epoch < 10:  # then it is brought to the budget
            for group in range(space.n_groups):
                units = torch.nonzero(space.group_of == group).flatten()
                if not q[units].any():
                    q[units[expected[units].argmax()]] = True
            assert torch.equal(grower._bank.keep, q)
        t += grower._bank.keep
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

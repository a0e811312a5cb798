"""What a run begins with: the whole frame, some of its units, or a network that was cut from it before."""

import copy
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layered
import torchgrow
from growing import batch, differences, everything, sgd, train
from layered import Stages
from oracle import SmallResNet
from torchgrow import Budget, Grower, StructureError, TorchgrowError, load_checkpoint, save_checkpoint
from torchgrow.policies import Default, Paper, Policy, Shrink

X = batch(0)[0]


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


def fresh() -> nn.Module:
    return SmallResNet().double()


def learnt(seed: int = 0) -> nn.Module:
    """A network with a few steps of training, so that its norms have seen something."""
    torch.manual_seed(seed)
    model = fresh()
    optimizer = sgd(model)
    for step in range(3):
        x, target = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    return model


def outputs(model: nn.Module) -> Tensor:
    """In evaluation mode; the mode stays."""
    mode = model.training
    model.eval()
    with torch.no_grad():
        found: Tensor = model(X)
    model.train(mode)
    return found


def begin(model: nn.Module, start: Any = "frame", share: str = "40%", updates: int = 8, **more: Any) -> Grower:
    return Grower(
        model, sgd(model), example_inputs=X, budget=Budget(params=share), updates=updates, start=start, **more
    )


def run(grower: Grower, first: int = 0) -> list[int]:
    """Train to the end; the parameters after every update."""
    sizes = []
    for epoch in range(first, grower.updates):
        train(grower, 2 * epoch)
        sizes.append(grower.update().params)
    if not grower.finished:
        grower.finish()
    return sizes


POLICIES = [
    Shrink(),
    Shrink(importance="group_norm", allocation="global"),
    Shrink(importance="l1", allocation="levelled", align=2),
    Shrink(importance="bn_scale", until=0.9, power=1),
    Shrink(importance="random"),
    Default(),
    Paper(),
    Paper(relaxation="gumbel"),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_the_frame_as_a_start_computes_what_it_did(policy: Policy) -> None:
    """Also under gates, which the raw weights make up for; and the end is within the budget as ever."""
    model = learnt()
    before = outputs(model)
    grower = begin(model, policy=policy)
    assert grower.cost() == grower.frame_cost
    same(outputs(model), before)
    run(grower)
    assert grower.limits.params is not None
    assert grower.cost().params <= grower.limits.params


@pytest.mark.parametrize("slots", ["sgd", "schedulefree"])
def test_a_start_under_gates_takes_copies_of_weights_along(slots: str) -> None:
    """The optimizer steps on the raw weights: with a rate of 0 nothing moves, whatever it holds."""
    model = learnt()
    model.eval()  # statistics stay
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    if slots == "schedulefree":
        optimizer = pytest.importorskip("schedulefree").SGDScheduleFree(model.parameters(), lr=0.0)
        optimizer.train()  # type: ignore[attr-defined]
    F.cross_entropy(model(X), batch(0)[1]).backward()
    optimizer.step()  # its state is made before the grower is
    before = outputs(model)
    grower = Grower(
        model, optimizer, example_inputs=X, budget=Budget(params="40%"), updates=4, start="frame", policy=Paper(lr=0.0)
    )
    same(outputs(model), before)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(X), batch(0)[1]).backward()
        optimizer.step()
    same(outputs(model), before)
    assert grower.policy.gate is not None
    assert bool((grower.policy.gate[grower.space.removable] < 1).all()), "there is something to make up for"


def test_a_plan_falls_from_the_frame_and_no_weight_is_lost_on_the_way() -> None:
    """Sizes never rise, and what stays is, without a step that moves it, bit for bit what it was."""
    model = learnt()
    whole = copy.deepcopy(model)
    grower = begin(model, policy=Shrink(until=0.5))
    for group in grower.optimizer.param_groups:
        group["lr"] = 0.0
    view = grower.run.view
    planned = [int(grower.policy.planned(view(number))[0]) for number in range(1, 9)]  # type: ignore[index]
    assert all(after < before for before, after in itertools.pairwise([grower.frame_cost.params, *planned[:4]]))
    sizes = run(grower)
    assert all(0.8 * plan <= size <= plan for size, plan in zip(sizes, planned, strict=True))
    assert len(set(sizes[3:])) == 1, "the structure rests after half of the updates"
    space = torchgrow.trace(whole, X)
    oracle = copy.deepcopy(whole)
    torchgrow.shrink_(oracle, space, grower.keep)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, oracle.get_parameter(name)), name


def test_the_least_important_leave_first() -> None:
    """Units with no effect at all are the ones that go."""
    first, second = nn.Linear(5, 12), nn.Linear(12, 3)
    with torch.no_grad():
        second.weight[:, ::2] = 0.0
        first.weight[::2] *= 1e-3
    model = nn.Sequential(first, nn.ReLU(), second).double()
    x, labels = torch.randn(8, 5).double(), torch.arange(8) % 3
    for importance in ("taylor", "l1", "l2", "group_norm"):
        own = copy.deepcopy(model)
        optimizer = torch.optim.SGD(own.parameters(), lr=1e-9)
        policy = Shrink(until=1.0, importance=importance)
        grower = Grower(
            own, optimizer, example_inputs=x, budget=Budget(params="60%"), updates=6, start="frame", policy=policy
        )
        for _ in range(6):
            optimizer.zero_grad()
            F.cross_entropy(own(x), labels).backward()
            optimizer.step()
            grower.update()
        kept = grower.space.unit_of["0.weight", 0][grower.keep[grower.space.unit_of["0.weight", 0]]]
        gone = set(range(12)) - {int(torch.nonzero(grower.space.unit_of["0.weight", 0] == u)) for u in kept}
        assert gone, importance
        assert all(place % 2 == 0 for place in gone), importance


def test_some_units_as_a_start() -> None:
    """The live network is that of the keep vector, with its weights; the rest waits in the bank."""
    model = learnt()
    space = torchgrow.trace(model, X)
    keep = torchgrow.trace(model, X).everything()
    keep[torch.nonzero(space.removable).flatten()[::3]] = False
    oracle = copy.deepcopy(model)
    torchgrow.shrink_(oracle, space, keep)
    grower = begin(model, start=keep, share="90%")
    assert torch.equal(grower.keep, keep)
    same(outputs(model), outputs(oracle))
    assert isinstance(grower.policy, Default), "it is within the budget, so it grows"
    for epoch in range(3):
        train(grower, 2 * epoch)
        grower.update()
        assert not bool((keep & ~grower.keep).any()), "while the plan rises nobody that lives has to go"
    run(grower, first=3)


@pytest.mark.parametrize("budgets", [("30%", "60%", Default), ("60%", "30%", Shrink)], ids=["grow on", "shrink on"])
def test_a_network_that_was_cut_as_a_start(budgets: tuple[str, str, type[Policy]], tmp_path: Path) -> None:
    """One call: what it has learnt is taken into a fresh frame, and the record is that of the frame."""
    first, then, kind = budgets
    grown = begin(learnt(), share=first)
    run(grown)
    torchgrow.save(grown.model, tmp_path / "first")
    small = torchgrow.load(tmp_path / "first", fresh)
    frame = learnt(seed=5)
    grower = begin(frame, start=small, share=then)
    assert torch.equal(grower.keep, grown.keep)
    same(outputs(frame), outputs(small))
    assert type(grower.policy) is kind
    run(grower)
    assert grower.limits.params is not None
    assert grower.cost().params <= grower.limits.params
    torchgrow.save(frame, tmp_path / "then")
    same(outputs(torchgrow.load(tmp_path / "then", fresh)), outputs(frame))


def test_a_finished_network_shrinks_on_as_its_own_frame(tmp_path: Path) -> None:
    grown = begin(learnt(), share="60%")
    run(grown)
    model, before = grown.model, outputs(grown.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = Grower(
            model,
            sgd(model),
            example_inputs=X,
            budget=Budget(params=grown.cost().params // 2),
            updates=4,
            start="frame",
        )
    same(outputs(model), before)
    run(again)
    torchgrow.save(model, tmp_path)
    same(outputs(torchgrow.load(tmp_path, fresh)), outputs(model))


@pytest.mark.parametrize("policy", [Shrink(until=0.8), Shrink(importance="l2"), Paper()], ids=str)
def test_a_resumed_run_is_the_unbroken_one(policy: Policy, tmp_path: Path) -> None:
    whole = begin(learnt(), policy=policy)
    run(whole)
    first = begin(learnt(), policy=policy)
    for epoch in range(3):
        train(first, 2 * epoch)
        first.update()
    save_checkpoint(tmp_path, first)
    second = begin(learnt(), policy=policy)
    load_checkpoint(tmp_path, second)
    run(second, first=3)
    assert not differences(everything(whole, run=False), everything(second, run=False))


def test_a_state_of_another_start_is_refused() -> None:
    state = begin(learnt()).state_dict()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*looks trained")
        seed = begin(learnt(), start="seed", preset="shrink")
        seed.load_state_dict(seed.state_dict())
        with pytest.raises(TorchgrowError, match=r"run with start=frame, this Grower has seed; construct it with"):
            seed.load_state_dict(state)


@pytest.mark.parametrize("policy", [Shrink(until=0.7), Shrink(allocation="levelled", until=0.7)], ids=str)
def test_layers_leave_too(policy: Policy) -> None:
    torch.manual_seed(0)
    model, (x, labels) = Stages().double(), layered.batch()
    optimizer = sgd(model)
    model.eval()
    before = model(x)
    grower = Grower(
        model, optimizer, example_inputs=x, budget=Budget(params="40%"), updates=8, start="frame", policy=policy,
        depth=True,
    )  # fmt: skip
    assert grower.depths() == grower.full_depths()
    same(model.eval()(x), before)
    for _ in range(8):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        grower.update()
    assert sum(grower.depths().values()) < sum(grower.full_depths().values())
    assert grower.limits.params is not None
    assert grower.cost().params <= grower.limits.params


# --- teacher, loss, statistics ---


@pytest.mark.parametrize("start", ["frame", "seed"])
def test_the_teacher_is_the_frame_as_it_was(start: str) -> None:
    model = learnt()
    before = outputs(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*looks trained")
        grower = begin(model, start=start, policy=Paper())
    teacher = grower.teacher()
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    run(grower)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    same(teacher(X), before)
    assert not any(id(tensor) in own for tensor in (*teacher.parameters(), *teacher.buffers()))
    assert teacher.state_dict().keys() == SmallResNet().state_dict().keys()
    with pytest.raises(TorchgrowError, match=r"trained since the run began.*call teacher = grower\.teacher\(\) before"):
        grower.teacher()


def test_statistics_are_those_of_the_batches() -> None:
    """Means of what the norm sees now; weights and modes stay."""
    model = learnt()
    grower = begin(model)
    run(grower)
    weights = [p.clone() for p in model.parameters()]
    model.eval()
    grower.recalibrate([X, (batch(1)[0], batch(1)[1])])
    assert not model.training
    assert all(map(torch.equal, weights, model.parameters()))
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    seen: list[Tensor] = []
    hook = norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].mean((0, 2, 3))))
    for x in (X, batch(1)[0]):
        model(x)
    hook.remove()
    torch.testing.assert_close(norm.running_mean, torch.stack(seen).mean(0))


def test_statistics_that_are_not_there_are_told_of() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    grower = Grower(model, sgd(model), example_inputs=torch.randn(2, 3), budget=Budget(params="50%"), updates=4)
    for recalibrate in (grower.recalibrate, lambda batches: torchgrow.recalibrate(model, batches)):
        with pytest.warns(UserWarning, match="^Sequential has no batch norms with running statistics, so") as told:
            recalibrate(iter(()))
        assert [warning.filename for warning in told] == [__file__]


# --- what is no start ---


def test_what_is_no_start_is_refused() -> None:
    model = learnt()
    before = copy.deepcopy(model.state_dict())
    space = torchgrow.trace(model, X)
    nothing = torch.zeros(space.n_units, dtype=torch.bool) | ~space.removable
    cases: list[tuple[Any, type[Exception], str]] = [
        ("whole", TorchgrowError, r"start='whole' is unknown; use \"seed\" or \"frame\""),
        (3, TorchgrowError, r"a network that was cut from such a model before, got int"),
        (torch.ones(3, dtype=torch.bool), StructureError, r"keep must be a bool tensor of shape"),
        (nothing, StructureError, r"keep leaves axis|start leaves nothing of"),
        (learnt(), StructureError, r"torchgrow did not cut, so nothing says which units"),
        (cut_linear(), StructureError, r"start is"),
    ]
    for start, kind, text in cases:
        with pytest.raises(kind, match=text):
            begin(model, start=start)
    assert not differences(before, model.state_dict())
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    for start in ("frame", cut_linear()):
        with pytest.raises(TorchgrowError, match="is on the meta device"):
            Grower(
                empty,
                torch.optim.SGD(empty.parameters(), 0.1),
                example_inputs=torch.randn(2, 4),
                budget=Budget(params="50%"),
                updates=3,
                start=start,
            )


def cut_linear() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    space = torchgrow.trace(model, torch.randn(2, 4))
    torchgrow.shrink_(model, space, torch.arange(space.n_units) != 0)
    return model


# --- found by a reviewer ---


def scaled() -> nn.Module:
    """48 of 64 hidden units hardly count."""
    torch.manual_seed(0)
    first, second = nn.Linear(8, 64), nn.Linear(64, 3)
    with torch.no_grad():
        first.weight[:48] *= 1e-3
        first.bias[:48] *= 1e-3
    return nn.Sequential(first, nn.ReLU(), second)


@pytest.mark.parametrize(("updates", "early"), [(1, False), (4, True), (2, False)])
def test_units_leave_by_importance_however_short_the_run(updates: int, early: bool) -> None:
    model, x = scaled(), torch.randn(16, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    grower = Grower(
        model,
        optimizer,
        example_inputs=x,
        budget=Budget(params="25%"),
        updates=updates,
        start="frame",
        policy=Shrink(importance="l1"),
    )
    for _ in range(0 if early else updates):
        F.cross_entropy(model(x), torch.arange(16) % 3).backward()
        optimizer.step()
        grower.update()
    if not grower.finished:
        grower.finish()
    assert bool((model.get_parameter("0.weight").abs().sum(1) > 0.1).all())


def test_the_teacher_of_a_smaller_network_is_that_network() -> None:
    """Not the frame around it, which has learnt nothing; and after load_state_dict it is what was loaded."""
    grown = begin(learnt(), share="30%")
    run(grown)
    before = outputs(grown.model)
    teacher = begin(learnt(seed=5), start=grown.model, share="60%").teacher()
    same(teacher(X), before)
    model, other = learnt(), learnt(seed=7)
    grower = begin(model)
    model.load_state_dict(other.state_dict())
    same(grower.teacher()(X), outputs(other))


def test_statistics_survive_bad_batches() -> None:
    model = learnt()
    grower = begin(model)
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    norm.eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TorchgrowError, match="recalibrate was given no batches, so statistics are as before"):
        grower.recalibrate([])
    for batches in ([torch.randn(2, 7, 6, 6).double()], [X, torch.randn(2, 7, 6, 6).double()]):
        with pytest.raises(RuntimeError):
            grower.recalibrate(batches)
    assert not differences(before, model.state_dict())
    assert norm.momentum == 0.1
    assert not norm.training
    for given in ({"x": X}, [(X,), batch(0)[1]]):
        grower.recalibrate([given])
    assert not norm.training
    assert norm.momentum == 0.1


def test_an_optimizer_of_other_weights_is_refused() -> None:
    grown = begin(learnt(), share="30%")
    run(grown)
    frame = learnt(seed=5)
    optimizer = sgd(frame)
    F.cross_entropy(frame(X), batch(0)[1]).backward()
    optimizer.step()
    before = copy.deepcopy(frame.state_dict())
    with pytest.raises(torchgrow.OptimizerError, match=r"has stepped on weights that start= replaces.*build the optim"):
        Grower(frame, optimizer, example_inputs=X, budget=Budget(params="60%"), updates=4, start=grown.model)
    assert not differences(before, frame.state_dict())


def test_a_transformer_with_a_layer_left_out_shrinks_on() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double(), torch.randn(2, 3, 8).double()
    space = torchgrow.trace(model, x, depth=True)
    keep = space.everything()
    keep[space.blocks[-1].unit] = False
    torchgrow.shrink_(model, space, keep)
    before = model.eval()(x)
    budget = Budget(params=sum(parameter.numel() for parameter in model.parameters()) - 50)
    grower = Grower(model, sgd(model), example_inputs=x, budget=budget, updates=2, start="frame", depth=True)
    same(model(x), before)
    assert grower.finish().params <= budget.limits(grower.frame_cost).params  # type: ignore[operator]


def test_a_network_cut_twice_with_layers_left_out_goes_on(tmp_path: Path) -> None:
    """Into the first frame, and as its own: what a left-out layer notes of other widths says nothing any more."""
    x = layered.batch()[0]

    def shrunk(model: nn.Module, share: str, start: Any = "frame", **more: Any) -> Grower:
        policy = Shrink(importance="l1", until=0.5)
        optimizer = sgd(model)
        budget = Budget(params=share)
        grower = Grower(
            model, optimizer, example_inputs=x, budget=budget, updates=2, start=start, policy=policy, depth=True, **more
        )
        grower.finish()
        return grower

    def seen(model: nn.Module) -> Tensor:
        with torch.no_grad():
            y: Tensor = model.eval()(x)
        return y

    torch.manual_seed(0)
    model = Stages().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / 4)
    once = shrunk(model, "45%")
    assert once.depths() != once.full_depths(), "a layer is gone"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shrunk(model, "70%")
        torchgrow.save(model, tmp_path)
        small = torchgrow.load(tmp_path, lambda: Stages().double())
        same(seen(small), seen(model))
        frame = Stages().double()
        on = Grower(
            frame, sgd(frame), example_inputs=x, budget=Budget(params="90%"), updates=3, start=small, depth=True
        )
    same(seen(frame), seen(small))
    assert sum(on.depths().values()) < sum(on.full_depths().values())

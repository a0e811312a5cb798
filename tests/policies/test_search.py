"""Search inside one run: fair turns, always exactly on the budget, the best mean loss stays, and all of it resumes."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import layered
from growing import batch, differences, everything, make, sgd, train
from torchgrow import Budget, Grower, TorchgrowError, load_checkpoint, save_checkpoint
from torchgrow.policies import Late, Search, named
from torchgrow.policies.search import Span, _sizes, _turns
from torchgrow.structure.cost import CostModel

QUICK = Search(candidates=3, warmup=0.1, passes=2)


def stages_grower(policy: Search = QUICK, updates: int = 40) -> Grower:
    torch.manual_seed(0)
    model = layered.Stages(blocks=4).double()
    x = layered.batch()[0]
    return Grower(
        model, sgd(model), example_inputs=x, budget=Budget(params="60%"), updates=updates, policy=policy, depth=True
    )


def step(grower: Grower, number: int) -> None:
    """An optimizer step, whose loss is observed."""
    x, target = layered.batch(number)
    grower.optimizer.zero_grad()
    loss = F.cross_entropy(grower.model(x), target)
    loss.backward()
    grower.optimizer.step()
    grower.observe(loss)


def searched(grower: Grower, first: int, updates: int) -> Grower:
    """Two steps to every update."""
    for update in range(first, updates):
        step(grower, 2 * update)
        step(grower, 2 * update + 1)
        grower.update()
    return grower


def policy_of(grower: Grower) -> Any:
    return grower.policy


# --- turns ---


def test_a_plan_worked_by_hand() -> None:
    """20 updates, 2 of them to warm up, 8 for two rungs: three candidates there and back, then the two that are left.

    The first rung ends by update 2 + (10 - 2) / 2 = 6, too early for 6 turns, so that there is no room for three.
    """
    assert Search(candidates=3, warmup=0.1, passes=2)._planned(3, 20) == []
    spans = Search(candidates=3, warmup=0.1, passes=2)._planned(3, 30)  # 3 to warm up; rungs to 9 and 15
    warm = [Span(-1, 0, 0), Span(-1, 1, 1), Span(-1, 2, 2)]
    first = [Span(0, turn, place) for turn, place in enumerate([0, 1, 2, 2, 1, 0])]
    second = [Span(1, turn, place) for turn, place in enumerate([0, 1, 1, 0])]  # 6 updates: 1 for each of 4 turns
    assert spans == warm + first + second


@pytest.mark.parametrize("count", [2, 3, 5, 8])
@pytest.mark.parametrize("passes", [2, 4, 8])
def test_turns_cancel_a_line_and_four_of_them_nearly_a_curve(count: int, passes: int) -> None:
    order = _turns(count, passes)
    middle = (len(order) - 1) / 2
    lines, curves = [0.0] * count, [0.0] * count
    for time, place in enumerate(order):
        lines[place] += time - middle
        curves[place] += (time - middle) ** 2
    assert lines == [0.0] * count
    assert [order.count(place) for place in range(count)] == [passes] * count
    if passes == 4:
        assert max(curves) < 1.25 * min(curves)  # there and back alone: from 6 times, for two, to 200
    if passes == 8:
        assert max(curves) < 1.06 * min(curves)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("updates", [60, 118, 240])
def test_every_candidate_has_the_same_share_of_a_rung(count: int, updates: int) -> None:
    policy = Search()
    spans = policy._planned(count, updates)
    for rung, size in enumerate(_sizes(count)[:-1]) if spans else ():
        places = [span.place for span in spans if span.rung == rung]
        assert {places.count(place) for place in range(size)} == {len(places) // size}
    assert len(spans) <= updates // 2


def test_sizes_halve() -> None:
    assert _sizes(8) == [8, 4, 2, 1]
    assert _sizes(6) == [6, 3, 2, 1]
    assert _sizes(5) == [5, 3, 2, 1]
    assert _sizes(2) == [2, 1]


# --- who wins ---


@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_lowest_loss_wins_whoever_comes_first(best: int) -> None:
    """Planted losses: they fall in a line, and one candidate's are lower by less than they fall in a turn."""
    grower = stages_grower(updates=60)
    policy = policy_of(grower)
    keeps = policy._keeps
    for update in range(32):
        live = next(number for number, keep in enumerate(keeps) if torch.equal(keep, grower.keep))
        train_once(grower, update)
        for part in range(2):
            grower.observe(100 - 2.0 * update - part - 0.5 * (live == best))
        grower.update()
    assert policy_of(grower).left == [best]
    assert torch.equal(grower.keep, keeps[best])


def train_once(grower: Grower, number: int) -> None:
    x, target = layered.batch(number)
    grower.optimizer.zero_grad()
    F.cross_entropy(grower.model(x), target).backward()
    grower.optimizer.step()


def test_mean_losses_worked_by_hand() -> None:
    """Two candidates, no warm-up: A B B A with two updates each; of the four losses of a turn the first is skipped."""
    grower = stages_grower(Search(candidates=2, warmup=0, passes=2, skip=0.25), updates=16)
    assert [span.place for span in policy_of(grower)._spans] == [0, 0, 1, 1, 1, 1, 0, 0]
    told = [[99, 8], [7, 6], [99, 5], [5, 5], [99, 4], [4, 4], [99, 3], [2, 1]]
    for number, losses in enumerate(told):
        train_once(grower, number)
        for loss in losses:
            grower.observe(torch.tensor(float(loss), requires_grad=True))
        grower.update()
    names = policy_of(grower)._names
    assert policy_of(grower).losses == {names[0]: [(7 + 2) / 2], names[1]: [(5 + 4) / 2]}
    assert policy_of(grower).left == [0]  # equal means: the first one
    train_once(grower, 8)
    grower.update()  # nobody has to observe any more


def test_a_loss_that_is_not_finite_is_worse_than_any_other() -> None:
    grower = stages_grower(Search(candidates=2, warmup=0, passes=2), updates=8)
    for number, loss in enumerate([float("nan"), 5.0, 5.0, 1.0]):
        train_once(grower, number)
        grower.observe(loss)
        grower.update()
    assert policy_of(grower).left == [1]


# --- laws of every policy ---


def test_every_window_is_exactly_on_the_budget_and_the_winner_stays() -> None:
    grower = stages_grower()
    costs, limit, seen = CostModel(grower.space), grower.limits.params, set()
    assert limit is not None
    keeps = policy_of(grower)._keeps
    for update in range(24):
        keep = grower.keep
        assert any(torch.equal(keep, one) for one in keeps)
        assert costs.cost(keep).params <= limit
        for unit in torch.nonzero(~keep).flatten().tolist():
            more = keep.clone()
            more[unit] = True
            owner = int(grower.space.owner[unit])
            assert costs.cost(more).params > limit or (owner >= 0 and not keep[owner])
        seen.add(tuple(keep.tolist()))
        searched(grower, update, update + 1)
    assert len(seen) == 3
    final = len(policy_of(grower)._spans)
    assert all(event.born == event.regrown == event.detached == 0 for event in grower.history[final + 1 :])
    assert torch.equal(grower.keep, keeps[policy_of(grower).left[0]])
    assert policy_of(grower).final(40) == final <= 20


def test_weights_moments_and_statistics_wait_in_the_bank() -> None:
    """What only the first candidate has comes back as it left, though others have trained meanwhile."""
    grower = stages_grower(Search(candidates=2, warmup=0, passes=2), updates=16)
    first, second = policy_of(grower)._keeps
    alone, bank = first & ~second, grower.run.live.bank
    assert bool(alone.any())

    def own() -> dict[str, torch.Tensor]:
        full, slots = bank.stored({}, {})
        tensors = {**full, **{f"{name} {key}": store for (name, key), store in slots.items()}}
        found = {}
        for name, store in tensors.items():
            for axis in grower.space.cut_axes[name.split()[0]]:
                units = grower.space.unit_of.get((name.split()[0], axis))
                if units is not None and axis >= 0:
                    mine = torch.nonzero((units >= 0) & alone[units.clamp(min=0)]).flatten()
                    found[f"{name} {axis}"] = store.read({}).index_select(axis, mine).clone()
        return {name: tensor for name, tensor in found.items() if tensor.numel()}

    searched(grower, 0, 2)
    left = own()
    searched(grower, 2, 6)
    assert torch.equal(grower.keep, first)
    assert left
    assert any(name.split()[1] == "momentum_buffer" for name in left)
    assert any("running_var" in name for name in left)
    assert not differences(left, own())


@pytest.mark.parametrize("stop", [7, 12])
def test_a_resumed_run_is_the_unbroken_one(stop: int, tmp_path: Path) -> None:
    """Law 4, from the middle of a turn with losses that were observed and not yet counted."""
    whole = searched(stages_grower(), 0, 24)
    first = searched(stages_grower(), 0, stop)
    step(first, 2 * stop)
    save_checkpoint(tmp_path, first)
    second = stages_grower()
    load_checkpoint(tmp_path, second)
    step(second, 2 * stop + 1)
    second.update()
    searched(second, stop + 1, 24)
    assert not differences(everything(whole, run=False), everything(second, run=False))
    assert len(policy_of(second).left) == 1


def test_a_state_of_too_many_candidates_is_damaged() -> None:
    grower = searched(stages_grower(), 0, 20)
    state = grower.state_dict()
    state["policy"]["left"] = [0, 1, 2]
    with pytest.raises(TorchgrowError, match=r"of Search is damaged: left must be 1 of 3 candidates, rising"):
        stages_grower().load_state_dict(state)


def test_how_many_are_left_is_known_from_the_updates() -> None:
    policy = policy_of(stages_grower())
    for number in range(len(policy._spans)):
        assert len(policy.left) == policy._left_after(number)
        policy._listen(number, (1.0,))
    assert len(policy.left) == policy._left_after(len(policy._spans)) == policy._left_after(39) == 1


def test_without_layers_and_ended_early() -> None:
    grower = make(policy=Search(candidates=2, passes=2), updates=20)
    for update in range(4):
        x, target = batch(update)
        grower.optimizer.zero_grad()
        loss = F.cross_entropy(grower.model(x), target)
        loss.backward()
        grower.optimizer.step()
        grower.observe(loss)
        grower.update()
    live = grower.keep
    grower.finish()
    assert torch.equal(grower.keep, live)  # it is on the budget as it is


# --- what is refused ---


def test_a_loss_has_to_be_observed() -> None:
    grower = stages_grower()
    train_once(grower, 0)
    before = everything(grower, run=False)
    text = "Search judges by training losses, and none was observed since the last update; call grower.observe(loss)"
    with pytest.raises(TorchgrowError, match=re.escape(text)):
        grower.update()
    assert not differences(before, everything(grower, run=False))
    grower.observe(1.0)
    grower.update()


@pytest.mark.parametrize(
    ("loss", "found"), [(torch.ones(2), "a tensor (2,)"), (True, "bool"), ("1", "str"), (None, "NoneType")]
)
def test_a_loss_is_one_number(loss: Any, found: str) -> None:
    for grower in (stages_grower(), make()):
        with pytest.raises(TorchgrowError, match=re.escape(f"one number, got {found}; call grower.observe(loss) with")):
            grower.observe(loss)


def test_other_policies_do_not_listen() -> None:
    grower = make()
    train(grower)
    grower.observe(1.0)
    assert grower.run.state.losses == []
    grower.update()


def test_too_few_updates_try_fewer_or_none() -> None:
    with pytest.warns(UserWarning, match=re.escape("Search tries 2 of 3 shapes, as updates=20 leaves no turn")) as said:
        grower = stages_grower(updates=20)
    assert len(policy_of(grower)._keeps) == 2
    enough = int(re.findall(r"updates=(\d+)\)", str(said[0].message))[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(policy_of(stages_grower(updates=enough))._keeps) == 3
    with pytest.raises(TorchgrowError, match=re.escape(f"Grower(..., updates={enough}) has room for 3")):
        stages_grower(updates=4)


def test_a_start_and_a_model_of_one_shape_are_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 2))
    x, optimizer = torch.randn(2, 3), torch.optim.SGD(model.parameters(), 0.1)
    asked: dict[str, Any] = {"example_inputs": x, "budget": Budget(params="50%"), "updates": 100}
    with pytest.raises(TorchgrowError, match="this model has one shape at this budget, so that there is nothing to"):
        Grower(model, optimizer, preset="search", **asked)
    with pytest.raises(TorchgrowError, match=r"Search begins with shapes of its own; with start= give policy="):
        Grower(model, optimizer, preset="search", start="frame", **asked)
    assert Grower(model, optimizer, policy=Late(), **asked)


def test_by_name() -> None:
    assert vars(named("search:until=0.3,candidates=4")) == vars(Search(until=0.3, candidates=4))
    with pytest.raises(TorchgrowError, match=re.escape("Search(passes=3): passes must be 2, 4, 8 or 16")):
        Search(passes=3)

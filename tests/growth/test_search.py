"""Search: successive halving as written out, candidates that are plain networks of the budget, costs that add up."""

import itertools
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchgrow
from growing import differences
from layered import Stages, batch
from oracle import SmallResNet
from torchgrow import Budget, BudgetError, Grower, Search, StructureError, TorchgrowError, TrainingError, Trial, measure
from torchgrow.policies import Shape
from torchgrow.structure.cost import CostModel

X = batch()[0].float()
HALF = Budget(params="50%")


def stages() -> nn.Module:
    return Stages(blocks=4)


def nothing(trial: Trial, more: int) -> float:
    return 1.0


def searched(train: Any = nothing, **settings: Any) -> Search:
    given: dict[str, Any] = {"example_inputs": X, "length": 10, "candidates": 6, "depth": True, **settings}
    return torchgrow.search(given.pop("factory", stages), given.pop("budget", HALF), train=train, **given)


def halving(losses: Sequence[Sequence[float]], rungs: int) -> tuple[list[int], int]:
    """How many rungs each trial is trained for, and the winner; losses[trial][rung]. As one would explain it."""
    left, trained = list(range(len(losses))), [0] * len(losses)
    for rung in range(rungs):
        for trial in left:
            trained[trial] += 1
        worst_first = sorted(left, key=lambda t: (not math.isfinite(losses[t][rung]), losses[t][rung], t), reverse=True)
        goes = len(left) - 1 if rung == rungs - 1 else len(left) // 2
        for trial in worst_first[:goes]:
            left.remove(trial)
    return trained, left[0]


@pytest.mark.parametrize("seed", range(9))
def test_the_better_half_goes_on_as_written_out(seed: int) -> None:
    """With ties, and with losses that are no numbers; costs are those of what was trained."""
    generator = torch.Generator().manual_seed(seed)
    rungs = [(0.2, 0.3, 0.5), (0.5,), (0.1, 0.2, 0.3, 0.4, 1.0)][seed % 3]
    losses = torch.randint(0, 4, (6, len(rungs)), generator=generator).double()
    losses[torch.rand(6, len(rungs), generator=generator) < 0.1] = torch.nan
    losses[0], losses[5] = losses[0].nan_to_num(2.0), losses[5].nan_to_num(2.0)
    calls: list[tuple[int, int]] = []

    def train(trial: Trial, more: int) -> float:
        calls.append((trial.number, more))
        return float(losses[trial.number, len(trial.losses)])

    search = searched(train, rungs=rungs, samples=7)
    order = [trial.number for trial in search]
    expected, winner = halving(losses.tolist(), len(rungs))
    at = [round(10 * share) for share in rungs]
    assert [len(trial.losses) for trial in search.trials] == expected
    assert [trial.done for trial in search.trials] == [at[count - 1] for count in expected]
    assert search.winner.number == winner
    assert order == [number for number, _ in calls]
    total = sum(3 * search.trials[number].cost.flops * 7 * more for number, more in calls)
    assert search.training_flops == total
    assert search.dense_flops == 3 * search.frame_cost.flops * 7 * 10
    assert (total + 3 * search.winner.cost.flops * 70) / search.dense_flops <= search.most * (1 + 1e-12)
    assert [trial.model is not None for trial in search.trials] == [n == winner for n in range(6)]


def test_the_cost_is_what_the_trainings_cost() -> None:
    """Counted by the loop itself: 3 x what `measure` says of the network at hand, for each sample."""
    spent = 0

    def train(trial: Trial, more: int) -> float:
        nonlocal spent
        assert trial.model is not None
        spent += 3 * measure(trial.model, X).flops * len(X) * more
        return step_by_step(trial, more)

    search = searched(train, samples=len(X))
    search.run()
    assert search.training_flops == spent > 0


def step_by_step(trial: Trial, more: int) -> float:
    """Steps of SGD, with an optimizer that is kept."""
    assert trial.model is not None
    if not trial.memory:
        trial.memory["optimizer"] = torch.optim.SGD(trial.model.parameters(), 0.05, momentum=0.9)
    total = 0.0
    for step in range(trial.done, trial.done + more):
        x, target = batch(step)
        loss = F.cross_entropy(trial.model(x.float()), target)
        trial.memory["optimizer"].zero_grad()
        loss.backward()
        trial.memory["optimizer"].step()
        total += loss.item()
    return total / more


def test_a_winner_has_trained_as_its_shape_alone_would() -> None:
    """Weights and optimizer are kept from rung to rung, and other trials do not get in between."""
    search = searched(step_by_step)
    best = search.run()
    alone = Trial(0, "alone", best.keep, best.cost, {}, {}, model=search.fresh(best))
    for _ in range(best.done):
        step_by_step(alone, 1)
        alone.done += 1
    assert best.model is not None
    assert alone.model is not None
    assert not differences(dict(best.model.state_dict()), dict(alone.model.state_dict()))
    again = searched(step_by_step)
    assert again.run().number == best.number
    assert [trial.losses for trial in again.trials] == [trial.losses for trial in search.trials]


@pytest.mark.parametrize("budget", [HALF, Budget(flops="30%"), Budget(params="60%", flops="50%")], ids=str)
def test_candidates_are_plain_networks_of_the_budget(budget: Budget) -> None:
    search = searched(budget=budget)
    costs, limits = CostModel(search.space), budget.limits(search.frame_cost).tensor()
    shapes = set()
    for trial in search.trials:
        model = search.fresh(trial)
        assert type(model) is Stages
        assert measure(model, X) == trial.cost
        assert sum(p.numel() for p in model.parameters()) == trial.cost.params
        assert bool((costs.both(costs.live(trial.keep)) <= limits).all())
        assert not any("torchgrow" in type(module).__module__ for module in model.modules())
        shapes.add((*trial.widths.values(), *trial.depths.values()))
    assert len(shapes) == len(search.trials) == 6


def test_random_numbers_of_the_user_go_on_undisturbed() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    search = searched()
    search.run()
    assert torch.equal(torch.rand(4), expected)
    one, other = search.fresh(search.winner), search.fresh(search.winner, seed=1)
    assert not differences(dict(one.state_dict()), dict(search.fresh(search.winner).state_dict()))
    assert differences(dict(one.state_dict()), dict(other.state_dict()))


def test_first_weights_have_the_scale_of_the_narrow_network() -> None:
    def factory() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8))

    search = searched(
        factory=factory, budget=Budget(params="5%"), example_inputs=torch.randn(4, 64), candidates=3, depth=False
    )
    for trial in search.trials:
        model = search.fresh(trial)
        for layer in (module for module in model.modules() if isinstance(module, nn.Linear)):
            like = nn.Linear(layer.in_features, layer.out_features)
            assert layer.weight.std().item() == pytest.approx(like.weight.std().item(), rel=0.15)


@pytest.mark.parametrize("share", ["10%", "36%", "60%", "95%"])
def test_by_default_it_costs_less_than_one_dense_training(share: str) -> None:
    """Wherever it leads; two are tried even where that is more."""
    search = searched(budget=Budget(flops=share), candidates=None)
    assert 2 <= len(search.trials) <= 12
    assert search.most <= 1 or len(search.trials) == 2
    dearest = sorted((trial.cost.flops for trial in search.trials), reverse=True)
    left, worst, done = len(dearest), 0, 0
    for rung in search.rungs:
        worst += sum(dearest[:left]) * (rung - done)
        left, done = math.ceil(left / 2), rung
    assert search.most == (worst + dearest[0] * 10) / (search.frame_cost.flops * 10)


def test_candidates_of_ones_own() -> None:
    space = torchgrow.trace(stages(), X, depth=True)
    some = space.everything()
    some[torch.nonzero(space.owner >= 0).flatten()[:3]] = False
    with pytest.warns(UserWarning, match="only 2 of 3 candidates differ at params <= 50%"):
        search = searched(candidates=[Shape("shallow", {"stage": 1}), some, Shape("again", {"stage": 1})])
    assert [trial.name for trial in search.trials] == ["shallow", "given 1"]
    assert search.trials[0].depths == {"stage": 2}
    limit = HALF.limits(search.frame_cost).params
    assert limit is not None
    assert all(limit * 0.7 < trial.cost.params <= limit for trial in search.trials)


def test_the_winner_grows_on_in_its_frame() -> None:
    search = searched(step_by_step, budget=Budget(params="30%"))
    best = search.run()
    frame = stages()
    optimizer = torch.optim.SGD(frame.parameters(), 0.05)
    assert best.model is not None
    grower = Grower(
        frame, optimizer, example_inputs=X, budget=HALF, updates=3, start=best.model, depth=True, preset="late"
    )
    assert torch.equal(grower.space.present(grower.keep), search.space.present(best.keep))
    torch.testing.assert_close(frame.eval()(X), best.model.eval()(X))


def test_short_trainings_have_fewer_rungs_and_all_is_told() -> None:
    search = searched(length=2)
    assert search.rungs == (1,)
    assert "not trained" in str(search)
    search.run()
    text = str(search)
    assert len(text.splitlines()) == 7
    assert [line[0] for line in text.splitlines()[:6]] == ["*", *" " * 5]
    assert "0: even, blocks 4: " in text
    assert re.search(r"training FLOPs so far: .*, \d\.\d\d of one dense training", text)


def bad(returned: Any) -> Any:
    return lambda trial, more: returned


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"length": 0}, "length=0 must be a whole number of epochs or steps"),
        ({"length": 2.5}, "length=2.5 must be a whole number"),
        ({"rungs": (0.5, 0.2)}, "rungs=(0.5, 0.2) must be rising shares of a whole training"),
        ({"rungs": (0.5, 1.2)}, "must be rising shares"),
        ({"rungs": ()}, "rungs=() must be rising shares"),
        ({"rungs": 0.5}, "rungs=0.5 must be rising shares"),
        ({"rungs": (float("nan"),)}, "rungs=(nan,) must be rising shares"),
        ({"rungs": (0.5, float("nan"))}, "rungs=(0.5, nan) must be rising shares"),
        ({"rungs": (True,)}, "rungs=(True,) must be rising shares"),
        ({"rungs": ("0.5",)}, "rungs=('0.5',) must be rising shares"),
        ({"candidates": 3.0}, "candidates=3.0: give how many"),
        ({"candidates": [torch.tensor(True)]}, "keep"),
        ({"train": None}, "train=None must be a function of a trial and how much more to train it"),
        ({"samples": 0}, "samples=0 must be a whole number >= 1: the samples in one unit of length"),
        ({"candidates": 0}, "candidates=0: give how many (2 or more make a search), or a list"),
        ({"candidates": []}, "candidates=[]: give how many"),
        ({"candidates": ["even"]}, "a candidate is a str; give torchgrow.policies.Shape objects or keep vectors"),
        ({"budget": "36%"}, "search takes a torchgrow.Budget such as Budget(params=\"36%\"), got '36%'"),
        ({"factory": stages()}, "factory is a Stages; it must be a function that makes the frame"),
        ({"factory": lambda: None}, "factory made a NoneType; it must be a function that makes the frame"),
        (
            {"factory": lambda: stages().to("meta")},
            "factory made a Stages on the meta device, and candidates are cut from frames that have weights",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused_at_once(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(TorchgrowError, match=re.escape(text)):
        searched(**settings)


def test_a_budget_out_of_reach_is_refused() -> None:
    with pytest.raises(BudgetError, match="what cannot be removed costs"):
        searched(budget=Budget(params=3))


@pytest.mark.parametrize("returned", [None, "0.5", True, torch.zeros(2)])
def test_a_train_that_returns_no_number_is_told(returned: Any) -> None:
    with pytest.raises(TorchgrowError, match=re.escape("for 'even'; it must return the mean training loss of what it")):
        searched(bad(returned)).run()


def test_a_tensor_with_one_number_will_do() -> None:
    assert searched(bad(torch.tensor(0.25))).run().losses == [0.25] * 3


def test_where_all_diverge_there_is_no_winner() -> None:
    search = searched(bad(math.nan))
    with pytest.raises(TrainingError, match="no candidate has a finite loss after 2 of 10; a lower learning rate"):
        search.run()
    with pytest.raises(TorchgrowError, match="the search is not over, so there is no winner"):
        _ = search.winner


def test_a_search_that_was_stopped_goes_on() -> None:
    """By a loop that is left, by Ctrl-C in `train`, and where two loops take turns; then it is over."""
    expected, stops = searched(step_by_step), iter([False, False, True, False, False, False, False, True])
    best = expected.run()

    def train(trial: Trial, more: int) -> float:
        if next(stops, False):
            raise KeyboardInterrupt
        return step_by_step(trial, more)

    search = searched(train)
    order = [trial.number for trial in itertools.islice(search, 2)]
    with pytest.raises(KeyboardInterrupt):
        search.run()
    with pytest.raises(TorchgrowError, match="so there is no winner"):
        _ = search.winner
    order += [trial.number for pair in itertools.islice(zip(search, search, strict=False), 2) for trial in pair]
    with pytest.raises(KeyboardInterrupt):
        search.run()
    assert order == [0, 1, 2, 3, 4, 5]
    assert search.run().number == best.number
    assert [trial.losses for trial in search.trials] == [trial.losses for trial in expected.trials]
    assert search.training_flops == expected.training_flops
    with pytest.raises(TorchgrowError, match=re.escape("this search is over, see search.winner")):
        search.run()


@pytest.mark.parametrize(("share", "blocks"), [("30%", 2), ("50%", 4), ("90%", 7)])
def test_where_only_layers_can_go_as_many_stay_as_the_budget_holds(share: str, blocks: int) -> None:
    """None of the proposed depths need be it, and that there is no choice is told."""

    def factory() -> nn.Module:
        return nn.Sequential(nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(8))))

    with pytest.warns(UserWarning, match="only 1 of 2 candidates differ at .*each shape is tried once"):
        search = searched(
            factory=factory,
            example_inputs=torch.randn(2, 8),
            budget=Budget(params=share),
            candidates=None,
            protect=[f"0.{block}.0" for block in range(8)],
        )
    assert search.trials[0].depths == {"0": blocks}
    assert search.trials[0].name == f"layers {blocks - 1}"
    assert search.run().cost.params == blocks * 72


def test_frames_without_layers_to_leave_out() -> None:
    x: Tensor = torch.randn(2, 3, 6, 6)
    with pytest.warns(UserWarning, match="only 3 of 6 candidates differ"):
        search = searched(factory=SmallResNet, example_inputs=x, depth=False)
    assert [trial.name for trial in search.trials] == ["even", "early wider", "late wider"]
    assert search.trials[0].depths == {}


def test_a_factory_that_seeds_itself_is_warned_of() -> None:
    """Its networks are the same, whatever seed is asked for; one that leaves that to the search is not."""

    def seeded() -> nn.Module:
        torch.manual_seed(7)
        return stages()

    before = torch.random.get_rng_state()
    with pytest.warns(UserWarning, match=r"^factory seeds itself, .*; leave it to search\(\.\.\., seed=1\)") as told:
        found = searched(factory=seeded)
    assert {warning.filename for warning in told} == {__file__}
    assert torch.equal(torch.random.get_rng_state(), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        searched().fresh(searched().trials[0], 5)
        with pytest.raises(UserWarning, match="seeds itself"):
            found.fresh(found.trials[0], 5)


def test_a_factory_that_returns_one_network_again_is_refused() -> None:
    one = stages()
    with pytest.raises(
        TorchgrowError, match=r"factory made a network whose .* is \(.*\), at first it was \(.*not lambda"
    ):
        searched(factory=lambda: one).run()


@pytest.mark.parametrize("number", [np.float32(0.5), np.int64(3), torch.tensor([0.25])])
def test_a_loss_may_be_any_single_number(number: Any) -> None:
    assert searched(lambda trial, more: number).run().losses[-1] == float(number)


def frozen(trained: bool = False) -> nn.Module:
    """Its first layer is frozen, or not."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    model[0].requires_grad_(trained)
    return model


def looked_for(trained: bool = False) -> Any:
    inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    search = torchgrow.search(
        lambda: frozen(trained),
        Budget(params="60%"),
        example_inputs=inputs,
        train=lambda trial, more: trial.model(inputs).square().mean().item(),  # type: ignore[misc]
        length=10,
        candidates=1,
    )
    return search.run().model


def grown_on(start: nn.Module) -> Grower:
    model, inputs = frozen(), torch.randn(4, 8)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return Grower(model, optimizer, example_inputs=inputs, budget=Budget(params="80%"), updates=3, start=start)


def test_frozen_layers_keep_their_widths_and_the_winner_grows_on() -> None:
    """As in a Grower: no gradient says anything about their units."""
    winner: Any = looked_for()
    assert winner[0].out_features == 16
    assert winner[2].out_features < 16
    grower: Any = grown_on(winner)
    assert grower.model[2].out_features == winner[2].out_features


def test_a_network_cut_where_nothing_is_trained_here_is_told_what_to_train() -> None:
    with pytest.raises(
        StructureError, match=r"start is of a structure .*what is trained.*requires_grad.*or train it on"
    ):
        grown_on(looked_for(trained=True))


def test_a_frame_with_nothing_to_cut_is_no_frame_to_search() -> None:
    with pytest.raises(StructureError, match=r"nothing can be cut here, because .*"):
        torchgrow.search(
            lambda: frozen().requires_grad_(False),
            Budget(params="60%"),
            example_inputs=torch.randn(4, 8),
            train=lambda trial, more: 0.0,
            length=10,
        )

"""ISS and MorphNet on recurrent units, by hand."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from small_tasks import Two, task_of
from torchgrow import Bank, Budget, Limits, trace
from torchgrow.lab import recipes
from torchgrow.lab.recurrent import LSTM
from torchgrow.lab.systems import Task, UnfitError, system
from torchgrow.lab.systems.iss import Groups
from torchgrow.lab.systems.morphnet import Shaping
from torchgrow.lab.systems.structure import Structure
from torchgrow.lab.text import TextData


def lstm(hidden: tuple[int, ...] = (2, 3)) -> tuple[LSTM, Groups]:
    torch.manual_seed(0)
    model = LSTM(words=7, embedding=5, hidden=hidden)
    words = torch.randint(7, (2, 4))
    space = trace(model, (words, model.start(2)), carried=model.carried, protect=("embedding",))
    return model, Groups(model, space, 0.1, 1e-4)


def test_the_group_of_a_unit_counted_by_hand() -> None:
    """Two units read 5 numbers and are read by 3 units, these by 7 words.

    First layer: 4 x 5 input weights, 4 x 2 recurrent rows, 4 x 2 recurrent columns of which 4 are in those rows, and
    12 rows of the next layer's gates. Second: 4 x 2, 4 x 3, 4 x 3 - 4, and 7 words.
    """
    model, groups = lstm()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    sizes = groups.squares()[groups.recurrent].tolist()
    assert sizes == [20 + 8 + 8 - 4 + 12] * 2 + [8 + 12 + 12 - 4 + 7] * 3
    by_hand = 0.1 * (2 * math.sqrt(44 + 1e-8) + 3 * math.sqrt(35 + 1e-8))
    assert groups.penalty().item() == pytest.approx(by_hand)


def test_small_weights_become_zero_and_a_zero_unit_is_cut_for_nothing() -> None:
    model, groups = lstm()
    space = trace(model, (torch.randint(7, (2, 4)), model.start(2)), carried=model.carried, protect=("embedding",))
    unit = int(space.unit_of["layers.0.weight_hh_l0", 1][1])
    with torch.no_grad():
        model.decoder.bias[0], model.decoder.bias[1] = 0.9e-4, -1.1e-4
        for (name, axis), vector in space.unit_of.items():
            if "weight" in name:
                dict(model.named_parameters())[name].index_fill_(axis, torch.nonzero(vector == unit).flatten(), 5e-5)
    groups.stepped(0.5)
    assert model.decoder.bias[:2].tolist() == pytest.approx([0.0, -1.1e-4])
    assert torch.nonzero(groups.squares()[groups.recurrent] == 0).flatten().tolist() == [1]
    words = torch.randint(7, (2, 6))
    before = model.eval()(words)[0]
    keep = space.everything()
    keep[unit] = False
    Bank(model, space).resize_(keep)
    assert torch.allclose(model(words)[0], before, atol=1e-6)


def test_units_that_died_stay_away_where_the_rest_is_within_the_budget() -> None:
    """The budget is what a network may cost: what is zero is not put back to use it up."""
    task = task_of(partial(Two, 6), Budget(params="90%"))
    whole = Structure(task.network(), task)
    alive, score = torch.arange(whole.space.n_units) != 0, torch.arange(whole.space.n_units).double()
    limits = Limits(int(whole.cost(whole.space.everything())[0]), None)
    assert torch.equal(whole.at_most(alive, score, limits), alive)
    assert bool(whole.at_most(torch.zeros_like(alive), score, limits).any())  # one is left of every group
    least = Limits(int(whole.cost(alive)[0]) - 1, None)
    assert torch.equal(whole.at_most(alive, score, least), whole.exact(alive, score, least))


def test_without_batch_norms_the_norm_of_a_recurrent_units_group_is_its_scale_for_morphnet() -> None:
    """By hand, for 4 words: every matrix product, one factor after the other; rows of gates are four a unit.

    Input of the first layer 5 x 4 s; its own 4 s x 2 + 8 s; of the second 4 t x 2 + 12 s; its own 4 t x 3 + 12 t; words
    7 t; s and t are the sums of the scales of two and of three units.
    """
    model, groups = lstm()
    words = torch.randint(7, (40,))
    text = TextData(train=words, valid=words, test=words, vocabulary=tuple("abcdefg"), steps=4, source="a test")
    recipe = replace(recipes.get("lstm-ptb"), build=lambda width=1.0: model, budget=Budget(flops="50%"))
    task = Task(recipe=recipe, data=text, folder=Path("nowhere"), trained=lambda: model)
    whole = Structure(model, task)
    shaping = Shaping(whole, 1.0, 0.01, flops=True)
    first, second = (whole.space.unit_of[f"layers.{i}.weight_hh_l0", 1] for i in (0, 1))
    norms = (shaping.scale()[torch.cat([first, second])] ** 2).tolist()
    squares = groups.squares()[groups.recurrent].tolist()
    assert [a / norms[0] for a in norms] == pytest.approx([a / squares[0] for a in squares])
    assert sum(a**0.5 for a in norms) / 5 == pytest.approx(1.0)
    s, t = (shaping.scale()[units].sum().item() for units in (first, second))
    by_hand = 4 * 2 * (20 * s + (8 * s + 8 * s) + (8 * t + 12 * s) + (12 * t + 12 * t) + 7 * t)
    assert shaping.penalty().item() == pytest.approx(by_hand / whole.cost(whole.space.everything())[1])
    with torch.no_grad():
        for (name, axis), vector in whole.space.unit_of.items():
            if "weight" in name:
                dict(model.named_parameters())[name].index_fill_(
                    axis, torch.nonzero(vector == first[1]).flatten(), 1e-4
                )
    assert torch.nonzero(~shaping.alive()).flatten().tolist() == [int(first[1])]


def test_iss_says_where_there_are_no_recurrent_units() -> None:
    with pytest.raises(UnfitError, match="ISS is written for recurrent units"):
        next(system("iss").phases(task_of(Two, Budget(params="50%"))))

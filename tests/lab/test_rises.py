"""What the lab measures a loss's rises on, what that counts, and how a comparison keeps them."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import torchgrow
from small_tasks import task_of
from torchgrow import Budget, Grower, TorchgrowError, measure
from torchgrow.lab import models, recipes, train
from torchgrow.lab.compare import compare
from torchgrow.lab.recipes import Recipe
from torchgrow.lab.recurrent import LSTM
from torchgrow.lab.rises import FEW, rises_of
from torchgrow.lab.systems.shrink import Shrinking
from torchgrow.lab.text import TextData
from torchgrow.policies import Shrink, named


class Drawing(nn.ReLU):
    """Draws a random number that changes nothing, in evaluation mode too."""

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(1)
        return super().forward(x)


def normed() -> nn.Module:
    """Layers of 20 and 10 channels, with a norm."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 20, 1), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 10, 1), Drawing()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 2))


def begun(recipe: Recipe, preset: str) -> Recipe:
    return replace(recipe, weights="some", preset=preset)


def test_it_is_measured_on_a_few_training_images_alone_and_counted() -> None:
    """32 of 40 images, drawn by the seed, as they are judged; test data is not there to be looked at."""
    task, model = task_of(normed, Budget(params="50%")), normed()
    recipe = begun(replace(task.recipe, batch_size=4, seed=3, depth=False), "shrink:allocation=measured,importance=l1")
    data: Any = task.data
    data = replace(data, test=None)
    state, before = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    found = rises_of(model, data, recipe, {})
    assert found is not None
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    drawn = data.train[torch.randperm(40, generator=torch.Generator().manual_seed(3))[:32]]
    x = data.normalise(drawn.pixels)

    def loss(model: nn.Module) -> float:
        return F.cross_entropy(model(x), drawn.labels).item()

    wanted = torchgrow.measure_rises(model, x[:2], loss, batches=[x], importance="l1")
    assert found.rises == pytest.approx(wanted, rel=1e-4)
    assert found.rises.keys() == {"0", "3"}
    assert found.flops == 3 * 2 * FEW * 4 * measure(model, x[:2]).flops  # as it is and without two; statistics, loss
    assert found.seconds > 0
    assert rises_of(model, data, recipe, vars(found)) == found
    assert rises_of(model, data, begun(recipe, "shrink:allocation=global"), {}) is None
    assert rises_of(model, data, begun(recipe, "default"), {}) is None


def test_on_a_text_it_is_the_beginning_of_the_training_part_with_the_state_carried_on() -> None:
    torch.manual_seed(0)
    text, none = torch.randint(9, (2000,)), torch.zeros(0, dtype=torch.int64)
    data = TextData(train=text, valid=none, test=none, vocabulary=tuple("abcdefghi"), steps=5, source="drawn")
    model = LSTM(words=9, embedding=4, hidden=(10, 20), init=0.5)
    recipe = begun(replace(recipes.get("lstm-ptb"), batch_size=4), "shrink:allocation=measured")
    found = rises_of(model, data, recipe, {})
    assert found is not None
    assert found.flops == 3 * FEW * 4 * measure(model, data.example()).flops  # no statistics: one pass each
    columns = text[: 8 * 4 * 5].view(20, 8)

    def loss(model: nn.Module) -> float:
        """All seven words of every column at once: the state goes from batch to batch as within one."""
        return F.cross_entropy(model(columns[:, :-1])[0].flatten(0, 1), columns[:, 1:].flatten()).item()

    inputs = (data.example(), model.start(2))
    wanted = torchgrow.measure_rises(model, inputs, loss, protect=recipe.freeze, carried=model.carried)
    assert found.rises == pytest.approx(wanted, rel=1e-3, abs=1e-6)


def test_where_nothing_is_trained_or_measured_it_is_refused() -> None:
    with pytest.raises(
        TorchgrowError,
        match=r"preset must be without allocation=measured where nothing is trained \(torchgrow shrink digits --from",
    ):
        replace(recipes.get("digits"), preset="shrink:allocation=measured")
    with pytest.raises(TorchgrowError, match="preset must be one that sees which trained units matter, such as shrink"):
        replace(recipes.get("digits"), preset="late", weights="weights.pt")
    with pytest.raises(TorchgrowError, match='rises and allocation="measured" go together'):
        named("shrink:allocation=measured")
    model = normed()
    grow = partial(Grower, model, torch.optim.SGD(model.parameters(), lr=0.1), example_inputs=torch.zeros(2, 1, 4, 4))
    with pytest.raises(TorchgrowError, match='rises and allocation="measured" go together'):
        grow(budget=Budget(params="50%"), updates=2, preset="shrink:allocation=measured")
    with pytest.raises(TorchgrowError, match=r"'rises=1' in preset 'shrink:rises=1' is not a setting of .*, align\)"):
        named("shrink:rises=1")
    assert Shrinking("shrink:allocation=measured").settings["rises"] == {"batches": 8}
    assert Shrinking().settings["rises"] is None
    policy = named("shrink:allocation=measured,until=0.5", rises={"a": 1.0})
    assert isinstance(policy, Shrink)
    assert (policy.until, policy.rises) == (0.5, {"a": 1.0})
    plain = named("shrink", rises={"a": 1.0})
    assert isinstance(plain, Shrink)
    assert plain.rises is None


class Stop(BaseException):
    """Stands for a kill."""


def test_a_comparison_measures_once_and_its_cost_is_in_both_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = "shrink:allocation=measured,until=0.8"
    recipe = replace(
        recipes.get("digits"),
        build=partial(models.ResNet, depth=8, widths=(4, 8, 8), in_channels=1),
        epochs=2,
        subset=64,
        batch_size=32,
        budget=Budget(params="50%"),
        depth=False,
    )

    def run(out: Path) -> Any:
        rows = compare(recipe, methods=[method], seeds=[0], console=Console(quiet=True), out=out)
        return next(row for row in rows if row["method"] == method)

    whole = run(tmp_path / "whole")
    assert [phase["name"] for phase in whole["phases"]] == ["dense", "measuring", "fine-tuning"]
    dense, measuring, tuning = (phase["flops"] for phase in whole["phases"])
    groups = len(whole["epochs"][0]["widths"])
    assert measuring == (1 + groups) * 2 * 64 * whole["dense_flops"]
    assert whole["train_flops"] == dense + measuring + tuning
    assert whole["train_flops_paper_rule"] == measuring + tuning
    assert 0.47 * whole["dense_params"] < whole["params"] <= 0.5 * whole["dense_params"]

    def fit(*arguments: Any, **keywords: Any) -> Iterator[Any]:
        yield next(train.fit(*arguments, **keywords))
        raise Stop

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("measured once more")

    with monkeypatch.context() as patched:
        patched.setattr("torchgrow.lab.systems.running.fit", fit)
        with pytest.raises(Stop):
            run(tmp_path / "broken")
    monkeypatch.setattr("torchgrow.lab.rises.measure_rises", again)
    resumed = run(tmp_path / "broken")
    for key in ("accuracy", "params", "flops", "train_flops", "train_flops_paper_rule"):
        assert resumed[key] == whole[key], key
    for key in ("loss", "widths", "training_flops"):
        assert [epoch[key] for epoch in resumed["epochs"]] == [epoch[key] for epoch in whole["epochs"]]

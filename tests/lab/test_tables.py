"""The results page: which rows stand beside each other, and what they are called."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from torchgrow.lab import recipes
from torchgrow.lab.compare import Job

PATH = Path(__file__).parents[2] / "benchmarks" / "tables.py"
RECIPE = recipes.get("resnet20-cifar10")


@pytest.fixture
def tables(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("tables", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "results" / "compare").mkdir(parents=True)
    return module


def row(method, recipe=RECIPE, **changed):
    config = Job(method=method, recipe=recipe, data=(10, 5)).config()
    if "growing" in config:
        config["growing"] |= changed
    return {"recipe": RECIPE.name, "method": method, "budget": "params <= 36%", "config": config, "accuracy": 1.0}


def labels(tables, rows):
    path = tables.ROOT / "results" / "compare" / f"{RECIPE.name}.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return [[one["method"] for one in found] for found in tables.alike().values()]


def test_what_differs_in_method_alone_stands_together(tables):
    methods = ["dense", "uniform", "default", "direct", "paper", "random", "default:peak=1.35"]
    flat = replace(RECIPE, depth=False)
    rows = [row(method) for method in methods] + [row("default", flat), row("paper", flat), row("direct", flat)]
    together = [*methods, "default --no-depth", "paper --no-depth", "direct --no-depth"]
    assert labels(tables, rows) == [together]
    assert labels(tables, [*rows, row("uniform", replace(RECIPE, epochs=7))]) == [together, ["uniform"]]


def test_what_was_otherwise_once_is_named(tables):
    """Also for networks that another method has found."""
    found = labels(tables, [row("default", hold=0.1), row("direct", hold=0.1), row("uniform")])
    assert found == [["default, then with hold=0.1", "direct, then with hold=0.1", "uniform"]]


def test_rows_stand_in_the_section_they_belong_to(tables):
    """A reader meets what holds now first, then what it was chosen by, then what was."""
    chosen = row("default")
    chosen["config"]["validate"] = True
    now = [row("default"), row("default", hold=0.1), row("uniform")]
    for one in now:
        one["method"] = tables.label(one)
    assert [tables.section(found) for found in ([row("dense")], now, [chosen], now[1:])] == [
        "Methods side by side",
        "Methods side by side",
        "What was chosen by",
        "Earlier ways to grow",
    ]

"""Recipes: fields that name themselves when wrong, variants, and what is written to config.json."""

import json
import re
from dataclasses import FrozenInstanceError, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchgrow import TorchgrowError
from torchgrow.lab import models, recipes
from torchgrow.lab.evidence.tables import PAPER
from torchgrow.lab.models import PadShortcut
from torchgrow.lab.names import SIZES
from torchgrow.lab.recipes import RECIPES, get, with_shortcut, with_size


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_whole(name: str) -> None:
    recipe = get(name)
    assert recipe.name == name
    assert f"Command: ``torchgrow run {name}" in (RECIPES[name].__doc__ or "")
    if recipe.dataset == "text":
        x, shape = torch.randint(99, (2, recipe.steps)), [2, recipe.steps, 99]
        recipe = recipe.with_words(99)
    else:
        size, channels = (8, 1) if recipe.dataset == "digits" else (32, 3)
        x, shape = torch.randn(2, channels, size, size), [2, 21, 32, 32] if recipe.dataset == "voc" else [2, 10]
    for width in (1.0, 0.3):
        out = recipe.build(width)(x)
        assert (out[0] if isinstance(out, tuple) else out).shape == torch.Size(shape)


@pytest.mark.parametrize("number", PAPER["tables"])
def test_a_recipe_of_the_paper_says_what_the_paper_claims(number: str) -> None:
    """The score of its method, and where ours stand; Table 5 repeats Table 1."""
    for group in PAPER["tables"][number]["groups"]:
        said = RECIPES[group["recipe"]].__doc__ or ""
        ours = next(row for row in group["rows"] if row.get("method") in ("paper", "nas"))
        claim = said.partition("    The paper")[2].partition("Command:")[0]
        assert float(ours["score"]) in map(float, re.findall(r"\d+\.?\d*", claim)), group["recipe"]
        assert "Hardware: " in said
        assert f"Here: docs/results.md, Table {number.replace('5', '1')} beside the paper's." in said


@pytest.mark.parametrize("name", RECIPES)
def test_config_survives_json(name: str) -> None:
    config = json.loads(json.dumps(get(name).as_json()))
    networks = ("ResNet", "VGG16", "WideResNet", "Staged", "MobileNetV1", "DeepLabV3", "ViT", "LSTM", "GPT")
    assert config["model"] in networks
    assert config["model_arguments"]
    assert config["epochs"] == get(name).epochs
    assert config["budget"] == str(get(name).budget)


def test_one_epoch_is_enough_where_the_structure_changes_twice_in_it() -> None:
    one = replace(get("digits"), epochs=1)
    assert replace(one, preset="paper").updates_an_epoch() == 160
    replace(one, preset="random", updates_per_epoch=2)
    text = "recipe 'digits': epochs must be at least 2 with '.*', whose structure changes once in an epoch, got 1"
    for edits in ({"preset": "random"}, {"updates_per_epoch": 1}):
        with pytest.raises(TorchgrowError, match=text):
            replace(one, **edits)
    with pytest.raises(TorchgrowError, match="schedule must be another one where there is one epoch, since milestones"):
        replace(one, schedule="milestones", warmup=0.0)


def test_config_holds_what_a_variant_changed() -> None:
    recipe = replace(get("digits"), build=partial(get("digits").build, depth=8))
    assert recipe.as_json()["model_arguments"]["depth"] == 8


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("dataset", "mnist", "one of digits, cifar10, imagefolder, voc, text, shapes, shape-masks"),
        ("updates_per_epoch", 0, "at least 1"),
        ("steps", 0, "at least 1"),
        ("optimizer", "adam", "one of sgd, adamw"),
        ("schedule", "triangle", "one of milestones, cosine, linear, wsd"),
        ("warmup", 0.1, "0 with milestones"),
        ("warmup", 1.0, "a share of the run"),
        ("decay", 0.0, "a share of the run, above 0"),
        ("decay", 1.1, "a share of the run, above 0 and at most 1 - warmup"),
        ("clip", 0.0, "above 0"),
        ("epochs", 0, "at least 1"),
        ("batch_size", 1, "at least 2"),
        ("lr", 0.0, "above 0"),
        ("lr", float("inf"), "above 0, and finite"),
        ("mean", (float("nan"),), "a number for every colour"),
        ("lr_milestones", (0.75, 0.5), "rising fractions of the run"),
        ("lr_milestones", (80, 120), "rising fractions of the run"),
        ("lr_factor", 0.0, "above 0 and at most 1"),
        ("momentum", 1.0, "at least 0 and below 1"),
        ("weight_decay", -1e-4, "at least 0"),
        ("shift", -1, "at least 0"),
        ("subset", 0, "at least 1"),
        ("precision", "float16", "one of float32, bfloat16"),
        ("seed", -1, "at least 0"),
        ("seed", 2**63, f"at least 0 and at most {2**63 - 1}"),
        ("freeze", (nn.ReLU(),), "what JSON can hold, since runs record it"),
        ("threads", 0, "at least 1"),
    ],
)
def test_a_bad_field_is_named(field: str, value: Any, rule: str) -> None:
    with pytest.raises(TorchgrowError, match=f"recipe 'digits': {field} must be {rule}.*, got "):
        replace(get("digits"), **{"schedule": "milestones", "warmup": 0.0, field: value})


def test_a_bad_preset_is_named() -> None:
    with pytest.raises(TorchgrowError, match="recipe 'digits': preset 'papre' is unknown; use one of"):
        replace(get("digits"), preset="papre")
    assert replace(get("digits"), preset="default:peak=1").updates_an_epoch() == 12
    assert replace(get("digits"), preset="paper", epochs=160).updates_an_epoch() == 1  # as published
    assert replace(get("digits"), preset="paper", epochs=20).updates_an_epoch() == 8
    assert replace(get("digits"), preset="paper:paced=False", epochs=20).updates_an_epoch() == 1
    assert replace(get("digits"), preset="random", updates_per_epoch=3).updates_an_epoch() == 3


def test_recipes_are_frozen_and_keyword_only() -> None:
    with pytest.raises(FrozenInstanceError):
        get("digits").epochs = 3  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        recipes.Recipe("digits")  # type: ignore[call-arg]


def test_unknown_recipe_lists_those_there_are() -> None:
    with pytest.raises(TorchgrowError, match="no recipe 'resnet'; there are digits, resnet20-cifar10"):
        get("resnet")


@pytest.mark.parametrize(("kind", "pads"), [("A", 2), ("B", 0)])
def test_shortcut_variant_changes_only_the_network(kind: str, pads: int) -> None:
    recipe = get("resnet20-cifar10")
    variant = with_shortcut(recipe, kind)
    assert replace(variant, build=recipe.build) == recipe
    assert sum(isinstance(module, PadShortcut) for module in variant.build().modules()) == pads


def test_shortcut_variant_refuses_what_has_none() -> None:
    recipe = replace(get("resnet20-cifar10"), build=models.VGG16)
    with pytest.raises(TorchgrowError, match="has no choice of shortcuts; leave --shortcut out"):
        with_shortcut(recipe, "A")
    with pytest.raises(TorchgrowError, match="got 'C'"):
        with_shortcut(get("digits"), "C")


def test_a_record_from_before_there_were_layouts_is_read() -> None:
    record = replace(get("digits"), seed=3).as_json()
    del record["channels_last"], record["crop"], record["void"]
    assert recipes.from_json(record).as_json() == replace(get("digits"), seed=3).as_json()
    with pytest.raises(TorchgrowError, match="not the record of a recipe: KeyError"):
        recipes.from_json({key: value for key, value in record.items() if key != "lr"})


@pytest.mark.parametrize(("epochs", "expected"), [(160, [80, 120]), (20, [10, 15]), (2, [1, 2])])
def test_milestones_become_epochs(epochs: int, expected: list[int]) -> None:
    assert replace(get("digits"), epochs=epochs).milestones_in_epochs() == expected


def test_sizes_are_zarembas() -> None:
    """Parameters of the small network worked out by hand; rates per word of a sample, as in the published code."""
    small, medium, large = (with_size(get("lstm-ptb"), size) for size in SIZES)
    layer = 4 * 200 * (200 + 200) + 2 * 4 * 200
    assert sum(p.numel() for p in small.build().parameters()) == 10_000 * 200 + 2 * layer + 200 * 10_000 + 10_000
    assert [r.epochs for r in (small, medium, large)] == [13, 39, 55]
    assert [r.milestones_in_epochs()[0] for r in (small, medium, large)] == [4, 6, 14]
    assert [len(r.milestones_in_epochs()) for r in (small, medium, large)] == [9, 33, 41]
    assert [r.lr / r.steps for r in (small, medium, large)] == [1, 1, 1]
    assert [(r.clip or 0) * r.steps for r in (small, medium, large)] == pytest.approx([5, 5, 10])
    assert [r.as_json()["model_arguments"]["dropout"] for r in (medium, large)] == [0.5, 0.65]
    assert large.as_json()["grown_arguments"]["dropout"] == 0.35
    assert large.with_words(50).as_json()["grown_arguments"]["words"] == 50


def test_size_variant_refuses_what_has_none() -> None:
    with pytest.raises(TorchgrowError, match="recipe 'digits' has no choice of sizes; leave --size out"):
        with_size(get("digits"), "small")
    with pytest.raises(TorchgrowError, match="size is one of small, medium, large, got 'huge'"):
        with_size(get("lstm-ptb"), "huge")


class Flat(nn.Sequential):
    def __init__(self, hidden: int = 64, width: float = 1.0, act: type[nn.Module] = nn.ReLU) -> None:
        units = max(1, round(hidden * width))
        super().__init__(nn.Flatten(), nn.Linear(64, units), act(), nn.Linear(units, 10))


class Maker:
    def __call__(self, width: float = 1.0) -> nn.Module:
        return Flat(width=width)


@pytest.mark.parametrize("field", ["build", "build_grown"])
@pytest.mark.parametrize(
    ("build", "text"),
    [
        (partial(Flat, 128), r"given 1 arguments by position, which .* by keyword: partial\(Flat, hidden=128\)"),
        (
            partial(partial(Flat, 128, 0.5), act=nn.GELU),
            r"given 2 .* by keyword: partial\(Flat, hidden=128, width=0\.5\)",
        ),
        (partial(Flat, act=nn.GELU), r"given act=<class .*GELU'>, .*: return Flat\(width=width, act=\.\.\.\)"),
        (Maker(), r"an object of Maker, .*: def build\(width=1\.0\): return maker\(width\)"),
    ],
)
def test_a_network_that_its_record_would_not_give_again_is_refused(field: str, build: Any, text: str) -> None:
    with pytest.raises(TorchgrowError, match=f"recipe 'digits': {field} is {text}"):
        replace(get("digits"), **{field: build})


OWN = """
from dataclasses import replace
from functools import partial
from torch import nn
from torchgrow.lab.recipes import get

class Net(nn.Linear):
    def __init__(self, hidden=1, width=1.0):
        super().__init__(64, hidden)

def grown(hidden=1, width=1.0):
    return nn.Linear(8, hidden)

def recipe():
    return replace(get("digits"), name="mine", build=partial(Net, hidden=3), build_grown=partial(grown, hidden=4))
"""


def test_the_record_of_a_recipe_in_a_file_gives_its_networks_again(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    recipe = get(f"{tmp_path / 'own.py'}:recipe")
    again = recipes.from_json(json.loads(json.dumps(recipe.as_json())))
    for one in (recipe, again):
        assert one.build_grown is not None
        assert str(one.build()) == "Net(in_features=64, out_features=3, bias=True)"
        assert str(one.build_grown()) == "Linear(in_features=8, out_features=4, bias=True)"


def test_a_network_gets_the_number_of_classes_or_words_if_it_takes_it() -> None:
    def narrow(width: float = 1.0) -> nn.Module:
        return Flat(width=width)

    def open_to_all(width: float = 1.0, **more: int) -> nn.Module:
        return Flat(width=width)

    for make in (recipes.Recipe.with_classes, recipes.Recipe.with_words):
        assert make(replace(get("digits"), build=narrow, build_grown=narrow), 7).build is narrow
        assert isinstance(make(replace(get("digits"), build=open_to_all), 7).build, partial)
    assert replace(get("digits"), build=narrow, build_grown=narrow).with_classes(7).build_grown is narrow
    assert get("digits").with_classes(7).build().fc.out_features == 7  # type: ignore[union-attr]

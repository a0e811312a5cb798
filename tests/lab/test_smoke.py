"""Scale smoke: every recipe runs anywhere, without data, in seconds."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from torchgrow import TorchgrowError
from torchgrow.cli import app
from torchgrow.lab import shapes
from torchgrow.lab.metrics import VOID
from torchgrow.lab.names import RECIPES
from torchgrow.lab.recipes import from_json, get, with_scale
from torchgrow.lab.recipes.foreign import of_model

PICTURED = ("resnet20-cifar10", "lstm-ptb", "deeplabv3-voc")
"""Recipes whose pictures are rendered, and whose frame is trained too: one of each metric."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.rendered) if name in PICTURED else name for name in RECIPES]
)
def test_every_recipe_runs_without_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    beside = ["dense", "uniform"] if name in PICTURED else ["uniform"]
    try:
        done = CliRunner().invoke(app, ["run", name, "--scale", "smoke", "--out", "out", "--beside", " ".join(beside)])
    finally:
        torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    results = json.loads(Path("out/results.json").read_text())
    limits = json.loads(Path("out/frame.json").read_text())["limits"]
    assert {*beside, "grown"} == set(results)
    assert all(results["grown"][field] <= limit for field, limit in limits.items() if limit is not None)
    metric = {"text": "perplexity", "voc": "miou"}.get(get(name).dataset, "accuracy")
    assert results["grown"][metric] > 0
    assert f"{metric}.png" in {path.name for path in Path("out").iterdir()}


@pytest.mark.parametrize("name", RECIPES)
def test_smoke_keeps_how_a_recipe_grows_and_trains(name: str) -> None:
    recipe, tiny = get(name), with_scale(get(name), "smoke")
    for field in ("name", "preset", "depth", "meta", "then", "optimizer", "schedule", "lr", "freeze", "clip"):
        assert getattr(tiny, field) == getattr(recipe, field)
    assert tiny.as_json()["model"] == recipe.as_json()["model"]
    assert from_json(json.loads(json.dumps(tiny.as_json()))).as_json() == tiny.as_json()


def test_other_networks_have_no_smoke() -> None:
    with pytest.raises(TorchgrowError, match="has no scale smoke; leave --scale out, or use --subset and --epochs"):
        with_scale(of_model("torchvision:resnet18"), "smoke")


def test_shapes_are_what_their_labels_say() -> None:
    """Of every kind the pixel in the middle, and the share of the square around it that is covered."""
    pixels, kinds = shapes.drawn(40, 32, masks=False)
    again, masks = shapes.drawn(40, 32, masks=True)
    assert torch.equal(pixels, again)
    assert kinds.bincount().tolist() == [10, 10, 10, 10]
    expected = {"disc": torch.pi / 4, "square": 1.0, "diamond": 0.5, "ring": 3 / 4 * torch.pi / 4}
    for mask, kind in zip(masks, kinds, strict=True):
        assert set(mask.unique().tolist()) == {VOID, 0, int(kind) + 1}
        rows, columns = (mask == kind + 1).nonzero().unbind(1)
        height, width = (int(x.max() - x.min()) + 2 for x in (rows, columns))
        covered = ((mask == kind + 1).sum() + (mask == VOID).sum() / 2) / (height * width)
        assert covered == pytest.approx(expected[shapes.SHAPES[int(kind)]], abs=0.2)
    light = (pixels.float().mean(1) * (masks > 0)).sum((1, 2)) / (masks > 0).sum((1, 2))
    dark = (pixels.float().mean(1) * (masks == 0)).sum((1, 2)) / (masks == 0).sum((1, 2))
    assert (light > dark + 20).all()

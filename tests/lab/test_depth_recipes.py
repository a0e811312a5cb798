"""Recipes in which layers grow: AutoGrow's families, frames on the meta device, a second phase, folders of images."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from rich.console import Console

import torchgrow
from torchgrow import Budget, TorchgrowError, measure, trace
from torchgrow.lab import data, run
from torchgrow.lab.from_recipe import with_data
from torchgrow.lab.models import ResNet, Staged
from torchgrow.lab.names import SCALES
from torchgrow.lab.recipes import RECIPES, get, with_scale

DEEP = partial(ResNet, depth=20, widths=(4, 8, 16), in_channels=1, shortcut="B")


@pytest.mark.parametrize("unit", ["basic", "bottleneck", "plain"])
@pytest.mark.parametrize("stem", ["small", "large"])
def test_staged_networks_have_layers_to_leave_out(unit: Any, stem: Any) -> None:
    model = Staged(unit=unit, units=(2, 3, 1), widths=(8, 8, 12), stem=stem, classes=7)
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 7)
    space = trace(model, x, depth=True)
    assert [block.modules[0] for block in space.blocks if space.removable[block.unit]] == [
        "stages.0.1",
        "stages.1.1",
        "stages.1.2",
    ]


def test_basic_units_make_resnet18() -> None:
    """The same weights, in the same order, give the same scores as torchvision's."""
    model = Staged(unit="basic", units=(2, 2, 2, 2), widths=(64, 128, 256, 512), stem="large", classes=1000).eval()
    theirs = torchvision.models.resnet18().eval()
    weights = [tensor for name, tensor in theirs.state_dict().items()]
    model.load_state_dict(dict(zip(model.state_dict(), weights, strict=True)))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x))
    assert measure(model, x) == measure(theirs, x)


def test_a_plain_and_a_residual_layer_of_the_same_width() -> None:
    assert measure(Staged(units=(2, 1, 1)), torch.randn(1, 3, 32, 32)).params > 0
    with pytest.raises(TorchgrowError, match=r"every stage has units and a width.*got \(2, 0\) and \(4, 8\)"):
        Staged(units=(2, 0), widths=(4, 8))
    with pytest.raises(TorchgrowError, match="a unit is one of basic, bottleneck, plain"):
        Staged(unit="dense")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", [name for name in RECIPES if name.endswith(("cifar10", "imagenet")) and "vit" not in name]
)
def test_full_scale_is_more(name: str) -> None:
    small, full = (with_scale(get(name), scale) for scale in SCALES)
    assert get(name).as_json() == small.as_json()
    assert full.epochs > small.epochs
    assert full.subset is None
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in recipe.build().parameters()) for recipe in (small, full)]
    assert sizes[1] >= sizes[0]
    with pytest.raises(TorchgrowError, match="scale is one of small, full or smoke, got 'huge'"):
        with_scale(get(name), "huge")


def test_the_paper_s_frames_have_the_paper_s_sizes() -> None:
    """In millions; where the data has classes of its own, 1,000. What differs from the paper: docs/results.md."""
    published = {"vgg16-cifar10": 14.73, "wrn28-10-cifar10": 36.5, "resnet20-cifar10": 0.27, "deeplabv3-voc": 58.04}
    of_imagenet = {"resnet50-imagenet": 25.56, "mobilenetv1-imagenet": 4.23, "mobilenetv1-half-imagenet": 1.33}
    with torch.device("meta"):
        for name, size in (published | of_imagenet).items():
            recipe = with_scale(get(name), "full")
            model = (recipe.with_classes(1000) if name in of_imagenet else recipe).build()
            assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(size, abs=0.03), name


def test_every_recipe_has_the_small_scale_and_what_was_published_the_full_one() -> None:
    for name in RECIPES:
        assert with_scale(get(name), "small").name == name
    large = with_scale(get("lstm-ptb"), "full")
    assert (large.epochs, large.budget) == (55, Budget(flops="11.9%"))  # the paper's, Table 8


def test_digits_have_one_scale() -> None:
    with pytest.raises(
        TorchgrowError, match="recipe 'digits' is small, and has no other scale but smoke; leave --scale out"
    ):
        with_scale(get("digits"), "full")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Layers grow in a frame on the meta device, then the network trains on."""
    recipe = replace(
        get("digits"),
        build=DEEP,
        epochs=4,
        then=3,
        subset=128,
        batch_size=32,
        depth=True,
        meta=True,
        preset="paper:penalised=all,start=1,paced=False",
        schedule="milestones",
        warmup=0.0,
        budget=Budget(params="20%"),
    )
    return run.run(recipe, console=Console(quiet=True), out=tmp_path_factory.mktemp("runs") / "deep", beside=())


def test_layers_grow_and_the_second_phase_has_a_schedule_of_its_own(finished: Any) -> None:
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [r["lr"] for r in records] == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.1, 0.1, 0.001])
    assert records[0]["depths"] == {"layer1": 1, "layer2": 1, "layer3": 1}
    assert max(sum(r["depths"].values()) for r in records) > 3
    params = {r["params"] for r in records if r["epoch"] > 4}
    assert len(params) == 1
    assert all(r["born"] == r["detached"] == 0 for r in records if r["epoch"] > 4)
    results = json.loads((finished / "results.json").read_text())["grown"]
    assert results["params"] in params
    model = torchgrow.load(finished / "network", DEEP)
    assert sum(p.numel() for p in model.parameters()) == results["params"]


def pictures(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 3) -> Path:
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for i in range(each):
                array = random.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
                Image.fromarray(array).save(folder / split / name / f"{i}.png")
    return folder


def test_a_folder_of_images(tmp_path: Path) -> None:
    found = data.load_images("imagefolder", folder=pictures(tmp_path), side=16)
    assert found.train.pixels.shape == (6, 3, 16, 16)
    assert found.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    recipe = replace(
        get("plain4net-imagenet"), epochs=2, batch_size=2, side=32, budget=Budget(params="60%"), updates_per_epoch=2
    )
    out = run.run(recipe, console=Console(quiet=True), out=tmp_path / "run", folder=tmp_path, beside=())
    assert json.loads((out / "config.json").read_text())["model_arguments"]["classes"] == 2


def test_images_held_out_of_a_folder_are_of_every_class(tmp_path: Path) -> None:
    """They come class by class, and the last class must not be all that is held out."""
    folder = pictures(tmp_path, classes=("cat", "dog", "hen"), each=20)
    split = data.load_images("imagefolder", folder=folder, side=8, held_out=True)
    assert (len(split.train), len(split.test)) == (48, 12)
    assert split.train.labels.unique().tolist() == split.test.labels.unique().tolist() == [0, 1, 2]


def test_a_subset_without_some_class_still_has_an_output_for_it(tmp_path: Path) -> None:
    recipe = replace(get("resnet18-imagenette"), subset=1, side=8)
    recipe, found = with_data(recipe, Console(quiet=True), pictures(tmp_path))
    assert isinstance(found, data.ImageData)
    assert found.train.labels.tolist() == [0]
    assert recipe.as_json()["model_arguments"]["classes"] == 2


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(TorchgrowError, match=r"has no images in train/CLASS/\*.*the folder is empty"):
        data.load("imagefolder", folder=tmp_path)
    pictures(tmp_path / "odd")
    (tmp_path / "odd" / "val" / "dog").rename(tmp_path / "odd" / "val" / "wolf")
    with pytest.raises(TorchgrowError, match=r"train/ and val/ differ in classes, e\.g\. dog"):
        data.load("imagefolder", folder=tmp_path / "odd")
    with pytest.raises(TorchgrowError, match=r"these recipes keep them in memory, up to 16 GB"):
        data.load("imagefolder", folder=pictures(tmp_path / "large"), side=40_000)

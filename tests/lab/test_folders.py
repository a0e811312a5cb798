"""Images in folders: VOC's layout, and images that are streamed from disk instead of being kept in memory."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from torchgrow import Budget, TorchgrowError
from torchgrow.lab import data, processes, run, shapes
from torchgrow.lab.from_recipe import with_data
from torchgrow.lab.images import ImageData
from torchgrow.lab.metrics import ACCURACY, MIOU, VOID
from torchgrow.lab.names import SCALES
from torchgrow.lab.recipes import get, with_scale
from torchgrow.lab.streamed import BACKGROUND, Streamed, as_labels

LISTS = "ImageSets/Segmentation"


def save(path: Path, values: Any, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, dtype=np.uint8))
    if palette:  # as VOC's masks are: what counts is the index, not the colour
        image = image.convert("P")
        image.putdata(np.asarray(values, dtype=np.uint8).flatten().tolist())
        image.putpalette([255 - i // 3 for i in range(768)])
    image.save(path)


def around(side: tuple[int, int], part: int) -> tuple[slice, slice]:
    """The middle, without one of so many parts on every side."""
    rows, columns = (slice(length // part, length - length // part) for length in side)
    return rows, columns


def write_voc(folder: Path, *, side: tuple[int, int] = (20, 30), masks: str = "SegmentationClass") -> Path:
    """Images that show fifty times their label: 0, one class of 1 to 4 each in the middle, and void around it."""
    names = {"train": [f"a{i}" for i in range(4)], "val": [f"b{i}" for i in range(4)]}
    for i, name in [pair for split in names.values() for pair in enumerate(split)]:
        labels = np.zeros(side, dtype=np.uint8)
        labels[around(side, 4)] = 255
        labels[around(side, 3)] = i + 1
        save(folder / f"JPEGImages/{name}.jpg", np.repeat(np.where(labels == 255, 0, 50 * labels)[..., None], 3, 2))
        save(folder / f"{masks}/{name}.png", labels, palette=True)
    for split, own in names.items():
        (folder / LISTS).mkdir(parents=True, exist_ok=True)
        (folder / LISTS / f"{split}.txt").write_text("\n".join(own) + "\n")
    return folder


# --- VOC's layout


@pytest.mark.parametrize("inner", [".", "VOC2012", "VOCdevkit/VOC2012", "VOCdevkit/VOC2007"])
@pytest.mark.parametrize("crop", [False, True])
def test_voc_is_found_wherever_the_folder_begins(tmp_path: Path, inner: str, crop: bool) -> None:
    write_voc(tmp_path / inner)
    found = data.load_images("voc", folder=tmp_path, side=32, crop=crop, void=(4,))
    assert (len(found.train), len(found.test), found.metric) == (4, 4, MIOU)
    assert found.test.labels.dtype == torch.int64
    assert [image.unique().tolist() for image in found.test.labels] == [[VOID, 0, c] for c in (1, 2, 3)] + [[VOID, 0]]
    assert found.train[:2].pixels.shape == (2, 3, 32, 32)


@pytest.mark.parametrize("outer", [".", "VOCdevkit"])
def test_of_several_years_2012_is_taken_or_else_the_newest(tmp_path: Path, outer: str) -> None:
    def taken() -> str:
        train = data.load_images("voc", folder=tmp_path, side=8, crop=True).train
        assert isinstance(train, Streamed)
        return Path(train.paths[0]).parents[1].name

    for year, newest in (("2007", "2007"), ("2010", "2010"), ("2009", "2010"), ("2012", "2012"), ("2031", "2012")):
        write_voc(tmp_path / outer / f"VOC{year}")
        assert taken() == f"VOC{newest}"
    write_voc(tmp_path)  # what is named itself comes before what it holds
    assert taken() == tmp_path.name


@pytest.mark.parametrize("name", ["train_aug", "trainaug"])
def test_the_augmented_list_is_taken_where_it_is_there(tmp_path: Path, name: str) -> None:
    write_voc(tmp_path)
    assert len(data.load_images("voc", folder=tmp_path, side=8).train) == 4
    write_voc(tmp_path, masks="SegmentationClassAug")
    (tmp_path / LISTS / f"{name}.txt").write_text("a0\na1\nb0\n")
    assert len(data.load_images("voc", folder=tmp_path, side=8).train) == 3
    train = data.load_images("voc", folder=tmp_path, side=8, crop=True).train
    assert isinstance(train, Streamed)
    assert all("SegmentationClassAug" in str(target) for target in train.targets)


@pytest.mark.parametrize(
    ("there", "missing"), [(f"{LISTS}/trainaug.txt", "SegmentationClassAug"), ("SegmentationClassAug", LISTS)]
)
def test_half_of_what_augmenting_needs_is_told(tmp_path: Path, there: str, missing: str) -> None:
    write_voc(tmp_path)
    if there.endswith(".txt"):
        (tmp_path / there).write_text("a0\n")
    else:
        (tmp_path / there).mkdir()
    text = f"{tmp_path / there} is there and {tmp_path / missing}.* is not, so the 4 images of .*train.txt are trained"
    with pytest.warns(UserWarning, match=text):
        assert len(data.load_images("voc", folder=tmp_path, side=8).train) == 4


def test_lists_as_editors_of_windows_save_them(tmp_path: Path) -> None:
    """UTF-8 with a mark in front is read; other encodings are refused by name."""
    listed = write_voc(tmp_path) / LISTS / "val.txt"
    listed.write_text("b0\nb1\n", encoding="utf-8-sig")
    assert len(data.load_images("voc", folder=tmp_path, side=8).test) == 2
    listed.write_text("b0\nb1\n", encoding="utf-16")
    with pytest.raises(TorchgrowError, match=r"val\.txt cannot be read as a list in UTF-8 \(.*\); save it in UTF-8"):
        data.load_images("voc", folder=tmp_path, side=8)


def test_what_is_missing_of_voc_is_named_with_what_to_put_where(tmp_path: Path) -> None:
    def refused(text: str) -> None:
        with pytest.raises(TorchgrowError, match=text) as caught:
            data.load("voc", folder=tmp_path, side=8)
        assert "JPEGImages/NAME.jpg, SegmentationClass/NAME.png and ImageSets/Segmentation/" in str(caught.value)

    refused(r"no segmentation of PASCAL VOC in .*: the folder is empty\. --data names a folder that holds VOCdevkit")
    write_voc(tmp_path)
    (tmp_path / "SegmentationClass/b1.png").unlink()
    (tmp_path / "JPEGImages/b2.jpg").unlink()
    refused(r"val\.txt names images that are not there: 2, e\.g\. .*b1\.png")
    (tmp_path / LISTS / "train.txt").write_text("")
    refused(r"train\.txt is missing or empty")


def test_masks_as_files_have_them() -> None:
    mask = torch.tensor([0, 1, 20, 255], dtype=torch.uint8)
    assert as_labels(mask, void=(20,)).tolist() == [0, 1, VOID, VOID]


def write_masks(folder: Path, values: dict[str, int], each: int) -> Path:
    """Pictures whose masks are one class all over; one list names them as often as it takes."""
    for split, value in values.items():
        save(folder / f"JPEGImages/{split}.jpg", np.zeros((20, 30, 3)))
        save(folder / f"SegmentationClass/{split}.png", np.full((20, 30), value), palette=True)
        (folder / LISTS).mkdir(parents=True, exist_ok=True)
        (folder / LISTS / f"{split}.txt").write_text(f"{split}\n" * each)
    return folder


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_without_a_class_that_is_learned_are_refused(split: str, crop: bool, tmp_path: Path) -> None:
    """Own masks of classes 1 and 2, of which the small recipe learns neither: the loss would be nan."""
    write_masks(tmp_path, {"train": 0, "val": 0} | {split: 2}, each=100)
    kept: dict[str, Any] = {"folder": tmp_path, "side": 8, "crop": crop}
    text = (
        rf"{split}\.txt: of 64 masks looked at, no pixel has a class that is learned; classes found: 2, "
        r"classes that are void in this recipe: 1, 2, 3; .*--scale full"
    )
    with pytest.raises(TorchgrowError, match=text):
        data.load("voc", void=(1, 2, 3), **kept)
    assert len(data.load_images("voc", void=(1, 3), **kept).test) == 100
    write_masks(tmp_path, {split: 255}, each=1)
    with pytest.raises(TorchgrowError, match=r"of 1 masks looked at, .*found: none, .* in this recipe: none; "):
        data.load("voc", **kept)


def test_few_masks_with_a_class_that_is_learned_are_enough(tmp_path: Path) -> None:
    """Lists are sorted in many ways: those that are looked at are spread over all of them."""
    write_masks(tmp_path, {"train": 1, "val": 0}, each=100)
    with (tmp_path / LISTS / "train.txt").open("a") as file:
        file.write("val\n" * 2)
    assert len(data.load_images("voc", folder=tmp_path, side=8, void=(1,)).train) == 102


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_subset_without_a_labelled_pixel_is_refused(part: str, crop: bool, tmp_path: Path) -> None:
    """One mask of 20 has labels, and is drawn to be trained on, or to be held out."""
    write_masks(tmp_path, {"train": 255, "val": 0}, each=20)
    drawn = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    labelled = drawn[-1 if part == "train" else 0]
    names = ["val" if i == labelled else "train" for i in range(20)]
    (tmp_path / LISTS / "train.txt").write_text("\n".join(names))
    few: dict[str, Any] = {"folder": tmp_path, "side": 8, "crop": crop, "held_out": part == "test"}
    text = "no pixel of the 10 images that are left to {} has a class that is learned; take a larger --subset"
    with pytest.raises(TorchgrowError, match=text.format("train on" if part == "train" else "judge by")):
        data.load("voc", subset=10, **few)
    assert len(data.load_images("voc", folder=tmp_path, side=8, crop=crop).train) == 20


@pytest.mark.parametrize(("dataset", "where"), [("imagefolder", "image-net.org"), ("voc", "host.robots.ox.ac.uk")])
def test_what_cannot_be_downloaded_says_where_it_is(dataset: str, where: str, tmp_path: Path) -> None:
    with pytest.raises(TorchgrowError, match=f"{dataset} cannot be downloaded: .*{where}.*; leave --download out"):
        data.load(dataset, folder=tmp_path, download=True)


# --- streamed


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (Image.new("L", (30, 20), 77), "has a class of number 77"),
        (Image.new("RGB", (30, 20)), "is a picture of mode RGB"),
    ],
)
def test_masks_that_are_none_are_named(bad: Any, found: str, crop: bool, tmp_path: Path) -> None:
    write_voc(tmp_path)
    bad.save(tmp_path / "SegmentationClass/b0.png")
    with pytest.raises(TorchgrowError, match=rf"b0\.png {found}; every pixel of a mask .* \(mode P or L"):
        list(data.load_images("voc", folder=tmp_path, side=16, crop=crop).test_batches(batch_size=4))


@pytest.mark.parametrize("crop", [False, True])
def test_a_mask_of_another_size_is_named(crop: bool, tmp_path: Path) -> None:
    write_voc(tmp_path)
    Image.new("L", (20, 30), 1).save(tmp_path / "SegmentationClass/b0.png")
    text = r"b0\.png has 20 x 30 pixels and its picture .*b0\.jpg 30 x 20; a mask says the class of every pixel"
    with pytest.raises(TorchgrowError, match=text):
        list(data.load_images("voc", folder=tmp_path, side=16, crop=crop).test_batches(batch_size=4))


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("bad", ["JPEGImages/b0.jpg", "SegmentationClass/b0.png"])
@pytest.mark.parametrize("what", ["truncated", "empty", "text"])
def test_a_damaged_picture_is_named(what: str, bad: str, crop: bool, tmp_path: Path) -> None:
    path = write_voc(tmp_path) / bad
    path.write_bytes({"truncated": path.read_bytes()[:-40], "empty": b"", "text": b"<html>"}[what])
    text = rf"^\S*{Path(bad).name} is not a picture that Pillow can read \([^\n]*\); mend it or take it out$"
    with pytest.raises(TorchgrowError, match=text):  # from a worker too, without a traceback in it
        list(data.load_images("voc", folder=tmp_path, side=16, crop=crop).test_batches(batch_size=4))


def deep(mode: str) -> Image.Image:
    """A picture with values beyond 255, in a mode that keeps them."""
    return Image.new(mode, (30, 20), 40_000)


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize(
    ("mode", "kept"), [("I", "bad.tif"), ("I;16", "bad.png"), ("I;16B", "bad.tif"), ("F", "bad.tif")]
)
def test_pictures_of_more_than_8_bits_a_colour_are_refused(mode: str, kept: str, crop: bool, tmp_path: Path) -> None:
    """Pillow would clip them, nearly all to white."""
    deep(mode).save(write_classes(tmp_path) / "val/cat" / kept)
    with pytest.raises(TorchgrowError, match=rf"{kept} is a picture of mode {mode[0]}.*save it with 8 bits a colour"):
        list(data.load_images("imagefolder", folder=tmp_path, side=16, crop=crop).test_batches(batch_size=4))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_pictures_of_other_modes_are_read(mode: str, tmp_path: Path) -> None:
    for path in write_classes(tmp_path).rglob("*.png"):
        changed = Image.new("RGB", (30, 20), (255, 255, 255)).convert(mode)
        path.unlink()
        changed.save(path.with_suffix(".tif"))
    for crop in (False, True):
        found = data.load_images("imagefolder", folder=tmp_path, side=16, crop=crop).test
        assert found.pixels.min() == 255


@pytest.mark.parametrize("crop", [False, True])
def test_pictures_too_large_for_pillow_are_named(crop: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_classes(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses more than twice that
    with pytest.raises(
        TorchgrowError, match=r"0\.png is not a picture that Pillow can read \(Image size \(2400 pixels"
    ):
        list(data.load_images("imagefolder", folder=tmp_path, side=16, crop=crop).test_batches(batch_size=4))


def batches(loaded: ImageData, **more: Any) -> list[tuple[Tensor, Tensor]]:
    draw: dict[str, Any] = {"batch_size": 2, "shift": 0, "mirror": True, **more}
    return list(loaded.train_batches(**draw, generator=torch.Generator().manual_seed(3)))


def write_classes(folder: Path, each: int = 4) -> Path:
    """Two classes, left half of the image dark, right half light by class."""
    for split in ("train", "val"):
        for c, name in enumerate(("cat", "dog")):
            for i in range(each):
                values = np.zeros((40 + i, 60, 3), dtype=np.uint8)
                values[:, 30:] = 100 + 50 * c + i
                save(folder / split / name / f"{i}.png", values)
    return folder


def test_one_class_is_refused(tmp_path: Path) -> None:
    shutil.rmtree(write_classes(tmp_path) / "train/dog")
    with pytest.raises(TorchgrowError, match=r"train holds one class, cat/, so there is nothing to tell apart"):
        data.load_images("imagefolder", folder=tmp_path, side=28)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("stray", [".ipynb_checkpoints", "__MACOSX", "zebra"])
def test_a_class_folder_without_pictures_is_named(split: str, stray: str, tmp_path: Path) -> None:
    (write_classes(tmp_path) / split / stray / "inner").mkdir(parents=True)
    (tmp_path / split / stray / "notes.txt").touch()
    text = rf"class folder {stray}/ in {tmp_path / split}/ holds no picture .*\.png.*; take it out or fill it"
    with pytest.raises(TorchgrowError, match=text):
        data.load_images("imagefolder", folder=tmp_path, side=28)


def test_a_folder_without_classes_says_what_is_there(tmp_path: Path) -> None:
    shutil.rmtree(write_classes(tmp_path) / "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(
        TorchgrowError, match=r"has no images in train/CLASS/\*: found train/, val/ \(Couldn't find any"
    ):
        data.load_images("imagefolder", folder=tmp_path, side=28)


def test_a_folder_of_classes_is_streamed(tmp_path: Path) -> None:
    loaded = data.load_images("imagefolder", folder=write_classes(tmp_path), side=28, crop=True)
    assert isinstance(loaded.train, Streamed)
    assert loaded.metric is ACCURACY
    assert loaded.test.labels.tolist() == [0] * 4 + [1] * 4
    # Resized to 32 along the shorter side, cut in the middle: dark left, light right, class by class.
    for pixels, label in zip(loaded.test.pixels, loaded.test.labels.tolist(), strict=True):
        assert pixels.shape == (3, 28, 28)
        assert pixels[:, :, :12].max() < 60
        assert pixels[:, :, 17:].min() >= 95 + 50 * label
    drawn = batches(loaded)
    assert [x.shape for x, _ in drawn] == [(2, 3, 28, 28)] * 4
    assert sorted(torch.cat([labels for _, labels in drawn]).tolist()) == [0] * 4 + [1] * 4
    assert torch.equal(torch.cat([y for _, y in loaded.test_batches(batch_size=3)]), loaded.test.labels)


@pytest.mark.parametrize("dataset", ["imagefolder", "voc"])
def test_what_is_drawn_depends_on_the_generator_and_not_on_the_workers(tmp_path: Path, dataset: str) -> None:
    (write_voc if dataset == "voc" else write_classes)(tmp_path)
    loaded = data.load_images(dataset, folder=tmp_path, side=16, crop=True)
    assert isinstance(loaded.train, Streamed)
    state = torch.random.get_rng_state()
    some = [batches(replace(loaded, train=replace(loaded.train, workers=workers))) for workers in (0, 0, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    for one, *others in zip(*some, strict=True):
        assert all(torch.equal(a, b) for other in others for a, b in zip(one, other, strict=True))
    epochs = [x for x, _ in some[0]]
    assert not torch.equal(epochs[0][0], epochs[0][1])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a system that does not say which CPUs a process has")
@pytest.mark.filterwarnings("error:This DataLoader will create")
def test_no_more_workers_than_cpus(tmp_path: Path) -> None:
    """Of which PyTorch would warn, on a machine with one of them."""
    loaded = data.load_images("imagefolder", folder=write_classes(tmp_path), side=16, crop=True)
    assert isinstance(loaded.train, Streamed)
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        assert len(batches(replace(loaded, train=replace(loaded.train, workers=2)))) == len(batches(loaded))
    finally:
        os.sched_setaffinity(0, cpus)


@pytest.mark.parametrize("crop", [False, True])
def test_processes_read_their_share(tmp_path: Path, crop: bool) -> None:
    loaded = data.load_images("imagefolder", folder=write_classes(tmp_path), side=16, crop=crop)
    whole = batches(loaded, batch_size=4)
    shares = [batches(loaded, batch_size=4, share=slice(rank, None, 2)) for rank in (0, 1)]
    for (x, labels), *parts in zip(whole, *shares, strict=True):
        for rank, (mine, own) in enumerate(parts):
            assert torch.equal(mine, x[rank::2])
            assert torch.equal(own, labels[rank::2])
    assert processes.share(6) == slice(0, None, 1)


def test_masks_are_cropped_with_their_images(tmp_path: Path) -> None:
    """Where a pixel is labelled, it shows its label; resizing blurs only what is near an edge."""
    write_voc(tmp_path, side=(60, 60))
    loaded = data.load_images("voc", folder=tmp_path, side=48, crop=True)
    assert isinstance(loaded.train, Streamed)
    order, generator = torch.arange(4).repeat(3), torch.Generator()
    for x, labels in loaded.train.batches(order, batch_size=4, mirror=True, generator=generator):
        for image, mask in zip(x.float().mean(1), labels, strict=True):
            for c in set(mask.unique().tolist()) - {VOID}:
                assert image[mask == c].median() == pytest.approx(50 * c, abs=20)


def test_all_of_an_image_is_judged_and_made_smaller_only_where_it_must_be(tmp_path: Path) -> None:
    write_voc(tmp_path, side=(20, 30))
    small = data.load_images("voc", folder=tmp_path, side=32, crop=True).test
    assert (small.labels[0][around((20, 30), 3)] == 1).all()
    assert (small.labels[0] == 1).sum() == 8 * 10
    assert (small.labels[0, 20:] == VOID).all()
    assert (small.labels[0, :, 30:] == VOID).all()
    assert small.pixels[0, :, 31, 31].tolist() == list(BACKGROUND)
    large = data.load_images("voc", folder=tmp_path, side=15, crop=True).test
    assert (large.labels[0, 10:] == VOID).all()
    assert (large.labels[0, :3] == 0).sum() > 20


def test_a_run_at_full_scale_streams(tmp_path: Path) -> None:
    """At full scale, on few pictures: the recipe's own data, augmentation and classes."""
    recipe = replace(
        with_scale(get("mobilenetv1-half-imagenet"), "full"),
        build=with_scale(get("mobilenetv1-half-imagenet"), "smoke").build,
        epochs=2,
        batch_size=4,
        side=32,
        updates_per_epoch=2,
        budget=Budget(flops="60%"),
    )
    assert recipe.crop
    out = run.run(recipe, console=Console(quiet=True), out=tmp_path / "run", folder=write_classes(tmp_path), beside=())
    assert json.loads((out / "config.json").read_text())["model_arguments"]["classes"] == 2
    assert json.loads((out / "results.json").read_text())["grown"]["accuracy"] >= 0


def test_what_does_not_fit_memory_is_to_be_streamed(tmp_path: Path) -> None:
    write_voc(tmp_path)
    with pytest.raises(TorchgrowError, match=r"in memory, up to 16 GB: .*--scale full of a recipe that has it"):
        data.load("voc", folder=tmp_path, side=20_000)
    assert isinstance(data.load_images("voc", folder=tmp_path, side=20_000, crop=True).train, Streamed)


@pytest.mark.parametrize("name", ["resnet50-imagenet", "mobilenetv1-imagenet", "plain4net-imagenet", "deeplabv3-voc"])
def test_full_scale_is_streamed_and_small_is_not(name: str) -> None:
    assert [with_scale(get(name), scale).crop for scale in SCALES] == [False, True]


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("resnet50-imagenet", {"crop": True}, "shift must be 0 with crop, which takes its place, got 4"),
        ("digits", {"crop": True, "shift": 0}, "crop must be False but for imagefolder and voc, got True"),
        ("digits", {"void": (3,)}, r"void must be empty but for voc, which has masks, got \(3,\)"),
    ],
)
def test_what_does_not_go_together_is_refused(name: str, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(TorchgrowError, match=text):
        replace(get(name), **changes)


def test_drawn_shapes_need_no_folder() -> None:
    loaded = data.load_images("shapes", side=16, subset=8)
    assert len(loaded.train) == 8
    assert int(loaded.test.labels.max()) + 1 == len(shapes.SHAPES)


class Own(nn.Sequential):
    def __init__(self, width: float = 1.0, classes: int = 1) -> None:
        n = max(1, round(8 * width))
        pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        super().__init__(nn.Conv2d(3, n, 3), nn.ReLU(), *pooled, nn.Linear(n, classes))


def two(width: float = 1.0) -> nn.Module:
    return Own(width, 2)


def one(width: float = 1.0) -> nn.Module:
    return Own(width)


@pytest.mark.parametrize("build", [Own, two])
def test_a_network_of_ones_own_learns_the_classes_of_a_folder(build: Any, tmp_path: Path) -> None:
    """Whether it takes their number or has them."""
    recipe = replace(get("resnet18-imagenette"), name="mine", build=build, side=16, epochs=2, depth=False)
    folder = write_classes(tmp_path / "data")
    done = run.run(recipe, console=Console(quiet=True), out=tmp_path / "out", folder=folder, beside=())
    assert json.loads((done / "results.json").read_text())["grown"]["accuracy"] >= 0
    with pytest.raises(TorchgrowError, match=r"\[2, 1\] for 2 images of 2 classes; .* build\(width=1\.0, classes=10\)"):
        with_data(replace(recipe, build=one), Console(quiet=True), folder)

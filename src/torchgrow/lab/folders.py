"""Images in folders: one folder a class, as ImageNet's, or with masks, as in PASCAL VOC's devkit.

Both are read into memory at one size, squeezed to squares, or, where they are cropped at random, streamed from disk.
"""

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from torchgrow import TorchgrowError
from torchgrow.lab.images import IMAGENET_MEAN, IMAGENET_STD, ImageData, Images
from torchgrow.lab.metrics import ACCURACY, MIOU, VOID
from torchgrow.lab.streamed import Streamed, as_labels, classes_in

VOC_CLASSES = 21

_MOST_BYTES = 16e9  # of images in memory
_LISTS = "ImageSets/Segmentation"
_AUGMENTED_LISTS, _AUGMENTED_MASKS = ("train_aug", "trainaug"), "SegmentationClassAug"  # both names are in use
_VOC_HELP = (
    "--data names a folder that holds VOCdevkit/VOC2012/ (or is one of the two), as VOCtrainval_11-May-2012.tar of "
    "host.robots.ox.ac.uk/pascal/VOC unpacks to: JPEGImages/NAME.jpg, SegmentationClass/NAME.png and "
    f"{_LISTS}/train.txt and val.txt; to train on the 10,582 augmented images, add {_LISTS}/train_aug.txt and "
    "SegmentationClassAug/NAME.png"
)


def of_classes(folder: Path, side: int, crop: bool) -> ImageData:
    """``train/CLASS/*`` and ``val/CLASS/*``, as torchvision's `ImageFolder` finds them.

    Args:
        folder: where they are.
        side: height and width, in pixels.
        crop: stream them, a random part of each, instead of reading them into memory.

    Raises:
        TorchgrowError: a split or a class has no images, a split one class, the two differ in classes, or memory is
            too small.
    """
    sets = {}
    for split in ("train", "val"):
        try:
            found = ImageFolder(str(folder / split))
        except (OSError, RuntimeError) as error:
            _filled(folder / split)
            raise TorchgrowError(
                f"{folder} has no images in {split}/CLASS/*: {what_is_in(folder)} ({error}); "
                "--data names a folder that holds train/ and val/, with one folder of images a class in each"
            ) from error
        if len(found.classes) < 2:
            raise TorchgrowError(
                f"{folder / split} holds one class, {found.classes[0]}/, so there is nothing to tell apart; "
                "give every class a folder of its own, two at least (or name the folder one above, or one below)"
            )
        paths = tuple(path for path, _ in found.samples)
        images = Streamed(paths=paths, targets=tuple(found.targets), side=side)
        sets[split] = found.classes, images if crop else _in_memory(images, folder / split)
    (classes, train), (others, test) = sets["train"], sets["val"]
    if classes != others:
        odd = sorted(set(classes) ^ set(others))
        raise TorchgrowError(f"{folder}: train/ and val/ differ in classes, e.g. {odd[0]}; both need the same folders")
    return ImageData(train=train, test=test, mean=IMAGENET_MEAN, std=IMAGENET_STD, metric=ACCURACY)


def _filled(split: Path) -> None:
    """Find the class folder without a picture, as editors and archives leave them beside those of classes."""
    for place in sorted(split.iterdir()) if split.is_dir() else []:
        files = (name for _, _, names in os.walk(place, followlinks=True) for name in names)
        if place.is_dir() and not any(name.lower().endswith(IMG_EXTENSIONS) for name in files):
            raise TorchgrowError(
                f"class folder {place.name}/ in {split}/ holds no picture ({', '.join(IMG_EXTENSIONS)}); "
                "take it out or fill it"
            )


def voc(folder: Path, side: int, crop: bool, void: tuple[int, ...]) -> ImageData:
    """PASCAL VOC's segmentation, in the layout of its devkit; augmented where the list and the masks for that are.

    Of several years that of 2012 is taken, or else the newest.

    Args:
        folder: that, or one of the folders around it.
        side: height and width, in pixels.
        crop: stream them, a random part of each, instead of reading them into memory.
        void: classes that are neither learned nor judged.

    Raises:
        TorchgrowError: a list, an image or a mask is missing or cannot be read, masks have no class that is not void,
            or memory is too small.
    """
    years = [*folder.glob("VOC20*"), *folder.glob("VOCdevkit/VOC20*")]
    around = [folder, *sorted(years, key=lambda place: (place.name == "VOC2012", place.name), reverse=True)]
    root = next((place for place in around if (place / _LISTS).is_dir()), None)
    if root is None:
        raise TorchgrowError(f"no segmentation of PASCAL VOC in {folder}: {what_is_in(folder)}. {_VOC_HELP}")
    sets = {}
    for split, (listed, masks) in _lists(root).items():
        names = _names(listed)
        pairs = [(root / f"JPEGImages/{name}.jpg", root / f"{masks}/{name}.png") for name in names]
        missing = [path for pair in pairs for path in pair if not path.exists()]
        if missing:
            raise TorchgrowError(
                f"{listed} names images that are not there: {len(missing)}, e.g. {missing[0]}. {_VOC_HELP}"
            )
        paths, targets = zip(*((str(image), str(mask)) for image, mask in pairs), strict=True)
        images = Streamed(paths=paths, targets=targets, side=side, void=void)
        _check_classes(images, listed)
        sets[split] = images if crop else _in_memory(images, listed)
    return ImageData(train=sets["train"], test=sets["val"], mean=IMAGENET_MEAN, std=IMAGENET_STD, metric=MIOU)


def _lists(root: Path) -> dict[str, tuple[Path, str]]:
    """For each split the list of its names, and the folder of its masks.

    Half of what the augmented images need is warned of: whoever put it there takes them to be trained on.
    """
    named = [root / _LISTS / f"{name}.txt" for name in _AUGMENTED_LISTS]
    listed, masks = next((path for path in named if path.exists()), None), root / _AUGMENTED_MASKS
    plain = root / _LISTS / "train.txt"
    if (listed is None) == masks.is_dir():
        there, missing = (masks, " or ".join(map(str, named))) if listed is None else (listed, str(masks))
        warnings.warn(
            f"{there} is there and {missing} is not, so the {len(_names(plain))} images of {plain} are trained on; "
            "the augmented ones need both",
            stacklevel=2,
        )
    train = (listed, _AUGMENTED_MASKS) if listed and masks.is_dir() else (plain, "SegmentationClass")
    return {"train": train, "val": (root / _LISTS / "val.txt", "SegmentationClass")}


def _names(listed: Path) -> list[str]:
    """Those in a list, one at least; a mark that editors on Windows put in front is none of them."""
    try:
        names = listed.read_text(encoding="utf-8-sig").split() if listed.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise TorchgrowError(
            f"{listed} cannot be read as a list in UTF-8 ({error}); save it in UTF-8, with a name a line"
        ) from error
    if not names:
        raise TorchgrowError(f"{listed} is missing or empty. {_VOC_HELP}")
    return names


def _check_classes(images: Streamed, listed: Path) -> None:
    """Masks must have a class that is learned, else their loss is nan and their mIoU too."""
    found, looked = classes_in(images)
    if not found - set(images.void):
        classes, void = (", ".join(map(str, sorted(some))) or "none" for some in (found, images.void))
        raise TorchgrowError(
            f"{listed}: of {looked} masks looked at, no pixel has a class that is learned; classes found: {classes}, "
            f"classes that are void in this recipe: {void}; take --scale full, which learns 0 to {VOC_CLASSES - 1}, or "
            "a recipe without these in void, or give masks other numbers"
        )


def any_learned(images: Images | Streamed) -> bool:
    """Whether a mask has a class that is learned, as far as `classes_in` looks at those on disk."""
    if isinstance(images, Streamed):
        return bool(classes_in(images)[0] - set(images.void))
    return bool((images.labels != VOID).any())


def _in_memory(images: Streamed, place: Path) -> Images:
    """All of them, squeezed to squares."""
    side = images.side
    needed = len(images) * (11 if images.masked else 3) * side**2  # a class of a pixel has 8 bytes
    if needed > _MOST_BYTES:
        raise TorchgrowError(
            f"{place} holds {len(images)} images, {needed / 1e9:.0f} GB at {side} x {side}; these recipes keep them in "
            f"memory, up to {_MOST_BYTES / 1e9:.0f} GB: use fewer images, --scale full of a recipe that has it, which "
            "reads them batch by batch, or a recipe with crop=True, which does too"
        )
    pixels = torch.empty(len(images), 3, side, side, dtype=torch.uint8)
    masks = torch.empty(len(images) if images.masked else 0, side, side, dtype=torch.int64)
    each = track(range(len(images)), escape(f"reading {place.stem}"), console=Console(stderr=True))
    for i in each:
        picture, mask = images.open(i)
        pixels[i] = _squeezed(picture, side, Image.Resampling.BILINEAR).permute(2, 0, 1)
        if mask is not None:
            masks[i] = as_labels(_squeezed(mask, side, Image.Resampling.NEAREST), images.void)
    return Images(pixels=pixels, labels=masks if images.masked else torch.tensor(images.targets))


def _squeezed(picture: Image.Image, side: int, how: Image.Resampling) -> Tensor:
    return torch.from_numpy(np.array(picture.resize((side, side), how)))


def what_is_in(folder: Path) -> str:
    """What was found there, in words."""
    if not folder.exists():
        return "the folder does not exist"
    if not folder.is_dir():
        return "it is a file, not a folder"
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    if not names:
        return "the folder is empty"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"found {', '.join(names[:5])}{more}"

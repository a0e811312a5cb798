"""Data sets by name, from whatever form they lie on disk in."""

import hashlib
import io
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from torchgrow import TorchgrowError
from torchgrow.lab import folders
from torchgrow.lab.folders import what_is_in
from torchgrow.lab.images import ImageData, Images, augment, train_steps
from torchgrow.lab.metrics import MIOU
from torchgrow.lab.names import DATASETS
from torchgrow.lab.shapes import shapes
from torchgrow.lab.streamed import UNREADABLE, in_rgb
from torchgrow.lab.text import TextData, load_text

__all__ = [
    "Data",
    "ImageData",
    "Images",
    "augment",
    "dataset_in",
    "fingerprint",
    "load",
    "load_images",
    "sizes",
    "train_steps",
]

# Per channel, of the 50,000 training images with values in [0, 1]; published with the set's first ResNets.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)

_DIGITS_TEST_IMAGES = 360  # of 1,797
_HELD_OUT_IMAGES, _HELD_OUT_SHARE = 10_000, 0.2
_SPLIT_SEED = 0  # the digits split and the subset draw are the same for every run seed

_MADE_HERE = {
    "digits": "the digits come with scikit-learn",
    **dict.fromkeys(("shapes", "shape-masks"), "at scale smoke the pictures are drawn"),
}

_FETCHED_BY_HAND = {
    "imagefolder": "ImageNet is given out at image-net.org, Imagenette at github.com/fastai/imagenette",
    "voc": "VOCtrainval_11-May-2012.tar is at host.robots.ox.ac.uk/pascal/VOC",
}

_CIFAR10_HELP = (
    "What works: a folder with torchvision's cifar-10-batches-py/ (data_batch_1 to data_batch_5 and test_batch), "
    "a folder with Hugging Face style train*.parquet and test*.parquet (columns img or image, and label), "
    "or --download to have torchvision fetch the data into the folder."
)


Data = ImageData | TextData


def sizes(data: Data) -> tuple[int, ...]:
    """How many images, or words, are for training, for validation where text has that, and for the test."""
    parts = [data.train, data.valid, data.test] if isinstance(data, TextData) else [data.train, data.test]
    return tuple(len(part) for part in parts)


def fingerprint(data: Data) -> str:
    """Tells data sets of equal size apart: by their words, by images as read, or by names of files and what is in some.

    Of images 64 are looked at, spread over the set, and all labels, or names.
    """
    seen = hashlib.sha256()
    if isinstance(data, TextData):
        seen.update("\n".join(data.vocabulary).encode())
        parts: list[Any] = [data.train, data.valid, data.test]
    else:
        parts = [data.train, data.test]
    for part in parts:
        for known in _looked_at(part):
            seen.update(known)
    return seen.hexdigest()[:16]


def _looked_at(part: Any) -> Iterator[bytes]:
    """What tells a part of a data set from others."""
    if isinstance(part, Tensor):
        yield part.cpu().numpy().tobytes()
        return
    spread = torch.linspace(0, max(0, len(part) - 1), 64).long()
    if isinstance(part, Images):
        labels = part.labels if part.labels.dim() == 1 else part.labels[spread.to(part.device)]
        yield labels.cpu().numpy().tobytes()
        yield part.pixels[spread.to(part.device)].cpu().numpy().tobytes()
        return
    yield json.dumps([path.rsplit(os.sep, 2)[-2:] for path in part.paths]).encode()  # quick for a million of them
    for i in spread.tolist():
        yield Path(part.paths[i]).read_bytes()
        yield str(part.targets[i]).encode() if isinstance(part.targets[i], int) else Path(part.targets[i]).read_bytes()


def load(
    dataset: str,
    *,
    folder: Path | None = None,
    download: bool = False,
    subset: int | None = None,
    steps: int = 35,
    side: int = 64,
    crop: bool = False,
    void: tuple[int, ...] = (),
    held_out: bool = False,
) -> Data:
    """Load a data set, into memory but where images are cropped at random.

    Args:
        dataset: ``"digits"`` (1,437 training and 360 test images of 1 x 8 x 8, shipped with scikit-learn),
            ``"cifar10"`` (50,000 and 10,000 images of 3 x 32 x 32), ``"imagefolder"`` (ImageNet, or your own, in one
            folder a class), ``"voc"`` (PASCAL VOC's masks, or your own in that layout), ``"text"`` (three files of
            words), ``"shapes"`` or ``"shape-masks"`` (drawn, see `torchgrow.lab.shapes`).
        folder: where the data is; default for CIFAR-10 ``data/cifar10``, for folders of images ``data/images``, for
            VOC ``data/voc``, for a text the manual that comes with Python. Digits and shapes need none.
        download: let torchvision fetch CIFAR-10 into ``folder`` if it is not there.
        subset: number of training images to keep, drawn once and for all, whatever the run's seed, or of training
            words, from the beginning; what a network is judged by is never cut. Default: all.
        steps: words a sample, of a text.
        side: pixels that images in folders are resized to, and shapes drawn with, along both axes.
        crop: stream images in folders from disk, a random part of each: see `torchgrow.lab.streamed`.
        void: classes of VOC that are neither learned nor judged.
        held_out: training images in place of the test images, for choices to be made on: those that the subset leaves
            over, at most 10,000, so that it trains as it will when the test images judge; where they are less than a
            fifth of the subset, a fifth of it, and the rest is left to train on.

    Raises:
        TorchgrowError: an unknown data set; a folder or a download for one that needs none; a folder that is missing,
            empty, incomplete or holds something else; a subset that is not between 1 and the number of training images
            or words; a download of anything but CIFAR-10; held-out parts of a text.
    """
    if dataset == "text":
        if held_out:
            raise TorchgrowError("a text is judged by its validation part as it is; leave --validate out")
        if download:
            raise TorchgrowError(
                "a text cannot be downloaded: the Penn Treebank may not be passed on freely; leave --download out and "
                "name a folder with your copy, or none for the manual that comes with Python"
            )
        return load_text(folder=folder, steps=steps, subset=subset)
    places: dict[str, Any] = {"folder": folder, "download": download, "subset": subset, "held_out": held_out}
    return load_images(dataset, side=side, crop=crop, void=void, **places)


def load_images(
    dataset: str,
    *,
    folder: Path | None = None,
    download: bool = False,
    subset: int | None = None,
    side: int = 64,
    crop: bool = False,
    void: tuple[int, ...] = (),
    held_out: bool = False,
) -> ImageData:
    """`load` for every data set but a text."""
    if dataset in _MADE_HERE and (folder is not None or download):
        raise TorchgrowError(
            f"{_MADE_HERE[dataset]}, so no folder is read; leave {'--data' if folder else '--download'} out, or take a "
            "recipe and a scale that read one: torchgrow run resnet20-cifar10 --data FOLDER"
        )
    if dataset in _FETCHED_BY_HAND and download:
        raise TorchgrowError(
            f"{dataset} cannot be downloaded: {_FETCHED_BY_HAND[dataset]}; leave --download out and name your copy: "
            "--data FOLDER"
        )
    if dataset == "digits":
        data = _digits()
    elif dataset == "cifar10":
        data = _cifar10(folder or Path("data/cifar10"), download)
    elif dataset == "imagefolder":
        data = folders.of_classes(folder or Path("data/images"), side, crop)
    elif dataset == "voc":
        data = folders.voc(folder or Path("data/voc"), side, crop, void)
    elif dataset in ("shapes", "shape-masks"):
        data = shapes(side, masks=dataset == "shape-masks")
    else:
        raise TorchgrowError(f"there is no data set {dataset!r}; there are {', '.join(DATASETS)}")
    if subset is not None and not 1 <= subset <= len(data.train):
        raise TorchgrowError(f"a subset has 1 to {len(data.train)} of the training images of {dataset}, got {subset}")
    if held_out:
        data = _held_out(data, subset)
    elif subset is not None:
        data = replace(data, train=data.train[_permutation(len(data.train))[:subset]])
    _check_drawn(data)
    return data


def _check_drawn(data: ImageData) -> None:
    """Whole sets have masks to learn; what was drawn from them may have none."""
    for images, use in ((data.train, "train on"), (data.test, "judge by")) if data.metric is MIOU else ():
        if not folders.any_learned(images):
            raise TorchgrowError(
                f"no pixel of the {len(images)} images that are left to {use} has a class that is learned; take a "
                "larger --subset, or leave it out"
            )


def _held_out(data: ImageData, subset: int | None) -> ImageData:
    """Training images in place of the test images, and the subset, or what is left of it, to train on."""
    order = _permutation(len(data.train))  # folders of images come class by class
    size = subset or len(order)
    fifth = round(_HELD_OUT_SHARE * size)
    trained = size if len(order) - size >= fifth else size - fifth
    judging = order[size:][:_HELD_OUT_IMAGES] if trained == size else order[trained:size]
    return replace(data, train=data.train[order[:trained]], test=data.train[judging])


def _permutation(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(_SPLIT_SEED))


def _digits() -> ImageData:
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)  # [1797, 64] floats, the integers 0 to 16
    pixels = torch.from_numpy(values).view(-1, 1, 8, 8).mul(255 / 16).round().to(torch.uint8)
    images = Images(pixels=pixels, labels=torch.from_numpy(labels).long())
    # The file is ordered by writer; a drawn split keeps every writer on both sides, as most published
    # figures for this set do.
    images = images[_permutation(len(images))]
    train, test = images[_DIGITS_TEST_IMAGES:], images[:_DIGITS_TEST_IMAGES]
    std, mean = torch.std_mean(train.pixels.float() / 255)
    return ImageData(train=train, test=test, mean=(mean.item(),), std=(std.item(),))


def _cifar10(folder: Path, download: bool) -> ImageData:
    read = _cifar10_reader(folder)
    if read is None and download:
        _download_cifar10(folder)
        read = _cifar10_reader(folder)
    if read is None:
        raise TorchgrowError(f"no CIFAR-10 in {folder}: {what_is_in(folder)}. {_CIFAR10_HELP}")
    train, test = read("train"), read("test")
    return ImageData(train=train, test=test, mean=CIFAR10_MEAN, std=CIFAR10_STD)


def dataset_in(folder: Path) -> str:
    """Which data set of images a folder holds: "cifar10", or "imagefolder".

    Raises:
        TorchgrowError: neither.
    """
    if _cifar10_reader(folder):
        return "cifar10"
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        return "imagefolder"
    raise TorchgrowError(
        f"{folder} holds no images to train on: {what_is_in(folder)}. What works: train/CLASS/* and val/CLASS/*, "
        "CIFAR-10 as torchvision's cifar-10-batches-py/, or as Hugging Face's train*.parquet and test*.parquet"
    )


def _cifar10_reader(folder: Path) -> Callable[[str], Images] | None:
    """The function that reads a split from ``folder``, or None if nothing there looks like CIFAR-10."""
    for place in (folder, folder / "cifar-10-batches-py"):
        if any(place.glob("data_batch_*")) or (place / "test_batch").exists():
            return lambda split: _read_batches(place, split)
    for place in (folder, folder / "data", folder / "plain_text"):
        if any(_shards(place, split) for split in ("train", "test")):
            return lambda split: _read_parquet(place, split)
    return None


def _download_cifar10(folder: Path) -> None:
    from torchvision.datasets import CIFAR10

    try:
        folder.mkdir(parents=True, exist_ok=True)
        CIFAR10(str(folder), download=True)
    except (OSError, RuntimeError) as error:
        raise TorchgrowError(f"CIFAR-10 could not be downloaded into {folder}: {error}. {_CIFAR10_HELP}") from error


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles CIFAR-10's batches and nothing that could run code: plain containers and numpy arrays."""

    def find_class(self, module: str, name: str) -> Any:
        """The few numpy names that an array needs; anything else raises."""
        if module.startswith("numpy"):
            if name == "_reconstruct":
                return np.empty(0).__reduce__()[0]  # numpy's own, wherever this version keeps it
            if name == "ndarray":
                return np.ndarray
            if name == "dtype":
                # Old files pass align as 0 and 1, which numpy 2.4 warns of; only the name matters.
                return lambda spec, *_: np.dtype(spec)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _read_batches(folder: Path, split: str) -> Images:
    """Torchvision's files: pickled ``{"data": uint8 [N, 3072], "labels": list of N}``, keys str or bytes."""
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise TorchgrowError(f"{folder} lacks {', '.join(missing)}: {what_is_in(folder)}. {_CIFAR10_HELP}")
    pixels, labels = [], []
    for name in names:
        path = folder / name
        try:
            with path.open("rb") as file:
                batch = _ArrayUnpickler(file, encoding="latin1").load()
            pixels.append(_as_images(np.asarray(batch["data"])))
            labels.append(torch.tensor(batch["labels"]))
        except Exception as error:  # whatever a damaged pickle raises
            raise TorchgrowError(f"{path} is not a batch of CIFAR-10: {error}. {_CIFAR10_HELP}") from error
    return _checked(torch.cat(pixels), torch.cat(labels), folder)


def _as_images(rows: np.ndarray[Any, Any]) -> Tensor:
    """Uint8 ``[N, 3, 32, 32]`` of what a batch has as its data; other numbers may be pixels in [0, 1], or anything.

    Raises:
        ValueError: it has no rows, or others.
    """
    if rows.dtype != np.uint8:
        raise ValueError(f"its data is {rows.dtype}, not uint8")
    if not len(rows):
        raise ValueError("it has no images")
    return torch.from_numpy(rows).view(-1, 3, 32, 32)


def _shards(folder: Path, split: str) -> list[Path]:
    """``split.parquet`` or ``split-00000-of-00002.parquet`` and so on, in order."""
    if not folder.is_dir():
        return []
    pattern = re.compile(rf"{split}(-\d+-of-\d+)?(-[0-9a-f]+)?\.parquet")
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))


def _read_parquet(folder: Path, split: str) -> Images:
    """Hugging Face's files: a column of encoded images, ``struct<bytes, path>``, and one of labels."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shards = _shards(folder, split)
    if not shards:
        raise TorchgrowError(f"{folder} has no {split}*.parquet: {what_is_in(folder)}. {_CIFAR10_HELP}")
    total = re.search(r"-of-(\d+)", shards[0].name)
    if total and int(total[1]) != len(shards):
        raise TorchgrowError(
            f"{folder} has {len(shards)} of the {int(total[1])} shards of {split}; copy the missing files there"
        )
    pixels: list[np.ndarray[Any, Any]] = []
    labels: list[int] = []
    for path in shards:
        try:
            table = pq.read_table(path)
            column = next((name for name in ("img", "image") if name in table.column_names), None)
            if column is None or "label" not in table.column_names:
                raise TorchgrowError(
                    f"{path} has the columns {', '.join(table.column_names)}, not img or image, and label. "
                    + _CIFAR10_HELP
                )
            labels += [int(label) for label in table["label"].to_pylist()]
            for row, cell in enumerate(table[column].to_pylist(), 1):
                with Image.open(io.BytesIO(cell["bytes"])) as image:
                    pixels.append(np.asarray(in_rgb(image, f"{path}: row {row}")))
        except (pa.ArrowException, KeyError, TypeError, *UNREADABLE) as error:
            raise TorchgrowError(f"{path} cannot be read as images: {error}. {_CIFAR10_HELP}") from error
    if not pixels:
        raise TorchgrowError(f"{folder} holds no {split} images. {_CIFAR10_HELP}")
    sizes = {image.shape for image in pixels}
    if sizes != {(32, 32, 3)}:
        raise TorchgrowError(f"{folder} holds {split} images of {sorted(sizes)}, CIFAR-10's are 32 x 32")
    # contiguous: permute alone would leave the batch channels_last without anyone having asked for it.
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return _checked(stacked, torch.tensor(labels), folder)


def _checked(pixels: Tensor, labels: Tensor, folder: Path) -> Images:
    if len(pixels) != len(labels):
        raise TorchgrowError(f"{folder} holds {len(pixels)} images but {len(labels)} labels")
    if labels.min() < 0 or labels.max() > 9:
        raise TorchgrowError(f"{folder} holds labels {int(labels.min())} to {int(labels.max())}, CIFAR-10's are 0 to 9")
    return Images(pixels=pixels, labels=labels.long())

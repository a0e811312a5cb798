"""Small image sets held in memory as uint8, and their batches: shifted, mirrored and normalised on the fly.

Batches are contiguous NCHW unless channels_last is asked for: in that layout PyTorch's CPU build corrupts
the heap in the backward pass of a thin, strided 1x1 convolution, so the networks need `torchgrow.guard_`.
"""

import io
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from torchgrow import TorchgrowError
from torchgrow.lab.metrics import ACCURACY, Metric
from torchgrow.lab.names import DATASETS
from torchgrow.lab.text import TextData, load_text

# Per channel, of the 50,000 training images with values in [0, 1]; published with the set's first ResNets.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
# Of ImageNet's training images, as all of torchvision's models take them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_DIGITS_TEST_IMAGES = 360  # of 1,797
_MOST_BYTES = 16e9  # of images in memory
_HELD_OUT_IMAGES, _HELD_OUT_SHARE = 10_000, 0.2
_SPLIT_SEED = 0  # the digits split and the subset draw are the same for every run seed

_CIFAR10_HELP = (
    "What works: a folder with torchvision's cifar-10-batches-py/ (data_batch_1 to data_batch_5 and test_batch), "
    "a folder with Hugging Face style train*.parquet and test*.parquet (columns img or image, and label), "
    "or --download to have torchvision fetch the data into the folder."
)


@dataclass(frozen=True, kw_only=True)
class Images:
    """Labelled images in memory.

    Attributes:
        pixels: uint8 ``[N, C, H, W]``, contiguous.
        labels: int64 ``[N]``.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | Tensor) -> "Images":
        index = index.to(self.labels.device) if isinstance(index, Tensor) else index
        return Images(pixels=self.pixels[index], labels=self.labels[index])

    def to(self, device: torch.device) -> "Images":
        """The same in the memory of a device."""
        return Images(pixels=self.pixels.to(device), labels=self.labels.to(device))


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """A training and a test set with the numbers that normalise them.

    Attributes:
        train: training images.
        test: test images.
        mean: mean per channel of pixels in [0, 1].
        std: standard deviation per channel of pixels in [0, 1].
        channels_last: whether batches have that layout in memory.
    """

    train: Images
    test: Images
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels_last: bool = False
    metric: Metric = ACCURACY

    @property
    def device(self) -> torch.device:
        """Where the images are, and so where networks train."""
        return self.train.labels.device

    def to(self, device: torch.device) -> "ImageData":
        """The same data on a device; what is drawn at random is drawn on the CPU, the same on every device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def example(self) -> Tensor:
        """A small batch to trace a network on, float32 ``[2, C, H, W]``."""
        return self.normalise(self.train.pixels[:2])

    def normalise(self, pixels: Tensor) -> Tensor:
        """Uint8 ``[N, C, H, W]`` to float32 of the same shape, about zero mean and unit variance, in the layout."""
        shape = (1, -1, 1, 1)
        mean, std = (torch.tensor(x, device=pixels.device).view(shape) for x in (self.mean, self.std))
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return ((pixels.float() / 255 - mean) / std).contiguous(memory_format=layout)

    def train_batches(
        self, *, batch_size: int, shift: int, mirror: bool, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of augmented training batches in a fresh order.

        Args:
            batch_size: images a batch. What is left over after the last full batch sits this epoch out, so
                that every step costs the same; a set smaller than one batch is one batch.
            shift: largest shift in pixels along each axis; the border that appears is black.
            mirror: whether to mirror every second image, by chance, left to right.
            generator: source of the order and of the augmentation.

        Yields:
            float32 images ``[batch_size, C, H, W]`` and int64 labels ``[batch_size]``.
        """
        order = torch.randperm(len(self.train), generator=generator)
        steps = train_steps(len(self.train), batch_size)
        for index in order[: steps * batch_size].split(batch_size):
            batch = self.train[index]
            pixels = augment(batch.pixels, shift=shift, mirror=mirror, generator=generator)
            yield self.normalise(pixels), batch.labels

    def test_batches(self, *, batch_size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
        """The test images in order, not augmented; the last batch may be smaller."""
        for start in range(0, len(self.test), batch_size):
            batch = self.test[start : start + batch_size]
            yield self.normalise(batch.pixels), batch.labels


def train_steps(images: int, batch_size: int) -> int:
    """Batches in one epoch of `ImageData.train_batches`."""
    return max(1, images // batch_size)


def augment(pixels: Tensor, *, shift: int, mirror: bool, generator: torch.Generator) -> Tensor:
    """Shift every image by up to ``shift`` pixels along each axis and mirror half of them.

    Args:
        pixels: uint8 ``[N, C, H, W]``.
        shift: largest shift in pixels; pixels shifted in are 0.
        mirror: whether to mirror at all.
        generator: source of the draws.

    Returns:
        uint8 ``[N, C, H, W]``, contiguous.
    """
    n, c, h, w = pixels.shape
    rows = torch.arange(h) + torch.randint(2 * shift + 1, (n, 1), generator=generator)  # [N, H]
    columns = torch.arange(w).expand(n, w)
    if mirror:
        flipped = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
    columns = columns + torch.randint(2 * shift + 1, (n, 1), generator=generator)  # [N, W]
    rows, columns = rows.to(pixels.device), columns.to(pixels.device)
    padded = F.pad(pixels, (shift, shift, shift, shift))
    # One gather does both: indices broadcast to [N, C, H, W].
    return padded[
        torch.arange(n, device=pixels.device)[:, None, None, None],
        torch.arange(c, device=pixels.device)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


Data = ImageData | TextData


def load(
    dataset: str,
    *,
    folder: Path | None = None,
    download: bool = False,
    subset: int | None = None,
    steps: int = 35,
    side: int = 64,
    held_out: bool = False,
) -> Data:
    """Load a data set into memory.

    Args:
        dataset: ``"digits"`` (1,437 training and 360 test images of 1 x 8 x 8, shipped with scikit-learn),
            ``"cifar10"`` (50,000 and 10,000 images of 3 x 32 x 32), ``"imagefolder"`` (your own, in one folder a class)
            or ``"text"`` (three files of words).
        folder: where the data is; default for CIFAR-10 ``data/cifar10``, for a text the manual that comes with
            Python. Digits need none.
        download: let torchvision fetch CIFAR-10 into ``folder`` if it is not there.
        subset: number of training images to keep, drawn once and for all, whatever the run's seed, or of training
            words, from the beginning; what a network is judged by is never cut. Default: all.
        steps: words a sample, of a text.
        side: pixels that images of ``"imagefolder"`` are resized to, along both axes.
        held_out: training images in place of the test images, for choices to be made on: those that the subset leaves
            over, at most 10,000, so that it trains as it will when the test images judge; where they are less than a
            fifth of the subset, a fifth of it, and the rest is left to train on.

    Raises:
        TorchgrowError: an unknown data set; a folder that is missing, empty, incomplete or holds something
            else; a subset that is not between 1 and the number of training images or words; a download of a text, or
            held-out parts of one.
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
    return load_images(dataset, folder=folder, download=download, subset=subset, side=side, held_out=held_out)


def load_images(
    dataset: str,
    *,
    folder: Path | None = None,
    download: bool = False,
    subset: int | None = None,
    side: int = 64,
    held_out: bool = False,
) -> ImageData:
    """`load` for every data set but a text."""
    if dataset == "digits":
        data = _digits()
    elif dataset == "cifar10":
        data = _cifar10(folder or Path("data/cifar10"), download)
    elif dataset == "imagefolder":
        data = _imagefolder(folder or Path("data/images"), side)
    else:
        raise TorchgrowError(f"there is no data set {dataset!r}; there are {', '.join(DATASETS)}")
    if subset is not None and not 1 <= subset <= len(data.train):
        raise TorchgrowError(f"a subset has 1 to {len(data.train)} of the training images of {dataset}, got {subset}")
    if held_out:
        return _held_out(data, subset)
    if subset is None:
        return data
    return replace(data, train=data.train[_permutation(len(data.train))[:subset]])


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
        raise TorchgrowError(f"no CIFAR-10 in {folder}: {_found(folder)}. {_CIFAR10_HELP}")
    train, test = read("train"), read("test")
    return ImageData(train=train, test=test, mean=CIFAR10_MEAN, std=CIFAR10_STD)


def _imagefolder(folder: Path, side: int) -> ImageData:
    """``train/CLASS/*`` and ``val/CLASS/*`` by torchvision's `ImageFolder`, squeezed to squares in memory."""
    from torchvision.datasets import ImageFolder

    sets = {}
    for split in ("train", "val"):
        try:
            found = ImageFolder(str(folder / split))
        except (OSError, RuntimeError) as error:  # torchvision says which class has no image
            raise TorchgrowError(
                f"{folder} has no images in {split}/CLASS/*: {_found(folder)} ({error}); "
                "--data names a folder that holds train/ and val/, with one folder of images a class in each"
            ) from error
        needed = len(found) * 3 * side**2
        if needed > _MOST_BYTES:
            raise TorchgrowError(
                f"{folder / split} holds {len(found)} images, {needed / 1e9:.0f} GB at {side} x {side}; these recipes "
                f"keep them in memory, up to {_MOST_BYTES / 1e9:.0f} GB: use fewer images, or your own training loop"
            )
        pixels = torch.empty(len(found), 3, side, side, dtype=torch.uint8)
        for i, (path, _) in enumerate(track(found.samples, f"reading {split}", console=Console(stderr=True))):
            with Image.open(path) as image:
                square = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
            pixels[i] = torch.from_numpy(np.array(square)).permute(2, 0, 1)
        sets[split] = found.classes, Images(pixels=pixels, labels=torch.tensor(found.targets))
    (classes, train), (others, test) = sets["train"], sets["val"]
    if classes != others:
        odd = sorted(set(classes) ^ set(others))
        raise TorchgrowError(f"{folder}: train/ and val/ differ in classes, e.g. {odd[0]}; both need the same folders")
    return ImageData(train=train, test=test, mean=IMAGENET_MEAN, std=IMAGENET_STD)


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
        f"{folder} holds no images to train on: {_found(folder)}. What works: train/CLASS/* and val/CLASS/*, "
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


def _found(folder: Path) -> str:
    if not folder.exists():
        return "the folder does not exist"
    if not folder.is_dir():
        return "it is a file, not a folder"
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    if not names:
        return "the folder is empty"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"found {', '.join(names[:5])}{more}"


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
        raise TorchgrowError(f"{folder} lacks {', '.join(missing)}: {_found(folder)}. {_CIFAR10_HELP}")
    pixels, labels = [], []
    for name in names:
        path = folder / name
        try:
            with path.open("rb") as file:
                batch = _ArrayUnpickler(file, encoding="latin1").load()
            pixels.append(torch.from_numpy(batch["data"]).view(-1, 3, 32, 32))
            labels.append(torch.tensor(batch["labels"]))
        except Exception as error:  # whatever a damaged pickle raises
            raise TorchgrowError(f"{path} is not a batch of CIFAR-10: {error}. {_CIFAR10_HELP}") from error
    return _checked(torch.cat(pixels), torch.cat(labels), folder)


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
        raise TorchgrowError(f"{folder} has no {split}*.parquet: {_found(folder)}. {_CIFAR10_HELP}")
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
            for cell in table[column].to_pylist():
                with Image.open(io.BytesIO(cell["bytes"])) as image:
                    pixels.append(np.asarray(image.convert("RGB")))
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise TorchgrowError(f"{path} cannot be read as images: {error}. {_CIFAR10_HELP}") from error
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

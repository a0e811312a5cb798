"""Images read from disk batch by batch, by workers, and augmented as is usual for their task."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2

from torchgrow import TorchgrowError
from torchgrow.lab.metrics import VOID

BACKGROUND = (124, 116, 104)  # of 255, the mean of ImageNet's training images: about 0 once it is normalised
_VOID = 255  # void in files of masks
_CLASSES = 21  # of VOC, background included
_WORKERS = 16
_LOOKED_AT = 64  # masks, before training
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises of a picture that it cannot read; a broken PNG is a SyntaxError."""


def _cores() -> int:
    """Those that this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Streamed:
    """Images on disk with a class, or a mask of classes, each; it stands for `torchgrow.lab.images.Images`.

    Trained on is a random part of 8 to 100 % of an image, resized (Szegedy et al., 2015), and judged by the middle of
    it, at 256/224 of the side; with masks, a random part of the image at half to twice the side (Chen et al., 2017),
    and judged by all of it, made smaller only where it does not fit. What is drawn at random for an image depends on
    the generator alone, not on how many workers there are. A run that is resumed within an epoch reads what it skips.

    Attributes:
        paths: of the images.
        targets: a class each, or the path of a mask each: a picture whose values are classes, 255 for void.
        side: height and width of what is read, in pixels.
        void: classes of masks that become void.
        device: where batches go.
        workers: processes that read, as far as there are so many CPUs; 0: this one reads.
    """

    paths: tuple[str, ...]
    targets: tuple[int, ...] | tuple[str, ...]
    side: int
    void: tuple[int, ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    workers: int = field(default_factory=lambda: min(_WORKERS, _cores() - 1))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: slice | Tensor) -> "Streamed":
        chosen = range(len(self))[index] if isinstance(index, slice) else index.tolist()
        targets: Any = tuple(self.targets[i] for i in chosen)
        return replace(self, paths=tuple(self.paths[i] for i in chosen), targets=targets)

    def to(self, device: torch.device) -> "Streamed":
        """The same with batches on a device."""
        return replace(self, device=device)

    @property
    def pixels(self) -> Tensor:
        """All of them as they are judged, uint8 ``[N, 3, side, side]``; meant for a few."""
        return self._read()[0].to(self.device)

    @property
    def labels(self) -> Tensor:
        """Int64 ``[N]``, or masks ``[N, side, side]``, which are read: meant for a few."""
        return (self._read()[1] if self.masked else torch.tensor(self.targets)).to(self.device)

    @property
    def masked(self) -> bool:
        """Whether there is a mask of each."""
        return isinstance(self.targets[0], str)

    def open(self, i: int) -> tuple[Image.Image, Image.Image | None]:
        """A picture in RGB, and its mask where there is one, as the files have them.

        Raises:
            TorchgrowError: one of the two cannot be read, or the mask is not one, or not of the picture's size.
        """
        picture, target = in_rgb(_opened(self.paths[i]), self.paths[i]), self.targets[i]
        if not isinstance(target, str):
            return picture, None
        mask = classes_of(_opened(target), target)
        if mask.size != picture.size:
            raise TorchgrowError(
                f"{target} has {mask.width} x {mask.height} pixels and its picture {self.paths[i]} {picture.width} x "
                f"{picture.height}; a mask says the class of every pixel, so give it the size of its picture"
            )
        return picture, mask

    def _read(self) -> tuple[Tensor, Tensor]:
        reading = _Reading(self)
        pixels, labels = zip(*(reading[i, None] for i in range(len(self))), strict=True)
        return torch.stack(pixels), torch.stack(labels)

    def batches(
        self,
        order: Tensor,
        *,
        batch_size: int,
        mirror: bool = False,
        generator: torch.Generator | None = None,
        share: slice = slice(None),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of images, uint8, and of their labels.

        Args:
            order: which images, int64.
            batch_size: images a batch; the last one may be smaller.
            mirror: whether half of the images are mirrored.
            generator: source of the augmentation; None: none, the images as they are judged.
            share: which of the images of every batch are read.
        """
        seeds: Any = [None] * len(order)
        if generator is not None:
            seeds = torch.randint(2**62, (len(order),), generator=generator).tolist()
        items = list(zip(order.tolist(), seeds, strict=True))
        loader = DataLoader(
            _Reading(self, mirror),
            batch_sampler=[items[start : start + batch_size][share] for start in range(0, len(items), batch_size)],
            collate_fn=_collated,
            num_workers=min(self.workers, _cores()),  # PyTorch warns of more
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else it draws from the one that dropout draws from
        )
        each = iter(loader)
        for batch in each:
            if isinstance(batch, TorchgrowError):
                del each  # its workers end now: those that the garbage collector finds go on for five seconds
                raise batch
            pixels, labels = batch
            yield pixels.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class _Reading(Dataset[tuple[Tensor, Tensor]]):
    """What workers do: an image and its label by number, and by the seed that augments it; None: as it is judged."""

    def __init__(self, images: Streamed, mirror: bool = False) -> None:
        self.images = images
        self.judged = _as_judged(images.side, images.masked)
        self.augmented = _augmented(images.side, images.masked, mirror)

    def __getitems__(self, items: list[tuple[int, int | None]]) -> list[tuple[Tensor, Tensor]] | TorchgrowError:
        """A batch; or what is wrong with it, which DataLoader would raise with a traceback for its text."""
        try:
            return [self[item] for item in items]
        except TorchgrowError as error:
            return error

    def __getitem__(self, item: tuple[int, int | None]) -> tuple[Tensor, Tensor]:
        i, seed = item
        target = self.images.targets[i]
        picture, mask = self.images.open(i)
        sample = [tv_tensors.Image(v2.functional.pil_to_tensor(picture))]
        if mask is not None:
            sample.append(tv_tensors.Mask(torch.from_numpy(np.array(mask))))
        if seed is None:
            read = self.judged(*sample)
        else:
            with torch.random.fork_rng(devices=()):
                torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
                read = self.augmented(*sample)
        if isinstance(target, str):
            return read[0].as_subclass(Tensor), as_labels(read[1].as_subclass(Tensor), self.images.void)
        return read.as_subclass(Tensor), torch.tensor(target)


def _collated(batch: list[tuple[Tensor, Tensor]] | TorchgrowError) -> Any:
    return batch if isinstance(batch, TorchgrowError) else default_collate(batch)


def _augmented(side: int, masked: bool, mirror: bool) -> Callable[..., Any]:
    """A random part of an image, and of its mask."""
    mirrored = [v2.RandomHorizontalFlip()] if mirror else []
    if not masked:
        return v2.Compose([v2.RandomResizedCrop(side), *mirrored])
    fill = {tv_tensors.Image: BACKGROUND, tv_tensors.Mask: _VOID}
    cropped = v2.RandomCrop(side, pad_if_needed=True, fill=fill)
    return v2.Compose([v2.RandomResize(side // 2, 2 * side), cropped, *mirrored])


def _as_judged(side: int, masked: bool) -> Callable[..., Any]:
    """The middle of an image; or all of it and of its mask, on a background."""
    if not masked:
        return v2.Compose([v2.Resize(round(side * 256 / 224)), v2.CenterCrop(side)])

    return partial(_whole, side)


def _whole(side: int, *sample: Tensor) -> tuple[Tensor, ...]:
    """An image and its mask on a square, made smaller where they do not fit."""
    h, w = sample[0].shape[-2:]
    longer = max(h, w)
    if longer > side:
        h, w = (max(1, round(length * side / longer)) for length in (h, w))
        sample = tuple(v2.functional.resize(part, [h, w]) for part in sample)
    pad, fills = [0, 0, side - w, side - h], (list(BACKGROUND), _VOID)
    return tuple(v2.functional.pad(part, pad, fill=fill) for part, fill in zip(sample, fills, strict=True))


def _opened(path: str) -> Image.Image:
    """All of a picture, read.

    Raises:
        TorchgrowError: it cannot be.
    """
    try:
        with Image.open(path) as file:
            file.load()
            return file
    except UNREADABLE as error:
        raise TorchgrowError(
            f"{path} is not a picture that Pillow can read ({error}); mend it or take it out"
        ) from None


def in_rgb(picture: Image.Image, name: str) -> Image.Image:
    """A picture in 8 bits a colour.

    Raises:
        TorchgrowError: it has more, which Pillow would clip: nearly all of a 16-bit picture to white.
    """
    if picture.mode.startswith(("I", "F")):
        raise TorchgrowError(
            f"{name} is a picture of mode {picture.mode}, whose values go beyond 255 and cannot be read as they are; "
            "save it with 8 bits a colour"
        )
    return picture.convert("RGB")


def classes_of(mask: Image.Image, path: str) -> Image.Image:
    """The mask itself, once its pixels are seen to be numbers of classes.

    Raises:
        TorchgrowError: they are colours, or beyond VOC's classes.
    """
    counts = enumerate(mask.histogram()[:_VOID])
    most = max((value for value, count in counts if count), default=0) if mask.mode in ("P", "L") else None
    if most is None or most >= _CLASSES:
        found = f"is a picture of mode {mask.mode}" if most is None else f"has a class of number {most}"
        raise TorchgrowError(
            f"{path} {found}; every pixel of a mask is the number of a class, 0 to {_CLASSES - 1}, or {_VOID} for none "
            "(mode P or L, as in VOC's SegmentationClass)"
        )
    return mask


def classes_in(images: Streamed) -> tuple[set[int], int]:
    """Which classes some of its masks have, void ones too, and how many were read.

    At most 64, spread over all of them, and none after one with a class that is not void: reading all masks of a large
    set takes minutes.
    """
    found: set[int] = set()
    looked = min(_LOOKED_AT, len(images))
    for read in range(looked):
        path = str(images.targets[read * len(images) // looked])
        counts = classes_of(_opened(path), path).histogram()
        found |= {value for value, count in enumerate(counts[:_VOID]) if count}
        if found - set(images.void):
            return found, read + 1
    return found, looked


def as_labels(mask: Tensor, void: tuple[int, ...] = ()) -> Tensor:
    """Masks as files have them, uint8, to int64 with `VOID` for what is not judged."""
    left_out = torch.isin(mask, torch.tensor([*void, _VOID], dtype=mask.dtype))
    return mask.long().masked_fill(left_out, VOID)

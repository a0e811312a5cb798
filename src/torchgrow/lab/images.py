"""Labelled images and their batches: shifted, mirrored and normalised on the fly.

Batches are contiguous NCHW unless channels_last is asked for: in that layout PyTorch's CPU build corrupts
the heap in the backward pass of a thin, strided 1x1 convolution, so the networks need `torchgrow.guard_`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from torchgrow.lab.metrics import ACCURACY, VOID, Metric
from torchgrow.lab.streamed import Streamed

# Of ImageNet's training images, as all of torchvision's models take them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_PIXELS = 500 * 64 * 64  # of a batch to evaluate on: what larger images need grows with them


@dataclass(frozen=True, kw_only=True)
class Images:
    """Labelled images in memory.

    Attributes:
        pixels: uint8 ``[N, C, H, W]``, contiguous.
        labels: int64 ``[N]``, or ``[N, H, W]``: a class for every pixel, or `torchgrow.lab.metrics.VOID`.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.labels.device

    @property
    def side(self) -> int:
        """Their longer side, in pixels."""
        return max(self.pixels.shape[-2:])

    def __getitem__(self, index: slice | Tensor) -> "Images":
        index = index.to(self.labels.device) if isinstance(index, Tensor) else index
        return Images(pixels=self.pixels[index], labels=self.labels[index])

    def to(self, device: torch.device) -> "Images":
        """The same in the memory of a device."""
        return Images(pixels=self.pixels.to(device), labels=self.labels.to(device))

    def augmented(self, *, shift: int, mirror: bool, generator: torch.Generator) -> "Images":
        """Shifted and mirrored, see `augment`; masks go with their images, and what is shifted in is void."""
        draw = _drawn(self.pixels, shift=shift, mirror=mirror, generator=generator)
        labels = self.labels if self.labels.dim() == 1 else _moved(self.labels[:, None], shift, *draw, fill=VOID)[:, 0]
        return Images(pixels=_moved(self.pixels, shift, *draw), labels=labels)


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """A training and a test set with the numbers that normalise them.

    Attributes:
        train: training images.
        test: test images.
        mean: mean per channel of pixels in [0, 1].
        std: standard deviation per channel of pixels in [0, 1].
        channels_last: whether batches have that layout in memory.
        metric: what networks are judged by.
    """

    train: Images | Streamed
    test: Images | Streamed
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels_last: bool = False
    metric: Metric = ACCURACY

    @property
    def device(self) -> torch.device:
        """Where the images are, and so where networks train."""
        return self.train.device

    def to(self, device: torch.device) -> "ImageData":
        """The same data on a device; what is drawn at random is drawn on the CPU, the same on every device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def example(self) -> Tensor:
        """A small batch to trace a network on, float32 ``[2, C, H, W]``."""
        return self.normalise(self.train[:2].pixels)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Uint8 ``[N, C, H, W]`` to float32 of the same shape, about zero mean and unit variance, in the layout."""
        shape = (1, -1, 1, 1)
        mean, std = (torch.tensor(x, device=pixels.device).view(shape) for x in (self.mean, self.std))
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return ((pixels.float() / 255 - mean) / std).contiguous(memory_format=layout)

    def train_batches(
        self, *, batch_size: int, shift: int, mirror: bool, generator: torch.Generator, share: slice = slice(None)
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of augmented training batches in a fresh order.

        Args:
            batch_size: images a batch. What is left over after the last full batch sits this epoch out, so
                that every step costs the same; a set smaller than one batch is one batch.
            shift: largest shift in pixels along each axis; the border that appears is black. Images that are streamed
                are cropped instead.
            mirror: whether to mirror every second image, by chance, left to right.
            generator: source of the order and of the augmentation.
            share: which of the images of every batch to yield.

        Yields:
            float32 images ``[batch_size, C, H, W]`` and int64 labels ``[batch_size]``, or masks
            ``[batch_size, H, W]``.
        """
        order = torch.randperm(len(self.train), generator=generator)
        order = order[: train_steps(len(self.train), batch_size) * batch_size]
        if isinstance(self.train, Streamed):
            drawn = self.train.batches(order, batch_size=batch_size, mirror=mirror, generator=generator, share=share)
            yield from ((self.normalise(pixels), labels) for pixels, labels in drawn)
            return
        for index in order.split(batch_size):
            batch = self.train[index].augmented(shift=shift, mirror=mirror, generator=generator)[share]
            yield self.normalise(batch.pixels), batch.labels

    def test_batches(self, *, batch_size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The test images in order, not augmented; the last batch may be smaller.

        Args:
            batch_size: images a batch; None: 500, and fewer of more than 64 x 64 pixels.
        """
        size = batch_size or max(1, min(500, _PIXELS // self.test.side**2))
        if isinstance(self.test, Streamed):
            read = self.test.batches(torch.arange(len(self.test)), batch_size=size)
            yield from ((self.normalise(pixels), labels) for pixels, labels in read)
            return
        for start in range(0, len(self.test), size):
            batch = self.test[start : start + size]
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
    return _moved(pixels, shift, *_drawn(pixels, shift=shift, mirror=mirror, generator=generator))


def _drawn(pixels: Tensor, *, shift: int, mirror: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For every image the rows ``[N, H]`` and columns ``[N, W]`` to take, of one with a border of ``shift`` pixels."""
    n, _, h, w = pixels.shape
    rows = torch.arange(h) + torch.randint(2 * shift + 1, (n, 1), generator=generator)
    columns = torch.arange(w).expand(n, w)
    if mirror:
        flipped = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
    columns = columns + torch.randint(2 * shift + 1, (n, 1), generator=generator)
    return rows.to(pixels.device), columns.to(pixels.device)


def _moved(pixels: Tensor, shift: int, rows: Tensor, columns: Tensor, fill: int = 0) -> Tensor:
    """These rows and columns of ``[N, C, H, W]`` with a border of ``fill``."""
    n, c = pixels.shape[:2]
    padded = F.pad(pixels, (shift, shift, shift, shift), value=fill)
    # One gather does both: indices broadcast to [N, C, H, W].
    return padded[
        torch.arange(n, device=pixels.device)[:, None, None, None],
        torch.arange(c, device=pixels.device)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]

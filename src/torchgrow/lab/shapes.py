"""Drawn pictures of four shapes, with a class or a mask each: something to learn where there is no data.

For `--scale smoke` and tests: they tell whether everything runs, and nothing about how well networks learn.
"""

import torch
from torch import Tensor

from torchgrow.lab.images import ImageData, Images
from torchgrow.lab.metrics import ACCURACY, MIOU, VOID

SHAPES = ("disc", "square", "diamond", "ring")

_TRAIN, _TEST = 256, 64


def shapes(side: int, *, masks: bool) -> ImageData:
    """256 training and 64 test images, the same every time.

    Args:
        side: height and width, in pixels.
        masks: label every pixel: 0 for the background, 1 to 4 for the shape, void where they meet; else every image.
    """
    pixels, labels = drawn(_TRAIN + _TEST, side, masks=masks)
    std, mean = (values.tolist() for values in torch.std_mean(pixels[:_TRAIN].float() / 255, (0, 2, 3)))
    train, test = (Images(pixels=pixels[part], labels=labels[part]) for part in (slice(_TRAIN), slice(_TRAIN, None)))
    return ImageData(train=train, test=test, mean=tuple(mean), std=tuple(std), metric=MIOU if masks else ACCURACY)


def drawn(count: int, side: int, *, masks: bool) -> tuple[Tensor, Tensor]:
    """One shape an image, light on dark, of random size, place and colour, under noise; classes in turn.

    Returns:
        uint8 ``[count, 3, side, side]`` and int64 ``[count]``, or ``[count, side, side]``.
    """
    generator = torch.Generator().manual_seed(0)
    kinds = torch.arange(count) % len(SHAPES)
    size, x, y = torch.rand(3, count, 1, 1, generator=generator) / 4  # all inside the image
    places = (torch.arange(side) + 0.5) / side
    dx, dy = (places - 0.4 - x).abs(), (places[:, None] - 0.4 - y).abs()
    radius, far = 0.15 + size, (dx**2 + dy**2).sqrt()
    # How far inside the shape a pixel is, in sides of the image.
    inside = torch.stack(
        [radius - far, radius - torch.maximum(dx, dy), radius - dx - dy, torch.minimum(radius - far, far - radius / 2)]
    )[kinds, torch.arange(count)]
    light = torch.rand(count, 3, 1, 1, generator=generator) / 2
    noise = torch.rand(count, 3, side, side, generator=generator) / 5
    pixels = (255 * (noise + light * 0.4 + (inside > 0)[:, None] * (0.2 + light))).to(torch.uint8)
    if not masks:
        return pixels, kinds
    labels = torch.where(inside > 0, kinds[:, None, None] + 1, 0)
    return pixels, labels.masked_fill(inside.abs() < 0.5 / side, VOID)

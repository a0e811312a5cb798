"""Tasks for compared systems: a few images of 4 x 4 pixels, and a network of two convolutions."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from torchgrow import Budget
from torchgrow.lab import recipes
from torchgrow.lab.data import ImageData, Images
from torchgrow.lab.systems import Task

SIDE = 4


def images(n: int) -> Images:
    generator = torch.Generator().manual_seed(n)
    pixels = torch.randint(256, (n, 1, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    return Images(pixels=pixels, labels=torch.arange(n) % 2)


def task_of(build: Callable[[], nn.Module], budget: Budget, **changes: object) -> Task:
    """A task on 40 images of 4 x 4 pixels in two classes."""
    data = ImageData(train=images(40), test=images(20), mean=(0.5,), std=(0.25,))
    recipe = replace(
        recipes.get("digits"),
        build=lambda width=1.0: build(),
        budget=budget,
        batch_size=8,
        epochs=2,
        **changes,  # type: ignore[arg-type]
    )
    return Task(recipe=recipe, data=data, folder=Path("nowhere"), trained=build)


class Two(nn.Sequential):
    """x -> c1(1, C) -> bn? -> relu -> c1(C, 2) -> pool"""

    def __init__(self, channels: int = 3, norm: bool = False) -> None:
        between = [nn.BatchNorm2d(channels)] if norm else []
        first, last = nn.Conv2d(1, channels, 1, bias=False), nn.Conv2d(channels, 2, 1, bias=False)
        super().__init__(first, *between, nn.ReLU(), last, nn.AdaptiveAvgPool2d(1), nn.Flatten())

"""Small tasks: images of 4 x 4 pixels with networks of a few convolutions, 64 digits, and a text of 7 words."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgrow import Budget
from torchgrow.lab import models, recipes
from torchgrow.lab.data import ImageData, Images
from torchgrow.lab.recurrent import LSTM
from torchgrow.lab.systems import Task
from torchgrow.lab.text import TextData

SIDE = 4
DIGITS = replace(
    recipes.get("digits"),
    build=partial(models.ResNet, depth=14, widths=(4, 8, 8), in_channels=1),
    preset="default",
    epochs=2,
    subset=64,
    batch_size=32,
    budget=Budget(params="50%"),
    depth=False,
    schedule="milestones",
    warmup=0.0,
)
"""Two epochs of 64 digits, to half the parameters of a ResNet of a few channels."""
THREE_BLOCKS = replace(DIGITS, build=partial(models.ResNet, depth=8, widths=(8, 8, 8), in_channels=1))
"""Half of the network of `DIGITS`, none of whose blocks can be left out."""


def images(n: int) -> Images:
    generator = torch.Generator().manual_seed(n)
    pixels = torch.randint(256, (n, 1, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    return Images(pixels=pixels, labels=torch.arange(n) % 2)


def task_of(build: Callable[[], nn.Module], budget: Budget, epochs: int = 2, **changes: object) -> Task:
    """A task on 40 images of 4 x 4 pixels in two classes."""
    data = ImageData(train=images(40), test=images(20), mean=(0.5,), std=(0.25,))
    recipe = replace(
        recipes.get("digits"),
        build=lambda width=1.0: build(),
        budget=budget,
        batch_size=8,
        epochs=epochs,
        **changes,  # type: ignore[arg-type]
    )
    return Task(recipe=recipe, data=data, folder=Path("nowhere"), trained=build)


def text_task(budget: Budget, epochs: int = 2) -> Task:
    """A task on 40 words, in samples of 4, for an LSTM of 4 units."""
    words = torch.randint(7, (40,), generator=torch.Generator().manual_seed(0))
    data = TextData(train=words, valid=words, test=words, vocabulary=tuple("abcdefg"), steps=4, source="a test")
    build = partial(LSTM, words=7, embedding=5, hidden=(4,))
    recipe = replace(recipes.get("lstm-ptb"), build=build, budget=budget, epochs=epochs, batch_size=2, steps=4)
    return Task(recipe=recipe, data=data, folder=Path("nowhere"), trained=build)


class Two(nn.Sequential):
    """x -> c1(1, C) -> bn? -> relu -> c1(C, 2) -> pool"""

    def __init__(self, channels: int = 3, norm: bool = False) -> None:
        between = [nn.BatchNorm2d(channels)] if norm else []
        first, last = nn.Conv2d(1, channels, 1, bias=False), nn.Conv2d(channels, 2, 1, bias=False)
        super().__init__(first, *between, nn.ReLU(), last, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Chain(nn.Module):
    """c1(1, 4) - bn - relu - three blocks - pool - fc; a block: relu(x + bn(c1(4, 4))). All but the first may go."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.bn(self.conv(x))
            return F.relu(x + y)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.blocks, self.fc = nn.Sequential(*(self.Block() for _ in range(3))), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.blocks(F.relu(self.bn(self.conv(x)))).mean((2, 3)))
        return out

"""Every recipe at a scale that takes seconds and no data: whether it runs, and nothing about how good it is."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from torchgrow import Budget, TorchgrowError
from torchgrow.lab import models
from torchgrow.lab.attention import GPT, ViT
from torchgrow.lab.names import SMOKE
from torchgrow.lab.recipes.recipe import Recipe
from torchgrow.lab.recurrent import LSTM
from torchgrow.lab.segmentation import DeepLabV3

TINY: dict[Callable[..., nn.Module], dict[str, Any]] = {
    models.ResNet: {"depth": 14, "widths": (4, 8, 16)},
    models.VGG16: {"widen": 1 / 16},
    models.WideResNet: {"depth": 10, "widen": 1},
    models.MobileNetV1: {"widen": 1 / 8},
    ViT: {"features": 16, "layers": 2, "heads": 2, "head": 8, "neurons": 32},
    DeepLabV3: {
        "unit": "basic",
        "units": (1, 1, 1, 1),
        "widths": (8, 8, 16, 16),
        "output_stride": 4,
        "rates": (1, 2, 3),
        "pooled": 8,
    },
    LSTM: {"embedding": 16, "hidden": (16, 16)},
    GPT: {"features": 16, "layers": 2, "heads": 2, "head": 8, "neurons": 32},
}
"""Arguments that make a network tiny, by its class."""

DRAWN = {"cifar10": "shapes", "imagefolder": "shapes", "voc": "shape-masks"}
"""What stands for data that has to be fetched; the others come along."""


def smoke(recipe: Recipe) -> Recipe:
    """``recipe`` with a tiny network of its kind, two epochs of growth of a few steps, and data that is always there.

    Policy, optimizer, schedule and everything else stay as they are.

    Raises:
        TorchgrowError: it is no recipe of the lab.
    """
    build = recipe.build.func if isinstance(recipe.build, partial) else recipe.build
    tiny = _staged(recipe) if build is models.Staged else TINY.get(build)
    if tiny is None:
        raise TorchgrowError(
            f"recipe {recipe.name!r} has no scale {SMOKE}; leave --scale out, or use --subset and --epochs"
        )
    text = recipe.dataset == "text"  # whose last layer, one row a word, is nearly all there is, and stays
    grown = recipe.build_grown and partial(recipe.build_grown, **tiny)
    return replace(
        recipe,
        dataset=DRAWN.get(recipe.dataset, recipe.dataset),
        build=partial(recipe.build, **tiny),
        build_grown=grown,
        budget=Budget(params="60%") if recipe.budget.params else Budget(flops="97%" if text else "60%"),
        epochs=2,
        subset=2_000 if text else 64,
        batch_size=4 if text else 16,
        side=64 if recipe.dataset == "imagefolder" else 32,  # of 32, the last stage has one pixel: norms of 16 values
        void=(),
        threads=1,
    )


def _staged(recipe: Recipe) -> dict[str, Any]:
    """Stages of two units, as many stages as it has."""
    assert isinstance(recipe.build, partial)
    stages = len(recipe.build.keywords["units"])
    return {"units": (2,) * stages, "widths": (8, 8, 16, 16)[:stages]}

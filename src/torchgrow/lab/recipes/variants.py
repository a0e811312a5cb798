"""Variants of recipes: functions that take a recipe and return an edited one."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from inspect import signature

from torchgrow import TorchgrowError
from torchgrow.lab import models
from torchgrow.lab.names import SCALES, SMOKE
from torchgrow.lab.recipes.recipe import Recipe
from torchgrow.lab.recipes.registry import RECIPES
from torchgrow.lab.recipes.sequences import lstm_ptb
from torchgrow.lab.recipes.smoke import smoke


def with_shortcut(recipe: Recipe, kind: str) -> Recipe:
    """``recipe`` with shortcuts of kind ``"A"`` (padding) or ``"B"`` (1x1 convolution) in its network.

    Raises:
        TorchgrowError: its network has no choice of shortcuts.
    """
    if not (isinstance(recipe.build, partial) and recipe.build.func is models.ResNet):
        raise TorchgrowError(f"recipe {recipe.name!r} has no choice of shortcuts; leave --shortcut out")
    if kind not in ("A", "B"):
        raise TorchgrowError(f'shortcut is "A" (padding) or "B" (1x1 convolution), got {kind!r}')
    return replace(recipe, build=partial(recipe.build, shortcut=kind))


def with_scale(recipe: Recipe, scale: str) -> Recipe:
    """``recipe`` small enough for two CPU cores, as published, or tiny: `torchgrow.lab.names.SCALES` and `SMOKE`.

    Raises:
        TorchgrowError: it has no choice of scales, or not this one.
    """
    if scale == SMOKE:
        return smoke(recipe)
    make: Callable[..., Recipe] = RECIPES.get(recipe.name, lambda: recipe)
    if recipe.name == "lstm-ptb" and scale in SCALES:
        return lstm_ptb({"small": "small", "full": "large"}[scale])
    if "scale" not in signature(make).parameters:
        if scale == "small" and recipe.name in RECIPES:
            return recipe
        raise TorchgrowError(f"recipe {recipe.name!r} is small, and has no other scale but {SMOKE}; leave --scale out")
    return make(scale)


def with_size(recipe: Recipe, size: str) -> Recipe:
    """``recipe`` for one of the `torchgrow.lab.names.SIZES` of its network, schedule included.

    Raises:
        TorchgrowError: its network has no choice of sizes, or not this one.
    """
    if recipe.name != "lstm-ptb":
        raise TorchgrowError(f"recipe {recipe.name!r} has no choice of sizes; leave --size out")
    return lstm_ptb(size)

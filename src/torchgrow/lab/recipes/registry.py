"""Recipes by name: those of the lab, those in users' files, and those that runs recorded."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from torchgrow import Budget, TorchgrowError
from torchgrow.lab.recipes import images, sequences
from torchgrow.lab.recipes.foreign import MODELS, of_model
from torchgrow.lab.recipes.recipe import Recipe
from torchgrow.lab.user_files import explained, is_file, made_in

RECIPES: dict[str, Callable[[], Recipe]] = {
    "digits": images.digits,
    "resnet20-cifar10": images.resnet20_cifar10,
    "vgg16-cifar10": images.vgg16_cifar10,
    "wrn28-10-cifar10": images.wrn28_10_cifar10,
    "basic3resnet-cifar10": images.basic3resnet_cifar10,
    "plain3net-cifar10": images.plain3net_cifar10,
    "bottleneck4resnet-imagenet": images.bottleneck4resnet_imagenet,
    "nas-imagenet": images.nas_imagenet,
    "plain4net-imagenet": images.plain4net_imagenet,
    "resnet18-imagenette": images.resnet18_imagenette,
    "resnet50-imagenet": images.resnet50_imagenet,
    "mobilenetv1-imagenet": images.mobilenetv1_imagenet,
    "mobilenetv1-half-imagenet": images.mobilenetv1_half_imagenet,
    "deeplabv3-voc": images.deeplabv3_voc,
    "vit-cifar10": images.vit_cifar10,
    "lstm-ptb": sequences.lstm_ptb,
    "gpt-ptb": sequences.gpt_ptb,
}
"""In the order of `torchgrow.lab.names.RECIPES`, which names them too."""


LATER: dict[str, Any] = {
    "channels_last": False,
    "crop": False,
    "largest_batch": None,
    "void": (),
    "decay": 0.3,
    "source": None,
    "mean": None,
    "std": None,
    "weights": None,
    "distil": 0.0,
}
"""Fields that records of older runs do not have."""


def get(name: str) -> Recipe:
    """The recipe of that name.

    Args:
        name: one of `torchgrow.lab.names.RECIPES`, or ``path/to/file.py:function`` for a function that takes no
            arguments and returns a `Recipe`; the file is executed.

    Raises:
        TorchgrowError: there is none; the message lists those there are.
    """
    if is_file(name):
        return _from_file(name)
    if name not in RECIPES:
        raise TorchgrowError(
            f"there is no recipe {name!r}; there are {', '.join(RECIPES)}, and path/to/file.py:function"
        )
    return RECIPES[name]()


def made(name: str, what: str = "a torchgrow.lab.recipes.Recipe") -> Any:
    """What a function in a user's file returns, called without arguments.

    Args:
        name: ``path/to/file.py:function``.
        what: what it is to return, in words.

    Raises:
        TorchgrowError: there is no such file or function, or it fails.
    """
    found = made_in(name, what)
    if callable(found) and not isinstance(found, nn.Module):
        path = str(Path(name.rpartition(":")[0]).resolve())
        with explained(f"{name} failed", f"it is called without arguments and must return {what}", path):
            found = found()
    return found


def _from_file(name: str) -> Recipe:
    recipe = made(name)
    if not isinstance(recipe, Recipe):
        raise TorchgrowError(
            f"{name} returned {type(recipe).__name__}; return a torchgrow.lab.recipes.Recipe, such as "
            'dataclasses.replace(torchgrow.lab.recipes.get("digits"), name="mine", build=MyModel, depth=False)'
        )
    if not re.fullmatch(r"[\w.-]+", recipe.name) or recipe.name in RECIPES:
        raise TorchgrowError(
            f"the recipe of {name} is called {recipe.name!r}; results are filed by that name, so choose one of its own "
            "of letters, digits, - and _"
        )
    return replace(recipe, source=name)


def from_json(config: dict[str, Any]) -> Recipe:
    """The inverse of `Recipe.as_json`, for recipes that `get` knows and variants of them; other fields are left alone.

    Raises:
        TorchgrowError: a field is missing or not what `Recipe.as_json` writes.
    """
    try:
        config = {**LATER, **config}
        base = of_model(config["source"]) if config.get("model") in MODELS else get(config["source"] or config["name"])
        build = _bare(base.build)
        if config["model"] != build.__name__:
            raise TorchgrowError(f"the network of recipe {base.name!r} is {build.__name__}, not {config['model']}")
        changed = {name: config[name] for name in vars(base) if name not in ("build", "build_grown", "budget")}
        changed = {name: tuple(v) if isinstance(v, list) else v for name, v in changed.items()}
        given = config.get("grown_arguments")
        grown = None if given is None else partial(_bare(base.build_grown or base.build), **_arguments(given))
        limits = dict(part.split(" <= ") for part in config["budget"].split(" and "))
        budget = Budget(**limits)
        own = partial(build, **_arguments(config["model_arguments"]))
        return replace(base, build=own, build_grown=grown, budget=budget, **changed)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TorchgrowError(f"this is not the record of a recipe: {error!r}") from error


def _bare(build: Callable[..., Any]) -> Callable[..., Any]:
    """What builds a network, without the arguments it is given."""
    return build.func if isinstance(build, partial) else build


def _arguments(recorded: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a network as they were before JSON made lists of tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in recorded.items()}

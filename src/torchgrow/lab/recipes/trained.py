"""Recipes that shrink a trained network while they fine-tune it."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from torchgrow import TorchgrowError
from torchgrow.lab import weights
from torchgrow.lab.data import dataset_in
from torchgrow.lab.recipes.foreign import of_model
from torchgrow.lab.recipes.recipe import Recipe
from torchgrow.lab.recipes.registry import get, made
from torchgrow.lab.user_files import is_file, is_library

_IN_FILES = "a network, or a torchgrow.lab.recipes.Recipe"


def trainable(name: str, folder: Path | None) -> Recipe:
    """The recipe that trains a network of that name: its own, or one for image classifiers.

    Args:
        name: a recipe, a model of a library, or ``path/to/file.py:function`` that returns either; a file is executed.
        folder: where the images are, for a network that has no recipe.

    Raises:
        TorchgrowError: there is no such network, or no images are known for it.
    """
    if not is_library(name) and not (is_file(name) and not isinstance(made(name, _IN_FILES), Recipe)):
        return get(name)
    if folder is None:
        raise TorchgrowError(
            f"{name} is no recipe, so nothing says which images it is for; name them with --data FOLDER: CIFAR-10, or "
            "train/CLASS/* and val/CLASS/*"
        )
    recipe = of_model(name)
    return replace(recipe, dataset=dataset_in(folder))


def to_shrink(recipe: Recipe, path: Path) -> Recipe:
    """`recipe` for fine-tuning a network to a smaller one: 10 epochs at a tenth of its learning rate, down to 0.

    Args:
        recipe: of the training before.
        path: weights that the run begins with, as `torchgrow.lab.weights.network` reads them.
    """
    return replace(
        recipe,
        weights=str(path.absolute()),
        epochs=10,
        then=0,
        lr=recipe.lr / 10,
        schedule="linear",
        warmup=0.0,
        preset="shrink",
        updates_per_epoch=None,
        depth=False,
        meta=False,
    )


def with_own_classes(recipe: Recipe) -> Recipe:
    """`recipe` with networks of as many classes as its weights are of."""
    assert recipe.weights is not None
    if recipe.dataset == "text":
        return recipe  # its words are counted in the data
    classes = weights.classes_in(Path(recipe.weights), recipe.build)
    return recipe if classes is None else replace(recipe, build=partial(recipe.build, classes=classes))

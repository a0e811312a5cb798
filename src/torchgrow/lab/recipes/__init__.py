"""Recipes: each is a function that returns a whole `Recipe` and opens with its claim.

To add one, write such a function in `images` or `sequences` and name it in `registry.RECIPES` and in
`torchgrow.lab.names.RECIPES`. A variant is a function that takes a recipe and returns an edited one
(`with_shortcut`, or plain ``dataclasses.replace``), so that the difference between two experiments is exactly what
one reads.
"""

from torchgrow.lab.recipes.recipe import Recipe
from torchgrow.lab.recipes.registry import RECIPES, from_json, get
from torchgrow.lab.recipes.trained import to_shrink, trainable, with_own_classes
from torchgrow.lab.recipes.variants import with_scale, with_shortcut, with_size

__all__ = [
    "RECIPES",
    "Recipe",
    "from_json",
    "get",
    "to_shrink",
    "trainable",
    "with_own_classes",
    "with_scale",
    "with_shortcut",
    "with_size",
]

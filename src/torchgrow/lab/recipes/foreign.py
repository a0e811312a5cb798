"""Recipes for networks that are none of the lab's: of libraries, folders of transformers, and users' files."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from torchgrow import Budget
from torchgrow.lab.frames import file_network, library_network
from torchgrow.lab.recipes.recipe import Recipe
from torchgrow.lab.user_files import is_file

MODELS = ("library_network", "file_network")
"""How records name what builds these networks."""


def of_model(name: str) -> Recipe:
    """How to train an image classifier that has no recipe: SGD at rates for fine-tuning, on a folder of images.

    Args:
        name: as `torchgrow.lab.user_files.is_library` or `is_file` knows it.
    """
    file = is_file(name)
    build = partial(file_network, model=name) if file else partial(library_network, model=name)
    path, _, last = name.rpartition(":")
    filed = f"{Path(path).stem}-{last}" if file else Path(last).name
    return Recipe(
        name=re.sub(r"[^\w.-]+", "-", filed),
        dataset="imagefolder",
        build=build,
        budget=Budget(params="50%"),
        epochs=10,
        batch_size=64,
        lr=0.1,
        shift=4,
        mirror=True,
        source=name,
        **_colours(name),
    )


def _colours(name: str) -> dict[str, Any]:
    """The mean and std that a folder of transformers says its images are normalised by, as fields of a recipe."""
    kind, _, folder = name.partition(":")
    try:
        found = json.loads((Path(folder) / "preprocessor_config.json").read_text()) if kind == "hf" else {}
        return {field: tuple(map(float, found[f"image_{field}"])) for field in ("mean", "std")}
    except (OSError, ValueError, TypeError, KeyError):
        return {}  # it does not say

"""Recipes for networks that are none of the lab's: of libraries, folders of transformers, and users' files."""

import json
import re
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torchvision.models as zoo

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
    filed = f"{Path(path).stem}-{last}" if file else Path(last).resolve().name  # "." has none
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
        **_pictures(name),
    )


def _pictures(name: str) -> dict[str, Any]:
    """What a library or a folder says of the images that a network takes, as fields of a recipe: mean, std, side."""
    kind, _, rest = name.partition(":")
    try:
        return _PICTURES[kind](rest) if kind in _PICTURES else {}
    except (ImportError, OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError):
        return {}  # it does not say, or there is no such network, which is told where it is built


def _of_timm(name: str) -> dict[str, Any]:
    said = import_module("timm.models").get_pretrained_cfg(name, allow_unregistered=False)
    return {"mean": tuple(said.mean), "std": tuple(said.std), "side": said.input_size[-1]}


def _of_torchvision(name: str) -> dict[str, Any]:
    said: Any = zoo.get_model_weights(name).DEFAULT.transforms()
    return {"mean": tuple(said.mean), "std": tuple(said.std), "side": int(said.crop_size[0])}


def _of_folder(folder: str) -> dict[str, Any]:
    """Of what save_pretrained left of the pictures, if anything, and else of the network."""
    files = [Path(folder) / f"{name}.json" for name in ("preprocessor_config", "config")]
    said, network = (json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {} for file in files)
    keys = {field: f"image_{field}" for field in ("mean", "std")}
    fields: dict[str, Any] = {field: tuple(map(float, said[key])) for field, key in keys.items() if key in said}
    size = said.get("crop_size") or said.get("size") or network.get("image_size") or {}
    size = size.get("height", size.get("shortest_edge")) if isinstance(size, dict) else size
    size = size[0] if isinstance(size, list) and size else size
    return {**fields, "side": size} if isinstance(size, int) else fields


_PICTURES: dict[str, Callable[[str], dict[str, Any]]] = {
    "timm": _of_timm,
    "torchvision": _of_torchvision,
    "hf": _of_folder,
}

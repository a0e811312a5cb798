"""What tells a network of a user's file from what the same file had before: recipes record its name and keywords."""

import inspect
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from hashlib import sha256

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from torchgrow.lab.devices import random_kept
from torchgrow.lab.from_recipe import make_network
from torchgrow.lab.recipes import Recipe
from torchgrow.lab.user_files import explained

_LIBRARIES = ("torch", "torchgrow", "torchvision", "timm", "transformers")
"""Packages whose classes are known by their names."""


def told_apart(recipe: Recipe) -> dict[str, str]:
    """What `Recipe.as_json` does not say of the network of a user's file, as one field ``network``; else nothing.

    It changes with the modules of the frame, the shapes of its tensors, and the code of its own classes. Of a recipe of
    ours the name and the arguments say all, and of a run that begins with weights these do.

    Raises:
        TorchgrowError: the network cannot be built.
    """
    if not recipe.source or recipe.weights:
        return {}
    fix = "build takes a width factor and returns a module"
    with explained(f"recipe {recipe.name!r}: build(1.0) failed", fix):
        return {"network": _digest(recipe.build, recipe.meta)}


@lru_cache(maxsize=16)  # it is asked for at every epoch
def _digest(build: Callable[..., nn.Module], meta: bool) -> str:
    with random_kept():
        torch.manual_seed(0)
        model = make_network(build, 1.0, torch.device("cpu"), meta=meta)
    return sha256("\n".join(_facts(model)).encode()).hexdigest()[:16]


def _facts(model: nn.Module) -> Iterator[str]:
    yield re.sub(r" at 0x[0-9a-fA-F]+", "", repr(model))  # addresses differ from process to process
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield name if is_lazy(tensor) else f"{name} {tuple(tensor.shape)}"
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    for kind in sorted(kinds, key=lambda kind: kind.__qualname__):
        if kind.__module__.partition(".")[0] not in (*_LIBRARIES, "builtins", "abc", "typing"):
            try:
                yield inspect.getsource(kind)
            except (OSError, TypeError):  # made in no file
                yield kind.__qualname__

"""What tells a network of a user's file from what the same file had before: recipes record its name and keywords."""

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from hashlib import sha256
from textwrap import dedent
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from torchgrow.lab.devices import random_kept
from torchgrow.lab.from_recipe import make_network
from torchgrow.lab.recipes import Recipe
from torchgrow.lab.user_files import explained, is_library

_KNOWN = {"torch", "torchgrow", "torchvision", "timm", "transformers", "builtins", *sys.stdlib_module_names}
"""Packages whose classes and functions are known by their names."""


def told_apart(recipe: Recipe) -> dict[str, str]:
    """What `Recipe.as_json` does not say of the network of a user's file, as one field ``network``; else nothing.

    It changes with the modules of the frame, the shapes of its tensors, and the code of its own classes and of the
    functions, classes and constants of the user's that this code names. Of a recipe of ours the name and the arguments
    say all, and of a library's network that begins with weights these do.

    Raises:
        TorchgrowError: the network cannot be built.
    """
    if not recipe.source or (recipe.weights and is_library(recipe.source)):
        return {}
    fix = "build takes a width factor and returns a module"
    with explained(f"recipe {recipe.name!r}: build(1.0) failed", fix):
        return {"network": _digest(recipe.build, recipe.meta)}


@lru_cache(maxsize=16)  # it is asked for at every epoch
def _digest(build: Callable[..., nn.Module], meta: bool) -> str:
    with random_kept():
        torch.manual_seed(0)
        model = make_network(build, 1.0, torch.device("cpu"), meta=meta)
    facts = re.sub(r" at 0x[0-9a-fA-F]+", "", "\n".join(_facts(model)))  # addresses differ from process to process
    return sha256(facts.encode()).hexdigest()[:16]


def _facts(model: nn.Module) -> Iterator[str]:
    yield repr(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield name if is_lazy(tensor) else f"{name} {tuple(tensor.shape)}"
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    seen = set[Any]()
    for kind in sorted(kinds, key=lambda kind: (kind.__module__, kind.__qualname__)):
        yield from _code(kind, seen)


def _code(code: Any, seen: set[Any]) -> Iterator[str]:
    """The code of a class or function without comments and layout, and in users' files of all that it names."""
    if code in seen or code.__module__.partition(".")[0] in _KNOWN:
        return
    seen.add(code)
    try:
        tree = ast.parse(dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):  # made in no file, or within an expression
        yield code.__qualname__
        return
    yield ast.dump(tree)
    home = sys.modules.get(code.__module__)
    for node in ast.walk(tree) if "site-packages" not in inspect.getfile(code) else ():
        found = None
        if isinstance(node, ast.Name):
            found = getattr(home, node.id, None)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = getattr(home, node.value.id, None)
            found = getattr(module, node.attr, None) if inspect.ismodule(module) else None
        if isinstance(found, (bool, int, float, str, tuple)):
            yield repr(found)
        elif inspect.isclass(found) or inspect.isfunction(found):
            yield from _code(found, seen)

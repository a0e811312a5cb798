"""Int attributes of modules, and entries of lists and tuples of ints, named like "sizes[1]"."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Size, nn

LEVELS = 3
"""How many modules upwards to look for an attribute that counts an axis: the module itself, its parent, and so on."""

PLACE = re.compile(r"(\w+)\[(\d+)\]")

Sizes = tuple[int, ...]

LISTS = (list, tuple, Size)
"""Types of attributes whose entries are looked at."""


def held(module: nn.Module) -> dict[str, Sizes]:
    """Int attributes of a module of the user, by name: (8,) for an int, all entries of a list or tuple of ints.

    Modules of torch.nn are known, not guessed; only the sizes that `nn.Unflatten` is given are the user's.
    """
    found: dict[str, Sizes] = {}
    theirs = type(module).__module__.startswith("torch.nn.")
    for name, value in vars(module).items():
        if theirs and not (name == "unflattened_size" and isinstance(module, nn.Unflatten)):
            continue
        if type(value) is int:
            found[name] = (value,)
        elif type(value) in LISTS and value and all(type(entry) is int for entry in value):
            found[name] = tuple(value)
    return found


def named(found: Mapping[str, Sizes], module: nn.Module) -> dict[str, int]:
    """The ints that `held` found, one name for every entry of a list."""
    result: dict[str, int] = {}
    for name, sizes in found.items():
        if type(vars(module)[name]) is int:
            result[name] = sizes[0]
        else:
            result.update({f"{name}[{i}]": size for i, size in enumerate(sizes)})
    return result


def above(path: str) -> list[str]:
    """Qualified names of a module and the modules around it, nearest first."""
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts), max(-1, len(parts) - LEVELS), -1)]


def around(modules: Mapping[str, nn.Module], path: str) -> Iterator[str]:
    """Modules whose attributes a forward is likely to read: the module itself, those around it, and its children."""
    yield from above(path)
    yield from (f"{path}.{name}" if path else name for name, _ in modules[path].named_children())


def get(module: nn.Module, name: str) -> int | None:
    """The value of an attribute, or of a place in one; None if there is no such int."""
    place = PLACE.fullmatch(name)
    value: Any = vars(module).get(place[1] if place else name)
    if place:
        i = int(place[2])
        value = value[i] if type(value) in LISTS and i < len(value) else None
    return value if type(value) is int else None


def put(module: nn.Module, name: str, number: int) -> None:
    """Set an attribute, or a place in one."""
    for attribute, value in replaced(module, {name: number}).items():
        setattr(module, attribute, value)


def replaced(module: nn.Module, numbers: Mapping[str, int]) -> dict[str, Any]:
    """New values of attributes of which some entries change. Lists are copied, since modules may share them."""
    found: dict[str, Any] = {}
    for name, number in numbers.items():
        place = PLACE.fullmatch(name)
        if place is None:
            found[name] = number
            continue
        value = found.get(place[1], vars(module)[place[1]])
        entries = list(value)
        entries[int(place[2])] = number
        found[place[1]] = type(value)(entries)
    return found

"""Attributes that count an axis (`num_heads`, `all_head_size`, ...): guesses, to be judged by the proof.

Legend: a *guess* is an `Attribute`: an int attribute of a module together with the unit ids it may count. It is
*strong* if it equals the length of an axis or the number of units on it, *sure* if besides nothing else in its
module has that size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from .space import Attribute, Space


@dataclass(frozen=True)
class Guess:
    """One way to read an attribute, for one group."""

    group: int
    attribute: Attribute
    strong: bool
    sure: bool


LEVELS = 3
"""How far above a parameter its counting attribute is looked for: its module, that one's parent, and so on."""

FLIPS = 16
"""How many single guesses are added or left out, one at a time."""

SUBSETS = 6
"""Of how many attributes every subset is tried in the end."""


def guesses(model: nn.Module, space: Space) -> list[Guess]:
    """All int attributes that may count an axis on which units can go."""
    known = {(attribute.module, attribute.name) for attribute in space.attributes}
    modules = dict(model.named_modules())
    ints = {
        path: {name: value for name, value in vars(module).items() if type(value) is int and value > 1}
        for path, module in modules.items()
        if not type(module).__module__.startswith("torch.nn.")  # those are known, not guessed
    }
    frozen_sizes: dict[str, set[int]] = {}
    for (tensor, axis), vector in space.unit_of.items():
        if bool((vector < 0).all()):
            for path in _above(tensor):
                frozen_sizes.setdefault(path, set()).add(space.shapes[tensor][axis])
    found: dict[tuple[int, str, str, tuple[int, ...]], Guess] = {}
    for tensor, axes in space.cut_axes.items():
        for axis in axes:
            vector = space.unit_of[tensor, axis]
            if bool((vector < 0).any()):
                continue
            groups = space.group_of[vector].unique()
            if groups.numel() > 1 or not bool(space.removable[vector].any()):
                continue
            for path in _above(tensor):
                for name, value in ints.get(path, {}).items():
                    if (path, name) in known:
                        continue
                    for part in _parts(vector):
                        counted = _counted(part, value)
                        if counted is None:
                            continue
                        group = int(groups)
                        strong = value in (part.numel(), part.unique().numel())
                        guess = Guess(group, Attribute(path, name, counted), strong, strong)
                        found.setdefault((group, path, name, tuple(counted.tolist())), guess)
    readings: dict[tuple[str, str], int] = {}
    for guess in found.values():
        key = guess.attribute.module, guess.attribute.name
        readings[key] = readings.get(key, 0) + 1
    result = []
    for guess in found.values():
        path, name = guess.attribute.module, guess.attribute.name
        alone = readings[path, name] == 1 and ints[path][name] not in frozen_sizes.get(path, ())
        result.append(Guess(guess.group, guess.attribute, guess.strong, guess.strong and alone))
    return sorted(result, key=lambda guess: (not guess.sure, not guess.strong))


def choices(
    found: list[Guess], known: frozenset[str] = frozenset(), *, thorough: bool = False
) -> Iterator[list[Guess]]:
    """What to try, in this order: what served before, what is sure, what is strong, everything.

    Args:
        found: guesses, sure ones first, then strong ones.
        known: names of attributes that followed elsewhere in this model.
        thorough: then leave out or add single guesses, and in the end try every subset of a few attributes.
    """
    sure, strong = ([g for g in found if g.sure], [g for g in found if g.strong])
    bases = [_one_each([g for g in found if g.attribute.name in known]), *map(_one_each, (sure, strong, found))]
    flipped = [
        [other for other in base if other is not guess]
        if any(guess is other for other in base)
        else _one_each([guess, *base])
        for base in bases
        for guess in found[:FLIPS]
    ]
    few = _one_each(found)[:SUBSETS]
    subsets = [[g for i, g in enumerate(few) if code >> i & 1] for code in range(1, 2 ** len(few))]
    tried: list[set[int]] = []
    for choice in [*bases, *(flipped + subsets if thorough else [])]:
        members = {id(guess) for guess in choice}
        if choice and members not in tried:
            tried.append(members)
            yield choice


def _one_each(found: list[Guess]) -> list[Guess]:
    """The first guess for every attribute."""
    first: dict[tuple[str, str], Guess] = {}
    for guess in found:
        first.setdefault((guess.attribute.module, guess.attribute.name), guess)
    return list(first.values())


def _above(tensor: str) -> list[str]:
    """Qualified names of the modules a tensor belongs to, nearest first."""
    parts = tensor.split(".")[:-1]
    return [".".join(parts[:n]) for n in range(len(parts), max(-1, len(parts) - LEVELS), -1)]


def _parts(vector: Tensor) -> list[Tensor]:
    """An axis, and its first half, third or quarter where the others repeat it (packed projections)."""
    parts = [vector]
    for k in (2, 3, 4):
        if vector.numel() % k == 0:
            rows = vector.reshape(k, -1)
            if bool((rows == rows[:1]).all()):
                parts.append(rows[0])
    return parts


def _counted(vector: Tensor, value: int) -> Tensor | None:
    """The unit behind each of `value` equal blocks of an axis; None if a block is not of one unit."""
    if vector.numel() % value:
        return None
    blocks = vector.reshape(value, -1)
    return blocks[:, 0].clone() if bool((blocks == blocks[:, :1]).all()) else None

"""Attributes that count an axis (`num_heads`, `all_head_size`, ...): guesses, which the proof accepts or rejects.

Legend: a *guess* is an `Attribute`: an int attribute of a module together with the unit ids it may count. It is
*strong* if it equals the length of an axis or the number of units on it. It is *sure* if also nothing else in its
module has that size, or if it equals the length of a slice that the module's forward takes of an axis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice, product

import torch
from torch import Tensor, nn

from ..structure.attributes import above, around, held, named
from ..structure.space import Attribute, Space, has_units


@dataclass(frozen=True)
class Guess:
    """One way to read an attribute, for the groups whose units it counts."""

    groups: frozenset[int]
    attribute: Attribute
    strong: bool
    sure: bool


FLIPS = 16
"""How many single guesses are added or left out, one at a time."""

RIVALRIES = 64
"""How many ways are tried in which one of several candidates is the attribute that counts."""

SUBSETS = 6
"""Up to how many attributes every subset is tried in the end."""


@dataclass(frozen=True)
class Counted:
    """Positions that attributes of some modules may count: an axis, or a piece of one that the forward cuts off."""

    near: tuple[str, ...]  # qualified names of the modules
    units: Tensor  # int64 unit ids, -1 for positions that always live
    cut: bool  # whether it is a piece cut off: an attribute of that size is most likely its size


def guesses(model: nn.Module, space: Space) -> list[Guess]:
    """All int attributes that may count positions at which units can go: those of pieces first, then sure ones."""
    known = {(attribute.module, attribute.name) for attribute in space.attributes}
    ints = {
        path: {name: value for name, value in named(held(module), module).items() if value > 1}
        for path, module in model.named_modules()
    }
    frozen_sizes: dict[str, set[int]] = {}
    for (tensor, axis), vector in space.unit_of.items():
        if bool((vector < 0).all()):
            for path in above(tensor.rpartition(".")[0]):
                frozen_sizes.setdefault(path, set()).add(space.shapes[tensor][axis])
    found: dict[tuple[str, str, tuple[int, ...]], Guess] = {}
    for counted in (*_cut_off(model, space), *_axes(space)):
        for path in counted.near:
            for name, value in ints.get(path, {}).items():
                if (path, name) in known:
                    continue
                for part in _parts(counted.units):
                    units = _counted(part, value)
                    if units is None or not has_units(units):
                        continue
                    groups = frozenset(space.group_of[units[units >= 0]].tolist())
                    whole = value == part.numel()
                    strong = whole or value == part.unique().numel()
                    guess = Guess(groups, Attribute(path, name, units), strong, counted.cut and whole)
                    other = found.setdefault((path, name, tuple(units.tolist())), guess)
                    if (guess.sure, guess.strong) > (other.sure, other.strong):
                        found[path, name, tuple(units.tolist())] = guess
    readings = Counter((guess.attribute.module, guess.attribute.name) for guess in found.values())
    result = []
    for guess in found.values():
        path, name = guess.attribute.module, guess.attribute.name
        alone = readings[path, name] == 1 and ints[path][name] not in frozen_sizes.get(path, ())
        result.append((guess.sure, replace(guess, sure=guess.sure or (guess.strong and alone))))
    result.sort(key=lambda entry: (not entry[0], not entry[1].sure, not entry[1].strong))
    return [guess for _, guess in result]


def _axes(space: Space) -> Iterator[Counted]:
    """Axes that are cut alike all along: of tensors, and those with a unit at each position that views split off.

    The module of such a view may have no tensors, as `nn.Unflatten` has none.
    """
    own = [
        (tensor.rpartition(".")[0], space.unit_of[tensor, axis])
        for tensor, axes in space.cut_axes.items()
        for axis in axes
    ]
    split = [(path, vector) for path, vector in space.views if vector.unique().numel() == vector.numel()]
    for path, vector in own + split:
        if bool((vector < 0).any()):
            continue
        if space.group_of[vector].unique().numel() == 1 and bool(space.removable[vector].any()):
            yield Counted(tuple(above(path)), vector, cut=False)


def _cut_off(model: nn.Module, space: Space) -> Iterator[Counted]:
    """Runs of pieces that a forward cuts an axis into: every piece, what is before or behind one, the whole."""
    modules = dict(model.named_modules())
    for parts in space.parts:
        near, pieces = tuple(around(modules, parts.module)), parts.pieces
        for length in range(1, len(pieces) + 1):
            for start in range(len(pieces) - length + 1):
                run = torch.cat(pieces[start : start + length])
                if has_units(run) and bool(space.removable[run[run >= 0]].any()):
                    yield Counted(near, run, cut=length == 1)


def choices(
    found: list[Guess], known: frozenset[str] = frozenset(), *, thorough: bool = False
) -> Iterator[list[Guess]]:
    """Choices to try, in this order: what worked before, sure guesses, these without lists, strong guesses, all.

    In `found` sure guesses come first, then strong ones; attributes in `known` followed elsewhere. `thorough`: then let
    one count where several would count the same, leave out or add single ones, and at last try all subsets of a few.
    """
    sure, strong = ([g for g in found if g.sure], [g for g in found if g.strong])
    served = [g for g in found if g.attribute.name in known]
    plain = [g for g in sure if "[" not in g.attribute.name]  # one place of a list, such as a shift, may be chance
    bases = [_one_each(some) for some in (served, sure, plain, strong, found)]
    flipped = [
        [other for other in base if other is not guess]
        if any(guess is other for other in base)
        else _one_each([guess, *base])
        for base in bases
        for guess in found[:FLIPS]
    ]
    rivals: dict[tuple[int, ...], list[Guess]] = {}  # attributes that would count the same: most often one does
    for guess in sure:
        rivals.setdefault(tuple(guess.attribute.units.tolist()), []).append(guess)
    single = [_one_each(list(choice)) for choice in islice(product(*rivals.values()), RIVALRIES)]
    few = _one_each(found)[:SUBSETS]
    subsets = [[g for i, g in enumerate(few) if code >> i & 1] for code in range(1, 2 ** len(few))]
    tried: list[set[int]] = []
    for choice in [*bases, *(single + flipped + subsets if thorough else [])]:
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

"""Shapes: depths of stages and relative widths of groups, and their structures exactly at a budget.

A shape fixes counts, not units. Widths are ratios between groups: one common factor brings them to the budget.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from ..errors import BudgetError, StructureError
from ..structure.space import Space, has_units
from .kit import fit, layers, places, top_share
from .policy import View

LEVELS = (2 / 3, 1 / 3, 0.0)
"""Shares of the layers of every stage that proposals have, beside all of them."""

RATIOS = (0.5, 2.0)
"""How wide a kind of group is beside the others, in proposals."""

TILT = 2.0
"""The width of first over that of last groups, in proposals that are tilted."""


@dataclass(frozen=True)
class Shape:
    """Depths of stages and relative widths of groups.

    Attributes:
        name: for tables.
        depths: how many of a stage's layers that may be left out there are, by the name of the stage (as in
            `Block.stage`), the first ones; of stages that are not named all.
        widths: by the name of a group, or a pattern such as "layer*.conv1" (`fnmatch`): its width is multiplied by
            this beside the others. What matches several patterns is multiplied by all of them.
    """

    name: str
    depths: Mapping[str, int] = field(default_factory=dict)
    widths: Mapping[str, float] = field(default_factory=dict)

    def ranks(self, space: Space) -> Tensor:
        """The common factor at which each unit enters, float64 [n]; below 0: always, infinite: never.

        Raises:
            StructureError: a name that the space does not have, or a number that means nothing.
        """
        self._check(space)
        multiples = [1.0] * space.n_groups
        for pattern, multiple in self.widths.items():
            for number, name in enumerate(space.group_names):
                multiples[number] *= multiple if _matches(name, pattern) else 1.0
        rank = places(space) / torch.tensor(multiples, dtype=torch.float64)[space.group_of]
        for stage, units in stages(space).items():
            wanted = self.depths.get(stage, len(units))
            rank[units[:wanted]], rank[units[wanted:]] = -1.0, torch.inf
        return rank

    def fitted(self, view: View) -> Tensor:
        """The structure of this shape exactly at the budget, bool [n]: never above it, and no unit more fits.

        Raises:
            BudgetError: with so many layers even one unit of every group is beyond the budget.
            StructureError: as for `ranks`.
        """
        space, rank = view.space, self.ranks(view.space)
        keep = top_share(view, rank, view.limits)
        if bool((view.cost(keep) > view.limits).any()):
            raise BudgetError(
                f"shape {self.name!r} costs {view.cost(keep).tolist()} (parameters, FLOPs) with one unit in every "
                "group, more than the budget allows; give it fewer layers (depths)"
            )
        return fit(space, view.costs, keep, -rank, view.limits)

    def and_(self, other: Shape) -> Shape:
        """Both together."""
        names = {**self.widths, **other.widths}
        widths = {name: self.widths.get(name, 1.0) * other.widths.get(name, 1.0) for name in names}
        return Shape(f"{self.name}, {other.name}", {**self.depths, **other.depths}, widths)

    def _check(self, space: Space) -> None:
        own = stages(space)
        for stage, depth in self.depths.items():
            if stage not in own or not isinstance(depth, int) or not 0 <= depth <= len(own[stage]):
                known = ", ".join(f"{name!r}: 0 to {len(units)}" for name, units in own.items())
                raise StructureError(
                    f"shape {self.name!r} has depths {stage!r}: {depth!r}; stages and the layers that may be left out "
                    f"there are {known or 'none: search with depth=True'}"
                )
        for pattern, multiple in self.widths.items():
            found = [name for name in space.group_names if _matches(name, pattern)]
            if not found or not 0 < multiple < 1e6:
                raise StructureError(
                    f"shape {self.name!r} has widths {pattern!r}: {multiple!r}; it must name groups of the space and "
                    f"multiply their width by a number above 0; groups are {', '.join(space.group_names)}"
                )


EVEN = Shape("even")
"""All layers, the same share of every group: the frame narrowed by one factor."""


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)


def stages(space: Space) -> dict[str, list[int]]:
    """Units of the layers that may be left out, by stage, in the order of the model."""
    found: dict[str, list[int]] = {}
    for block in space.blocks:
        found.setdefault(block.stage, []).append(block.unit)
    return found


def counts(space: Space, keep: Tensor) -> tuple[int, ...]:
    """How many units of every group are there, and how many layers of every stage: what tells structures apart."""
    live = torch.bincount(space.group_of[space.present(keep)], minlength=space.n_groups).tolist()
    own = set(space.group_of[layers(space)].tolist())
    widths = (count for group, count in enumerate(live) if group not in own)
    return (*widths, *(int(keep[units].sum()) for units in stages(space).values()))


def proposals(space: Space, seed: int = 0) -> Iterator[Shape]:
    """Shapes worth trying, in order: even, then one change at a time, then two.

    What is changed: the depths of all stages, of the first one or of the last; the widths of a kind of group that
    repeats from block to block (the inside of blocks, attention heads, hidden neurons) beside all others; first groups
    wider than last ones, or narrower.

    Args:
        space: the units.
        seed: of the order in which things are changed two at a time.
    """
    families = [[Shape(told(depths.values()), depths) for depths in _depths(space)], _kinds(space), _tilts(space)]
    yield EVEN
    yield from (shape for some in itertools.zip_longest(*families) for shape in some if shape is not None)
    pairs = [one.and_(other) for a, b in itertools.combinations(families, 2) for one in a for other in b]
    random.Random(seed).shuffle(pairs)
    yield from pairs


def told(depths: Iterable[int]) -> str:
    """Depths of stages in words."""
    return "layers " + "-".join(map(str, depths))


def _depths(space: Space) -> list[dict[str, int]]:
    """Depths of stages that proposals have: each level in all stages, and one stage shallower than the others."""
    full = {stage: len(units) for stage, units in stages(space).items()}
    found: list[dict[str, int]] = [full]
    for level in (*LEVELS, 1.0):
        base = {stage: int(level * count + 0.5) for stage, count in full.items()}
        first_shallow, last_shallow = dict(base), dict(base)
        for changed, stage in ((first_shallow, next(iter(full), "")), (last_shallow, next(reversed(full), ""))):
            if stage in changed and len(full) > 1:
                changed[stage] = max(0, base[stage] - max(1, int(full[stage] / 3 + 0.5)))
        found += [base, first_shallow, last_shallow]
    return [one for place, one in enumerate(found) if place and one not in found[:place]]


def _homes(space: Space) -> dict[int, str]:
    """By group the innermost module that all its tensors lie in; "" is the model. Layers are no such groups."""
    homes: dict[int, list[str]] = {}
    own = set(space.group_of[layers(space)].tolist())
    for (name, _), vector in space.unit_of.items():
        path = name.split(".")[:-1]
        for group in space.group_of[vector[vector >= 0]].unique().tolist() if has_units(vector) else ():
            before = homes.get(group, path)
            common = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, path, strict=False))
            homes[group] = [part for part, _ in common]
    return {group: ".".join(path) for group, path in sorted(homes.items()) if group not in own}


def _kinds(space: Space) -> list[Shape]:
    """Kinds of groups inside blocks that repeat, each narrower and wider beside all others; all of them first."""
    found: dict[str, list[str]] = {}
    for group, home in _homes(space).items():
        if any(part.isdigit() for part in home.split(".")):
            name = space.group_names[group]
            found.setdefault(re.sub(r"\d+", "*", name.partition("#")[0]), []).append(name)
    kinds = [("inner", list(itertools.chain(*found.values())))] if len(found) != 1 else []
    kinds += [(kind, names) for kind, names in found.items() if len(names) > 1]
    return [
        Shape(f"{kind} x{ratio:g}", {}, dict.fromkeys(names, ratio))
        for kind, names in kinds
        for ratio in RATIOS
        if names
    ]


def _tilts(space: Space) -> list[Shape]:
    """First groups wider than last ones, and narrower; all groups of a stage alike where there are several stages."""
    homes, names = _homes(space), list(space.unit_of)
    if len(homes) < 2:
        return []
    first: dict[int, int] = {}
    for place, (name, axis) in enumerate(names):
        vector = space.unit_of[name, axis]
        for group in space.group_of[vector[vector >= 0]].unique().tolist() if has_units(vector) else ():
            first.setdefault(group, place)
    own = list(stages(space))
    stage_of = {g: next((s for s in own if s and names[first[g]][0].startswith(f"{s}.")), "") for g in homes}
    place_of: dict[int, float] = {group: float(first[group]) for group in homes}
    if len(own) > 1:
        for stage in own:
            members = [group for group in homes if stage_of[group] == stage]
            place_of |= dict.fromkeys(members, sum(place_of[g] for g in members) / max(1, len(members)))
    low, high = min(place_of.values()), max(place_of.values())
    where = {group: (place - low) / max(1e-9, high - low) - 0.5 for group, place in place_of.items()}
    return [
        Shape(name, {}, {space.group_names[g]: TILT ** (sign * at) for g, at in where.items()})
        for name, sign in (("early wider", -1), ("late wider", 1))
    ]

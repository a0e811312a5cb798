"""What a user asks to keep or to couple, by the names of tensors and modules."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import Tensor

from ..errors import TraceError
from ..structure.space import Place

Couples = Sequence[tuple[Place, Place]]
"""Pairs of axes that are cut alike, position by position."""


def frozen_by_name(symbols: dict[Place, Tensor], names: Sequence[str | Place]) -> list[Place]:
    """Places of the tensors, modules, patterns and single axes named."""
    found: list[Place] = []
    for name in names:
        if isinstance(name, str):
            matching = [p for p in symbols if p[0] == name or p[0].startswith(f"{name}.") or fnmatchcase(p[0], name)]
        else:
            matching = [name] if name in symbols else []
        if not matching:
            raise TraceError(f"protect names {name!r}, which no parameter or buffer {_close(name, symbols)}")
        found += matching
    return found


def coupled(symbols: dict[Place, Tensor], couple: Couples) -> Couples:
    """The pairs, once both sides are known and as long as each other."""
    for pair in couple:
        for place in pair:
            if place not in symbols:
                raise TraceError(f"couple names {place!r}, which no parameter or buffer {_close(place, symbols)}")
        sizes = [symbols[place].numel() for place in pair]
        if sizes[0] != sizes[1]:
            raise TraceError(
                f"couple names {pair[0]} of {sizes[0]} positions and {pair[1]} of {sizes[1]}; only axes "
                "of the same length can be cut alike"
            )
    return couple


def _close(name: str | Place, symbols: dict[Place, Tensor]) -> str:
    """The end of an error about a name: what there is instead."""
    near = get_close_matches(name if isinstance(name, str) else str(name[0]), {place[0] for place in symbols}, 3, 0.3)
    axes = [f"{tensor} (axes {[a for t, a in symbols if t == tensor]})" for tensor in near]
    return f"of two or more positions has; close are {', '.join(axes) or 'none: see model.named_parameters()'}"

"""Numbers in attributes that follow from kept positions: written with their evidence, and checked against it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SavedModelError
from ..structure.attributes import get, held
from ..structure.record import Record, join
from ..structure.store import Index
from .structure_file import STRUCTURE

REPEATS = (1, 2, 3, 4)
"""How often an axis may hold what an attribute counts: once, or packed projections and gates of recurrent cells."""


CHANNELS = ("in_channels", "out_channels", "groups")
"""Counts of a convolution, which its weight must fit."""

Shown = tuple[str, int, int, int]
"""Evidence for a count: tensor, axis, how often the axis repeats what is counted (0: a piece of it), its start."""


def counts_of(modules: Mapping[str, nn.Module], record: Record, kept: Mapping[str, Index]) -> list[list[Any]]:
    """Attributes that are lowered, each with an axis that shows why: [module, name, number, *evidence]."""
    entries: list[list[Any]] = []
    for (path, name), number in record.attributes.items():
        whole = record.wholes[path, name]
        if number == whole:
            continue
        if isinstance(modules[path], nn.modules.conv._ConvNd) and name in CHANNELS:
            entries.append([path, name, number])
            continue
        shown = _evidence(path, number, whole, kept, record.shapes)
        if shown is None and _may_count_pieces(modules[path], name):
            shown = _piece(path, number, whole, kept, record.shapes)
        if shown is None:
            raise SavedModelError(
                f"{path}.{name} went from {whole} to {number}, which is the count of no axis of the model's tensors "
                "nor of a piece of one, so it could not be loaded; save the larger model it is part of"
            )
        entries.append([path, name, number, *shown])
    return entries


def _evidence(
    path: str, number: int, whole: int, kept: Mapping[str, Index], shapes: Mapping[str, tuple[int, ...]]
) -> Shown | None:
    """An axis of a module's own tensors of which `number` of `whole` equal parts are kept."""
    for tensor, index in kept.items():
        if tensor.startswith(f"{path}." if path else ""):
            for axis, positions in index.items():
                for repeats in REPEATS:
                    if _counted(positions, shapes[tensor][axis], whole, repeats) == number:
                        return tensor, axis, repeats, 0
    return None


def _piece(
    path: str, number: int, whole: int, kept: Mapping[str, Index], shapes: Mapping[str, tuple[int, ...]]
) -> Shown | None:
    """A piece of `whole` positions of which `number` are kept, of an axis of the module's own tensors, else of any."""
    lead = f"{path}." if path else ""
    for tensor in sorted(kept, key=lambda name: not name.startswith(lead)):
        for axis, positions in kept[tensor].items():
            live = torch.zeros(shapes[tensor][axis] + 1, dtype=torch.int64)
            live[positions + 1] = 1
            before = live.cumsum(0)
            starts = torch.nonzero(before[whole:] - before[: len(before) - whole] == number)
            if whole < len(before) and starts.numel():
                return tensor, axis, 0, int(starts[0])
    return None


def _may_count_pieces(module: nn.Module, name: str) -> bool:
    """Whether an attribute is a user's, which may hold the size of what a forward cuts off an axis."""
    return name.partition("[")[0] in held(module)


def _holds(
    shown: Shown,
    path: str,
    module: nn.Module,
    name: str,
    number: int,
    whole: int,
    kept: Mapping[str, Index],
    shapes: Mapping[str, tuple[int, ...]],
) -> bool:
    """Whether evidence that a record gives is some."""
    tensor, axis, repeats, start = shown
    positions = kept.get(tensor, {}).get(axis)
    if positions is None:
        return False
    size = shapes[tensor][axis]
    if repeats == 0:
        inside = int(((positions >= start) & (positions < start + whole)).sum())
        return 0 <= start <= size - whole and inside == number and _may_count_pieces(module, name)
    own = tensor.startswith(f"{path}." if path else "")
    return own and repeats in REPEATS and start == 0 and _counted(positions, size, whole, repeats) == number


def _counted(positions: Tensor, size: int, whole: int, repeats: int) -> int:
    """How many of `whole` parts of an axis are kept, each with as many positions as the others; 0 if it has none such.

    Args:
        positions: int64, those that are kept.
        size: of the axis in the frame.
        whole: number of parts in the frame.
        repeats: how often the parts follow each other along the axis.
    """
    if size % (whole * repeats):
        return 0
    parts, times = (positions // (size // (whole * repeats)) % whole).unique(return_counts=True)
    return parts.numel() if bool((times == times[0]).all()) else 0


def read_counts(
    source: Path,
    structure: dict[str, Any],
    modules: Mapping[str, nn.Module],
    kept: Mapping[str, Index],
    own: Mapping[str, Tensor],
    below: tuple[str, ...],
) -> dict[tuple[str, str], int]:
    """Attributes that are lowered, once each is known to be the frame's and to count what is kept of it."""
    shapes, found = {name: tuple(tensor.shape) for name, tensor in own.items()}, {}
    for path, name, number, *shown in structure["attributes"]:
        module = modules.get(path)
        whole = get(module, name) if module is not None else None
        if module is None or whole is None or not 1 <= number <= whole:
            raise SavedModelError(
                f"{source / STRUCTURE}: {path}.{name} = {number} does not fit the frame, where it is {whole}"
            )
        if number == whole or (structure["format"] < 3 and f"{path}.".startswith(below)):
            continue  # of a module that is left out, format 2 kept no positions that would show why
        counts = isinstance(module, nn.modules.conv._ConvNd) and name in CHANNELS  # which its weight must fit
        if not counts and structure["format"] < 3:
            counts = _evidence(path, number, whole, kept, shapes) is not None
        elif not counts and shown:
            counts = _holds(tuple(shown), path, module, name, number, whole, kept, shapes)
        if not counts:
            raise SavedModelError(
                f"{source / STRUCTURE}: {path}.{name} = {number}, of {whole} in the frame, follows from no kept "
                "positions; only what counts them can be another number than in the frame"
            )
        found[path, name] = number
    return found


def check_convolutions(
    source: Path,
    modules: Mapping[str, nn.Module],
    tensors: Mapping[str, Tensor],
    attributes: Mapping[tuple[str, str], int],
    below: tuple[str, ...],
) -> None:
    """Refuse convolutions whose channel counts and groups would not be those of their weight."""
    for path, layer in modules.items():
        weight = tensors.get(join(path, "weight"))  # of a tied or parametrized one the shape is checked elsewhere
        if not isinstance(layer, nn.modules.conv._ConvNd) or f"{path}.".startswith(below) or weight is None:
            continue
        into, out, groups = (attributes.get((path, name), getattr(layer, name)) for name in CHANNELS)
        first, second = weight.shape[:2]
        counted = (second * groups, first) if layer.transposed else (first, second * groups)
        if counted != (out, into) or out % groups:
            raise SavedModelError(f"{source / STRUCTURE}: the channels and groups of {path} do not fit its weight")

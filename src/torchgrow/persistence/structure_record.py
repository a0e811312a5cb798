"""The record of a structure as JSON: written for a model, and checked when read for a frame.

One format for the folders of `save` and for what travels in a `state_dict()`. All of it is data, never code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.registry import ADAPTERS
from ..errors import SavedModelError
from ..structure.attributes import get, held
from ..structure.record import Record, join, skip_of
from ..structure.space import PassThrough, Shapes
from ..structure.store import Index

FORMAT = 4
FORMATS = (1, 2, 3, 4)
"""Format 1 has no checksums; up to 2 no evidence for counts, and none for modules left out without parameters; up to 3
no list of buffers, so that each must be as in the frame."""

REPEATS = (1, 2, 3, 4)
"""How often an axis may repeat what an attribute counts: once, or for packed projections and recurrent gates."""

CHANNELS = ("in_channels", "out_channels", "groups")
"""Counts of a convolution, which its weight must fit."""

FIELDS = {
    "format": int,
    "kept": dict,
    "frame_shapes": dict,
    "attributes": list,
    "adapted": list,
    "skipped": dict,
    "extra_state": dict,
    "buffers": dict,
}
"""Fields of the record, and their types."""

ENTRIES = {
    "attributes": ([str, str, int], [str, str, int, str, int, int, int]),
    "skipped": ([str, int], [str, int, str]),
}
"""Types of what is in their entries: without evidence, and with that of format 3."""


def described(
    modules: Mapping[str, nn.Module],
    tensors: Mapping[str, Tensor],
    record: Record,
    extra_state: dict[str, Any],
    buffers: dict[str, bool | None],
) -> dict[str, Any]:
    """The record of a model, of its modules and tensors by name.

    `buffers`: by name, whether each is persistent; None of one without a value.

    Raises:
        SavedModelError: an attribute was lowered for which there is no evidence.
    """
    kept = {name: record.kept[name] for name in tensors if name in record.kept}
    skipped = {path: skip for path, module in modules.items() if (skip := skip_of(module)) is not None}
    return {
        "format": FORMAT,
        "kept": {name: {str(k): where.tolist() for k, where in index.items()} for name, index in kept.items()},
        "frame_shapes": {name: list(record.shapes[name]) for name in kept},
        "attributes": _counts(modules, record, kept),
        "adapted": [path for path, module in modules.items() if type(module) in ADAPTERS.values()],
        "skipped": {path: _left_out(path, skip, skipped, tensors, record) for path, skip in skipped.items()},
        "extra_state": extra_state,
        "buffers": buffers,
    }


def _counts(modules: Mapping[str, nn.Module], record: Record, kept: Mapping[str, Index]) -> list[list[Any]]:
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


Shown = tuple[str, int, int, int]
"""Evidence for a count: tensor, axis, how often the axis repeats what is counted (0: a piece of it), its start."""


def _evidence(path: str, number: int, whole: int, kept: Mapping[str, Index], shapes: Shapes) -> Shown | None:
    """An axis of a module's own tensors of which `number` of `whole` equal parts are kept."""
    for tensor, index in kept.items():
        if tensor.startswith(f"{path}." if path else ""):
            for axis, positions in index.items():
                for repeats in REPEATS:
                    if _counted(positions, shapes[tensor][axis], whole, repeats) == number:
                        return tensor, axis, repeats, 0
    return None


def _piece(path: str, number: int, whole: int, kept: Mapping[str, Index], shapes: Shapes) -> Shown | None:
    """A piece of `whole` positions of which `number` are kept, of an axis of the module's own tensors, else of any."""
    lead = f"{path}." if path else ""
    for tensor in sorted(kept, key=lambda name: not name.startswith(lead)):
        for axis, positions in kept[tensor].items():
            live = torch.zeros(shapes[tensor][axis] + 1, dtype=torch.int64)
            live[positions + 1] = 1
            before = live.cumsum(0)
            starts = torch.nonzero(before[whole:] - before[:-whole] == number)  # none, where the axis is shorter
            if starts.numel():
                return tensor, axis, 0, int(starts[0])
    return None


def _may_count_pieces(module: nn.Module, name: str) -> bool:
    """Whether an attribute is a user's, which may hold the size of what a forward cuts off an axis."""
    return name.partition("[")[0] in held(module)


def _counted(positions: Tensor, size: int, whole: int, repeats: int) -> int:
    """How many of `whole` parts of an axis are kept, each with as many positions as the others; 0 if it has none such.

    The axis has `size` positions in the frame, where its parts follow each other so many times (`repeats`).
    """
    if size % (whole * repeats):
        return 0
    parts, times = (positions // (size // (whole * repeats)) % whole).unique(return_counts=True)
    return parts.numel() if bool((times == times[0]).all()) else 0


def _left_out(
    path: str, skip: PassThrough, skipped: Mapping[str, PassThrough], tensors: Mapping[str, Tensor], record: Record
) -> list[Any]:
    """What is written of a module left out: what it computes and, if it has no tensors, one of its block that has."""
    if _has_tensors(path, tensors):
        return [skip.keyword, skip.outputs]
    together = {other for block in record.blocks if path in block for other in block}
    for other in skipped:
        if other in together and _has_tensors(other, tensors):
            return [skip.keyword, skip.outputs, other]
    raise SavedModelError(
        f"{path} is left out and has no parameters, and the modules it was left out with are not part of the model; "
        "save the larger model they are in"
    )


def _has_tensors(path: str, tensors: Mapping[str, Any]) -> bool:
    return any(name.startswith(f"{path}.") for name in tensors)


# --- reading ---


def check_form(where: str, structure: dict[str, Any]) -> None:
    """Refuse a record whose fields are missing, foreign or of the wrong type; `where` it stands, in words."""
    well_formed = structure.keys() == FIELDS.keys()
    well_formed = well_formed and all(type(structure[name]) is kind for name, kind in FIELDS.items())
    if well_formed:
        lists = {"attributes": structure["attributes"], "skipped": list(structure["skipped"].values())}
        well_formed = (
            all(isinstance(axes, dict) for axes in structure["kept"].values())
            and all(type(path) is str for path in structure["adapted"])
            and all(kept is None or type(kept) is bool for kept in structure["buffers"].values())
            and all(
                isinstance(entry, list) and [type(x) for x in entry] in ENTRIES[name]
                for name, entries in lists.items()
                for entry in entries
            )
            and all(0 <= entry[1] <= 64 for entry in lists["skipped"])
        )
    if not well_formed:
        raise SavedModelError(f"{where} is damaged: fields are missing, foreign or of the wrong type")


def read_skipped(
    where: str, structure: dict[str, Any], modules: Mapping[str, nn.Module], own: Mapping[str, Tensor]
) -> dict[str, PassThrough]:
    """Modules that are left out, once they are known to be the frame's, with parameters or beside one that has."""
    skipped, entries = {}, structure["skipped"]
    for path, (keyword, outputs, *_) in entries.items():
        if not path or path not in modules:
            raise SavedModelError(
                f"{where}: the frame has no module {path!r} to leave out; is the frame built as it was when the model "
                "was grown?"
            )
        if not any(_has_tensors(other, own) for other in (path, *left_out_with(structure, path))):
            raise SavedModelError(
                f"{where}: {path} ({type(modules[path]).__name__}) has no parameters, and is left out "
                "with no module that has; only recorded blocks of layers can be"
            )
        skipped[path] = PassThrough(keyword, outputs)
    return skipped


def left_out_with(structure: dict[str, Any], path: str) -> list[str]:
    """Modules that are left out with one, as far as the record says; in format 2 those beside it."""
    entries = structure["skipped"]
    if structure["format"] < 3:
        return [other for other in entries if other.rpartition(".")[0] == path.rpartition(".")[0]]
    return [other for other in entries[path][2:] if other in entries]


def read_attributes(
    where: str,
    structure: dict[str, Any],
    modules: Mapping[str, nn.Module],
    kept: Mapping[str, Index],
    own: Mapping[str, Tensor],
    below: tuple[str, ...],
    wholes: Mapping[tuple[str, str], int] | None = None,
) -> dict[tuple[str, str], int]:
    """Attributes that are lowered, once each is known to be the frame's and to count what is kept of it.

    `wholes`: their values in the frame, where the modules are not of the frame's size.
    """
    shapes, found = {name: tuple(tensor.shape) for name, tensor in own.items()}, {}
    for path, name, number, *shown in structure["attributes"]:
        module = modules.get(path)
        whole = (wholes or {}).get((path, name), get(module, name)) if module is not None else None
        if module is None or whole is None or not 1 <= number <= whole:
            raise SavedModelError(f"{where}: {path}.{name} = {number} does not fit the frame, where it is {whole}")
        if number == whole or (structure["format"] < 3 and f"{path}.".startswith(below)):
            continue  # of a module that is left out, format 2 kept no positions that would show why
        counts = isinstance(module, nn.modules.conv._ConvNd) and name in CHANNELS  # which its weight must fit
        if not counts and structure["format"] < 3:
            counts = _evidence(path, number, whole, kept, shapes) is not None
        elif not counts and shown:
            tensor, axis, repeats, start = shown
            positions, own_tensor = kept.get(tensor, {}).get(axis), tensor.startswith(f"{path}." if path else "")
            if positions is not None and repeats == 0:
                inside = int(((positions >= start) & (positions < start + whole)).sum())
                fits = 0 <= start <= shapes[tensor][axis] - whole and inside == number
                counts = fits and _may_count_pieces(module, name)
            elif positions is not None and own_tensor and repeats in REPEATS and start == 0:
                counts = _counted(positions, shapes[tensor][axis], whole, repeats) == number
        if not counts:
            raise SavedModelError(
                f"{where}: {path}.{name} = {number}, of {whole} in the frame, follows from no kept "
                "positions; only what counts them can be another number than in the frame"
            )
        found[path, name] = number
    return found


def check_convolutions(
    where: str,
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
            raise SavedModelError(f"{where}: the channels and groups of {path} do not fit its weight")


def read_kept(where: str, structure: dict[str, Any], own: dict[str, Tensor]) -> dict[str, Index]:
    """Kept positions of every cut tensor, once its name and full shape are known to be the frame's."""
    for name in structure["kept"]:
        if name not in own:
            raise SavedModelError(
                f"{where}: the frame has no tensor {name!r}; is the frame built as it was when the model was grown?"
            )
    if structure["frame_shapes"] != {name: list(own[name].shape) for name in structure["kept"]}:
        raise SavedModelError(
            f"{where}: the saved model was cut from a frame with other shapes than this one's; build the same "
            "full-size model that was grown"
        )
    return {name: _index(where, name, axes, own[name]) for name, axes in structure["kept"].items()}


def _index(where: str, name: str, axes: dict[str, Any], full: Tensor) -> Index:
    """Kept positions of one tensor of the frame: strictly rising and in range."""
    index: Index = {}
    for key, positions in axes.items():
        axis = int(key) if key.isascii() and key.isdecimal() and key == str(int(key[:3])) else -1
        size = full.shape[axis] if 0 <= axis < full.dim() else 0
        rising = (
            isinstance(positions, list)
            and 0 < len(positions) <= size
            and all(type(p) is int for p in positions)
            and all(a < b for a, b in zip([-1, *positions], [*positions, size], strict=True))
        )
        if not rising:
            raise SavedModelError(
                f"{where}: kept positions of axis {key} of {name} {tuple(full.shape)} are not rising positions in range"
            )
        index[axis] = torch.tensor(positions)
    return dict(sorted(index.items()))

"""The record of a saved network, `structure.json`: its fields, read and checked."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SavedModelError
from ..structure.store import Index
from .folder import read_folder

FORMAT = 4


FORMATS = (1, 2, 3, 4)
"""Format 1 has no checksums; up to 2 no evidence for counts, and none for modules left out without parameters; up to 3
no list of buffers, so that each must be as in the frame."""


WEIGHTS, STRUCTURE = "model.safetensors", "structure.json"


def check_names(source: Path, own: AbstractSet[str], tensors: AbstractSet[str]) -> None:
    """Refuse tensors of another model."""
    missing, foreign = sorted(own - tensors), sorted(tensors - own)
    if missing or foreign:
        raise SavedModelError(
            f"{source} does not fit the frame: missing {missing[:3]}, foreign {foreign[:3]}; "
            "frame_factory must build the same full-size model that was grown"
        )


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


def read_structure(source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Both files, with the record's form checked."""
    what = "a saved model; save one with torchgrow.save, or take a checkpoint by torchgrow.load_checkpoint"
    structure, tensors = read_folder(source, (STRUCTURE, WEIGHTS), FORMATS, what)
    if structure["format"] < 3:
        structure.setdefault("skipped", {})  # absent before depth
        structure.setdefault("extra_state", {})
    if structure["format"] < 4:
        structure.setdefault("buffers", {})
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
        raise SavedModelError(f"{source / STRUCTURE} is damaged: fields are missing, foreign or of the wrong type")
    return structure, tensors


def read_kept(source: Path, structure: dict[str, Any], own: dict[str, Tensor]) -> dict[str, Index]:
    """Kept positions of every cut tensor, once its name and full shape are known to be the frame's."""
    for name in structure["kept"]:
        if name not in own:
            raise SavedModelError(
                f"{source / STRUCTURE}: the frame has no tensor {name!r}; is frame_factory the same model?"
            )
    if structure["frame_shapes"] != {name: list(own[name].shape) for name in structure["kept"]}:
        raise SavedModelError(
            f"{source / STRUCTURE}: the saved model was cut from a frame with other shapes than frame_factory's; "
            "frame_factory must build the same full-size model that was grown"
        )
    return {name: _index(source, name, axes, own[name]) for name, axes in structure["kept"].items()}


def _index(source: Path, name: str, axes: dict[str, Any], full: Tensor) -> Index:
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
                f"{source / STRUCTURE}: kept positions of axis {key} of {name} {tuple(full.shape)} are not "
                "rising positions in range"
            )
        index[axis] = torch.tensor(positions)
    return dict(sorted(index.items()))

"""Save and load a grown network: safetensors and a JSON record of its structure. Files are data, never code."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import adapt_
from .attributes import get, put
from .errors import SavedModelError, TorchgrowError
from .files import read_folder, write_folder
from .guard import guard_
from .space import PassThrough
from .store import Index, gather
from .surgery import RECORD, Record, named_tensors, replace_, skip_

FORMAT = 2
FORMATS = (1, 2)
"""Format 1 has no checksums."""

WEIGHTS, STRUCTURE = "model.safetensors", "structure.json"


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save a model, grown, shrunk or whole: `model.safetensors` and `structure.json`.

    The folder appears complete, flushed to the disk, or not at all; an existing saved folder is replaced.

    Args:
        model: the module; what torchgrow did to it is recorded on it.
        folder: where to; created with its parents.

    Raises:
        SavedModelError: the folder exists and is not a saved model, or cannot be written (disk full, read-only).
    """
    target = Path(folder)
    if target.exists() and not (target.is_dir() and {p.name for p in target.iterdir()} <= {WEIGHTS, STRUCTURE}):
        raise SavedModelError(f"{target} exists and is not a saved model; choose another folder or remove it")
    record: Record = getattr(model, RECORD, None) or Record()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named_tensors(model).items()}
    structure = {
        "format": FORMAT,
        "kept": {
            name: {str(axis): positions.tolist() for axis, positions in index.items()}
            for name, index in record.kept.items()
        },
        "frame_shapes": {name: list(record.shapes[name]) for name in record.kept},
        "attributes": [[module, name, number] for (module, name), number in record.attributes.items()],
        "adapted": list(record.adapted),
        "skipped": {path: [skip.keyword, skip.outputs] for path, skip in record.skipped.items()},
    }
    write_folder(target, structure, {name: tensor.clone() for name, tensor in tensors.items()}, (STRUCTURE, WEIGHTS))


def load(folder: str | os.PathLike[str], frame_factory: Callable[[], nn.Module]) -> nn.Module:
    """Load a saved model into a fresh frame, without tracing anything.

    Args:
        folder: what `save` wrote.
        frame_factory: builds the frame, the full-size model the saved one was grown in.

    Returns:
        The frame, cut to the saved structure, with the saved weights and buffers, in training mode as built.

    Raises:
        SavedModelError: the folder is missing or damaged, or does not fit the frame; the frame factory's
            model is discarded.
    """
    source = Path(folder)
    structure, tensors = _read(source)
    model = frame_factory()
    if not isinstance(model, nn.Module):
        raise SavedModelError(f"frame_factory must return a torch.nn.Module, got {type(model).__name__}")
    own = named_tensors(model)
    kept = _kept(source, structure, own)
    missing, foreign = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or foreign:
        raise SavedModelError(
            f"{source} does not fit the frame: missing {missing[:3]}, foreign {foreign[:3]}; "
            "frame_factory must build the same full-size model that was grown"
        )
    modules = dict(model.named_modules())
    for module, name, number in structure["attributes"]:
        whole = get(modules[module], name) if module in modules else None
        if type(whole) is not int or not 1 <= number <= whole:
            raise SavedModelError(
                f"{source / STRUCTURE}: {module}.{name} = {number} does not fit the frame, where it is {whole}"
            )
    attributes = {(module, name): number for module, name, number in structure["attributes"]}
    skipped = _skipped(source, structure["skipped"], modules)
    below = tuple(f"{path}." for path in skipped)
    parts = {
        name: gather(tensor.detach(), None if name.startswith(below) else kept.get(name, {}))
        for name, tensor in own.items()
    }
    for name, part in parts.items():
        if tensors[name].shape != part.shape or tensors[name].dtype != part.dtype:
            raise SavedModelError(
                f"{source / WEIGHTS}: {name} is {tensors[name].dtype} {tuple(tensors[name].shape)}, but the structure "
                f"record makes it {part.dtype} {tuple(part.shape)} in this frame"
            )
    for path, layer in modules.items():
        left_out = f"{path}.".startswith(below)
        if not left_out and isinstance(layer, nn.modules.conv._ConvNd) and not _fits(path, layer, parts, attributes):
            raise SavedModelError(f"{source / STRUCTURE}: the channels and groups of {path} do not fit its weight")
    try:
        adapt_(model, structure["adapted"])
    except TorchgrowError as error:
        raise SavedModelError(f"{source / STRUCTURE}: {error}") from error
    shapes = {name: tuple(own[name].shape) for name in own if name in kept or name.startswith(below)}
    for name, tensor in own.items():
        replace_(tensor, tensors[name].to(tensor.device))
    for (module, name), number in attributes.items():
        put(modules[module], name, number)
    skip_(model, skipped, skipped)
    setattr(model, RECORD, Record(shapes, kept, attributes, tuple(structure["adapted"]), skipped))
    guard_(model)
    return model


def _skipped(source: Path, recorded: dict[str, Any], modules: dict[str, nn.Module]) -> dict[str, PassThrough]:
    """Modules that are left out, once they are known to be the frame's."""
    skipped = {}
    for path, (keyword, outputs) in recorded.items():
        if not path or path not in modules:
            raise SavedModelError(
                f"{source / STRUCTURE}: the frame has no module {path!r} to leave out; is frame_factory the same model?"
            )
        skipped[path] = PassThrough(keyword, outputs)
    return skipped


def _fits(
    path: str, layer: nn.modules.conv._ConvNd, parts: dict[str, Tensor], attributes: dict[tuple[str, str], int]
) -> bool:
    """Whether a convolution's channel counts and groups will be those of its weight."""
    weight = parts.get(f"{path}.weight" if path else "weight")
    if weight is None:  # tied or parametrized: its shape is checked under another name
        return True
    names = ("out_channels", "in_channels", "groups")
    out, into, groups = (attributes.get((path, name), getattr(layer, name)) for name in names)
    first, second = weight.shape[:2]
    counted = (second * groups, first) if layer.transposed else (first, second * groups)
    return counted == (out, into) and out % groups == 0


def _read(source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Both files, with the record's form checked."""
    what = "a saved model; save one with torchgrow.save"
    structure, tensors = read_folder(source, (STRUCTURE, WEIGHTS), FORMATS, what)
    attributes, kept, shapes = structure.get("attributes"), structure.get("kept"), structure.get("frame_shapes")
    adapted, skipped = structure.get("adapted"), structure.setdefault("skipped", {})  # absent before depth
    well_formed = (
        set(structure) == {"format", "kept", "frame_shapes", "attributes", "adapted", "skipped"}
        and isinstance(skipped, dict)
        and all(
            isinstance(x, list) and [type(y) for y in x] == [str, int] and 0 <= x[1] <= 64 for x in skipped.values()
        )
        and isinstance(kept, dict)
        and all(isinstance(axes, dict) for axes in kept.values())
        and isinstance(shapes, dict)
        and isinstance(adapted, list)
        and all(type(path) is str for path in adapted)
        and isinstance(attributes, list)
        and all(
            isinstance(a, list) and len(a) == 3 and type(a[0]) is str and type(a[1]) is str and type(a[2]) is int
            for a in attributes
        )
    )
    if not well_formed:
        raise SavedModelError(f"{source / STRUCTURE} is damaged: fields are missing, foreign or of the wrong type")
    return structure, tensors


def _kept(source: Path, structure: dict[str, Any], own: dict[str, Tensor]) -> dict[str, Index]:
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

"""Save and load a grown network: safetensors and a JSON record of its structure. Files are data, never code."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.registry import adapt_
from ..default_device import on_default, on_host
from ..errors import SavedModelError, TorchgrowError
from ..onednn_guard import guard_
from ..structure.attributes import get, put
from ..structure.record import Record, growths, join, mark_, mark_of, own_tensors, recorded, skip_, skip_of
from ..structure.space import PassThrough
from ..structure.store import Index, live_shape
from ..structure.surgery import materialise_, replace_
from . import structure_record as form
from .beside import has_extra_state, may_appear
from .folder import pack, read_folder, real_folder, storable, unpack, write_folder
from .portable import portable_
from .wrappers import plain_modules, stored_tensors, unwrapped

WEIGHTS, STRUCTURE = "model.safetensors", "structure.json"


@on_host()
def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save a model, grown, shrunk or whole: `model.safetensors` and `structure.json`.

    The folder appears complete, flushed to the disk, or not at all; an existing saved folder is replaced. A part of a
    grown model, or a larger one around it, can be saved alike, and loads with a factory of just that. Of wrappers
    (`torch.compile`, DataParallel, DistributedDataParallel, AveragedModel) the wrapped model is saved.

    Args:
        model: the module; what torchgrow did to it is recorded on its modules.
        folder: where to; created with its parents.

    Warns:
        UserWarning: the model is still growing: its structure is not final and may be over its budget.

    Raises:
        SavedModelError: the folder exists and is not a saved model, or cannot be written (disk full, read-only); or
            `load` could not rebuild the model: a shape, count or state that follows from nothing recorded, which the
            message names.
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise SavedModelError(
            f"save takes a torch.nn.Module and a folder, got a {kind} for the first; call "
            'torchgrow.save(model, "folder/"), and for a run torchgrow.save_checkpoint("folder/", grower)'
        )
    target = real_folder(folder)
    there = os.path.exists(target)  # noqa: PTH110  # Path raises where a name is too long
    if there and not (target.is_dir() and {p.name for p in target.iterdir()} <= {WEIGHTS, STRUCTURE}):
        raise SavedModelError(f"{target} exists and is not a saved model; choose another folder or remove it")
    model = unwrapped(model)
    modules = plain_modules(model)
    tensors, record = stored_tensors(modules), recorded(modules.items())
    skipped = {path: skip for path, module in modules.items() if (skip := skip_of(module)) is not None}
    _check_explained(modules, tensors, record, skipped)
    stored = {name: storable(tensor, name) for name, tensor in tensors.items()}
    extra = {path: module.get_extra_state() for path, module in modules.items() if has_extra_state(module)}
    packed = {path: pack(value, stored, f"the extra state of {path}") for path, value in extra.items()}
    buffers: dict[str, bool | None] = {}  # by name, whether each is part of the `state_dict`; None without a value
    for path, module in modules.items():
        passing = module._non_persistent_buffers_set
        for name, x in module._buffers.items():
            if name not in passing or x is None or x.layout == torch.strided:
                buffers[join(path, name)] = None if x is None else name not in passing
    structure = form.described(modules, tensors, record, packed, buffers)
    for growth in growths(model):
        warnings.warn(
            f"{type(model).__name__} is saved before its growth has finished: {growth}; call grower.finish() before "
            "torchgrow.save for the network on its budget, or torchgrow.save_checkpoint to go on later",
            stacklevel=2,
        )
    write_folder(target, structure, stored, (STRUCTURE, WEIGHTS))


def _check_explained(
    modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], record: Record, skipped: Mapping[str, PassThrough]
) -> None:
    """Refuse a model that cannot be rebuilt from its frame and what is recorded."""
    below, wrong = tuple(f"{path}." for path in skipped), []
    for name, shape in record.shapes.items():
        if name in tensors:
            expected = (0,) if name.startswith(below) else live_shape(shape, record.kept.get(name, {}))
            if tensors[name].shape != expected:
                wrong.append(f"{name} is {tuple(tensors[name].shape)}, the record makes it {expected} of {shape}")
    marks = {path: mark for path, module in modules.items() if (mark := mark_of(module)) is not None}
    roots = {id(mark.record): (path, mark) for path, mark in reversed(marks.items())}  # the outermost of each
    for path, mark in roots.values():
        lead = f"{mark.path}." if mark.path else ""
        for name in mark.record.kept:  # tensors without a record, in the place of recorded ones and of another shape
            shape, here = mark.record.shapes[name], (f"{path}." if path else "") + name[len(lead) :]
            unrecorded = name.startswith(lead) and here in tensors and here not in record.shapes
            if unrecorded and tensors[here].shape != shape:
                found = f"{here} is {tuple(tensors[here].shape)}"
                wrong.append(f"{found}, of a module put there after the cut; the frame had {shape}")
    for path, attribute in record.attributes:
        now, then = get(modules[path], attribute), record.attributes[path, attribute]
        if now != then:
            wrong.append(f"{path}.{attribute} is {now}, the record makes it {then}")
    for path, module in modules.items():
        entries: dict[str, Any] = {}
        if type(module)._save_to_state_dict is not nn.Module._save_to_state_dict:
            module._save_to_state_dict(entries, "", True)
        outside = sorted(entries.keys() - own_tensors(module).keys() - {"_extra_state"})
        if outside:
            wrong.append(f"{path or 'the model'} ({type(module).__name__}) keeps {outside[:3]} outside of its tensors")
    if wrong:
        raise SavedModelError(
            f"the model cannot be rebuilt from its frame, since {'; '.join(wrong[:3])}. Save it as it was grown, "
            "before tensors or modules are replaced by others, or store its state_dict() yourself"
        )


# --- loading ---


@on_host()
def load(folder: str | os.PathLike[str], frame_factory: Callable[[], nn.Module]) -> nn.Module:
    """Load a saved model into a fresh frame, without tracing anything.

    Args:
        folder: what `save` wrote.
        frame_factory: builds the frame, the full-size model the saved one was grown in; also on the meta device
            (`with torch.device("meta"): ...`), from where what is loaded comes to the CPU.

    Returns:
        The frame, cut to the saved structure, with the saved weights and buffers, in training mode as built. Buffers
        that nothing cuts are as saved, also where a forward had made them, replaced them at another shape, or put None
        in their place.

    Raises:
        SavedModelError: the folder is missing or damaged, or does not fit the frame; the frame factory's
            model is discarded.
    """
    if isinstance(frame_factory, nn.Module) or not callable(frame_factory):
        kind = type(frame_factory).__name__
        name = kind if isinstance(frame_factory, nn.Module) else "MyModel"
        raise SavedModelError(
            f"frame_factory must be a function that builds the frame, got a {kind}; call torchgrow.load(folder, "
            f"{name}), or with lambda: {name}(...): torchgrow.load cuts a model of its own"
        )
    source = Path(folder)
    what = "a saved model; save one with torchgrow.save, or take a checkpoint by torchgrow.load_checkpoint"
    structure, tensors = read_folder(source, (STRUCTURE, WEIGHTS), form.FORMATS, what)
    if structure["format"] < 3:
        structure.setdefault("skipped", {})  # absent before depth
        structure.setdefault("extra_state", {})
    if structure["format"] < 4:
        structure.setdefault("buffers", {})
    form.check_form(str(source / STRUCTURE), structure)
    with on_default():
        model = frame_factory()
    if not isinstance(model, nn.Module):
        raise SavedModelError(f"frame_factory must return a torch.nn.Module, got {type(model).__name__}")
    frame = unwrapped(model)
    _fill(source, structure, tensors, frame)
    guard_(frame)
    return portable_(model)


def _fill(source: Path, structure: dict[str, Any], tensors: dict[str, Tensor], frame: nn.Module) -> None:
    """Make a frame the saved network, once all that the folder says is known to fit it."""
    where, modules = str(source / STRUCTURE), plain_modules(frame)
    own = stored_tensors(modules)
    _check_fresh(modules, own)
    extra = {path: unpack(value, tensors) for path, value in structure["extra_state"].items()}
    kept = form.read_kept(where, structure, own)
    late, dropped = _late(structure, modules, own, tensors)
    fixed = {name: tensor for name, tensor in own.items() if name not in dropped}  # tensors that take contents
    missing, foreign = sorted(fixed.keys() - tensors.keys()), sorted(tensors.keys() - fixed.keys() - {*late})
    if missing or foreign:
        raise SavedModelError(
            f"{source} does not fit the frame: missing {missing[:3]}, foreign {foreign[:3]}; "
            "frame_factory must build the same full-size model that was grown"
        )
    skipped = form.read_skipped(where, structure, modules, own)
    below = tuple(f"{path}." for path in skipped)
    free = {name for name in structure["buffers"] if name not in kept and not name.startswith(below)}
    attributes = form.read_attributes(where, structure, modules, kept, own, below)
    _check_contents(source, fixed, tensors, kept, below, free)
    form.check_convolutions(where, modules, tensors, attributes, below)
    with_extra = {path for path, module in modules.items() if has_extra_state(module)}
    if extra.keys() != with_extra and structure["format"] >= 3:
        raise SavedModelError(
            f"{where} has the extra state of {sorted(extra)[:3]}, the frame has some in "
            f"{sorted(with_extra)[:3]}; is frame_factory the same model?"
        )
    names = {module: path for path, module in frame.named_modules()}
    try:
        adapt_(frame, [names.get(modules[path], path) if path in modules else path for path in structure["adapted"]])
    except TorchgrowError as error:
        raise SavedModelError(f"{where} names a module without its adapter: {error}") from error
    wholes = {(path, name): get(modules[path], name) or 0 for path, name in attributes}
    shapes = {name: tuple(own[name].shape) for name in own if name in kept or name.startswith(below)}
    bare = {name: tensor for name, tensor in fixed.items() if tensor.is_meta}
    materialise_(frame, bare, lambda name: tensors[name].detach())  # another object: it is exchanged for the frame's
    for name, tensor in fixed.items():
        replace_(tensor, tensors[name].to(tensor.device))
    for name in (*late, *dropped):
        path, _, last = name.rpartition(".")
        if last in modules[path]._buffers:
            modules[path]._buffers[last] = tensors.get(name)
        else:
            modules[path].register_buffer(last, tensors.get(name), persistent=bool(structure["buffers"][name]))
    for (path, name), number in attributes.items():
        put(modules[path], name, number)
    for path, skip in skipped.items():
        skip_(modules[path], [""], {"": skip})
    blocks = tuple((path, *form.left_out_with(structure, path)) for path in skipped)
    mark_(modules.items(), Record(shapes, kept, wholes, attributes, blocks))
    for path, value in extra.items():
        _give_extra(where, path, modules[path], value)


def _check_fresh(modules: Mapping[str, nn.Module], own: Mapping[str, Tensor]) -> None:
    """Refuse a frame that is no full-size model, or has meta tensors that nothing fills."""
    cut = recorded(modules.items())
    for name, index in cut.kept.items():
        if name in own and index:
            raise SavedModelError(
                f"frame_factory returned a model that has been cut already: {name} is {tuple(own[name].shape)} of "
                f"{cut.shapes[name]}; it must build a new one at full size"
            )
    for path, module in modules.items():
        bare = [name for name, value in vars(module).items() if isinstance(value, Tensor) and value.is_meta]
        if bare:
            raise SavedModelError(
                f"frame_factory returned a model on the meta device whose {join(path, bare[0])} is neither parameter "
                "nor buffer, so that nothing is saved for it: make it a buffer, or build the frame on a real device"
            )


def _late(
    structure: dict[str, Any],
    modules: Mapping[str, nn.Module],
    own: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> tuple[list[str], list[str]]:
    """Names of buffers that only the saved model has, and of those of the frame that have no value in it."""
    buffers = structure["buffers"]
    late = [name for name in tensors if name not in own and buffers.get(name) is not None]
    dropped = [name for name in own if name not in tensors and name in buffers and buffers[name] is None]
    return (
        [name for name in late if may_appear(modules, name)],
        [name for name in dropped if name not in structure["kept"] and not isinstance(own[name], nn.Parameter)],
    )


def _check_contents(
    source: Path,
    own: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    kept: Mapping[str, Index],
    below: tuple[str, ...],
    free: AbstractSet[str],
) -> None:
    """Refuse tensors of other shapes or dtypes than the cut frame's; buffers in `free` may have any shape."""
    for name, full in own.items():
        shape = (0,) if name.startswith(below) else live_shape(tuple(full.shape), kept.get(name, {}))
        if name in free and not isinstance(full, nn.Parameter):
            shape = tuple(tensors[name].shape)
        if tensors[name].shape != shape or tensors[name].dtype != full.dtype:
            raise SavedModelError(
                f"{source / WEIGHTS}: {name} is {tensors[name].dtype} {tuple(tensors[name].shape)}, but the structure "
                f"record makes it {full.dtype} {shape} in this frame"
            )


def _give_extra(where: str, path: str, module: nn.Module, value: Any) -> None:
    try:
        module.set_extra_state(value)
    except Exception as error:
        raise SavedModelError(
            f"{where}: {path or 'the model'} ({type(module).__name__}) does not take its extra state: "
            f"{type(error).__name__}: {error}"
        ) from error

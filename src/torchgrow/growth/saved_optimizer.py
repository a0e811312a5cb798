"""The state of optimizers in a saved run, by names of parameters, and its checks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SavedModelError
from ..persistence.plain_data import Field, alike, plain
from ..structure.optimizer_checks import is_plain
from ..structure.optimizer_slots import Layout
from ..structure.optimizer_trial import Slot
from ..structure.space import Shapes
from ..structure.store import Store
from .gates import Fold
from .state import read_store

Slots = dict[Tensor, dict[str, Any]]
"""Optimizer state as `torch.optim.Optimizer.state` holds it."""


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], raw: Mapping[tuple[str, str], Tensor]
) -> dict[str, Any]:
    """State and settings of an optimizer, by the names of its parameters, as copies.

    Slots that are copies of gated weights are stored as they are in `raw`, by parameter and key.
    Settings that are not data (a dtype, a function) are left out: the resumed run has its own.
    """
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    groups = [
        {**_copy(group), "params": [name_of[id(p)] for p in group["params"] if id(p) in name_of]}
        for group in optimizer.param_groups
    ]
    slots = {name: _copy(optimizer.state[p]) for name, p in parameters.items() if optimizer.state.get(p)}
    for (name, key), contents in raw.items():
        if name in slots:
            slots[name][key] = contents.clone().view_as(slots[name][key])
    return {"groups": groups, "slots": slots}


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.detach().clone() if isinstance(value, Tensor) else value
        for key, value in values.items()
        if key != "params" and is_plain(value, math.inf)
    }


def read_optimizer(
    field: Field, layout: Layout, parameters: Mapping[str, nn.Parameter], shapes: Shapes, full: Shapes
) -> tuple[Slots, list[dict[str, Any]]]:
    """Check what `optimizer_state` made of parameters that will have `shapes`, and have the shapes `full` in the frame.

    Returns:
        Slots by parameter and settings by group, as copies on the right devices.

    Raises:
        SavedModelError: other parameters, other settings, or slots that this optimizer does not keep so.
    """
    optimizer = layout.optimizer
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    saved = field.fields(("groups", "slots"))
    groups = [group.fields() for group in saved["groups"].items()]
    own = [[name_of[id(p)] for p in group["params"] if id(p) in name_of] for group in optimizer.param_groups]
    if own != [group["params"].value if "params" in group else None for group in groups]:
        raise SavedModelError(
            f"the state's optimizer has {len(groups)} groups of parameters, this one has {len(own)}, or they hold "
            "other parameters or in another order; build it just as in the saved run. Nothing was changed"
        )
    present = optimizer.param_groups
    settings = [_settings(group, present[i], *layout.settings(i)) for i, group in enumerate(groups)]
    for i, group in enumerate(settings):
        _check_values(optimizer, group, f"{field.path}['groups'][{i}]")
    slots: Slots = {}
    entries = saved["slots"].fields()
    for names, group in zip(own, present, strict=True):
        for name in names:
            if name in entries:
                parameter, known = parameters[name], layout.known(parameters[name], len(full[name]))
                slots[parameter] = _slots(entries.pop(name), known, parameter, shapes[name], group)
    for entry in entries.values():
        entry.refuse("the state of a parameter that this optimizer holds")
    return slots, settings


def _settings(
    saved: dict[str, Field], present: dict[str, Any], made_with: dict[str, Any], stepped: dict[str, Any]
) -> dict[str, Any]:
    """Settings of one group, complete.

    Those that the optimizer has now must be there, but for those that only steps add, and those that are no data,
    which stay. Their kind is what it is now, or was when the optimizer was made, or is after steps: a number may become
    a tensor. Others may be what steps add, or numbers.
    """
    settings = {key: value for key, value in present.items() if key == "params" or not is_plain(value, math.inf)}
    for key in [key for key in present if key not in settings]:  # in order, so that an error names the same each time
        if key in saved:
            samples = [sample[key] for sample in (made_with, stepped) if key in sample]
            fits = any(alike(saved[key].value, sample) for sample in samples)
            settings[key] = saved[key].value if fits else saved[key].like(present[key])
        elif key in made_with or key not in stepped:
            raise SavedModelError(
                f"the state's optimizer has no setting {key!r}; build the optimizer as in the saved run, of the same "
                "class. Nothing was changed"
            )
    for key, field in saved.items():
        if key not in present:
            known = key in stepped and is_plain(stepped[key], math.inf)
            settings[key] = field.like(stepped[key]) if known else field.number()  # initial_lr, say, of a schedule
    device = next((p.device for p in present["params"]), torch.device("cpu"))
    places = {key: value.device for key, value in {**stepped, **present}.items() if isinstance(value, Tensor)}
    return {
        key: value.to(places.get(key, device), copy=True) if isinstance(value, Tensor) else value
        for key, value in settings.items()
    }


def _check_values(optimizer: torch.optim.Optimizer, settings: Mapping[str, Any], path: str) -> None:
    """Refuse settings that the constructor of one of PyTorch's own optimizers refuses."""
    if not type(optimizer).__module__.startswith("torch.optim."):
        return
    known = inspect.signature(type(optimizer)).parameters.keys() - {"params"}
    try:
        type(optimizer)([nn.Parameter(torch.zeros(1))], **{key: settings[key] for key in known & settings.keys()})
    except (ValueError, RuntimeError, TypeError) as error:
        raise SavedModelError(f"{path} cannot be set: {error}; nothing was changed") from error


def _slots(
    entry: Field, known: dict[str, Slot], parameter: nn.Parameter, shape: tuple[int, ...], group: dict[str, Any]
) -> dict[str, Any]:
    """Slots of one parameter; `known` are those that a trial of this optimizer made."""
    found, slots = entry.fields(), {}
    for key in [*(key for key in known if not known[key].late), *found]:
        field, value = found.get(key, Field(None, f"{entry.path}[{key!r}]")), None
        slot = known.get(key) or _judged(found[key], shape)
        if isinstance(slot.sample, Tensor):
            wanted = slot.sample.shape if slot.kind == "number" else (math.prod(shape),) if slot.flat else shape
            if slot.kind != "number" and isinstance(field.value, Tensor) and field.value.numel() == 1:
                wanted = field.value.shape  # one number for all, as long as all were alike
            stays = key == "step" and not (group.get("capturable") or group.get("fused"))
            value = field.tensor(wanted, slot.sample.dtype)
            value = value.to("cpu" if stays else parameter.device, copy=True)
        else:
            value = field.like(slot.sample)
        slots[key] = value
    return slots


def _judged(field: Field, shape: tuple[int, ...]) -> Slot:
    """The kind of a saved slot that no trial showed."""
    value = field.value
    if isinstance(value, Tensor):
        if value.shape != shape and value.numel() > 1:
            field.refuse(f"a number, or of the parameter's shape {shape}")
        return Slot("unknown" if value.shape == shape else "number", value)
    return Slot("number", value if value is None or plain(value) else 0)


def fold_copies(
    slots: Slots, layout: Layout, fold: Fold, factors: Sequence[Tensor], shapes: Shapes
) -> dict[tuple[str, str], Tensor]:
    """Fold those slots that are copies of gated weights, in place; returns their raw contents by parameter and key.

    They belong to the structure of `fold`, whose parameters are folded with `factors` and have `shapes` in the frame.
    """
    raw = {}
    gated = zip(fold.contents.items(), fold.parameters if fold.gated else (), factors, strict=True)
    for (name, contents), parameter, factor in gated:
        for key, slot in layout.known(parameter, len(shapes[name])).items():
            value = slots.get(parameter, {}).get(key)
            if slot.kind == "copy" and isinstance(value, Tensor) and value.numel() == contents.numel():
                raw[name, key] = value.view_as(contents)
                slots[parameter][key] = (raw[name, key] * factor).view_as(value)
    return raw


def read_bank_slots(
    field: Field,
    parameters: Mapping[str, nn.Parameter],
    empty: Callable[[str, torch.dtype, Slot], Store],
    layouts: Sequence[Layout],
    slots: Slots,
    shapes: Shapes,
) -> dict[tuple[str, str], Store]:
    """Stored optimizer slots, of the dtypes that the optimizers keep them in."""
    stored: dict[tuple[str, str], Store] = {}
    for entry in field.items():
        if not isinstance(entry.value, list) or len(entry.value) != 3:
            entry.refuse("a list of a name, a key and what a store holds")
        name, key, held = entry.value
        if type(name) is not str or name not in parameters or type(key) is not str:
            entry.refuse("a slot of a parameter that can be cut")
        live = slots.get(parameters[name], {}).get(key)
        known = [layout.known(parameters[name], len(shapes[name])).get(key) for layout in layouts]
        slot = next((one for one in known if one is not None), Slot("unknown", parameters[name].new_empty(0)))
        dtype = (live if isinstance(live, Tensor) else slot.sample).dtype
        stored[name, key] = read_store(Field(held, entry.path), empty(name, dtype, slot), dtype, shapes[name])
    return stored

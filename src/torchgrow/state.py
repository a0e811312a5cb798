"""The state of a run as plain data, and its examination: every field is checked before anything is touched."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .errors import SavedModelError
from .exchange import Exchange
from .fold import Fold
from .policies.policy import Policy, is_data
from .slots import Layout
from .space import Space, live_positions
from .store import Store
from .trial import Slot

FORMAT = 2
"""Of `Grower.state_dict()`."""

LARGEST = 2**62
"""Numbers beyond it are no counts, rates or times of a training run."""


Slots = dict[Tensor, dict[str, Any]]
"""Optimizer state as `torch.optim.Optimizer.state` holds it."""


class Field:
    """A value in a state and where it stands; raises `SavedModelError` for whatever is not as it must be.

    Args:
        value: the value.
        path: where it stands, in words.
    """

    def __init__(self, value: Any, path: str = "state") -> None:
        self.value, self.path = value, path

    def refuse(self, wanted: str) -> NoReturn:
        """Say what is there and what must be."""
        value = self.value
        kind = type(value).__name__
        found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{str(value)[:60]} ({kind})"
        raise SavedModelError(f"{self.path} is {found}, it must be {wanted}; nothing was changed")

    def fields(self, names: Iterable[str] | None = None, later: Iterable[str] = ()) -> dict[str, Field]:
        """The fields of a dict with text for keys; with `names`, with just these keys and those in `later`.

        The latter may be missing, as they are in states of older versions, and are None then.
        """
        if not isinstance(self.value, dict) or not all(type(key) is str for key in self.value):
            self.refuse("a dict with text for keys")
        names = None if names is None else {*names, *later}
        values = {**dict.fromkeys(later), **self.value}
        if names is not None and values.keys() != names:
            missing, foreign = sorted(names - values.keys()), sorted(values.keys() - names)
            raise SavedModelError(
                f"{self.path} lacks {missing[:3]} and has the foreign {foreign[:3]}; nothing was changed"
            )
        return {key: Field(value, f"{self.path}[{key!r}]") for key, value in values.items()}

    def items(self, count: int | None = None) -> list[Field]:
        """The items of a list, of just so many if `count` is given."""
        if not isinstance(self.value, list):
            self.refuse("a list")
        if count not in (None, len(self.value)):
            raise SavedModelError(
                f"{self.path} is a list of {len(self.value)}, it must be a list of {count}, one for every optimizer; "
                "give Grower as many as in the saved run. Nothing was changed"
            )
        return [Field(value, f"{self.path}[{i}]") for i, value in enumerate(self.value)]

    def tensor(self, shape: Iterable[int], dtype: torch.dtype, finite: bool = False) -> Tensor:
        """A dense tensor of this shape and dtype; with `finite`, without NaN and infinity."""
        value, shape = self.value, tuple(shape)
        fits = isinstance(value, Tensor) and value.shape == shape and value.dtype == dtype
        if not fits or value.layout != torch.strided or value.is_meta:
            self.refuse(f"{dtype} {shape}")
        if finite and not bool(value.isfinite().all()):
            self.refuse(f"{dtype} {shape} without NaN and infinity")
        return value.detach()

    def number(self, low: float = -math.inf) -> float:
        """A finite number of at least `low`."""
        if type(self.value) not in (int, float) or not max(low, -LARGEST) <= self.value <= LARGEST:
            self.refuse(f"a finite number, at least {low}")
        return float(self.value)

    def whole(self, low: int = 0, high: int = LARGEST) -> int:
        """A whole number in [low, high]."""
        if type(self.value) is not int or not low <= self.value <= high:
            self.refuse(f"a whole number in [{low}, {high}]")
        return self.value

    def flag(self) -> bool:
        """True or False."""
        if type(self.value) is not bool:
            self.refuse("True or False")
        return self.value

    def like(self, present: Any) -> Any:
        """A value of the kind of `present`: same type, numbers finite where those are, same shape of containers."""
        if not _alike(self.value, present):
            self.refuse(f"of the kind of {str(present)[:60]}")
        return self.value

    def generator(self) -> Tensor:
        """The state of a `torch.Generator` on the CPU."""
        fresh = torch.Generator()
        state = self.tensor(fresh.get_state().shape, torch.uint8).cpu()
        try:
            fresh.set_state(state)
        except RuntimeError:
            self.refuse("the state of a torch.Generator")
        return state


def _alike(value: Any, present: Any) -> bool:
    if present is None or isinstance(present, bool):
        return value is None or isinstance(value, bool) or (present is None and _plain(value))
    if isinstance(present, (int, float)):
        wild = isinstance(present, float) and not math.isfinite(present)
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        return (fits and abs(value) <= LARGEST) or (wild and fits and not math.isnan(value))
    if isinstance(present, Tensor):
        return isinstance(value, Tensor) and (value.shape, value.dtype) == (present.shape, present.dtype)
    if isinstance(present, (list, tuple)):
        if not present and type(value) is type(present):
            return _plain(value)
        fits = type(value) is type(present) and len(value) == len(present)
        return fits and all(map(_alike, value, present))
    if isinstance(present, dict):
        fits = isinstance(value, dict) and value.keys() == present.keys()
        return fits and all(_alike(value[key], item) for key, item in present.items())
    return type(value) is type(present)


def _plain(value: Any) -> bool:
    """A number, text, or a list of them: what may stand where nothing stood before."""
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return isinstance(value, str) or (isinstance(value, (int, float)) and abs(value) <= LARGEST)


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that nothing writes to, with the same order of elements in memory."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


# --- the frame ---


def fingerprint(space: Space, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a state must share with the frame it is loaded into: shapes and dtypes by name, and all units."""
    units = hashlib.sha256()
    for kind, vectors in (("unit", space.unit_of), ("gate", space.fold)):
        for (name, axis), vector in sorted(vectors.items()):
            units.update(f"{kind} {name} {axis} ".encode() + vector.cpu().numpy().tobytes())
    for attribute in space.attributes:
        units.update(f"attribute {attribute.module} {attribute.name} ".encode())
        units.update(attribute.units.cpu().numpy().tobytes())
    for slot in space.slots:
        units.update(f"layer {slot.unit} {slot.modules} {slot.residual} ".encode())
    units.update(space.group_of.cpu().numpy().tobytes() + space.removable.cpu().numpy().tobytes())
    return {
        "shapes": {name: list(shape) for name, shape in space.shapes.items()},
        "dtypes": {name: str(tensors[name].dtype) for name in space.shapes},
        "units": units.hexdigest(),
    }


def check_frame(field: Field, own: dict[str, Any]) -> None:
    """Refuse a state of another frame.

    Raises:
        SavedModelError: names the first tensor that differs, or says that the units do.
    """
    saved = field.fields(own.keys())
    advice = "the model must be built just as the one of the saved run"
    for kind in ("shapes", "dtypes"):
        found, wanted = saved[kind].fields(), own[kind]
        for name in [*wanted, *found]:
            a, b = (found[name].value if name in found else None), wanted.get(name)
            if type(a) is not type(b) or a != b:
                raise SavedModelError(
                    f"the state is of another frame: {name} is {a or 'not there'} in it and {b or 'not there'} here; "
                    f"{advice}. Nothing was changed"
                )
    if saved["units"].value != own["units"]:
        raise SavedModelError(
            "the state has other units than this frame, though the shapes agree: was it made with another freeze, "
            f"couple, set of trained parameters or version of torchgrow? {advice}. Nothing was changed"
        )


def live_shapes(space: Space, keep: Tensor) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters and buffers when the units in `keep` (bool [n]) live."""
    shapes = {name: list(shape) for name, shape in space.shapes.items()}
    for name, axes in space.cut_axes.items():
        for axis in axes:
            shapes[name][axis] = int(live_positions(space.unit_of[name, axis], keep).sum())
    return {name: (0,) if space.absent(name, keep) else tuple(shape) for name, shape in shapes.items()}


def store_state(store: Store) -> dict[str, Any]:
    """What a store holds, not copied; its box as positions by axis, None for nothing."""
    box = None if store.box is None else {str(axis): positions.clone() for axis, positions in store.box.items()}
    return {"box": box, "held": None if box is None else store.held.detach()}


def stores_state(stores: Mapping[str, Store]) -> dict[str, Any]:
    """The state of stores by name."""
    return {name: store_state(store) for name, store in stores.items()}


def read_store(field: Field, present: Store, dtype: torch.dtype, shape: Sequence[int]) -> Store:
    """A copy of a present store that holds what the state says."""
    saved, held, box = field.fields(("box", "held")), list(shape), None
    if saved["box"].value is not None:
        box = {}
        for key, entry in saved["box"].fields().items():
            axis = int(key) if key in map(str, range(len(held))) else entry.refuse("positions of an axis")
            count = entry.value.numel() if isinstance(entry.value, Tensor) else 0
            if count > held[axis]:  # however few bytes are behind it: the stride may be 0
                entry.refuse(f"at most {held[axis]} positions")
            positions = entry.tensor((count,), torch.int64).cpu()
            bounded = torch.cat([torch.tensor([-1]), positions, torch.tensor([held[axis]])])
            if not count or bool((bounded.diff() < 1).any()):
                entry.refuse(f"rising positions below {held[axis]}")
            box[axis], held[axis] = positions.clone(), count
    other = copy.copy(present)
    if (present.box == {} and box != {}) or (box is None and saved["held"].value is not None):
        saved["box"].refuse("all positions of a frame that is there as a whole")
    other.box = box
    other.held = torch.empty(0, dtype=dtype) if box is None else saved["held"].tensor(held, dtype).cpu().clone()
    return other


def read_stores(
    field: Field, present: Mapping[str, Store], space: Space, like: Mapping[str, Tensor]
) -> dict[str, Store]:
    """Stores by name, one for every present one, of the dtypes of the tensors in `like`."""
    saved = field.fields(present)
    return {
        name: read_store(saved[name], store, like[name].dtype, space.shapes[name]) for name, store in present.items()
    }


def read_tensors(
    field: Field, like: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], some: bool = False
) -> dict[str, Tensor]:
    """Tensors by name, one for every name in `like` (with `some`: for any of them), of its dtype.

    Args:
        field: of the state.
        like: present tensors, for names and dtypes.
        shapes: wanted shapes by name.
        some: whether names may be missing.
    """
    found = field.fields()
    if not found.keys() <= like.keys() or not (some or len(found) == len(like)):
        field.fields(like)
    return {name: tensor.tensor(shapes[name], like[name].dtype) for name, tensor in found.items()}


def read_bank_slots(
    field: Field,
    parameters: Mapping[str, nn.Parameter],
    empty: Callable[[str, torch.dtype, Slot], Store],
    layouts: Sequence[Layout],
    slots: Slots,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[tuple[str, str], Store]:
    """Sleeping optimizer slots, of the dtypes that the optimizers keep them in."""
    sleeping: dict[tuple[str, str], Store] = {}
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
        sleeping[name, key] = read_store(Field(held, entry.path), empty(name, dtype, slot), dtype, shapes[name])
    return sleeping


def read_policy(field: Field, policy: Policy, events: int) -> Policy:
    """A policy like the one that is there with a saved state, of so many events; see `Policy.state_dict`."""
    here = policy.state_dict()
    found = {key: _like(one, here[key]) for key, one in field.fields(here).items()}
    wrong = policy.check_state(found, events)
    if wrong:
        raise SavedModelError(f"{field.path} of {type(policy).__name__} is damaged: {wrong}; nothing was changed")
    read = policy.copied()
    read.load_state_dict(found)
    return read


def _like(field: Field, present: Any) -> Any:
    """A value of the kind and shape of the present one, finite where that is; tensors on the host."""
    if isinstance(present, (list, dict)):  # which may have grown
        if type(field.value) is not type(present) or not is_data(field.value):
            field.refuse(f"a {type(present).__name__} of tensors, numbers and text")
        return field.value
    if not isinstance(present, Tensor):
        return field.like(present)
    return field.tensor(present.shape, present.dtype, finite=bool(present.isfinite().all())).cpu()


# --- history ---


@dataclass(frozen=True)
class Event:
    """What one update did; event 0 is the seed.

    Attributes:
        update: number of the update.
        params: parameters of the network after it.
        flops: FLOPs of the network after it, for one sample.
        widths: live units per group.
        pressure: what the policy tells: lambda of Eq 4 for the epoch to come (`Paper`), else 0.
        temperature: mean beta per group; empty where the policy has none.
        born: units present for the first time.
        regrown: units that came back with their old weights.
        detached: units that left.
        seconds: wall-clock time of the update.
    """

    update: int
    params: int
    flops: int
    widths: dict[str, int]
    pressure: float
    temperature: dict[str, float]
    born: int
    regrown: int
    detached: int
    seconds: float


def read_event(field: Field) -> Event:
    """One event of a saved history."""
    saved = field.fields(event_field.name for event_field in fields(Event))
    counts = {name: saved[name].whole() for name in ("update", "params", "flops", "born", "regrown", "detached")}
    return Event(
        widths={name: width.whole() for name, width in saved["widths"].fields().items()},
        pressure=saved["pressure"].number(),
        temperature={name: beta.number(low=0) for name, beta in saved["temperature"].fields().items()},
        seconds=saved["seconds"].number(low=0),
        **counts,
    )


# --- optimizers ---


def optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    raw: Mapping[tuple[str, str], Tensor],
) -> dict[str, Any]:
    """State and settings of an optimizer, by the names of its parameters, as copies.

    Slots that are copies of gated weights are stored as they are in `raw`, by parameter and key.
    Settings that are no data, a dtype or a function, are left out: a run that goes on has its own.
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
        if key != "params" and _data(value)
    }


def _data(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_data, value))
    if isinstance(value, dict):
        return all(map(_data, value.values()))
    return value is None or isinstance(value, (Tensor, bool, int, float, str))


def read_optimizer(
    field: Field,
    layout: Layout,
    parameters: Mapping[str, nn.Parameter],
    shapes: Mapping[str, tuple[int, ...]],
    full: Mapping[str, tuple[int, ...]],
) -> tuple[Slots, list[dict[str, Any]]]:
    """Check a saved optimizer state.

    Args:
        field: what `optimizer_state` made.
        layout: of the optimizer that it shall go to.
        parameters: of the model, by name.
        shapes: what the tensors' shapes will be, by name.
        full: their shapes in the frame.

    Returns:
        Slots by parameter and settings by group, as copies on the right devices, for `swapped_in`.

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
    settings = {key: value for key, value in present.items() if key == "params" or not _data(value)}
    for key in [key for key in present if key not in settings]:  # in order, so that an error names the same each time
        if key in saved:
            samples = [sample[key] for sample in (made_with, stepped) if key in sample]
            fits = any(_alike(saved[key].value, sample) for sample in samples)
            settings[key] = saved[key].value if fits else saved[key].like(present[key])
        elif key in made_with or key not in stepped:
            raise SavedModelError(
                f"the state's optimizer has no setting {key!r}; build the optimizer as in the saved run, of the same "
                "class. Nothing was changed"
            )
    for key, field in saved.items():
        if key not in present:
            known = key in stepped and _data(stepped[key])
            settings[key] = field.like(stepped[key]) if known else field.number()  # initial_lr, say, of a schedule
    device = next((p.device for p in present["params"]), torch.device("cpu"))
    places = {key: value.device for key, value in {**stepped, **present}.items() if isinstance(value, Tensor)}
    return {
        key: value.to(places.get(key, device), copy=True) if isinstance(value, Tensor) else value
        for key, value in settings.items()
    }


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
    """What a slot is that no trial made, by what is there."""
    value = field.value
    if isinstance(value, Tensor):
        if value.shape != shape and value.numel() > 1:
            field.refuse(f"a number, or of the parameter's shape {shape}")
        return Slot("unknown" if value.shape == shape else "number", value)
    return Slot("number", value if value is None or _plain(value) else 0)


def fold_copies(
    slots: Slots, layout: Layout, fold: Fold, factors: Sequence[Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[tuple[str, str], Tensor]:
    """Fold those slots that are copies of gated weights, in place; returns their raw contents by parameter and key.

    Args:
        slots: by parameter, as read.
        layout: of their optimizer.
        fold: of the structure that they belong to.
        factors: that its parameters are folded with.
        shapes: of the tensors in the frame.
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


def exchange_state(
    exchange: Exchange, optimizer: torch.optim.Optimizer, slots: Slots, settings: list[dict[str, Any]]
) -> None:
    """Have `exchange` give an optimizer other state and settings."""
    exchange.fill(optimizer.state, slots)
    for group, new in zip(optimizer.param_groups, settings, strict=True):
        exchange.fill(group, new)

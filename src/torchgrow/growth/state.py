"""The state of a run as plain data: frame, stores, tensors and policy, written and read."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..errors import SavedModelError, TorchgrowError
from ..persistence.plain_data import Field, no_data
from ..policies.paper import Paper
from ..policies.policy import Policy
from ..structure.space import Shapes, Space
from ..structure.store import Store


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies with the same order of elements in memory."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def fingerprint(space: Space, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What must be equal in the frame that loads a state: shapes and dtypes by name, and all units."""
    units = hashlib.sha256()
    for kind, vectors in (("unit", space.unit_of), ("gate", space.fold)):
        for (name, axis), vector in sorted(vectors.items()):
            units.update(f"{kind} {name} {axis} ".encode() + vector.cpu().numpy().tobytes())
    for attribute in space.attributes:
        units.update(f"attribute {attribute.module} {attribute.name} ".encode())
        units.update(attribute.units.cpu().numpy().tobytes())
    for block in space.blocks:
        units.update(f"layer {block.unit} {block.modules} {block.residual} ".encode())
    units.update(space.group_of.cpu().numpy().tobytes() + space.removable.cpu().numpy().tobytes())
    return {
        "shapes": {name: list(shape) for name, shape in space.shapes.items()},
        "dtypes": {name: str(tensors[name].dtype) for name in space.shapes},
        "units": units.hexdigest(),
    }


def check_frame(field: Field, own: dict[str, Any]) -> None:
    """Refuse (`SavedModelError`) a state of another frame."""
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
            "the state has other units than this frame, though the shapes agree: was it made with another protect, "
            f"couple, set of trained parameters or version of torchgrow? {advice}. Nothing was changed"
        )


def store_state(store: Store) -> dict[str, Any]:
    """Contents of a store, not copied, with its box as positions by axis; None for an empty one."""
    box = None if store.box is None else {str(axis): positions.clone() for axis, positions in store.box.items()}
    return {"box": box, "held": None if box is None else store.held.detach()}


def read_store(field: Field, present: Store, dtype: torch.dtype, shape: Sequence[int]) -> Store:
    """A copy of a present store with the contents of a state."""
    saved, held, box = field.fields(("box", "held")), list(shape), None
    if saved["box"].value is not None:
        box = {}
        for key, entry in saved["box"].fields().items():
            axis = int(key) if key in map(str, range(len(held))) else entry.refuse("positions of an axis")
            count = entry.value.numel() if isinstance(entry.value, Tensor) else 0
            if count > held[axis]:  # even if it has little memory: the stride may be 0
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


def read_tensors(field: Field, like: Mapping[str, Tensor], shapes: Shapes, some: bool = False) -> dict[str, Tensor]:
    """Tensors by name, one for every name in `like` (with `some`: for any of them), of its dtype and these shapes."""
    found = field.fields()
    if not found.keys() <= like.keys() or not (some or len(found) == len(like)):
        field.fields(like)
    return {name: tensor.tensor(shapes[name], like[name].dtype) for name, tensor in found.items()}


UNPACED = {"pace": 1.0, "steps": 0}
"""State of `Paper` that older versions lack, whose runs all went at the paper's own pace."""


def policy_state(policy: Policy, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a policy, known to load into a new run; `kinds`: its state when the run began.

    Raises:
        TorchgrowError: an attribute came, went, or is of another kind; the message names it.
    """
    state = policy.state_dict()
    for key in {**kinds, **state}:
        with suppress(KeyError, SavedModelError):
            _like(Field(state[key]), kinds[key])
            continue
        now, before = (Field(one[key]).told if key in one else "not there" for one in (state, kinds))
        freely = "what comes, goes or grows may do so in a list or dict that seed has set"
        raise TorchgrowError(
            f"{type(policy).__name__}.{key} is {now} and was {before} when the run began, so that no run could "
            "load a checkpoint of it. Set it in seed, and keep its kind, dtype and shape, and its numbers finite; "
            f"{'a gate of ones scales nothing' if key == 'gate' else freely}. Nothing was changed"
        )
    return state


def read_policy(field: Field, policy: Policy, here: Mapping[str, Any], events: int) -> Policy:
    """A copy of the present policy with a saved state of so many events, of the kinds of the state `here`."""
    once = UNPACED if isinstance(policy, Paper) and not policy.paced else {}
    read_fields = field.fields(here.keys() - once.keys(), once.keys())
    found = {k: once[k] if f.value is None and k in once else _like(f, here[k]) for k, f in read_fields.items()}
    wrong = policy.check_state(found, events)
    if wrong:
        raise SavedModelError(f"{field.path} of {type(policy).__name__} is damaged: {wrong}; nothing was changed")
    read = policy.copied()
    read.load_state_dict(found)
    return read


def _like(field: Field, present: Any) -> Any:
    """A value of the kind and shape of the present one, finite where that is; tensors on the host."""
    if isinstance(present, (list, dict)):  # which may have grown
        if type(field.value) is not type(present) or no_data(field.value, ""):
            field.refuse(f"a {type(present).__name__} of tensors, numbers and text")
        return field.value
    if not isinstance(present, Tensor):
        return field.like(present)
    return field.tensor(present.shape, present.dtype, finite=bool(present.isfinite().all())).cpu()

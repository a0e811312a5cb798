"""Optimizer slots across a change of structure: which there are, initial values for new units, and resets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import OptimizerError
from .optimizer_checks import form_of
from .optimizer_trial import Slot, take_trial

CORRECTED = frozenset({"exp_avg_sq", "exp_inf"})
"""Slots that begin at 0 and are bias-corrected by the step count, as in Adam and its variants."""

ANEW = 4
"""Reset these slots if less than one part in so many of a tensor was trained."""

MOMENTS = CORRECTED | {"exp_avg", "max_exp_avg_sq"}
"""All slots of such an optimizer; one that keeps more, such as a copy of the weights, is not reset."""


@dataclass(frozen=True)
class LiveSlot:
    """An optimizer slot with an element for each of its parameter's."""

    state: dict[str, Any]  # of the parameter, where it stands
    key: str  # under which
    kind: Slot  # as its trial showed
    tensor: Tensor  # it, of the parameter's shape; shares memory with what stands there


class Layout:
    """The slots of one optimizer, and the kind of each; a copy of it takes steps on stand-in parameters.

    Raises:
        OptimizerError: it cannot be served.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._trial = take_trial(optimizer)
        self._group_of: dict[int, int] = {}
        self._made_with = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    def known(self, parameter: Tensor, dims: int) -> dict[str, Slot]:
        """Slots of a parameter with `dims` axes in the frame, as the trial showed; none for a parameter of no group."""
        groups = self.optimizer.param_groups
        if id(parameter) not in self._group_of:  # at first, or a group was added since
            self._group_of = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        group = self._group_of.get(id(parameter), -1)
        return self._trial.slots.get((group, max(1, dims), parameter.dtype), {})

    def settings(self, group: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings of a group, by its number, as it was made and as steps leave them."""
        made_with = self._made_with[group] if group < len(self._made_with) else {}
        return made_with, self._trial.settings.get(group, {})

    def copies(self, parameters: Sequence[Tensor]) -> dict[tuple[int, str], Tensor]:
        """Slots that are copies of the weights, by (index of the parameter, key)."""
        if not any(slot.kind == "copy" for slots in self._trial.slots.values() for slot in slots.values()):
            return {}
        return {
            (i, slot.key): slot.tensor
            for i, parameter in enumerate(parameters)
            for slot in self.of(parameter, parameter.dim())
            if slot.kind.kind == "copy"
        }

    def of(self, parameter: Tensor, dims: int) -> list[LiveSlot]:
        """Slots of a parameter, with `dims` axes in the frame, that have an element for each of its own.

        Raises:
            OptimizerError: there is one of another layout.
        """
        state = self.optimizer.state.get(parameter)
        if not state:
            return []
        known = self.known(parameter, dims)
        if not state.keys() <= known.keys():
            self._learn()
            known = self.known(parameter, dims)
        found = []
        for key, value in state.items():
            slot = known.get(key) or self._unknown(key, value, parameter)
            single = isinstance(value, Tensor) and value.numel() == 1 != parameter.numel()
            number = slot.kind == "number" or single
            if not isinstance(value, Tensor) or (number and value.numel() <= 1):
                continue
            other = value.numel() != parameter.numel() or (not slot.flat and value.shape != parameter.shape)
            if number or other:
                raise OptimizerError(
                    f"{type(self.optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for a parameter of "
                    f"shape {tuple(parameter.shape)}; torchgrow can only re-cut slots of the parameter's own shape. If "
                    "the optimizer's state was loaded by hand, load the grower's too, which brings back both: "
                    "grower.load_state_dict or torchgrow.load_checkpoint"
                )
            found.append(LiveSlot(state, key, slot, value.view_as(parameter) if slot.flat else value))
        return found

    def _learn(self) -> None:
        """Another trial, for slots or groups that were not there at the first; what is known stays so."""
        again = take_trial(self.optimizer)
        for signature, slots in again.slots.items():
            self._trial.slots[signature] = slots | self._trial.slots.get(signature, {})
        for group, settings in again.settings.items():
            self._trial.settings.setdefault(group, settings)

    def _unknown(self, key: str, value: Any, parameter: Tensor) -> Slot:
        """The kind of a slot that no trial showed, by its shape; it is kept from then on."""
        form = form_of(self.optimizer, key, value, parameter)
        slot = Slot("number", value) if form == "number" else Slot("unknown", value.new_empty(0), form == "flat")
        signature = (self._group_of.get(id(parameter), -1), max(1, parameter.dim()), parameter.dtype)
        self._trial.slots.setdefault(signature, {})[key] = slot
        return slot


def blank(slot: Slot, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Contents of a slot for untrained units (no memory): 0 for a direction, else a mark that `begun` replaces."""
    # The mark is a value that no slot holds: the lowest number of the dtype. NaN would not be equal to itself.
    mark = 0.0 if slot.kind == "direction" else torch.finfo(dtype).min
    return torch.full((), mark, dtype=dtype).expand(tuple(shape))


def begun(part: Tensor, slot: Slot, live: Tensor) -> Tensor:
    """Fill in, in place, the elements that never trained.

    A second moment of 0 with a large step count would let a new unit move several learning rates in one step. So a
    magnitude starts at the mean over the live units, whose part of the slot is `live`; the kind of an unknown slot is
    read from them. An element that never trained has the mark of `blank`.
    """
    missing = part == torch.finfo(part.dtype).min
    if not bool(missing.any()):
        return part
    values = live if live.numel() else part[~missing]  # a block that comes back has no other live units
    values = values[values.isfinite()]
    negative = not values.is_complex() and bool((values < 0).any())
    mean = values.mean() if values.numel() and not (slot.kind == "unknown" and negative) else part.new_zeros(())
    return part.masked_fill_(missing, mean.to(part.dtype))


def begun_anew(
    slots: list[tuple[dict[str, Any], str, Tensor]], born: Mapping[int, Tensor]
) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Reset slots and step count to those of a new parameter, where nearly all of a tensor is new.

    With few units each one's gradient is large, and a second moment takes a thousand steps to forget that. If new
    units inherited these moments, they would learn several times too slowly for about as long.
    Optimizers without a correction by the step count, or with scalars beside it, keep their slots.
    """
    known = math.prod(1 - float(places.double().mean()) for places in born.values())
    keys = {key for _, key, _ in slots}
    if ANEW * known >= 1 or not keys & CORRECTED or keys - MOMENTS:
        return slots
    state = slots[0][0]
    if state.keys() - keys != {"step"}:
        return slots
    return [(state, key, torch.zeros_like(part)) for _, key, part in slots] + [(state, "step", 0 * state["step"])]

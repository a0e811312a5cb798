"""Hidden states that a model carries from one call to the next, re-cut after a change of structure."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import StructureError
from ..structure.space import Space, live_positions
from ..structure.surgery import recut
from ..tracing.nested import mapped, tensors


def carried_over(space: Space, state: Any, old: Tensor, new: Tensor) -> Any:
    """Re-cut a carried state from structure `old` to `new` (bool [n]); see `Grower.carry`."""
    carried = space.carried
    if not carried:
        raise StructureError(
            "no state was declared; construct Grower(..., example_inputs=(x, state), carried={1: 1}) for a model "
            "called as out, state = model(x, state)"
        )
    found = tensors(state)
    if len(found) != len(carried):
        raise StructureError(
            f"the state holds {len(found)} tensors, but {len(carried)} were declared as carried; pass the whole "
            "state as the model returned it"
        )
    for i, (tensor, place) in enumerate(zip(found, carried, strict=True)):
        for axis, units in place.units.items():
            size = int(live_positions(units, old).sum())
            if tensor.dim() <= axis or tensor.shape[axis] != size:
                raise StructureError(
                    f"tensor {i} of the state is {tuple(tensor.shape)}, but axis {axis} had {size} positions "
                    "before the last update; call carry once after every update, with what the model returned last"
                )
    cut = iter([recut(x, place.units, old, new) for x, place in zip(found, carried, strict=True)])
    return mapped(state, lambda x: next(cut), "the state")

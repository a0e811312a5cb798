"""From a record to units: which units of a frame a network has that was cut before."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..errors import StructureError
from .bank import Bank
from .record import Record, skip_of
from .store import same_index


def keep_of(bank: Bank, record: Record, left_out: Collection[str], what: str, *, earlier: bool = False) -> Tensor:
    """The units (bool [n]) of a bank's frame that a record of a network of the same first frame keeps.

    `left_out` are modules of the network; with `earlier` they may hold outdated positions, since they are not updated
    while they are left out. `what` says in errors where the record comes from.

    Raises:
        StructureError: it is no structure of this space; the message names a tensor.
    """
    space, base, below = bank.space, bank.base.kept, tuple(f"{path}." for path in left_out if earlier)
    keep = space.everything()
    for (name, axis), units in space.unit_of.items():
        where = record.kept.get(name, {}).get(axis)
        if where is None or not units.numel():  # all of it is, or it was left out before
            continue
        before = base.get(name, {}).get(axis)
        live = torch.isin(torch.arange(units.numel()) if before is None else before, where)
        gone = units[~live]
        gone = gone[gone >= 0]
        if name.startswith(below):  # empty: a layer left out does not receive later changes
            gone = gone[space.owner[gone] >= 0]
        keep[gone] = False
    for block in space.blocks:
        keep[block.unit] = not all(path in left_out for path in block.modules)
    keep = space.check_keep(keep | ~space.removable)  # what went and cannot go here shows below
    here = bank.record_of(keep)
    there = [name for name in space.cut_axes if not name.startswith(below)]
    strange = [name for name in there if not same_index(here.kept.get(name, {}), record.kept.get(name, {}))]
    absent = {path for path, module in bank.model.named_modules() if earlier and skip_of(module) is not None}
    strange += sorted(set(left_out) ^ (bank.skipped(keep).keys() | absent))
    if strange:
        advice = (
            "Build the frame that it was cut from, with the same protect, couple and depth, and train what may be "
            "narrower in it (requires_grad, in an optimizer); or train it on as it is, without a Grower"
            if earlier
            else "Construct Grower as in the run that was saved, or load it into a model of its own: "
            "torchgrow.portable_(build())"
        )
        raise StructureError(
            f"{what} is of a structure that this run cannot have, as {strange[0]} shows: its frame was another, or "
            f"other units could go there (protect, couple, depth, what is trained). {advice}. Nothing was changed"
        )
    return keep

"""The space of networks inside a frame: units, and one vector of unit ids per axis of every tensor.

Legend: a *unit* is what an indicator switches (a channel, a neuron, a head). For every axis of every parameter
and buffer `Space.unit_of[(name, axis)]` holds one unit id per position, -1 for a position no unit owns. All
later work is data on these vectors: surgery is `index_select(axis, alive[unit_of])`, cost is a product of counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .errors import StructureError

Place = tuple[str, int]
"""A tensor name (as in `named_parameters` / `named_buffers`) and one of its axes."""


@dataclass(frozen=True)
class Frozen:
    """Positions that can never be removed, and why.

    Attributes:
        op: the operation that decided it, e.g. `aten.softmax`.
        module: qualified name of the module that was running.
        line: `file:line` of the user's code that called the operation, or "".
        reason: one readable sentence.
        places: the (tensor, axis) places whose positions were frozen by it.
    """

    op: str
    module: str
    line: str
    reason: str
    places: tuple[Place, ...]

    def __str__(self) -> str:
        at = f" ({self.line})" if self.line else ""
        names = ", ".join(f"{name}[{axis}]" for name, axis in self.places[:3])
        more = f" and {len(self.places) - 3} more" if len(self.places) > 3 else ""
        return f"{self.module or 'model'}: {self.op}{at}: {self.reason} [{names}{more}]"


@dataclass(frozen=True)
class FlopTerm:
    """FLOPs of one traced operation for the whole example batch.

    `constant` times the number of live positions of every vector in `vectors` (each an int64 tensor of unit
    ids, -1 for positions that always live). A multiply-accumulate counts as 2.
    """

    constant: int
    vectors: tuple[Tensor, ...]
    module: str


@dataclass(frozen=True)
class Attribute:
    """An int attribute of a module that counts live positions, such as `Conv2d.groups`.

    Its value is the number of live positions in `units` (int64 unit ids, -1 = always live).
    """

    module: str
    name: str
    units: Tensor


@dataclass(frozen=True)
class Space:
    """What tracing found. Units are numbered 0..n-1.

    Attributes:
        unit_of: for every axis of every parameter and buffer of the frame, int64 unit ids, -1 for none.
        removable: bool [n]; False for a unit that must stay.
        group_of: int64 [n]; units of one group live on the same (tensor, axis) places equally often.
        group_names: one readable name per group: the place of its first position.
        shapes: full shape of every parameter and buffer.
        parameters: names of the parameters (the other names in `shapes` are buffers).
        flops: FLOP terms of all traced operations, for `batch` samples.
        batch: number of samples in the example inputs.
        fold: for every (tensor, axis) place that carries gates, int64 unit ids, -1 where no gate sits.
        attributes: module attributes that count an axis.
        frozen: what can never be removed, and why.
        proven: whether the units were tried on the model itself; never on the meta device, where nothing can run.
    """

    unit_of: Mapping[Place, Tensor]
    removable: Tensor
    group_of: Tensor
    group_names: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    parameters: tuple[str, ...]
    flops: tuple[FlopTerm, ...]
    batch: int
    fold: Mapping[Place, Tensor]
    attributes: tuple[Attribute, ...]
    frozen: tuple[Frozen, ...] = ()
    proven: bool = False
    cut_axes: Mapping[str, tuple[int, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Index the axes that carry units, so that later loops touch no others."""
        axes: dict[str, list[int]] = {}
        for (name, axis), units in self.unit_of.items():
            if has_units(units):
                axes.setdefault(name, []).append(axis)
        object.__setattr__(self, "cut_axes", {name: tuple(sorted(found)) for name, found in axes.items()})

    @property
    def n_units(self) -> int:
        """Number of units, removable or not."""
        return self.removable.numel()

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return len(self.group_names)

    def everything(self) -> Tensor:
        """A keep vector (bool [n]) that keeps every unit: the frame itself."""
        return torch.ones(self.n_units, dtype=torch.bool)

    def widths(self, keep: Tensor) -> dict[str, int]:
        """Live units per group name, for groups with at least one removable unit."""
        live = torch.bincount(self.group_of[keep], minlength=self.n_groups).tolist()
        free = torch.bincount(self.group_of[self.removable], minlength=self.n_groups).tolist()
        return {name: live[g] for g, name in enumerate(self.group_names) if free[g]}

    def check_keep(self, keep: Tensor) -> Tensor:
        """Return `keep` as a bool vector on the CPU, or raise if the space does not allow it.

        Raises:
            StructureError: wrong shape or dtype, a unit that is not removable is dropped, or an axis of a
                tensor would be left empty.
        """
        if not isinstance(keep, Tensor) or keep.shape != (self.n_units,) or keep.dtype != torch.bool:
            got = f"{keep.dtype} {tuple(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
            raise StructureError(
                f"keep must be a bool tensor of shape ({self.n_units},), one entry per unit, got {got}; "
                "start from space.everything() and set entries to False"
            )
        keep = keep.detach().cpu()
        stuck = torch.nonzero(~keep & ~self.removable).flatten().tolist()
        if stuck:
            names = sorted({self.group_names[int(self.group_of[u])] for u in stuck})
            raise StructureError(
                f"units {stuck[:8]} of {', '.join(names[:3])} are not removable (see space.frozen for the reason); "
                "use keep | ~space.removable"
            )
        for name, axes in self.cut_axes.items():
            for axis in axes:
                if not bool(live_positions(self.unit_of[name, axis], keep).any()):
                    raise StructureError(
                        f"keep leaves axis {axis} of {name} {self.shapes[name]} empty; "
                        "keep at least one unit on every axis"
                    )
        return keep

    def freeze(self, units: Iterable[int], frozen: Frozen) -> Space:
        """The same space with `units` no longer removable, for the reason given."""
        removable = self.removable.clone()
        removable[torch.tensor(list(units), dtype=torch.int64)] = False
        return replace(self, removable=removable, frozen=(*self.frozen, frozen))


def has_units(units: Tensor) -> bool:
    """Whether any position of an axis has a unit."""
    positions = units.numpy()
    return positions.size > 0 and bool(positions.item(0) >= 0 or positions.max() >= 0)


def live_positions(units: Tensor, keep: Tensor) -> Tensor:
    """Bool vector: which positions of an axis live when the units in `keep` (bool [n]) do."""
    if keep.numel() == 0:
        return torch.ones_like(units, dtype=torch.bool)
    return keep[units.clamp(min=0)] | (units < 0)

"""The space of networks inside a frame: units, and one vector of unit ids per axis of every tensor.

Legend: a *unit* is what an indicator switches (a channel, a neuron, a head). For every axis of every parameter
and buffer `Space.unit_of[(name, axis)]` holds one unit id per position, -1 for a position no unit owns. All
later work is data on these vectors: surgery is `index_select(axis, alive[unit_of])`, cost is a product of counts.

A block that may be left out (`Block`) is a unit too. It has no positions of its own: if it is left out, all tensors
below it are empty and no unit inside it is present.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import StructureError
from ..renamed import renamed_attribute

Place = tuple[str, int]
"""A tensor name (as in `named_parameters` / `named_buffers`) and one of its axes."""

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of tensors by name."""


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

    Its value is the number of live positions in `units` (int64 unit ids, -1 = always live). `name` may be one place
    in a list or tuple, such as "sizes[1]".
    """

    module: str
    name: str
    units: Tensor


@dataclass(frozen=True)
class Parts:
    """An axis that a forward cuts into pieces whose sizes attributes may hold.

    Attributes:
        module: qualified name of the module that was running.
        line: `file:line` of the user's code.
        pieces: int64 unit ids of the positions of every piece in order, -1 for positions that always live.
    """

    module: str
    line: str
    pieces: tuple[Tensor, ...]


WHOLE = -1
"""As the axis of a place in `Space.fold`: one gate for the whole tensor."""


@dataclass(frozen=True)
class PassThrough:
    """What a block that is left out computes: it returns its input (x_out = x_in, paper Eq 2).

    Attributes:
        keyword: name of the input, where it is passed by keyword.
        outputs: 0 for a layer that returns a tensor, n for one that returns a tuple of n with the tensor first
            (the others become None).
    """

    keyword: str = ""
    outputs: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer would return."""
        x = args[0] if args else kwargs[self.keyword]
        return (x, *[None] * (self.outputs - 1)) if self.outputs else x

    @property
    def forward(self) -> Callable[..., Any]:
        """In place of the layer's `forward`; TorchScript can compile it where a tensor goes in and out."""
        return self if self.outputs else self.hand_on

    def hand_on(self, *args: Any, **kwargs: Any) -> Any:
        """The input, unchanged."""
        return self(*args, **kwargs)


def _scripted(self: Any, x: Tensor) -> Tensor:
    return x


# TorchScript knows no *args; it reads the source of what a function wraps.
PassThrough.hand_on.__wrapped__ = _scripted  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Block:
    """One or several modules that may be left out together.

    Attributes:
        unit: id of its unit.
        modules: qualified names of its modules, which run one after the other.
        stage: name of the container in which it follows blocks of its class; "" for modules named by the user.
        skip: what its modules compute when it is left out.
        residual: whether a gate of 0 leaves it out (x + m f(x)); else the gate scales its output (m f(x)).
    """

    unit: int
    modules: tuple[str, ...]
    stage: str
    skip: PassThrough
    residual: bool = True

    def holds(self, name: str) -> bool:
        """Whether a tensor (or module) of that qualified name lies below it."""
        return any(name == module or name.startswith(f"{module}.") for module in self.modules)


@dataclass(frozen=True)
class Carried:
    """A tensor that the model returns and takes again at its next call, such as the hidden state of an LSTM.

    Attributes:
        input: which of the tensors among the example inputs it is.
        output: which of the tensors among the outputs it is.
        units: for every axis that can be cut, int64 unit ids, -1 for positions that always live.
    """

    input: int
    output: int
    units: Mapping[int, Tensor]


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
        fold: for every (tensor, axis) place that carries gates, int64 unit ids, -1 where no gate sits; axis
            `WHOLE` (-1) and one id for a tensor that carries the gate of its layer.
        columns: likewise, the places where units are read: where these weights are 0, the unit has no effect, but it is
            computed, and has gradients. Units of which that is not true have none.
        attributes: module attributes that count an axis.
        frozen: what can never be removed, and why; what keeps most parameters first.
        carried: tensors that go from one call of the model to the next, and are cut as it is.
        parts: where the forward cuts an axis at places that attributes may hold.
        views: axes that a view has split off: the module whose forward does, and the unit ids along the axis.
        proven: whether the units were tried on the model itself; never on the meta device, where nothing can run.
        blocks: modules that may be left out; each is a unit.
        cut_axes: for every tensor that surgery changes, the axes that carry units.
        block_of: the unit of the block that a tensor lies in, by name of the tensor.
        owner: int64 [n], the unit of the block that a unit lives in exclusively, -1 for others.
        least: int64 [G], fewest units that a group keeps: those that cannot go and at least one; 0 for blocks.
    """

    unit_of: Mapping[Place, Tensor]
    removable: Tensor
    group_of: Tensor
    group_names: tuple[str, ...]
    shapes: Shapes
    parameters: tuple[str, ...]
    flops: tuple[FlopTerm, ...]
    batch: int
    fold: Mapping[Place, Tensor]
    columns: Mapping[Place, Tensor]
    attributes: tuple[Attribute, ...]
    frozen: tuple[Frozen, ...] = ()
    carried: tuple[Carried, ...] = ()
    parts: tuple[Parts, ...] = ()
    views: tuple[tuple[str, Tensor], ...] = ()
    proven: bool = False
    blocks: tuple[Block, ...] = ()
    cut_axes: Mapping[str, tuple[int, ...]] = field(init=False, repr=False)
    block_of: Mapping[str, int] = field(init=False, repr=False)
    owner: Tensor = field(init=False, repr=False)
    least: Tensor = field(init=False, repr=False)
    slots = renamed_attribute("slots", "blocks")
    slot_of = renamed_attribute("slot_of", "block_of")

    def __post_init__(self) -> None:
        """Precompute what is looked up often."""
        block_of = {name: block.unit for block in self.blocks for name in self.shapes if block.holds(name)}
        axes: dict[str, list[int]] = {name: [] for name in block_of}
        owner = torch.full((self.n_units,), -2, dtype=torch.int64)  # -2: no place seen yet
        for (name, axis), vector in self.unit_of.items():
            if has_units(vector):
                axes.setdefault(name, []).append(axis)
                if self.blocks:
                    units = vector[vector >= 0]
                    here, before = block_of.get(name, -1), owner[units]
                    owner[units] = torch.where((before == -2) | (before == here), here, -1)
        stuck = torch.bincount(self.group_of[~self.removable], minlength=self.n_groups)
        least = stuck.clamp(min=1)
        for block in self.blocks:
            least[self.group_of[block.unit]] = stuck[self.group_of[block.unit]]
        cut_axes = {name: tuple(sorted(found)) for name, found in axes.items()}
        for name, value in (
            ("frozen", self._ordered(self.frozen)),
            ("cut_axes", cut_axes),
            ("block_of", block_of),
            ("owner", owner.clamp(min=-1)),
            ("least", least),
        ):
            object.__setattr__(self, name, value)

    def _ordered(self, frozen: tuple[Frozen, ...]) -> tuple[Frozen, ...]:
        """Largest first: by the parameters of the tensors that stay whole, then by positions."""
        parameters = set(self.parameters)

        def cost(one: Frozen) -> tuple[int, int]:
            names = {name for name, _ in one.places if name in parameters}
            positions = [self.shapes[name][axis] for name, axis in one.places if axis < len(self.shapes.get(name, ()))]
            return -sum(math.prod(self.shapes[name]) for name in names), -sum(positions)

        return tuple(sorted(frozen, key=cost))

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
        return torch.ones(self.n_units, dtype=torch.bool, device="cpu")

    def present(self, keep: Tensor) -> Tensor:
        """Bool [n], the units in `keep` that are not inside a block that is left out."""
        return keep & (keep[self.owner] | (self.owner < 0)) if self.blocks else keep

    def absent(self, name: str, keep: Tensor) -> bool:
        """Whether a tensor lies in a block that is left out."""
        unit = self.block_of.get(name)
        return unit is not None and not bool(keep[unit])

    def widths(self, keep: Tensor) -> dict[str, int]:
        """Live units per group name, for groups with at least one removable unit."""
        live = torch.bincount(self.group_of[self.present(keep)], minlength=self.n_groups).tolist()
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
        removable[torch.tensor(list(units), dtype=torch.int64, device="cpu")] = False
        return replace(self, removable=removable, frozen=(*self.frozen, frozen))


def frozen_for(space: Space, units: Tensor, op: str, module: str, reason: str, line: str = "") -> Space:
    """The space with units (their ids) no longer removable, for a reason that is about all of their places."""
    places = tuple(place for place, vector in space.unit_of.items() if bool(torch.isin(vector, units).any()))
    return space.freeze(units.tolist(), Frozen(op, module, line, reason, places))


def has_units(units: Tensor) -> bool:
    """Whether any position of an axis has a unit."""
    positions = units.numpy()
    return positions.size > 0 and bool(positions.item(0) >= 0 or positions.max() >= 0)


def live_positions(units: Tensor, keep: Tensor) -> Tensor:
    """Bool vector: which positions of an axis live when the units in `keep` (bool [n]) do."""
    if keep.numel() == 0:
        return torch.ones_like(units, dtype=torch.bool)
    positions = units.numpy()  # numpy: these vectors are short and asked for by the thousand
    return torch.from_numpy(keep.numpy()[positions.clip(0)] | (positions < 0))

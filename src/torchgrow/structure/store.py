"""Storage for inactive units: index arithmetic on tensors, and stores that hold only what was ever live.

A frame on the meta device has no values. New units get theirs from `reset_parameters` of their own module, seeded by
the module's name, as if the whole frame had been initialised at the start.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import TraceError
from .space import Space, live_positions

Index = dict[int, Tensor]
"""Live positions (int64) per cut axis; an axis that is whole is left out."""


def index_of(space: Space, name: str, keep: Tensor, absent: bool = True) -> Index | None:
    """Positions of the live part of a tensor in its full size; None if its block is left out and `absent` is set."""
    if absent and space.absent(name, keep):
        return None
    index: Index = {}
    for axis in space.cut_axes.get(name, ()):
        live = live_positions(space.unit_of[name, axis], keep)
        if not bool(live.all()):
            index[axis] = torch.nonzero(live).flatten()
    return index


def live_shape(full: tuple[int, ...], index: Index) -> tuple[int, ...]:
    """Shape of the part at `index` of a tensor of shape `full`."""
    return tuple(index[axis].numel() if axis in index else size for axis, size in enumerate(full))


def gather(full: Tensor, index: Index | None) -> Tensor:
    """The part of `full` at `index`, as a new tensor; an empty one for None."""
    if index is None:
        return full.new_empty(0)
    part = full
    for axis, positions in index.items():
        part = part.index_select(axis, positions)
    return part.clone() if part is full else part


def scatter_(full: Tensor, index: Index | None, part: Tensor) -> None:
    """Write `part` into `full` at `index`: the inverse of `gather`."""
    if index is None:
        return
    if not index:
        full.copy_(part)
        return
    (axis, positions), *rest = index.items()
    if not rest:
        full.index_copy_(axis, positions, part)
        return
    middle = full.index_select(axis, positions)
    scatter_(middle, dict(rest), part)
    full.index_copy_(axis, positions, middle)


def memory_order(tensor: Tensor, before: Sequence[int]) -> tuple[int, ...]:
    """The axes of a tensor from the outermost in memory to the innermost: (0, 2, 3, 1) for channels_last.

    Axes of size 1 and empty tensors keep the order given in `before`.
    """
    if tensor.dim() != len(before) or not tensor.numel():
        return tuple(before)
    place, strides = {axis: i for i, axis in enumerate(before)}, tensor.stride()
    return tuple(sorted(place, key=lambda axis: (-strides[axis], -tensor.shape[axis], place[axis])))


def laid_out(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """The tensor with its axes in that order in memory, outermost first; the same object if nothing changes."""
    rising = all(axis == i for i, axis in enumerate(order))
    if tensor.dim() != len(order) or not tensor.numel() or (rising and tensor.is_contiguous()):
        return tensor
    new = torch.empty_permuted(tensor.shape, tuple(order), dtype=tensor.dtype, device=tensor.device)
    return tensor if new.stride() == tensor.stride() else new.copy_(tensor)


class Store:
    """One tensor of the frame, of which only the smallest box of positions that were ever written is held.

    `full` gives the tensor as it is where nothing has been written. `whole`: hold all of it from the start.
    """

    def __init__(self, full: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype, *, whole: bool) -> None:
        self._shape = tuple(shape)
        self.box: Index | None = {} if whole else None  # positions held; None: nothing
        self.held: Tensor = full() if whole else torch.empty(0, dtype=dtype)
        self._full = _never if whole else full  # which would keep alive what it closes over: the frame's own tensor

    def copy(self, dtype: torch.dtype) -> Store:
        """A store of its own with the same contents in another dtype."""
        other = copy.copy(self)
        other.held, other._full = self.held.to(dtype, copy=True), lambda: self._full().to(dtype)
        return other

    def read(self, index: Index | None) -> Tensor:
        """The part at `index`, a new tensor; an empty one for None."""
        if index is None or (self.box is not None and _covers(self.box, index)):
            return gather(self.held, None if index is None else _within(index, self.box or {}))
        part = gather(self._full(), index)
        if self.box is not None:
            both = {}
            for axis in sorted(index.keys() | self.box.keys()):
                whole = torch.arange(self._shape[axis])
                one, other = index.get(axis, whole), self.box.get(axis, whole)
                both[axis] = one[torch.isin(one, other)]
            scatter_(part, _within(both, index), gather(self.held, _within(both, self.box)))
        return part

    def write(self, index: Index | None, part: Tensor) -> None:
        """Replace the part at `index`; None writes nothing."""
        if index is None:
            return
        if self.box is None or not _covers(self.box, index):
            box = self.box or index
            wider = {k: torch.cat([index[k], box[k]]).unique() for k in sorted(index.keys() & box.keys())}
            self.held, self.box = self.read(wider), wider
        scatter_(self.held, _within(index, self.box), part)


def _never() -> Tensor:
    raise AssertionError("a store that holds all of a tensor needs no initial values")


def same_index(a: Index | None, b: Index | None) -> bool:
    """Whether two indices name the same positions."""
    if a is None or b is None:
        return a is b
    return a.keys() == b.keys() and all(torch.equal(a[axis], b[axis]) for axis in a)


def _covers(box: Index, index: Index) -> bool:
    return all(axis in index and bool(torch.isin(index[axis], held).all()) for axis, held in box.items())


def _within(index: Index, box: Index) -> Index:
    """Positions of `index` inside a tensor that holds `box`, which contains them all."""
    return {k: torch.searchsorted(box[k], positions) if k in box else positions for k, positions in index.items()}


def is_meta(model: nn.Module) -> bool:
    """Whether a model is on the meta device: shapes without values."""
    return any(parameter.is_meta for parameter in model.parameters())


class Births:
    """Initial values of a frame on the meta device, one module at a time; `scales`: what to multiply tensors by.

    Raises:
        TraceError: parameters or buffers that no `reset_parameters` of their module sets.
    """

    def __init__(self, model: nn.Module, seed: int, scales: Mapping[str, float] | None = None) -> None:
        self.frame, self.seed, self.scales = copy.deepcopy(model), seed, dict(scales or {})
        self._last: tuple[str, nn.Module] | None = None  # several tensors of one module are asked for in a row
        bare = [
            f"{path}.{name}" if path else name
            for path, module in self.frame.named_modules()
            for name, tensor in _own(module).items()
            if not hasattr(module, "reset_parameters") and not hasattr(module, "_reset_parameters")
            if tensor.is_meta
        ]
        if bare:
            raise TraceError(
                f"the model is on the meta device, and nothing says how {', '.join(bare[:3])} begins: give "
                f"{type(self.frame.get_submodule(bare[0].rpartition('.')[0])).__name__} a reset_parameters() that sets "
                "all its own parameters and buffers, or build the model on a real device"
            )

    def full(self, name: str) -> Tensor:
        """The whole initial tensor of that qualified name, on the CPU."""
        path, _, tensor = name.rpartition(".")
        if self._last is None or self._last[0] != path:
            self._last = path, self._born(path)
        initial = _own(self._last[1])[tensor].detach()
        return initial * self.scales[name] if name in self.scales else initial.clone()

    def forget(self) -> None:
        """Drop the cached module."""
        self._last = None

    def _born(self, path: str) -> nn.Module:
        module = copy.deepcopy(self.frame.get_submodule(path))
        module.to_empty(device="cpu", recurse=hasattr(module, "_reset_parameters"))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(self.seed ^ zlib.crc32(path.encode()))
            getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))()  # type: ignore[misc]
        return module


def _own(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module itself."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def live_shapes(space: Space, keep: Tensor) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters and buffers when the units in `keep` (bool [n]) live."""
    shapes = {name: list(shape) for name, shape in space.shapes.items()}
    for name, axes in space.cut_axes.items():
        for axis in axes:
            shapes[name][axis] = int(live_positions(space.unit_of[name, axis], keep).sum())
    return {name: (0,) if space.absent(name, keep) else tuple(shape) for name, shape in shapes.items()}

"""Surgery: cut a live model out of its frame, in place, and put it back.

The `Bank` holds every cut tensor and optimizer slot at full size on the host. A change of structure is computed
first (`Bank.stage`) and swapped in afterwards (`Change.apply`), which rolls back whatever happens in between, so
the model is always whole. Parameter and optimizer objects keep their identity; one function, `replace_`, writes.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import adapt_, adaptable
from .errors import OptimizerError, StructureError
from .space import Space, live_positions

Index = dict[int, Tensor]
"""Live positions (int64) per cut axis; an axis that is whole is left out."""


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def index_of(space: Space, name: str, keep: Tensor) -> Index:
    """Where the live part of a tensor sits in its full size."""
    index: Index = {}
    for axis in space.cut_axes.get(name, ()):
        live = live_positions(space.unit_of[name, axis], keep)
        if not bool(live.all()):
            index[axis] = torch.nonzero(live).flatten()
    return index


def gather(full: Tensor, index: Index) -> Tensor:
    """The part of `full` at `index`, as a new tensor."""
    part = full
    for axis, positions in index.items():
        part = part.index_select(axis, positions)
    return part.clone() if part is full else part


def scatter_(full: Tensor, index: Index, part: Tensor) -> None:
    """Write `part` into `full` at `index`: the inverse of `gather`."""
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


def replace_(tensor: Tensor, new: Tensor) -> None:
    """Give a parameter or buffer other contents of any shape; the object, its hooks and requires_grad stay.

    The gradient goes first: it has the old shape. Passing through an empty tensor of another dtype drops the
    gradient accumulator of the old shape, which a live graph would otherwise keep; hooks survive. The version
    counter is raised, so that a graph built before refuses its backward instead of using the new values.
    """
    tensor.grad = None
    if tensor.shape != new.shape:
        other = torch.float16 if tensor.dtype != torch.float16 else torch.float32
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = new
    torch.autograd.graph.increment_version(tensor)


@dataclass
class Record:
    """What was done to a model, kept on the model itself so that it can be saved without anything else.

    Attributes:
        shapes: full shapes of the tensors that can be cut.
        kept: per cut tensor and axis the live positions in the frame.
        attributes: changed int attributes, by (module, name).
        adapted: modules whose class was swapped for an adapter.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    kept: dict[str, Index] = field(default_factory=dict)
    attributes: dict[tuple[str, str], int] = field(default_factory=dict)
    adapted: tuple[str, ...] = ()


DIRECTIONS = frozenset({"momentum_buffer", "exp_avg", "grad_avg", "prev"})
"""Optimizer slots that point somewhere, even where all entries of a small tensor happen to be positive."""

RECORD = "_torchgrow_record"
"""Name of the plain attribute under which a model carries its Record."""


@dataclass
class _Swap:
    """New contents for a tensor and for its optimizer slots."""

    tensor: Tensor
    new: Tensor
    slots: list[tuple[dict[str, Any], str, Tensor]]


class Change:
    """A change of structure, computed and not yet made.

    Attributes:
        swaps: by tensor name, what will be written; values may be replaced before `apply`.
    """

    def __init__(self, bank: Bank, keep: Tensor, swaps: dict[str, _Swap], record: Record) -> None:
        self.bank, self.keep, self.swaps, self.record = bank, keep, swaps, record

    def apply(self) -> None:
        """Swap everything in, or, whatever happens in between, nothing."""
        bank = self.bank
        before = [
            (swap.tensor, swap.tensor.data, [(s, k, s[k]) for s, k, _ in swap.slots]) for swap in self.swaps.values()
        ]
        grads = [(parameter, parameter.grad) for parameter in bank.model.parameters()]
        attributes = [(m, n, getattr(m, n)) for m, n, _ in self._attributes()]
        try:
            for parameter, _ in grads:
                parameter.grad = None
                torch.autograd.graph.increment_version(parameter)
            for swap in self.swaps.values():
                replace_(swap.tensor, swap.new)
                for state, key, value in swap.slots:
                    state[key] = value
            for module, name, number in self._attributes():
                setattr(module, name, number)
            index = {name: self.record.kept.get(name, {}) for name in bank.space.cut_axes}
        except BaseException:
            for tensor, old, slots in before:
                replace_(tensor, old)
                for state, key, value in slots:
                    state[key] = value
            for module, name, number in attributes:
                setattr(module, name, number)
            for parameter, grad in grads:
                parameter.grad = grad
            raise
        setattr(bank.model, RECORD, self.record)
        bank.keep, bank.index = self.keep, index

    def _attributes(self) -> list[tuple[nn.Module, str, int]]:
        modules = dict(self.bank.model.named_modules())
        return [(modules[path], name, number) for (path, name), number in self.record.attributes.items()]


class Bank:
    """Everything of a frame at full size, asleep; the live model is cut from it and written back to it.

    Args:
        model: the frame, at full size.
        space: its space.
        optimizer: the user's optimizer, whose state is cut along with the parameters.

    Attributes:
        keep: bool [n], the units of the live model.
    """

    def __init__(self, model: nn.Module, space: Space, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model, self.space, self.optimizer = model, space, optimizer
        self.tensors = named_tensors(model)
        wrong = [n for n, shape in space.shapes.items() if n not in self.tensors or self.tensors[n].shape != shape]
        if wrong:
            name = wrong[0]
            found = tuple(self.tensors[name].shape) if name in self.tensors else "nothing"
            raise StructureError(
                f"{name} is {found} but the space was traced with {space.shapes[name]}; the model must be the full "
                "frame (trace it again, or restore it from its bank first)"
            )
        self.adapted = _adaptable_and_cut(model, space)
        adapt_(model, self.adapted)
        self.full = {name: self.tensors[name].detach().cpu().clone() for name in space.cut_axes}
        self.slots: dict[tuple[str, str], Tensor] = {}
        self.keep = space.everything()
        self.index: dict[str, Index] = {name: {} for name in space.cut_axes}
        self.trained = torch.zeros(space.n_units, dtype=torch.bool)  # units for which optimizer slots ever existed

    def stage(self, keep: Tensor, values: Mapping[str, Tensor] | None = None) -> Change:
        """Write the live tensors back and compute those for `keep` (bool [n]); nothing live is touched.

        Args:
            keep: units that shall live.
            values: what to write back instead of a parameter's own contents (raw values of gated ones).
        """
        if self.space.cut_axes and not self.full:
            raise StructureError("the bank has been emptied: what slept in it is gone, so the structure is final")
        keep = self.space.check_keep(keep)
        self.tensors = named_tensors(self.model)  # a forward may have put another object in a buffer's place
        had_state = keep & False
        swaps: dict[str, _Swap] = {}
        index: dict[str, Index] = {}
        for name in self.space.cut_axes:
            tensor, old, new = self.tensors[name], self.index[name], index_of(self.space, name, keep)
            index[name] = new
            gated = values is not None and name in values
            if not gated and _same(old, new):
                continue
            live = values[name] if values is not None and gated else tensor.detach()
            scatter_(self.full[name], old, live.cpu())
            slots = []
            for state, key, slot in self._slots_of(tensor):
                had_state = self.keep
                full = self.slots.setdefault((name, key), torch.zeros(self.space.shapes[name], dtype=slot.dtype))
                scatter_(full, old, slot.cpu())
                fresh = self._newborn(name, key, gather(full, new), new, keep, slot)
                slots.append((state, key, fresh.to(slot.device)))
            swaps[name] = _Swap(tensor, gather(self.full[name], new).to(tensor.device), slots)
        self.trained = self.trained | had_state
        return Change(self, keep, swaps, self._record(keep, index))

    def stage_contents(self, keep: Tensor, contents: Mapping[str, Tensor]) -> Change:
        """Compute the change to a structure whose live tensors, by name, shall hold just these contents.

        Nothing is written back: what is live now is lost, and optimizer slots are not the change's business.
        """
        keep = self.space.check_keep(keep)
        index = {name: index_of(self.space, name, keep) for name in self.space.cut_axes}
        present = named_tensors(self.model)  # a buffer may be another object by now
        swaps = {n: _Swap(tensor, contents[n].to(tensor.device, copy=True), []) for n, tensor in present.items()}
        return Change(self, keep, swaps, self._record(keep, index))

    def commit(self, change: Change) -> None:
        """Make a staged change."""
        with uninterrupted():
            change.apply()

    def resize_(self, keep: Tensor) -> None:
        """Make the live model the one with the units in `keep`; detached ones sleep with all they had."""
        self.commit(self.stage(keep))

    def restore_(self) -> None:
        """Bring the whole frame back, bit for bit."""
        self.resize_(self.space.everything())

    def empty(self) -> None:
        """Forget what sleeps; the live model stays as it is and cannot be changed any more."""
        self.full, self.slots = {}, {}

    def _slots_of(self, tensor: Tensor) -> list[tuple[dict[str, Any], str, Tensor]]:
        """Optimizer slots that have the parameter's shape; refuses layouts it does not know."""
        if self.optimizer is None or tensor not in self.optimizer.state:
            return []
        state = self.optimizer.state[tensor]
        slots = []
        for key, slot in state.items():
            if isinstance(slot, Tensor) and slot.shape == tensor.shape:
                slots.append((state, key, slot))
            elif isinstance(slot, Tensor) and slot.numel() > 1:
                raise OptimizerError(
                    f"{type(self.optimizer).__name__} keeps {key!r} of shape {tuple(slot.shape)} for a parameter of "
                    f"shape {tuple(tensor.shape)}; torchgrow can only re-cut slots of the parameter's own shape. "
                    "Use SGD, Adam, AdamW or RMSprop"
                )
        return slots

    def _newborn(self, name: str, key: str, part: Tensor, index: Index, keep: Tensor, live: Tensor) -> Tensor:
        """Slots of units that never trained: the mean of the living for a magnitude, else 0.

        A second moment of 0 under a large shared step count would let a newborn move several learning rates in
        one step. A slot that is nowhere negative, and not known for a direction, is taken for a magnitude.
        """
        new = keep & ~self.trained & ~self.keep
        if key in DIRECTIONS or not bool(new.any()) or bool((live < 0).any()):
            return part
        for axis in self.space.cut_axes[name]:
            vector = self.space.unit_of[name, axis]
            born = (vector >= 0) & new[vector.clamp(min=0)]
            if axis in index:
                born = born[index[axis]]
            if bool(born.any()):
                part.index_fill_(axis, torch.nonzero(born).flatten(), float(live.mean()))
        return part

    def _record(self, keep: Tensor, index: dict[str, Index]) -> Record:
        attributes = {(a.module, a.name): int(live_positions(a.units, keep).sum()) for a in self.space.attributes}
        shapes = {name: self.space.shapes[name] for name in self.space.cut_axes}
        return Record(shapes, {name: cut for name, cut in index.items() if cut}, attributes, self.adapted)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold a Ctrl-C back until the block is through, then deliver it.

    Nothing to do outside the main thread, nor where the handler is not Python's and so could not be put back.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    held: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held and callable(before):
            before(*held[0])


def _adaptable_and_cut(model: nn.Module, space: Space) -> tuple[str, ...]:
    """Modules that need their adapter: something can go in them or below them."""
    cut = [name for name, axes in space.cut_axes.items() if axes]
    return tuple(path for path in adaptable(model) if any(name.startswith(f"{path}." if path else "") for name in cut))


def _same(a: Index, b: Index) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[axis], b[axis]) for axis in a)


def shrink_(model: nn.Module, space: Space, keep: Tensor, optimizer: torch.optim.Optimizer | None = None) -> Bank:
    """Cut the model down to the units in `keep`, in place.

    Every Parameter object stays; its contents, its optimizer state, buffers and counting attributes are re-cut.
    Gradients are dropped.

    Args:
        model: the full frame.
        space: what `trace` found for it.
        keep: bool [n]; False removes a unit.
        optimizer: its state is re-cut too.

    Returns:
        The bank with everything that was cut off: `bank.restore_()` is the inverse, bit for bit.

    Raises:
        StructureError: the space does not allow `keep`, or the model is not the full frame.
        OptimizerError: the optimizer keeps state in a layout that cannot be cut.
    """
    bank = Bank(model, space, optimizer)
    bank.resize_(keep)
    return bank

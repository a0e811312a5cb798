"""The bank: storage for all tensors of a frame at full size. The model is cut from it and written back to it.

The `Bank` holds every cut tensor and optimizer slot at full size on the host; of a frame on the meta device it holds
only units that were ever live. A change of structure is computed first (`Bank.stage`) and written
afterwards (`Bank.commit`) by one call into C, all of it or nothing. Parameter and optimizer objects stay the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.registry import adapt_, adaptable
from ..default_device import on_host
from ..errors import OptimizerError, StructureError
from ..exchange import Exchange
from .optimizer_slots import Layout, LiveSlot, begun, begun_anew, blank
from .optimizer_trial import Slot
from .optimizers import layouts_of
from .record import Growth, Record, mark_of, recorded, rewrite
from .space import PassThrough, Space, live_positions
from .store import Births, Index, Store, gather, index_of, is_meta, laid_out, memory_order, same_index, scatter_
from .surgery import materialise_, named_tensors, replace_


@dataclass
class _Swap:
    """New contents for a tensor and its optimizer slots. Some slots may be copies of the tensor."""

    tensor: Tensor
    new: Tensor
    slots: list[tuple[dict[str, Any], str, Tensor]]
    copies: Set[str] = frozenset()

    def raw_copies(self) -> dict[str, Tensor]:
        """New contents of the copies, in the tensor's shape; they share memory with the slots."""
        return {key: part.view_as(self.new) for _, key, part in self.slots if key in self.copies}

    def fold_copies(self, factor: Tensor) -> None:
        """Multiply the copies as the tensor is."""
        self.slots = [
            (state, key, (part.view_as(self.new) * factor).view_as(part) if key in self.copies else part)
            for state, key, part in self.slots
        ]


class Change:
    """A change of structure, computed but not yet made."""

    def __init__(
        self,
        bank: Bank,
        keep: Tensor,
        swaps: dict[str, _Swap],  # by tensor name, what will be written
        index: dict[str, Index | None],
        record: Record,
        trained: Tensor | None = None,
        order: dict[str, tuple[int, ...]] | None = None,  # of axes in memory, by tensor name
    ) -> None:
        self.bank, self.keep, self.swaps, self.index, self.record = bank, keep, swaps, index, record
        self.order = bank.order if order is None else order
        self.trained = bank.trained if trained is None else trained

    @property
    def reshapes(self) -> bool:
        """Whether any tensor changes its shape. Ask before the change is made."""
        return any(swap.tensor.shape != swap.new.shape for swap in self.swaps.values())

    def contents(self, names: Iterable[str]) -> dict[str, Tensor]:
        """New contents of the tensors of those names; those that do not change are left out."""
        return {name: self.swaps[name].new for name in names if name in self.swaps}

    def add(self, name: str, part: Tensor) -> None:
        """Add a vector, of the size before the change, to what a tensor of one axis and its copies will hold."""
        bank, full = self.bank, part.new_zeros(self.bank.space.shapes[name])
        if name not in self.swaps:  # its positions stay
            slots = [slot for slot in bank.live_slots(name) if slot.kind.kind == "copy"]
            kept = [(slot.state, slot.key, slot.tensor) for slot in slots]
            self.swaps[name] = _Swap(bank.tensors[name], bank.tensors[name].detach(), kept, {s.key for s in slots})
        swap = self.swaps[name]
        scatter_(full, bank.index.get(name, {}), part)
        part = gather(full, self.index.get(name, {})).to(swap.new)
        swap.new = swap.new + part
        swap.slots = [(s, k, (old + part).to(old) if k in swap.copies else old) for s, k, old in swap.slots]

    def into(self, exchange: Exchange) -> None:
        """Add all that the change writes."""
        bank, model = self.bank, self.bank.model
        modules, skipped = dict(model.named_modules()), bank.skipped(self.keep)
        for parameter in model.parameters():
            exchange.forget_gradient(parameter)
        for name, swap in self.swaps.items():
            exchange.write(swap.tensor, laid_out(swap.new, self.order.get(name, ())))
            for state, key, value in swap.slots:
                exchange.put(state, key, value)
        own = {(attribute.module, attribute.name) for attribute in bank.space.attributes}
        numbers = {place: number for place, number in self.record.attributes.items() if place in own}
        paths = [path for block in bank.space.blocks for path in block.modules]
        rewrite(exchange, modules, self.record, numbers, paths, skipped)
        exchange.fields(bank, keep=self.keep, index=self.index, record=self.record)
        exchange.fields(bank, trained=self.trained, order=self.order)


class Bank:
    """Storage for all tensors of a frame at full size.

    Args:
        model: the frame, at full size.
        space: its space.
        optimizer: the user's optimizer, or several, whose state is cut along with the parameters.
        seed: of initial values, for a frame on the meta device.
        device: of the real tensors of a frame on the meta device; there are none before the first change.
        layouts: what the optimizers keep, where that is known already.
        exchange: its `undo` will bring a frame back to the meta device.
        stores: whether inactive units are stored; if not, they are lost.
        scales: what initial values are multiplied by, by name: of a frame on the meta device here, else before.
    """

    @on_host()
    def __init__(
        self,
        model: nn.Module,
        space: Space,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        layouts: Sequence[Layout] | None = None,
        exchange: Exchange | None = None,
        stores: bool = True,
        scales: Mapping[str, float] | None = None,
    ) -> None:
        self.model, self.space = model, space
        self.layouts = tuple(layouts_of(optimizer) if layouts is None else layouts)
        self.tensors = named_tensors(model)
        for name in [n for n, s in space.shapes.items() if n not in self.tensors or self.tensors[n].shape != s]:
            found = tuple(self.tensors[name].shape) if name in self.tensors else "nothing"
            raise StructureError(
                f"{name} is {found} but the space was traced with {space.shapes[name]}; the model must be the full "
                "frame (trace it again, or restore it from its bank first)"
            )
        self.names = _all_names(model)
        self.base = self.record = recorded(model.named_modules())  # of earlier cuts
        self.growth: Growth | None = None
        cut = [name for name, axes in space.cut_axes.items() if axes]
        self.adapted = tuple(p for p in adaptable(model) if any(name.startswith(f"{p}." if p else "") for name in cut))
        self.scales = dict(scales or {})
        self.births = Births(model, seed, scales) if is_meta(model) else None
        adapt_(model, self.adapted)
        self.full = {name: self._store(name) for name in space.cut_axes if stores}
        self.order = {
            name: memory_order(self.tensors[name], range(self.tensors[name].dim())) for name in space.cut_axes
        }
        self.slots: dict[tuple[str, str], Store] = {}
        self.keep = space.everything()  # the units of the live model
        self.index: dict[str, Index | None] = {name: {} for name in space.cut_axes}
        if self.births is not None:
            self._materialise(self.births, device, exchange or Exchange())
            self.keep, self.index = torch.zeros_like(self.keep), dict.fromkeys(space.cut_axes)
        self.trained = torch.zeros(space.n_units, dtype=torch.bool)  # units for which optimizer slots ever existed

    @on_host()
    def stage(
        self,
        keep: Tensor,
        values: Mapping[str, Tensor] | None = None,
        copies: Mapping[tuple[str, str], Tensor] | None = None,
    ) -> Change:
        """Write the live tensors back and compute those for `keep` (bool [n]). The model does not change yet.

        `values` are written back instead of parameters' own contents (raw values of gated ones), and `copies`, by name
        and key, instead of slots that are copies of one.
        """
        if self.space.cut_axes and not self.full:
            raise StructureError("the bank has been emptied: what was stored in it is gone, so the structure is final")
        keep = self.space.check_keep(keep)
        mark = mark_of(self.model)
        if self.record is not self.base and (mark is None or mark.record is not self.record):
            raise StructureError(
                f"{type(self.model).__name__} was cut by somebody else since, as by load_state_dict of another "
                "structure, so that the bank does not know what lives; build the frame anew and cut it by shrink_"
            )
        self.tensors = named_tensors(self.model)  # a forward may have put another object in a buffer's place
        present = self.space.present(self.keep)
        fresh_units = self.space.present(keep) & ~self.trained & ~present
        past = self.trained & ~present  # stored units, whose slots fit the step count as it is
        had_state = keep & False
        swaps: dict[str, _Swap] = {}
        index: dict[str, Index | None] = {}
        order = {name: memory_order(self.tensors[name], axes) for name, axes in self.order.items()}
        for name in self.space.cut_axes:
            tensor, old, new = self.tensors[name], self.index[name], index_of(self.space, name, keep)
            index[name] = new
            gated = values is not None and name in values
            if not gated and same_index(old, new):
                continue
            live = values[name] if values is not None and gated else tensor.detach()
            self.full[name].write(old, live.cpu())
            born, slots = _places(self.space, name, new, fresh_units), []
            for slot in self.live_slots(name):
                had_state = present
                if (name, slot.key) not in self.slots:
                    self.slots[name, slot.key] = self.empty_slot(name, slot.tensor.dtype, slot.kind)
                stored = self.slots[name, slot.key]
                stored.write(old, (copies or {}).get((name, slot.key), slot.tensor).cpu())
                fresh = begun(stored.read(new), slot.kind, slot.tensor.cpu())
                fresh = laid_out(fresh, order[name]).to(slot.tensor.device)
                slots.append((slot.state, slot.key, fresh.flatten() if slot.kind.flat else fresh))
            if born and not _places(self.space, name, {}, past):  # at full size
                slots = begun_anew(slots, born)
            same = frozenset(slot.key for slot in self.live_slots(name) if slot.kind.kind == "copy")
            part = laid_out(self.full[name].read(new), order[name])
            swaps[name] = _Swap(tensor, part.to(tensor.device), slots, same)
        if self.births is not None:
            self.births.forget()
        return Change(self, keep, swaps, index, self.record_of(keep), self.trained | had_state, order)

    def stored(
        self, raw: Mapping[str, Tensor], copies: Mapping[tuple[str, str], Tensor]
    ) -> tuple[dict[str, Store], dict[tuple[str, str], Store]]:
        """Copies of all stored tensors and optimizer slots, with the live contents written back as `stage` does.

        The result does not depend on changes that were computed and never made. `raw` and `copies` are `values` and
        `copies` of `stage`.
        """
        if not self.full:
            return {}, {}
        self.tensors, full = named_tensors(self.model), {}  # as in `stage`
        slots = {place: store.copy(store.held.dtype) for place, store in self.slots.items()}
        for name, index in self.index.items():
            full[name] = self.full[name].copy(self.full[name].held.dtype)
            full[name].write(index, raw.get(name, self.tensors[name].detach()).cpu().to(full[name].held.dtype))
            for slot in self.live_slots(name):
                place = name, slot.key
                if place not in slots:
                    slots[place] = self.empty_slot(name, slot.tensor.dtype, slot.kind)
                slots[place].write(index, copies.get(place, slot.tensor).cpu().to(slots[place].held.dtype))
        return full, {place: slots[place] for place in sorted(slots)}

    def unchanged(self) -> Change:
        """A change that keeps the structure: it only drops gradients and invalidates graphs built before."""
        self.tensors = named_tensors(self.model)  # as in `stage`
        return Change(self, self.keep, {}, self.index, self.record)

    def stage_contents(self, keep: Tensor, contents: Mapping[str, Tensor]) -> Change:
        """Compute the change to a structure whose live tensors, by name, shall hold just these contents.

        Nothing is written back: the present contents are lost. Optimizer slots do not change.
        """
        keep = self.space.check_keep(keep)
        index = {name: index_of(self.space, name, keep) for name in self.space.cut_axes}
        swaps = {
            name: _Swap(tensor, contents[name].to(tensor.device, copy=True), [])
            for name, tensor in named_tensors(self.model).items()  # a buffer may be another object by now
            if name in contents
        }
        order = {name: memory_order(contents[name], axes) for name, axes in self.order.items()}
        return Change(self, keep, swaps, index, self.record_of(keep), order=order)

    @on_host()
    def commit(self, *changes: Change) -> None:
        """Make staged changes, of this bank and of others: all of them or none."""
        exchange = Exchange()
        for change in changes:
            change.into(exchange)
        exchange.make()

    def resize_(self, keep: Tensor) -> None:
        """Cut the model to the units in `keep`; units that leave are stored with their optimizer slots."""
        self.commit(self.stage(keep))

    @on_host()
    def recut_(self, keep: Tensor) -> None:
        """Cut the model to the units in `keep` with the stored contents; the present contents are lost.

        It changes one tensor after the other and cannot be undone, so it needs no further memory. For a copy that
        nobody else holds.
        """
        keep = self.space.check_keep(keep)
        index = {name: index_of(self.space, name, keep) for name in self.space.cut_axes}
        self.tensors = named_tensors(self.model)
        for name, stored in self.full.items():
            replace_(self.tensors[name], stored.read(index[name]).to(self.tensors[name].device))
        self.commit(Change(self, keep, {}, index, self.record_of(keep)))

    def restore_(self) -> None:
        """Bring the whole frame back, bit for bit."""
        self.resize_(self.space.everything())

    def empty(self) -> None:
        """Drop all stored contents. The model stays as it is and cannot change any more."""
        self.full, self.slots = {}, {}

    def _store(self, name: str) -> Store:
        births, tensor, shape = self.births, self.tensors[name].detach(), self.space.shapes[name]  # live, it is smaller
        if births is None:
            return Store(lambda: tensor.cpu().clone(), shape, tensor.dtype, whole=True)
        return Store(lambda: births.full(name), shape, tensor.dtype, whole=False)

    def blank(self) -> dict[str, Store]:
        """Stores for all tensors that can be cut, to be filled from a state."""
        if self.births is not None:
            return {name: self._store(name) for name in self.space.cut_axes}
        kinds = {name: (self.space.shapes[name], self.tensors[name].dtype) for name in self.space.cut_axes}
        return {name: Store(partial(torch.zeros, s, dtype=d), s, d, whole=True) for name, (s, d) in kinds.items()}

    def empty_slot(self, name: str, dtype: torch.dtype, slot: Slot) -> Store:
        """Storage for an optimizer slot before its first step; for a copy of the weights, the stored weights."""
        if slot.kind == "copy":
            return self.full[name].copy(dtype)
        unborn = blank(slot, self.space.shapes[name], dtype)
        if self.births is None:
            return Store(unborn.clone, self.space.shapes[name], dtype, whole=True)
        return Store(lambda: unborn, self.space.shapes[name], dtype, whole=False)

    def live_slots(self, name: str) -> list[LiveSlot]:
        """Optimizer slots of a tensor that are cut along with it.

        Raises:
            OptimizerError: there is one of a layout that cannot be.
        """
        tensor = self.tensors[name]
        layout = next((layout for layout in self.layouts if tensor in layout.optimizer.state), None)
        return [] if layout is None else layout.of(tensor, len(self.space.shapes[name]))

    def _materialise(self, births: Births, device: torch.device | str, exchange: Exchange) -> None:
        """Move the model's tensors off the meta device: empty where they are cut, else with their initial values."""

        def born(name: str) -> Tensor:
            full = births.full(name)
            return (gather(full, None) if name in self.space.cut_axes else full).to(device)

        materialise_(self.model, self.tensors, born, exchange)

    def skipped(self, keep: Tensor) -> dict[str, PassThrough]:
        """Modules of the blocks that `keep` leaves out, and what they compute instead."""
        return {path: b.skip for b in self.space.blocks if not bool(keep[b.unit]) for path in b.modules}

    def record_of(self, keep: Tensor) -> Record:
        """The record of a structure, relative to the first frame."""
        space, names = self.space, self.names
        attributes = {(a.module, a.name): int(live_positions(a.units, keep).sum()) for a in space.attributes}
        wholes = {(a.module, a.name): a.units.numel() for a in space.attributes}
        kept = {name: where for name in space.cut_axes if (where := index_of(space, name, keep, absent=False))}
        shapes = {alias: space.shapes[name] for name in space.cut_axes for alias in names[name]}
        everywhere = {alias: where for name, where in kept.items() for alias in names[name]}
        blocks = tuple(block.modules for block in space.blocks)
        return Record(shapes, everywhere, wholes, attributes, blocks, self.growth).on(self.base)


def cut_(bank: Bank, keep: Tensor) -> None:
    """Cut the model of a bank that stores nothing down to the units in `keep`, one tensor after the other.

    Raises:
        StructureError: the space does not allow `keep`.
        OptimizerError: an optimizer has state, which would have to be cut along.
    """
    keep, space = bank.space.check_keep(keep), bank.space
    if any(layout.optimizer.state for layout in bank.layouts):
        raise OptimizerError(
            "the optimizer has stepped, and its state is cut along only where everything is stored: call shrink_ "
            "without store=False, or make the optimizer after it"
        )
    index = {name: index_of(space, name, keep) for name in space.cut_axes}
    for name, live in index.items():
        tensor = bank.tensors[name]
        here = live and {axis: positions.to(tensor.device) for axis, positions in live.items()}
        if here != {}:  # else all of it stays
            replace_(tensor, laid_out(gather(tensor.detach(), here), bank.order[name]))
    bank.commit(Change(bank, keep, {}, index, bank.record_of(keep)))


def _all_names(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter and buffer, by the first."""
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first = {id(tensor): name for name, tensor in named_tensors(model).items()}
    names: dict[str, list[str]] = {}
    for name, tensor in every:
        names.setdefault(first[id(tensor)], []).append(name)
    return names


def _places(space: Space, name: str, index: Index | None, units: Tensor) -> dict[int, Tensor]:
    """By cut axis of a tensor, the positions of the part at `index` that belong to `units`; only axes with some."""
    found = {}
    for axis in space.cut_axes[name] if index is not None and bool(units.any()) else ():
        vector = space.unit_of[name, axis]
        places = (vector >= 0) & units[vector.clamp(min=0)]
        places = places[index[axis]] if index is not None and axis in index else places
        if bool(places.any()):
            found[axis] = places
    return found

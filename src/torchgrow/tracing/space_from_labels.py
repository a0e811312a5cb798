"""From the labels of a finished replay to the space: units, groups, places of gates, attributes, frozen positions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..structure.space import Attribute, Carried, FlopTerm, Frozen, Parts, Place, Space, frozen_for, has_units
from .labels import FIXED, Array, Labelled, UnionFind

UNREAD = "is computed, but nothing reads it in any run; add an example that does: example_inputs=[..., ...]"
"""Reason for freezing units that nothing reads."""

ZEROS = "reads nothing but zeros in any run; add an example with more steps: example_inputs=[..., ...]"
"""Reason for freezing columns that would be cut apart from the rows that they read in longer runs."""


@dataclass
class Read:
    """A contraction reading produced values through the columns of a weight."""

    produced: Labelled
    weight: Labelled


@dataclass
class Freezing:
    """A call of `freeze`, with the symbols it froze."""

    frozen: Frozen
    symbols: Tensor


@dataclass
class Findings:
    """The findings of a replay."""

    model: nn.Module  # the frame
    classes: UnionFind  # which symbols are equal, and which can never go
    parameters: tuple[str, ...]  # names of its parameters
    tensors: dict[str, Tensor]  # its parameters and buffers
    symbols: dict[Place, Tensor] = field(default_factory=dict)  # the symbols of every axis of two or more positions
    reads: list[Read] = field(default_factory=list)  # contractions
    # axes of tensors that contractions sum over; what is summed over along two is also what produces
    summed: set[Place] = field(default_factory=set)
    freezings: list[Freezing] = field(default_factory=list)  # what was frozen, in order
    flop_terms: list[tuple[int, list[Tensor], str]] = field(default_factory=list)  # constant, counted symbols, module
    # int attributes that rules have seen counting symbols, by (module, name)
    counted: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    # for tensors that the model is given again: which input, which output, and the symbols per axis
    carried: list[tuple[int, int, dict[int, Tensor]]] = field(default_factory=list)
    # cuts at places that attributes may hold, with symbols in place of units
    parts: list[Parts] = field(default_factory=list)
    # labels that vary along several axes, and the module that ran when they came to do so
    views: list[tuple[str, Labelled]] = field(default_factory=list)
    zeros: list[Tensor] = field(default_factory=list)  # symbols of zeros, perhaps the initial states of cells

    def space(self, batch: int) -> Space:
        """The space, before the proof; `batch` is the number of samples in the example inputs."""
        parameters = set(self.parameters)
        roots = self.classes.find(torch.arange(self.classes.count))
        sizes = [symbols.numel() for symbols in self.symbols.values()]
        of_parameters = [name in parameters for name, _ in self.symbols]
        in_parameters = torch.tensor(of_parameters, dtype=torch.bool).repeat_interleave(torch.tensor(sizes))
        owned = torch.zeros(self.classes.count, dtype=torch.bool)  # roots of which a parameter has a position
        owned[roots[1 : sum(sizes) + 1][in_parameters]] = True
        owned[FIXED] = False
        real = owned.nonzero().flatten()
        unit_of_root = torch.full_like(roots, -1)
        unit_of_root[real] = torch.arange(real.numel())
        unit_of_symbol = unit_of_root[roots]
        known = dict(zip(self.symbols, unit_of_symbol[1 : sum(sizes) + 1].split(sizes), strict=True))
        unit_of = {}
        for name, tensor in self.tensors.items():
            for axis, size in enumerate(tensor.shape):
                own = known.get((name, axis))
                unit_of[name, axis] = torch.full((size,), -1) if own is None else own

        def units(symbols: Tensor) -> Tensor:
            return unit_of_symbol[symbols]

        terms = tuple(
            FlopTerm(constant, tuple(units(v) for v in vectors), module)
            for constant, vectors, module in self.flop_terms
        )
        group_of, names = _groups(unit_of, [v for term in terms for v in term.vectors], real.numel())
        space = Space(
            unit_of=unit_of,
            removable=torch.ones(real.numel(), dtype=torch.bool),
            group_of=group_of,
            group_names=names,
            shapes={name: tuple(tensor.shape) for name, tensor in self.tensors.items()},
            parameters=self.parameters,
            flops=terms,
            batch=batch,
            fold=self._scaling_places(unit_of, units, self._by_producer(units, real.numel())),
            columns=self._columns(unit_of, units, real.numel()),
            attributes=self._attributes(unit_of, units),
            frozen=self._frozen(),
            carried=tuple(
                Carried(i, o, {axis: cut for axis, s in symbols.items() if bool(((cut := units(s)) >= 0).any())})
                for i, o, symbols in sorted(self.carried, key=lambda state: state[0])
            ),
            parts=tuple(replace(cut, pieces=tuple(units(piece) for piece in cut.pieces)) for cut in self.parts),
            views=tuple(
                (module, units(labels.symbols.movedim(axis, 0).flatten(1)[:, 0]))
                for module, labels in self.views
                for axis in labels.axes
            ),
        )
        return self._without_unread(space, units)

    def _without_unread(self, space: Space, units: Callable[[Tensor], Tensor]) -> Space:
        """Freeze units that nothing reads, or that read nothing but zeros: of others nothing would be proven."""
        fed = space.everything()
        for found in map(units, self.zeros):
            fed[found[found >= 0]] = False
        for place, found in space.unit_of.items():
            if place not in self.summed:
                fed[found[found >= 0]] = True
        if not bool(fed.all()):
            space = frozen_for(space, torch.nonzero(~fed).flatten(), "zeros", "", ZEROS)
        unread = space.everything()
        for symbols in [read.produced.symbols for read in self.reads]:
            found = units(symbols).flatten()
            unread[found[found >= 0]] = False
        for group in space.group_of[unread].unique().tolist():
            mine = torch.nonzero(unread & (space.group_of == group)).flatten()
            space = frozen_for(space, mine, "unread", space.group_names[group], UNREAD)
        return space

    def _by_producer(self, units: Callable[[Tensor], Tensor], n: int) -> npt.NDArray[np.bool_]:
        """Units (bool [n]) that are zero for all readers where the last affine map that produces them is."""
        found = np.ones(n, dtype=np.bool_)
        for read in self.reads:
            if not read.produced.all_zero:
                read_units = units(read.produced.symbols).flatten().numpy()
                found[read_units[(read_units >= 0) & ~read.produced.zero.flatten().numpy()]] = False
        return found

    def _scaling_places(
        self, unit_of: dict[Place, Tensor], units: Callable[[Tensor], Tensor], by_producer: npt.NDArray[np.bool_]
    ) -> dict[Place, Tensor]:
        """Where to scale what each unit puts out: `by_producer` on that last affine map, else on columns of readers."""
        parameters, scales = set(self.parameters), dict[Place, Array]()
        here = np.zeros(len(by_producer) + 1, dtype=np.bool_)  # the last entry stands for -1, "no unit"
        for read in self.reads:
            read_units, weights = units(read.produced.symbols).flatten().numpy(), read.weight.sources
            read_units = read_units[read_units >= 0]
            chosen = by_producer[read_units] | (not weights)  # a sum over units has no columns of its own
            for places, scaled in ((read.produced.sources, read_units[chosen]), (weights, read_units[~chosen])):
                if not scaled.size:
                    continue
                here[scaled] = True
                for place in sorted(places):
                    vector = unit_of[place].numpy()
                    found = here[vector]
                    if place[0] not in parameters or not found.any():
                        continue
                    old = scales.get(place)
                    scales[place] = np.where(found if old is None else found | (old >= 0), vector, -1)
                here[scaled] = False
        return {place: torch.from_numpy(vector) for place, vector in scales.items()}

    def _columns(self, unit_of: dict[Place, Tensor], units: Callable[[Tensor], Tensor], n: int) -> dict[Place, Tensor]:
        """Where units are read, of those that nothing reads without weights, and that learn when these are 0.

        Some reader has gradients then: one of values that are produced by other weights than those.
        """
        found = self._scaling_places(unit_of, units, np.zeros(n, dtype=np.bool_))
        over, parameters = Counter(name for name, _ in self.summed), set(self.parameters)
        learns, bare, tied, wide = np.zeros((4, n + 1), dtype=np.bool_)  # the last entry of each is of no unit
        for read in self.reads:
            mine, zeroed = units(read.produced.symbols).flatten().numpy(), np.zeros(n + 1, dtype=np.bool_)
            for place in read.produced.sources & found.keys():
                zeroed[found[place].numpy()] = True
            if read.weight.sources:
                learns[mine[~zeroed[mine]]] = True
            else:
                bare[mine] = True
        for place, vector in unit_of.items():  # tied: read by what produces them, wide: produced by another matrix too
            read_here = found.get(place, torch.full_like(vector, -1))
            if over[place[0]] > 1:
                tied[read_here.numpy()] = True
            if place[0] in parameters and self.tensors[place[0]].dim() > 1:
                wide[vector[read_here < 0].numpy()] = True
        silent = torch.from_numpy(learns & ~bare & (wide | ~tied) & (np.arange(n + 1) < n))
        return {x: torch.where(silent[vector], vector, -1) for x, vector in found.items() if bool(silent[vector].any())}

    def _attributes(self, unit_of: dict[Place, Tensor], units: Callable[[Tensor], Tensor]) -> tuple[Attribute, ...]:
        """Attributes of torch.nn modules that count an axis."""
        modules = dict(self.model.named_modules())
        found: dict[tuple[str, str], Tensor] = {
            key: units(symbols)
            for key, symbols in self.counted.items()
            if hasattr(modules[key[0]], key[1])  # a forward may also take its groups from the input
        }
        for path, module in modules.items():
            for attribute, (tensor, axis) in _counted_axes(module).items():
                place = (f"{path}.{tensor}" if path else tensor, axis)
                vector = unit_of.get(place)
                groups = int(getattr(module, "groups", 1))
                if vector is not None and attribute in ("in_channels", "out_channels") and axis == 1 and groups > 1:
                    whole = found.get((path, "groups"))
                    vector = whole.repeat_interleave(vector.numel()) if whole is not None else vector.repeat(groups)
                if vector is not None and getattr(module, attribute, None) == vector.numel():
                    found[path, attribute] = vector
            if isinstance(module, nn.MultiheadAttention):
                tensor = "in_proj_weight" if module.in_proj_weight is not None else "q_proj_weight"
                rows = unit_of[f"{path}.{tensor}" if path else tensor, 0]
                heads = rows[: module.num_heads * module.head_dim].reshape(module.num_heads, -1)
                if rows.numel() and bool((heads == heads[:, :1]).all()):  # a left-out layer has no rows
                    found[path, "num_heads"] = heads[:, 0]
        return tuple(Attribute(module, name, vector) for (module, name), vector in found.items() if has_units(vector))

    def _frozen(self) -> tuple[Frozen, ...]:
        """Freezings with the places of their symbols; those of carried tensors alone are left out.

        So do those of kernels, of which nothing could ever go. What one operation keeps for one reason, in several
        runs perhaps, is said once.
        """
        places = list(self.symbols)
        starts = torch.tensor([1, *(symbols.numel() for symbols in self.symbols.values())]).cumsum(0)[:-1]
        last = sum(symbols.numel() for symbols in self.symbols.values())  # then come those of carried tensors
        kernels = {
            (f"{path}.weight" if path else "weight", axis)
            for path, module in self.model.named_modules()
            if isinstance(module, nn.modules.conv._ConvNd)
            for axis in range(2, module.weight.dim())
        }
        found: dict[Frozen, dict[Place, None]] = {}
        for freezing in self.freezings:
            symbols = freezing.symbols[freezing.symbols <= last]
            if not symbols.numel():
                continue
            index = (torch.searchsorted(starts, symbols, right=True) - 1).unique().tolist()
            own = [places[i] for i in index if places[i] not in kernels]
            if own:
                found.setdefault(freezing.frozen, {}).update(dict.fromkeys(own))
        return tuple(replace(frozen, places=tuple(own)) for frozen, own in found.items())


def _counted_axes(module: nn.Module) -> dict[str, Place]:
    """For modules of torch.nn: attribute -> (tensor, axis) it counts."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return {"in_channels": ("weight", 0), "out_channels": ("weight", 1)}
    if isinstance(module, nn.modules.conv._ConvNd):
        return {"in_channels": ("weight", 1), "out_channels": ("weight", 0)}
    if isinstance(module, nn.Linear):
        return {"in_features": ("weight", 1), "out_features": ("weight", 0)}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return {"num_features": ("weight" if module.weight is not None else "running_mean", 0)}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": ("weight", 0)}
    if isinstance(module, nn.RNNCellBase):
        return {"input_size": ("weight_ih", 1), "hidden_size": ("weight_hh", 1)}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": ("weight", 1)}
    return {}


def _groups(unit_of: dict[Place, Tensor], counted: list[Tensor], n: int) -> tuple[Tensor, tuple[str, ...]]:
    """Units that live on the same places (and are counted by the same FLOPs) equally often form a group.

    A group is named by the first place of its first unit.
    """
    if n == 0:
        return torch.zeros(0, dtype=torch.int64), ()
    places, vectors = list(unit_of), [*unit_of.values(), *counted]
    codes = np.random.default_rng(0).integers(-(2**62), 2**62, len(vectors))
    units = torch.cat([vector.flatten() for vector in vectors]).numpy()
    index = np.repeat(np.arange(len(vectors)), [vector.numel() for vector in vectors])
    units, index = units[units >= 0], index[units >= 0]
    signature = np.zeros(n, dtype=np.int64)  # a hash of the multiset of places; sums wrap around
    np.add.at(signature, units, codes[index])
    first = np.zeros(n, dtype=np.int64)  # each unit's first place: of several values the last one written stays
    first[units[::-1]] = index[::-1]
    starts = np.flatnonzero(np.diff(signature, prepend=~signature[:1]))  # most neighbours are alike: fewer to sort
    _, leader, run_key = np.unique(signature[starts], return_index=True, return_inverse=True)
    leader = starts[leader]  # the first unit of each group
    key = np.repeat(run_key, np.diff(starts, append=n))
    order = np.argsort(leader)  # groups in the order of their first units
    names: dict[str, None] = {}
    for place in first[leader[order]].tolist():
        names[_place_name(places[place], names)] = None
    return torch.from_numpy(np.argsort(order)[key]), tuple(names)


def _place_name(place: Place, taken: Container[str]) -> str:
    """`layer1.0.conv1` for rows of a weight, `name[axis]` otherwise; made unique with a number."""
    tensor, axis = place
    base = tensor.removesuffix(".weight") if axis == 0 and tensor.endswith(".weight") else f"{tensor}[{axis}]"
    name, number = base, 2
    while name in taken:
        name, number = f"{base}#{number}", number + 1
    return name

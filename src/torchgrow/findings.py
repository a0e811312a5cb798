"""Reading the space off a finished replay: units, groups, where gates sit, what counts an axis, what stays and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .labels import FIXED, Labels, Layer
from .space import Attribute, Carried, FlopTerm, Frozen, Place, Space


@dataclass
class Read:
    """A contraction reading produced values through the columns of a weight."""

    produced: Layer
    weight: Layer


@dataclass
class Freezing:
    """A call of `freeze`, with the symbols it froze."""

    frozen: Frozen
    symbols: Tensor


@dataclass
class Findings:
    """What a replay has noted about a frame.

    Attributes:
        model: the frame.
        labels: which symbols are equal, and which can never go.
        parameters: names of its parameters.
        tensors: its parameters and buffers.
        symbols: the symbols of every axis of two or more positions.
        reads: contractions.
        freezings: what was frozen, in order.
        flop_terms: constant, counted symbols, module.
        counted: int attributes that rules have seen counting symbols, by (module, name).
        carried: for tensors that the model is given again: which input, which output, and the symbols per axis.
    """

    model: nn.Module
    labels: Labels
    parameters: tuple[str, ...]
    tensors: dict[str, Tensor]
    symbols: dict[Place, Tensor] = field(default_factory=dict)
    reads: list[Read] = field(default_factory=list)
    freezings: list[Freezing] = field(default_factory=list)
    flop_terms: list[tuple[int, list[Tensor], str]] = field(default_factory=list)
    counted: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    carried: list[tuple[int, int, dict[int, Tensor]]] = field(default_factory=list)

    def space(self, batch: int) -> Space:
        """The space, before the proof; `batch` is the number of samples in the example inputs."""
        roots = {place: self.labels.find(symbols) for place, symbols in self.symbols.items()}
        owned = [roots[place] for place in roots if place[0] in self.parameters]
        real = torch.cat(owned).unique() if owned else torch.zeros(0, dtype=torch.int64)
        real = real[real != FIXED]
        unit_of_root = torch.full_like(self.labels.parent, -1)
        unit_of_root[real] = torch.arange(real.numel())
        unit_of = {}
        for name, tensor in self.tensors.items():
            for axis, size in enumerate(tensor.shape):
                known = roots.get((name, axis))
                unit_of[name, axis] = (
                    torch.full((size,), -1, dtype=torch.int64) if known is None else unit_of_root[known]
                )

        def units(symbols: Tensor) -> Tensor:
            return unit_of_root[self.labels.find(symbols)]

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
            fold=self._fold_places(unit_of, units, real.numel()),
            attributes=self._attributes(unit_of, units),
            carried=tuple(
                Carried(i, o, {axis: cut for axis, s in symbols.items() if bool(((cut := units(s)) >= 0).any())})
                for i, o, symbols in sorted(self.carried, key=lambda state: state[0])
            ),
        )
        return replace(space, frozen=self._frozen())

    def _fold_places(
        self, unit_of: dict[Place, Tensor], units: Callable[[Tensor], Tensor], n: int
    ) -> dict[Place, Tensor]:
        """Where each unit's gate sits.

        On the last affine map that produces the unit, if every reader sees zero when that is zero; else on
        the columns of everything that reads it.
        """
        by_producer = torch.ones(n, dtype=torch.bool)
        reads = []
        for read in self.reads:
            read_units, silent = units(read.produced.symbols).flatten(), read.produced.silent.flatten()
            loud = read_units[~silent & (read_units >= 0)]
            by_producer[loud] = False
            reads.append((read_units[read_units >= 0].unique(), read.produced.sources, read.weight.sources))
        fold: dict[Place, Tensor] = {}
        for read_units, produced, weights in reads:
            for places, chosen in ((produced, by_producer), (weights, ~by_producer)):
                here = torch.zeros(n + 1, dtype=torch.bool)  # the last entry stands for -1, "no unit"
                here[read_units[chosen[read_units]]] = True
                for place in sorted(places):
                    vector = unit_of[place]
                    if place[0] not in self.parameters or not bool(here[vector].any()):
                        continue
                    gated = torch.where(here[vector], vector, -1)
                    old = fold.get(place)
                    fold[place] = gated if old is None else torch.where(old >= 0, old, gated)
        return fold

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
                if bool((heads == heads[:, :1]).all()):
                    found[path, "num_heads"] = heads[:, 0]
        return tuple(
            Attribute(module, name, vector) for (module, name), vector in found.items() if bool((vector >= 0).any())
        )

    def _frozen(self) -> tuple[Frozen, ...]:
        """Freezings with the places of their symbols; those of nothing but axes of carried tensors go unsaid."""
        places = list(self.symbols)
        starts = torch.tensor([int(self.symbols[place][0]) for place in places] or [0])
        last = max((int(symbols[-1]) for symbols in self.symbols.values()), default=0)
        result = []
        for freezing in self.freezings:
            symbols = freezing.symbols[freezing.symbols <= last]
            if not symbols.numel():
                continue
            index = (torch.searchsorted(starts, symbols, right=True) - 1).unique().tolist()
            result.append(replace(freezing.frozen, places=tuple(places[i] for i in index)))
        return tuple(result)


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
    codes = torch.randint(-(2**62), 2**62, (len(vectors),), generator=torch.Generator().manual_seed(0))
    signature = torch.zeros(n, dtype=torch.int64)  # a hash of the multiset of places; sums wrap around
    first = torch.zeros(n, dtype=torch.int64)  # each unit's first place
    for i in range(len(vectors) - 1, -1, -1):
        owned = vectors[i][vectors[i] >= 0]
        if owned.numel():
            signature.index_add_(0, owned, codes[i].expand(owned.numel()))
            if i < len(places):
                first[owned] = i
    _, key = signature.unique(return_inverse=True)
    leader = torch.full((int(key.max()) + 1,), n).scatter_reduce_(0, key, torch.arange(n), "amin")
    order = torch.argsort(leader)  # groups in the order of their first units
    names: list[str] = []
    for place in first[leader[order]].tolist():
        names.append(_place_name(places[place], names))
    return torch.argsort(order)[key], tuple(names)


def _place_name(place: Place, taken: list[str]) -> str:
    """`layer1.0.conv1` for rows of a weight, `name[axis]` otherwise; made unique with a number."""
    tensor, axis = place
    base = tensor.removesuffix(".weight") if axis == 0 and tensor.endswith(".weight") else f"{tensor}[{axis}]"
    name, number = base, 2
    while name in taken:
        name, number = f"{base}#{number}", number + 1
    return name

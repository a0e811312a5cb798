"""Labels: which positions of a tensor belong together. The algebra under tracing, free of any operation.

A *symbol* is one position of one axis of a parameter or buffer; symbol 0 is FIXED, "can never be removed". Symbols
only ever become equal (`Labels.unify`) or FIXED (`Labels.freeze`), so the order of operations does not matter,
and a rule that says too much only costs freedom, never correctness.

A tensor carries `Layer`s. A layer has the tensor's rank and size 1 on every axis along which it does not vary:
an activation [N, C, H, W] with labelled channels has one layer of shape [1, C, 1, 1]; a weight [O, I, 3, 3] has
two, [O, 1, 1, 1] and [1, I, 1, 1]. A position is absent as soon as one of its layers' symbols is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .space import Place

FIXED = 0


@dataclass(frozen=True, eq=False)
class Layer:
    """One set of labels on a tensor.

    Attributes:
        packed: int64, symbol * 2 + silent. `silent` says: this position is zero whenever the parameters
            in `sources` that carry its unit are zero. Packing lets data movement replay both at once.
        sources: the places whose zeroing silences the silent positions (empty for constants).
    """

    packed: Tensor
    sources: frozenset[Place]

    @property
    def symbols(self) -> Tensor:
        """int64 symbols, same shape as `packed`."""
        return self.packed >> 1

    @property
    def silent(self) -> Tensor:
        """Bool, same shape as `packed`."""
        return (self.packed & 1).bool()

    @property
    def axes(self) -> tuple[int, ...]:
        """Axes along which the layer varies."""
        return tuple(k for k, size in enumerate(self.packed.shape) if size > 1)

    def with_silence(self, silent: Tensor | bool, sources: frozenset[Place]) -> Layer:
        """The same symbols with other knowledge about silence."""
        bit = silent.to(torch.int64) if isinstance(silent, Tensor) else int(silent)
        return Layer((self.packed & ~1) | bit, sources)

    def move(self, shape: torch.Size, op: Callable[[Tensor], Tensor]) -> Layer | None:
        """Replay a data movement on the labels: expand to the tensor's full `shape`, move, compress again."""
        return compressed(Layer(op(self.packed.expand(shape)), self.sources))


def compressed(layer: Layer) -> Layer | None:
    """Reduce every axis along which the layer does not vary to size 1; None if all is FIXED."""
    packed = layer.packed
    for axis in range(packed.dim()):
        if packed.shape[axis] > 1:
            first = packed.narrow(axis, 0, 1)
            if packed.stride(axis) == 0 or bool((packed == first).all()):
                packed = first
    if not bool((packed >> 1).any()):
        return None
    return Layer(packed.contiguous(), layer.sources)


class Labels:
    """A union-find over symbols, vectorised: every call works on whole tensors of symbols.

    The smallest symbol of a class is its root, so FIXED (0) absorbs whatever it meets.
    """

    def __init__(self) -> None:
        self._room = torch.arange(1024)  # grows by doubling, so that many small tensors cost no more than few large
        self.count = 1

    @property
    def parent(self) -> Tensor:
        """int64 [number of symbols], writable."""
        return self._room[: self.count]

    def new(self, count: int) -> Tensor:
        """`count` fresh symbols, int64 [count]."""
        start, self.count = self.count, self.count + count
        if self.count > self._room.numel():
            room = torch.arange(2 * self.count)
            room[:start] = self._room[:start]
            self._room = room
        return torch.arange(start, self.count)

    def find(self, symbols: Tensor) -> Tensor:
        """Roots of `symbols` (same shape), with path compression."""
        parent = self.parent
        root = parent[symbols]
        above = parent[root]
        if torch.equal(above, root):
            return root
        while not torch.equal(above, root):
            root, above = above, parent[above]
        parent[symbols] = root
        return root

    def unify(self, a: Tensor, b: Tensor) -> None:
        """Make `a` and `b` (broadcast against each other) equal, entry by entry."""
        a, b = torch.broadcast_tensors(self.find(a), self.find(b))
        while True:
            differs = a != b
            if not bool(differs.any()):
                return
            a, b = a[differs], b[differs]
            high, low = torch.maximum(a, b), torch.minimum(a, b)
            # several lows may compete for one high: one wins here, the others meet it in the next round
            self.parent[high] = low
            a, b = self.find(high), self.find(low)

    def freeze(self, symbols: Tensor) -> Tensor:
        """Make `symbols` FIXED; returns the ones that were not, unique."""
        roots = self.find(symbols).flatten().unique()
        roots = roots[roots != FIXED]
        self.parent[roots] = FIXED
        return roots

    def canonical(self, layer: Layer) -> Layer | None:
        """The layer with every symbol replaced by its root, compressed."""
        return compressed(Layer(self.find(layer.symbols) << 1 | (layer.packed & 1), layer.sources))

    def merge_along(self, layer: Layer, axis: int) -> Layer | None:
        """Unify all positions along `axis`, so that the layer varies no longer there (it must vary elsewhere)."""
        first = layer.packed.narrow(axis, 0, 1)
        self.unify(layer.symbols, first >> 1)
        silent = layer.silent.all(dim=axis, keepdim=True)
        return self.canonical(Layer((first & ~1) | silent.to(torch.int64), layer.sources))

"""Labels: which positions of a tensor belong together. The algebra under tracing, free of any operation.

A *symbol* is one position of one axis of a parameter or buffer; symbol 0 is FIXED, "can never be removed". Symbols
only ever become equal (`UnionFind.unify`) or FIXED (`UnionFind.freeze`), so the order of operations does not matter,
and a rule that says too much only costs freedom, never correctness.

A tensor carries a list of `Labelled`. Each has the tensor's rank, and size 1 on every axis along which it does not
vary: an activation [N, C, H, W] with labelled channels has one, of shape [1, C, 1, 1]; a weight [O, I, 3, 3] has two,
[O, 1, 1, 1] and [1, I, 1, 1]. A position is absent as soon as one of its symbols is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..renamed import renamed_attribute
from ..structure.space import Place

FIXED = 0
NOTHING = torch.zeros(0, dtype=torch.int64)
Array = npt.NDArray[np.int64]
T = TypeVar("T")


class Lazy(Generic[T]):
    """`functools.cached_property` without its lock, which before Python 3.12 costs more than what is cached here."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute, self.name, self.__doc__ = compute, compute.__name__, compute.__doc__

    def __get__(self, instance: Any, owner: type) -> T:
        """Compute, and store the value in the instance, where Python looks first."""
        value = instance.__dict__[self.name] = self.compute(instance)
        return value


@dataclass(frozen=True, eq=False)
class Labelled:
    """Labels of a tensor along some of its axes."""

    # int64, symbol * 2 + zero. `zero` says: this position is zero when its sources are zero, that is, where the
    # parameters in `sources` carry its unit. Packing lets data movement replay both at once
    packed: Tensor
    sources: frozenset[Place] = frozenset()  # the places that decide it (empty for constants)
    compact: bool = False  # known to be as `compressed` leaves it
    with_silence = renamed_attribute("with_silence", "with_zeros")

    @Lazy
    def array(self) -> Array:
        """`symbols` as an array."""
        return self.packed.numpy() >> 1

    @Lazy
    def symbols(self) -> Tensor:
        """int64 symbols, same shape as `packed`."""
        return torch.from_numpy(self.array)

    @Lazy
    def zero(self) -> Tensor:
        """Bool, same shape as `packed`."""
        return (self.packed & 1).bool()

    @Lazy
    def all_zero(self) -> bool:
        """Whether `zero` holds everywhere."""
        return int(np.bitwise_and.reduce(self.packed.numpy(), axis=None)) & 1 == 1

    @Lazy
    def axes(self) -> tuple[int, ...]:
        """Axes along which the labels vary."""
        return tuple(k for k, size in enumerate(self.packed.shape) if size > 1)

    def with_zeros(self, zero: Tensor | bool, sources: frozenset[Place] = frozenset()) -> Labelled:
        """The same symbols, with `zero` and `sources` as given."""
        if isinstance(zero, bool) and zero and self.all_zero:
            return Labelled(self.packed, sources, self.compact)
        bit = zero.to(torch.int64) if isinstance(zero, Tensor) else int(zero)
        return Labelled((self.packed & ~1) | bit, sources)

    def move(self, shape: Sequence[int], op: Callable[[Tensor], Tensor]) -> Labelled | None:
        """Replay a data movement on the labels: expand to the tensor's full `shape`, move, compress again."""
        return compressed(Labelled(op(self.packed.expand(standing(shape))), self.sources))


def standing(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape to replay movements of an empty tensor in: labels do not vary along its empty axes, but still others do.

    An expert without tokens, or a box in no image, still has channels.
    """
    return tuple(size or 2 for size in shape)


def compressed(labels: Labelled) -> Labelled | None:
    """Reduce every axis along which the labels do not vary to size 1; None if all is FIXED."""
    packed = labels.packed.numpy()
    if not packed.size:
        return None
    for axis, size in enumerate(packed.shape):
        if size > 1:
            corner = (0,) * packed.ndim
            beside = (*corner[:axis], 1, *corner[axis + 1 :])
            if packed.item(corner) != packed.item(beside):
                continue  # most often two entries tell
            first = packed[(slice(None),) * axis + (slice(0, 1),)]
            if packed.strides[axis] == 0 or bool((packed == first).all()):
                packed = first
    if packed.size == 0 or packed.max() <= 1:
        return None
    return Labelled(torch.from_numpy(packed).contiguous(), labels.sources, compact=True)


class UnionFind:
    """A union-find over symbols, vectorised: every call works on whole tensors of symbols.

    The smallest symbol of a class is its root, so FIXED (0) absorbs whatever it meets. Inside are numpy arrays: most
    calls are on some hundred symbols, where these cost a fraction of what tensors do.
    """

    def __init__(self) -> None:
        self._parent: Array = np.zeros(1, dtype=np.int64)

    @property
    def count(self) -> int:
        """Number of symbols, FIXED included."""
        return self._parent.size

    def new(self, count: int) -> Tensor:
        """`count` fresh symbols, int64 [count]."""
        fresh = np.arange(self.count, self.count + count, dtype=np.int64)
        self._parent = np.concatenate([self._parent, fresh])
        return torch.from_numpy(fresh)

    def _roots(self, symbols: Array) -> Array:
        """Roots of `symbols`, with path compression; the same array if it holds only roots."""
        parent = self._parent
        root = parent[symbols]
        if not np.count_nonzero(root != symbols):
            return symbols
        above = parent[root]
        if np.count_nonzero(above != root):
            while np.count_nonzero(above != root):
                root, above = above, parent[above]
            parent[symbols] = root
        return root

    def find(self, symbols: Tensor) -> Tensor:
        """Roots of `symbols` (same shape; the same tensor if it holds only roots)."""
        known = symbols.numpy()
        root = self._roots(known)
        return symbols if root is known else torch.from_numpy(np.asarray(root))

    def unify(self, a: Tensor, b: Tensor) -> Tensor:
        """Make `a` and `b` (broadcast against each other) equal, entry by entry.

        Returns the symbols that met FIXED, unique.
        """
        left, right = self._roots(a.numpy()), self._roots(b.numpy())
        if left.shape != right.shape:
            left, right = np.broadcast_arrays(left, right)
        met = NOTHING
        while True:
            differs = left != right
            if not np.count_nonzero(differs):
                return met
            left, right = left[differs], right[differs]
            high, low = np.maximum(left, right), np.minimum(left, right)
            if met is NOTHING and np.count_nonzero(low) < low.size:
                met = torch.from_numpy(np.unique(high[low == FIXED]))
            # several lows may compete for one high: one wins here, the others meet it in the next round
            self._parent[high] = low
            lost = self._parent[high] != low
            left, right = self._roots(high[lost]), self._roots(low[lost])

    def freeze(self, symbols: Tensor) -> Tensor:
        """Make `symbols` FIXED; returns the ones that were not, unique."""
        roots = self._roots(symbols.numpy())
        roots = roots[roots != FIXED]
        if not roots.size:
            return NOTHING
        roots = np.unique(roots)
        self._parent[roots] = FIXED
        return torch.from_numpy(roots)

    def set_aside(self) -> Array:
        """All roots, by symbol; afterwards every symbol is on its own again, and free."""
        every = np.arange(self.count, dtype=np.int64)
        roots, self._parent = self._roots(every), every.copy()
        return roots

    def join(self, found: Sequence[Array]) -> None:
        """Make equal what is equal in any of several results of `set_aside`; what is FIXED there is left out."""
        for roots in found:
            free = np.flatnonzero(roots != FIXED)
            self.unify(torch.from_numpy(free), torch.from_numpy(roots[free]))

    def canonical(self, labels: Labelled) -> Labelled | None:
        """The labels with every symbol replaced by its root, compressed; the same object, if that changes nothing."""
        roots = self._roots(labels.array)
        if roots is labels.array:
            return labels if labels.compact else compressed(labels)
        packed = roots << 1 | (labels.packed.numpy() & 1)
        return compressed(Labelled(torch.from_numpy(packed), labels.sources))

    def merge_along(self, labels: Labelled, axis: int) -> Labelled | None:
        """Unify all positions along `axis`, so that the labels no longer vary there (they must vary elsewhere)."""
        first = labels.packed.narrow(axis, 0, 1)
        self.unify(labels.symbols, first >> 1)
        zero = labels.zero.all(dim=axis, keepdim=True)
        return self.canonical(Labelled((first & ~1) | zero.to(torch.int64), labels.sources))

"""What a network of the space costs: parameters and FLOPs, exactly, from the number of live units per group.

Every count is `base + multiplicity * live units`, every cost a sum of products of counts, so the whole cost of a
structure is a few small matrix operations on one integer per group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .space import Space


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Attributes:
        params: number of parameters, trainable or not, tied ones once; buffers do not count.
        flops: 2 x multiply-accumulates of convolutions and matrix products for one sample.
    """

    params: int
    flops: int


class CostModel:
    """Costs of all networks in a space, as a function of live units per group.

    Args:
        space: the space; costs are exact for every keep vector it allows.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self.sizes = torch.bincount(space.group_of, minlength=space.n_groups)
        self._rows: dict[tuple[int, ...], int] = {}
        self._base: list[int] = []
        self._multiplicity: list[list[int]] = []
        self._row(torch.full((1,), -1, dtype=torch.int64))  # row 0 always counts 1: the padding of short products
        params = []
        for name in space.parameters:
            shape, axes = space.shapes[name], space.cut_axes.get(name, ())
            whole = [size for axis, size in enumerate(shape) if axis not in axes]
            rows = [self._row(space.unit_of[name, axis]) for axis in axes]
            if name in space.slot_of:
                rows.append(self._row(torch.tensor([space.slot_of[name]])))
            params.append((_product(whole), rows))
        flops = [(term.constant, [self._row(v) for v in term.vectors]) for term in space.flops]
        self.base = torch.tensor(self._base, dtype=torch.int64)
        self.multiplicity = torch.tensor(self._multiplicity, dtype=torch.int64).reshape(len(self._base), space.n_groups)
        self.params, self.flops = self._pack(params), self._pack(flops)

    def _row(self, vector: Tensor) -> int:
        """Row of the count of live positions in a vector of unit ids; equal counts share a row."""
        owned = vector[vector >= 0]
        positions = torch.bincount(self.space.group_of[owned], minlength=self.space.n_groups)
        each = torch.where(positions > 0, positions // self.sizes.clamp(min=1), 0)
        key = (vector.numel() - owned.numel(), *each.tolist())
        if key not in self._rows:
            self._rows[key] = len(self._base)
            self._base.append(key[0])
            self._multiplicity.append(list(key[1:]))
        return self._rows[key]

    @staticmethod
    def _pack(terms: list[tuple[int, list[int]]]) -> tuple[Tensor, Tensor]:
        """Constants [T] and factor rows [T, most factors], padded with row 0."""
        most = max([len(rows) for _, rows in terms] or [0])
        constants = torch.tensor([constant for constant, _ in terms], dtype=torch.int64)
        factors = torch.tensor([rows + [0] * (most - len(rows)) for _, rows in terms], dtype=torch.int64)
        return constants, factors.reshape(len(terms), most)

    def live(self, keep: Tensor) -> Tensor:
        """Live units per group, int64 [G], of a keep vector, bool [n]."""
        return torch.bincount(self.space.group_of[keep], minlength=self.space.n_groups)

    def both(self, live: Tensor) -> Tensor:
        """Parameters and FLOPs (for one sample, rounded down), int64 [..., 2], of live units per group [..., G]."""
        counts = self.base + (live[..., None, :] * self.multiplicity).sum(-1)
        results = []
        for constants, factors in (self.params, self.flops):
            results.append((constants * counts[..., factors].prod(-1)).sum(-1))
        return torch.stack([results[0], results[1] // self.space.batch], -1)

    def cost(self, keep: Tensor) -> Cost:
        """Cost of a keep vector, bool [n]."""
        params, flops = self.both(self.live(keep)).tolist()
        return Cost(params, flops)

    def smallest(self) -> Tensor:
        """Fewest live units per group, int64 [G]: what cannot be removed, and at least one; of layers none."""
        return self.space.least


def _product(sizes: list[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result

"""What a network of the space costs: parameters and FLOPs, exactly, from the number of live units per group.

Every count is `base + multiplicity * live units`, every cost a sum of products of counts. What one group changes is
counted from the products that contain it, so time and memory grow with the network and not with a power of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

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
    """Costs of all networks in a space, exact for every keep vector it allows, by live units per group."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.sizes = torch.bincount(space.group_of, minlength=space.n_groups)
        self._rows: dict[tuple[int, tuple[tuple[int, int], ...]], int] = {}
        self._row(torch.full((1,), -1, dtype=torch.int64))  # row 0 always counts 1: the padding of short products
        terms: list[tuple[int, int, list[int]]] = []  # what its rows' product is worth in parameters and in FLOPs
        for name in space.parameters:
            shape, axes = space.shapes[name], space.cut_axes.get(name, ())
            whole = [size for axis, size in enumerate(shape) if axis not in axes]
            rows = [self._row(space.unit_of[name, axis]) for axis in axes]
            if name in space.block_of:
                rows.append(self._row(torch.tensor([space.block_of[name]])))
            terms.append((math.prod(whole), 0, rows))
        terms += [(0, term.constant, [self._row(v) for v in term.vectors]) for term in space.flops]
        most = max([len(rows) for *_, rows in terms] or [0])
        self._constants = torch.tensor([term[:2] for term in terms], dtype=torch.int64).reshape(-1, 2)  # [T, 2]
        factors = [rows + [0] * (most - len(rows)) for *_, rows in terms]  # padded with row 0
        self._factors = torch.tensor(factors, dtype=torch.int64).reshape(len(terms), most)  # [T, most factors]
        self._base = torch.tensor([base for base, _ in self._rows], dtype=torch.int64)
        entries = sorted((group, row, each) for row, (_, groups) in enumerate(self._rows) for group, each in groups)
        columns = torch.tensor(entries, dtype=torch.int64).reshape(-1, 3).unbind(1)
        self._entry_group, self._entry_row, self._entry_each = (column.contiguous() for column in columns)

    def _row(self, vector: Tensor) -> int:
        """Row of the count of live positions in a vector of unit ids; equal counts share a row.

        A row is the number of positions that always live, and of every group in it how many each of its units has.
        """
        owned = vector[vector >= 0]
        groups, positions = self.space.group_of[owned].unique(return_counts=True)
        each = positions // self.sizes[groups]
        counted = torch.stack([groups, each], 1)[each > 0].tolist()
        key = (vector.numel() - owned.numel(), tuple((group, number) for group, number in counted))
        return self._rows.setdefault(key, len(self._rows))

    @cached_property
    def _touched(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Every term with every group in it, sorted by group.

        Groups [P]; the terms' constants [P, 2] and factor rows [P, most factors]; and how many positions of each
        factor a unit of the group has [P, most factors].
        """
        groups_of = [dict(groups) for _, groups in self._rows]
        found = [
            (group, term, *(groups_of[row].get(group, 0) for row in rows))
            for term, rows in enumerate(self._factors.tolist())
            for group in {group for row in rows for group in groups_of[row]}
        ]
        table = torch.tensor(sorted(found), dtype=torch.int64).reshape(len(found), 2 + self._factors.shape[1])
        terms = table[:, 1]
        return table[:, 0].contiguous(), self._constants[terms], self._factors[terms], table[:, 2:].contiguous()

    def live(self, keep: Tensor) -> Tensor:
        """Live units per group, int64 [G], of a keep vector, bool [n]."""
        return torch.bincount(self.space.group_of[keep], minlength=self.space.n_groups)

    def both(self, live: Tensor) -> Tensor:
        """Parameters and FLOPs (for one sample, rounded down), int64 [..., 2], of live units per group [..., G]."""
        return self._for_one(self._sums(self._counts(live)))

    def expected(self, live: Tensor) -> Tensor:
        """Parameters and FLOPs (for one sample), float [..., 2], of mean live units per group, float [..., G].

        The mean over networks whose groups are drawn independently, but where a product has one group twice (a layer
        from a group to itself); can be differentiated. Where a layer that may be left out is drawn, its group's mean
        is the probability that it is there.
        """
        return self._sums(self._counts(live)) / torch.tensor([1, self.space.batch], device="cpu")

    def each(self, live: Tensor, more: Tensor) -> Tensor:
        """What `both` gives when one group alone has so many more units (or fewer), int64 [G, 2], for every group."""
        counts = self._counts(live)
        groups, constants, factors, slopes = self._touched
        before = counts[factors]
        gained = (before + more[groups, None] * slopes).prod(-1) - before.prod(-1)
        sums = self._sums(counts).expand(self.space.n_groups, -1).clone()
        return self._for_one(sums.index_add_(0, groups, gained[:, None] * constants))

    def cost(self, keep: Tensor) -> Cost:
        """Cost of a keep vector, bool [n]."""
        params, flops = self.both(self.live(keep)).tolist()
        return Cost(params, flops)

    def _counts(self, live: Tensor) -> Tensor:
        """Live positions of every row, [..., R], of live units per group [..., G]."""
        counts = self._base.expand(*live.shape[:-1], -1).to(live.dtype, copy=True)
        return counts.index_add_(-1, self._entry_row, live[..., self._entry_group] * self._entry_each)

    def _sums(self, counts: Tensor) -> Tensor:
        """Parameters and FLOPs of the whole batch, [..., 2], of counts [..., R]."""
        return (counts[..., self._factors].prod(-1)[..., None] * self._constants).sum(-2)

    def _for_one(self, sums: Tensor) -> Tensor:
        """Parameters and FLOPs for one sample, rounded down, from those of the whole batch, int64 [..., 2]."""
        return sums // torch.tensor([1, self.space.batch], device="cpu")


class Tally:
    """What a structure costs while one group after the other changes: only products that contain it are recomputed."""

    def __init__(self, costs: CostModel, live: Tensor) -> None:
        self._costs, self.live = costs, live.tolist()
        self._counts = costs._counts(live)
        self._sums = costs._sums(self._counts)
        ends = torch.arange(costs.space.n_groups + 1)
        self._entries = torch.searchsorted(costs._entry_group, ends).tolist()  # where those of every group begin
        self._terms = torch.searchsorted(costs._touched[0], ends).tolist()

    def fits(self, allowed: Tensor) -> bool:
        """Whether parameters and FLOPs, as of `CostModel.both`, are within int64 [2]."""
        return self._within(self._sums, allowed)

    def change(self, group: int, more: int, allowed: Tensor | None = None) -> bool:
        """Give one group so many more units (or fewer), unless it would then not fit into `allowed`; whether done."""
        terms = slice(self._terms[group], self._terms[group + 1])
        _, constants, factors, slopes = (column[terms] for column in self._costs._touched)
        before = self._counts[factors]
        gained = (before + more * slopes).prod(-1) - before.prod(-1)
        sums = self._sums + (gained[:, None] * constants).sum(0)
        if allowed is not None and not self._within(sums, allowed):
            return False
        entries = slice(self._entries[group], self._entries[group + 1])
        self._counts[self._costs._entry_row[entries]] += more * self._costs._entry_each[entries]
        self._sums, self.live[group] = sums, self.live[group] + more
        return True

    def _within(self, sums: Tensor, allowed: Tensor) -> bool:
        return bool((self._costs._for_one(sums) <= allowed).all())

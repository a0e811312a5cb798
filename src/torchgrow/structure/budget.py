"""Structures exactly at a budget, and structures that meet a planned cost."""

from __future__ import annotations

from heapq import heapify, heappop, heapreplace

import torch
from torch import Tensor

from ..errors import BudgetError
from .cost import CostModel, Tally
from .limits import Budget, Limits
from .space import Space


def check_feasible(budget: Budget, limits: Limits, costs: CostModel) -> None:
    """Raise before any training if the budget cannot be met or does not bind.

    Raises:
        BudgetError: names the feasible range.
    """
    least, full = costs.both(costs.space.least).tolist(), costs.both(costs.sizes).tolist()
    for name, limit, low, high in zip(("params", "flops"), (limits.params, limits.flops), least, full, strict=True):
        if limit is None:
            continue
        span = f"feasible here: {name} from {low:,} ({low / max(high, 1):.2%}) to {high:,} (100%)"
        if limit < low:
            raise BudgetError(f"{budget} allows {limit:,} {name}, but what cannot be removed costs {low:,}; {span}")
        if limit > high:
            raise BudgetError(f"{budget} allows {limit:,} {name}, more than the whole frame has ({high:,}); {span}")


def aligned(space: Space, keep: Tensor, must: Tensor, margin: Tensor, multiples: Tensor) -> Tensor:
    """Every group's width rounded down to a multiple of its own (int64 [groups]), by dropping units of `keep`.

    Those of least margin go, float64 [n] in (-1, 1), by which a unit is in; what is in `must` (bool [n]) stays.
    """
    group_of, n_groups = space.group_of, space.n_groups
    live = torch.bincount(group_of[keep], minlength=n_groups)
    least = torch.bincount(group_of[must], minlength=n_groups)
    wanted = torch.maximum(torch.where(live < multiples, live, live - live % multiples), least)
    first_to_stay = margin + 2.0 * keep + 4.0 * must
    order = torch.argsort(first_to_stay, descending=True, stable=True)
    order = order[torch.argsort(group_of[order], stable=True)]  # group by group
    sizes = torch.bincount(group_of, minlength=n_groups)
    first = torch.cumsum(sizes, 0) - sizes
    place = torch.arange(order.numel()) - first[group_of[order]]
    found = torch.zeros_like(keep)
    found[order] = place < wanted[group_of[order]]
    return found


def shed(space: Space, costs: CostModel, keep: Tensor, importance: Tensor, allowed: Tensor, steps: Tensor) -> Tensor:
    """The structure within `keep` that costs no more than allowed and loses the least importance for what it saves.

    Groups give up their least important units, from multiple to multiple of their step, in the order of rising
    importance per marginal cost: that of the units that leave, over the cost they save, as a share of what is allowed.
    In every round the cheapest leave, of one group as many as are cheapest, until a tenth of the excess is saved; then
    marginal costs, which have changed, are recomputed.
    One unit of every group stays, of layers none need to.

    It starts from `keep`, bool [n]. `importance`, float64 [n], is not negative: what a unit adds to that of its group.
    `allowed`, int64 [2], is known to be feasible. `steps`: as for `fit`.
    """
    keep, live = keep.clone(), costs.live(keep)
    order = torch.argsort(importance, stable=True)
    queues: list[list[int]] = [[] for _ in range(space.n_groups)]  # by group, the least important last
    for unit in order[keep[order] & space.removable[order]].flip(0).tolist():
        queues[int(space.group_of[unit])].append(unit)

    def cheapest(group: int, saved: Tensor) -> tuple[float, int, int] | None:
        """What the next units of a group cost in importance for what they save, the group, and how many they are."""
        width, step, least = int(live[group]), int(steps[group]), int(space.least[group])
        count = min((width - 1) % step + 1 if width > step else 1, width - least, len(queues[group]))
        gain, units = float(saved[group].sum()) * count, queues[group][-count:]
        return (float(importance[units].sum()) / gain, group, count) if count > 0 and gain > 0 else None

    while bool(((excess := costs.both(live) - allowed) > 0).any()):
        saved = (costs.both(live) - costs.each(live, -torch.ones_like(live))).double()  # [G, 2], of one unit
        saved = torch.where(excess > 0, saved / allowed, 0.0)
        target, gained = (excess.clamp(min=0).float() / allowed).double() / 10, torch.zeros(2, dtype=torch.float64)
        first = [cheapest(group, saved) for group in range(space.n_groups)]
        heap = [one for one in first if one is not None]
        heapify(heap)
        while heap and not (bool(gained.any()) and bool((gained >= target).all())):
            _, group, count = heap[0]
            keep[queues[group][-count:]] = False
            del queues[group][-count:]
            live[group] -= count
            gained += saved[group] * count
            following = cheapest(group, saved)
            heappop(heap) if following is None else heapreplace(heap, following)
        if not bool(gained.any()):
            raise BudgetError(f"no unit is left that could go, but {costs.both(live).tolist()} is above {allowed}")
    return keep


def fit(
    space: Space,
    costs: CostModel,
    keep: Tensor,
    score: Tensor,
    allowed: Tensor,
    steps: Tensor | None = None,
    thin: bool = False,
) -> Tensor:
    """The structure nearest to `keep` that uses the budget: never above it, and no removable unit fits any more.

    Drops units in order of rising score until the cost is within the limits. Then adds, in order of falling
    score, units that bring their group to the next multiple of its step, and fills what remains with single
    units of the groups where one costs the fewest FLOPs. One unit of every group stays, of layers none need to; units
    inside a layer that is left out cost nothing and stay as they are. With `thin` a layer may come with fewer of them.

    `keep`, bool [n], is where it starts, of `score`, float [n], higher ones stay longer, `allowed`, int64 [2], are
    limits (as in `View.limits`) known to be feasible, and `steps`, int64 [G], multiples at which widths are held; None:
    any width.
    """
    filling = _Filling(space, costs, keep, torch.argsort(score, stable=True).tolist(), allowed, steps)
    filling.drop()
    filling.fill()
    layers = {block.unit for block in space.blocks if thin and bool(space.removable[block.unit])}
    for layer in (unit for unit in reversed(filling.order) if unit in layers):
        if filling.enters_thin(layer):
            filling.fill()
    return filling.keep


class _Filling:
    """A structure on its way to the budget; units in `order`, the worst first."""

    def __init__(
        self, space: Space, costs: CostModel, keep: Tensor, order: list[int], allowed: Tensor, steps: Tensor | None
    ) -> None:
        self.costs, self.keep, self.order, self.allowed = costs, keep.clone(), order, allowed
        self.removable, self.owner, self.group_of = (x.tolist() for x in (space.removable, space.owner, space.group_of))
        self.floor, self.tally = space.least.tolist(), Tally(costs, costs.live(keep))
        self.steps = [1] * space.n_groups if steps is None else steps.tolist()
        self.absent: dict[int, list[int]] = {}  # by group, best first

    def drop(self) -> None:
        """Until the cost is within the limits."""
        present = self.keep.tolist()  # asking a tensor for one entry after the other takes far longer
        for unit in self.order:
            if self.tally.fits(self.allowed):
                break
            group = self.group_of[unit]
            if present[unit] and self.removable[unit] and self.tally.live[group] > self.floor[group]:
                self.keep[unit] = False
                self.tally.change(group, -1)

    def fill(self) -> None:
        """Until no unit fits."""
        best_first = [unit for unit in reversed(self.order) if not self.keep[unit]]
        self.absent = {}
        for unit in best_first:
            self.absent.setdefault(self.group_of[unit], []).append(unit)
        self._add(best_first, self.steps)
        live = torch.tensor(self.tally.live, dtype=torch.int64)
        flops = self.costs.each(live, torch.ones_like(live))[:, 1].tolist()
        cheapest_first = sorted((u for u in best_first if not self.keep[u]), key=lambda u: flops[self.group_of[u]])
        before = None
        while before is None or not torch.equal(before, self.keep):  # a layer that came in may have room inside
            before = self.keep.clone()
            self._add(cheapest_first, [1] * len(self.floor))

    def _add(self, candidates: list[int], steps: list[int]) -> None:
        """Bring the candidates' groups from step to step while that fits."""
        closed: set[int] = set()  # costs only grow, so a group that does not fit once never fits again
        for unit in candidates:
            group = self.group_of[unit]
            if group in closed or self.keep[unit] or not self._has_place(unit):
                continue
            count = min(steps[group] - self.tally.live[group] % steps[group], len(self.absent[group]))
            if self.tally.change(group, count, self.allowed):
                entering, self.absent[group] = self.absent[group][:count], self.absent[group][count:]
                self.keep[entering] = True
            else:
                closed.add(group)

    def _has_place(self, unit: int) -> bool:
        return self.owner[unit] < 0 or bool(self.keep[self.owner[unit]])

    def enters_thin(self, layer: int) -> bool:
        """Whether a layer that is left out fits with the fewest units inside; it then has those."""
        if self.keep[layer] or not self._has_place(layer):
            return False
        inside = [unit for unit in self.order if self.owner[unit] == layer and self.keep[unit]]
        surplus = {group: self.tally.live[group] - self.floor[group] for group in {self.group_of[u] for u in inside}}
        for group, count in surplus.items():
            self.tally.change(group, -count)
        if not self.tally.change(self.group_of[layer], 1, self.allowed):
            for group, count in surplus.items():
                self.tally.change(group, count)
            return False
        self.keep[layer] = True
        for group, count in surplus.items():
            leaving = [unit for unit in inside if self.group_of[unit] == group and self.removable[unit]]
            self.keep[torch.tensor(leaving[:count], dtype=torch.int64)] = False
        return True

"""Structures exactly at a budget, and structures that meet a planned cost."""

from __future__ import annotations

from heapq import heapify, heappop, heapreplace

import torch
from torch import Tensor

from ..errors import BudgetError
from ..renamed import renamed_arguments
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


@renamed_arguments(worth="importance")
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
        target, gained = (excess.clamp(min=0) / allowed).double() / 10, torch.zeros(2, dtype=torch.float64)
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
    space: Space, costs: CostModel, keep: Tensor, score: Tensor, limits: Limits, steps: Tensor | None = None
) -> Tensor:
    """The structure nearest to `keep` that uses the budget: never above it, and no removable unit fits any more.

    Drops units in order of rising score until the cost is within the limits. Then adds, in order of falling
    score, units that bring their group to the next multiple of its step, and fills what remains with single
    units of the groups where one costs the fewest FLOPs. One unit of every group stays, of layers none need to; units
    inside a layer that is left out cost nothing and stay as they are.

    Args:
        space: the space.
        costs: its cost model.
        keep: bool [n], the structure to start from.
        score: float [n]; units of higher score stay longer.
        limits: absolute limits, known to be feasible.
        steps: int64 [G], the multiple at which each group's width is held; 1, or None for all, for any width.
    """
    allowed, keep, owner = limits.tensor(), keep.clone(), space.owner.tolist()
    order = torch.argsort(score, stable=True).tolist()
    group_of, floor, tally = space.group_of.tolist(), space.least.tolist(), Tally(costs, costs.live(keep))
    droppable = (keep & space.removable).tolist()
    for unit in order:
        if tally.fits(allowed):
            break
        if droppable[unit] and tally.live[group_of[unit]] > floor[group_of[unit]]:
            keep[unit] = False
            tally.change(group_of[unit], -1)
    best_first = [unit for unit in reversed(order) if not keep[unit]]
    absent: dict[int, list[int]] = {}  # by group, best first; groups in the order of their best unit
    for unit in best_first:
        absent.setdefault(group_of[unit], []).append(unit)

    def add(candidates: list[int], steps: list[int]) -> None:
        """Bring the candidates' groups from step to step while that fits."""
        closed: set[int] = set()  # costs only grow, so a group that does not fit once never fits again
        for unit in candidates:
            group = group_of[unit]
            if group in closed or keep[unit] or (owner[unit] >= 0 and not keep[owner[unit]]):
                continue
            count = min(steps[group] - tally.live[group] % steps[group], len(absent[group]))
            if tally.change(group, count, allowed):
                entering, absent[group] = absent[group][:count], absent[group][count:]
                keep[entering] = True
            else:
                closed.add(group)

    ones = [1] * space.n_groups
    add(best_first, ones if steps is None else steps.tolist())
    live = torch.tensor(tally.live, dtype=torch.int64)
    flops = costs.each(live, torch.ones_like(live))[:, 1].tolist()
    cheapest_first = sorted((u for u in best_first if not keep[u]), key=lambda u: flops[group_of[u]])
    before = None
    while before is None or not torch.equal(before, keep):  # a layer that came in may have room inside
        before = keep.clone()
        add(cheapest_first, ones)
    return keep

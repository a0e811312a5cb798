"""Building blocks of policies, all pure functions: pools of units, plans of cost, and ways to meet a cost."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..structure.budget import aligned, fit, shed
from ..structure.limits import UNLIMITED
from ..structure.space import Space
from .policy import View

__all__ = [
    "SMALLEST_GATE",
    "aligned",
    "around",
    "deal",
    "evenly",
    "fit",
    "gap",
    "gumbel",
    "largest_share",
    "layers",
    "multiples",
    "one_per_group",
    "places",
    "pools",
    "running",
    "settled",
    "shed",
    "smallest",
    "spread",
    "staggered",
    "top_share",
    "trapezoid",
    "within",
]

MEMORY = 0.99
"""Of the running mean of importance, per step."""

SMALLEST_GATE = 1e-6
"""Gates are kept at or above this, so that a raw weight can always be told from its folded value in float32."""


def pools(space: Space) -> list[Tensor]:
    """Interchangeable units (ids, int64): those of a group, then the layers of a stage."""
    stages: dict[str, list[int]] = {}
    for block in space.blocks:
        stages.setdefault(block.stage, []).append(block.unit)
    units = torch.nonzero(~layers(space)).flatten()
    groups = space.group_of[units]
    sizes = torch.bincount(groups, minlength=space.n_groups).tolist()
    by_group = units[torch.argsort(groups, stable=True)].split(sizes)
    return [pool for pool in by_group if pool.numel()] + [torch.tensor(own) for own in stages.values()]


def none(space: Space) -> Tensor:
    """No unit at all, bool [n]."""
    return torch.zeros(space.n_units, dtype=torch.bool)


def one_per_group(space: Space, keep: Tensor, score: Tensor) -> Tensor:
    """`keep` (bool [n]), all that cannot be removed, and the best-scored unit of every group that then has none."""
    keep = keep | ~space.removable
    live = torch.bincount(space.group_of[keep], minlength=space.n_groups)
    empty = torch.nonzero(live < space.least).flatten()
    if empty.numel():
        order = torch.argsort(score, descending=True, stable=True)
        order = order[torch.argsort(space.group_of[order], stable=True)]  # group by group, the best first
        sizes = torch.bincount(space.group_of, minlength=space.n_groups)
        keep[order[(torch.cumsum(sizes, 0) - sizes)[empty]]] = True
    return keep


def smallest(space: Space, rank: Tensor) -> Tensor:
    """The unit of lowest rank of every group, no removable block, and all that cannot be removed; bool [n]."""
    return one_per_group(space, none(space), -rank)


def spread(view: View) -> Tensor:
    """A number in (0, 1) for every unit, float64 [n]: spread evenly over each pool, in random order."""
    found = torch.empty(view.space.n_units, dtype=torch.float64)
    for pool in pools(view.space):
        order = torch.randperm(pool.numel(), generator=view.generator).double()
        found[pool] = (order + torch.rand(1, generator=view.generator, dtype=torch.float64)) / pool.numel()
    return found


def staggered(view: View, layer_lag: float) -> Tensor:
    """Ranks in (0, 1), float64 [n], in random order: those up to p are the share p of every group, rounded down.

    Of a stage of n layers they are p^layer_lag n; stages alternate, the last one first, so one layer enters at a time.
    """
    is_layer, stages = layers(view.space), len({block.stage for block in view.space.blocks})
    found, turn = torch.empty(view.space.n_units, dtype=torch.float64), 0
    for pool in pools(view.space):
        order = torch.randperm(pool.numel(), generator=view.generator).double()
        torch.rand(1, generator=view.generator, dtype=torch.float64)  # keeps the draws of earlier versions
        is_stage = bool(is_layer[pool[0]])
        lag, late = (layer_lag, turn / stages) if is_stage else (1.0, 0.0)
        turn += is_stage
        found[pool] = ((order + 1 - late) / pool.numel() * (1 - 1e-9)) ** (1 / lag)
    return found


def multiples(space: Space, align: int) -> Tensor:
    """Multiples at which widths are held, int64 [groups]: `align` in groups of at least 2 x align units, else 1."""
    sizes = torch.bincount(space.group_of, minlength=space.n_groups)
    return torch.where(sizes >= 2 * align, align, 1)


def deal(space: Space, rank: Tensor, importance: Tensor, keep: Tensor) -> Tensor:
    """Re-rank the units of every pool: live units by falling importance, then the others."""
    ranked = rank.clone()
    for pool in pools(space):
        order = torch.argsort(rank[pool], stable=True)
        order = order[torch.argsort(importance[pool][order], descending=True, stable=True)]
        order = order[torch.argsort(keep[pool][order].int(), descending=True, stable=True)]
        ranked[pool[order]] = rank[pool].sort().values
    return ranked


def around(space: Space, rank: Tensor, start: Tensor | None) -> Tensor:
    """Ranks in (0, 1) that order each pool as before, but all units of a structure (bool [n]) before all others.

    So the share of units in the structure selects exactly the structure. None changes nothing.
    """
    if start is None:
        return rank
    found, middle = rank.clone(), float(start.double().mean())
    for pool in pools(space):
        for part, low, high in ((pool[start[pool]], 0.0, middle), (pool[~start[pool]], middle, 1.0)):
            place = (torch.arange(part.numel(), dtype=rank.dtype) + 0.5) / max(1, part.numel())
            found[part[torch.argsort(rank[part], stable=True)]] = low + (high - low) * place
    return found


def trapezoid(view: View, start: Tensor, peak: float, ramp: float, hold: float, final: int) -> Tensor:
    """Planned cost (int64 [2]) at `view.update`: a line up to the peak, flat, and a line down to the budget.

    Args:
        view: the run.
        start: cost of the seed, int64 [2].
        peak: the peak, as a multiple of the budget; at most the frame.
        ramp: share of the updates until it is reached.
        hold: share of the updates until it is left.
        final: the update at which the budget is reached.
    """
    frame, limited = view.cost(view.space.everything()), view.limits < UNLIMITED
    top = torch.minimum((view.limits.double() * peak).clamp(max=2.0**62).long(), frame.maximum(view.limits))
    rising = math.ceil(ramp * view.updates)
    falling = max(rising, math.ceil(hold * view.updates))
    begin, end, progress = start, top, min(1.0, view.update / max(1, rising))
    if view.update >= falling:
        begin, end, progress = top, view.limits, (view.update - falling) / max(1, final - falling)
    if view.update >= final:
        progress = 1.0
    return torch.where(limited, begin + ((end - begin).double() * progress).long(), view.limits)


def largest_share(view: View, ranks: Tensor, keep_at: Callable[[float], Tensor], allowed: Tensor) -> float:
    """The largest share whose structure costs no more than allowed (int64 [2]): exact, by bisection over all ranks.

    Args:
        view: the run.
        ranks: float64 [n]; shares between two ranks give the same structure.
        keep_at: structure by share; a larger share never drops a unit.
        allowed: parameters and FLOPs.
    """
    above = torch.nextafter(ranks.unique(), torch.tensor(torch.inf, dtype=torch.float64))
    shares = [0.0, *above.tolist()]
    low, high = 0, len(shares)
    while high - low > 1:
        middle = (low + high) // 2
        fits = bool((view.cost(keep_at(shares[middle])) <= allowed).all())
        low, high = (middle, high) if fits else (low, middle)
    return shares[low]


def within(
    view: View, ranks: Tensor, allowed: Tensor, steps: Tensor | None = None, most: Tensor | None = None
) -> tuple[Tensor, float]:
    """The units of rank below a share, and the share: the largest that costs no more than allowed (int64 [2]).

    Held at multiples of `steps` (int64 [groups]); `most`, float64 [n], is the largest share that counts for a unit.
    """
    must = smallest(view.space, ranks)

    def keep_at(share: float) -> Tensor:
        margin = (share if most is None else most.clamp(max=share)) - ranks
        keep = (margin > 0) | must
        return keep if steps is None or bool((steps == 1).all()) else aligned(view.space, keep, must, margin, steps)

    share = largest_share(view, ranks, keep_at, allowed)
    return keep_at(share), share


def top_share(view: View, ranks: Tensor, allowed: Tensor) -> Tensor:
    """The units of lowest rank, up to the largest rank that costs no more than allowed (int64 [2]); bool [n]."""
    return within(view, ranks, allowed)[0]


def settled(updates: int, share: float) -> int:
    """The last update that changes the structure, if it stays fixed for this share of them, at least for one."""
    return max(1, updates - max(1, math.ceil(share * updates)))


def places(space: Space) -> Tensor:
    """The place of every unit in its pool, in (0, 1), float64 [n]."""
    found = torch.empty(space.n_units, dtype=torch.float64)
    for pool in pools(space):
        found[pool] = (torch.arange(pool.numel(), dtype=found.dtype) + 0.5) / pool.numel()
    return found


def layers(space: Space) -> Tensor:
    """Which units are layers that may be left out, bool [n]."""
    found = none(space)
    found[[block.unit for block in space.blocks]] = True
    return found


def running(mean: Tensor, sensitivity: Tensor) -> Tensor:
    """The running mean of (dL/dm)^2 after one more step, by which units matter."""
    return MEMORY * mean + (1 - MEMORY) * sensitivity**2


def evenly(view: View) -> Tensor:
    """The first units of every pool, of all the same share, as many as the budget allows; bool [n]."""
    return top_share(view, places(view.space), view.limits)


def gap(view: View, keep: Tensor) -> float:
    """U - u_G of Eq 4, target less present sparsity; of two budgets the one nearer to being violated counts."""
    frame, now = view.cost(view.space.everything()).tolist(), view.cost(keep).tolist()
    costs = zip(view.limits.tolist(), frame, now, strict=True)
    return max(present / full - limit / full for limit, full, present in costs if limit < UNLIMITED and full)


def gumbel(view: View) -> Tensor:
    """The difference of two Gumbel variables for every unit, float64 [n]; a new draw."""
    uniform = torch.rand(2, view.space.n_units, generator=view.generator, dtype=torch.float64)
    drawn = -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-12)))
    return drawn[1] - drawn[0]

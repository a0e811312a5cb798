"""Grow once, late: a small network trains for most of the run, then grows to the budget.

The cheap steps come first. The learning rate should stay constant until after the growth and fall then
(`torchgrow.warmup_stable_decay`). Compare with the final structure, trained from scratch with as many FLOPs.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..renamed import frames_to_user
from .kit import around, fit, layers, none, one_per_group, places, pools, top_share
from .policy import NEWBORNS, Policy, View


@dataclass(eq=False)
class Late(Policy):
    """Hold a small structure, grow once to the budget, train on.

    The structure at the budget has the same share p of every group, and p^layer_lag of the layers of every stage. The
    small one is a part of it: the units that live go on, and no group gets more than twice as many with the default.

    SPARKLING (arXiv 2602.02472) doubles widths at half of the training, zero/one-layer expansion (arXiv 2511.04981)
    adds layers at 0.8 of it. `newborns="silent"` is the way of Net2Net (arXiv 1511.05641).

    Attributes:
        until: share of the updates in which the structure is small.
        factor: in groups: how many times wider the structure at the budget is at most.
        grow: "width": groups, all layers are there from the start; "layers": those that may be left out come late,
            groups have their widths from the start; "both".
        layer_lag: as of `Default`.
        newborns: as of `Policy`.
        grown: bool [n], the structure at the budget.
    """

    until: float = 0.5
    factor: float = 2.0
    grow: str = "width"
    layer_lag: float = 3.0
    newborns: str = "fresh"

    def __post_init__(self) -> None:
        self.check(until=(0, 1), factor=(1, 1e6), layer_lag=(1, 1e3))
        self.check(grow=("width", "layers", "both"), newborns=NEWBORNS)

    def seed(self, view: View) -> Tensor:
        """The small structure; of a run with a start the grown one has it, as far as the budget holds."""
        self.rank = self._ranks(view)
        keep = top_share(view, self.rank, view.limits)
        self.grown = fit(view.space, view.costs, keep, -self.rank, view.limits)
        if view.start is not None:
            return view.start
        small = self._small(view)
        if torch.equal(small, self.grown):
            warnings.warn(
                f"Late(grow={self.grow!r}, factor={self.factor:g}) grows nothing here: it begins with all that it may "
                "have; let layers be left out (depth=True), or give another grow, factor or budget",
                stacklevel=frames_to_user(),
            )
        return small

    def update(self, view: View) -> tuple[Tensor, bool]:
        """The small structure, then the grown one."""
        grown = view.update >= self.final(view.updates)
        return (self.grown, True) if grown else (view.keep, False)

    def score(self, view: View) -> Tensor:
        """Units of the grown structure first, in the order of ranks."""
        return 2.0 * self.grown - self.rank

    def target(self, view: View) -> Tensor:
        """The structure at the budget."""
        return self.grown

    def planned(self, view: View) -> Tensor:
        """The small structure's cost, then that of the one at the budget."""
        small = self._small(view) if view.start is None else view.start
        return view.cost(self.grown if view.update >= self.final(view.updates) else small)

    def final(self, updates: int) -> int:
        """The update that grows."""
        return max(1, min(updates - 1, math.ceil(self.until * updates)))

    def check_state(self, state: dict[str, Any], events: int) -> str:
        """A structure that no run reaches."""
        fine = bool((state["rank"] >= 0).all() and (state["rank"] <= 1).all()) and state["grown"].dtype == torch.bool
        return "" if fine else "rank must lie in [0, 1], grown be a structure"

    def _ranks(self, view: View) -> Tensor:
        """A number in (0, 1) for every unit by its place in its pool; those that a run starts with come first."""
        place = places(view.space)
        rank = torch.where(layers(view.space), place ** (1 / self.layer_lag), place)
        return around(view.space, rank, view.start)

    def _small(self, view: View) -> Tensor:
        """The part of the grown one that the run begins with: of groups the first ones, at least 1 / factor of them."""
        space, small = view.space, none(view.space)
        is_layer = layers(space)
        for pool in pools(space):
            own = pool[self.grown[pool]]
            own = own[torch.argsort(self.rank[own], stable=True)]
            first = own.numel()
            if bool(is_layer[pool[0]]):
                first = 0 if self.grow != "width" else first
            elif self.grow != "layers":
                first = math.ceil(first / self.factor)
            small[own[:first]] = True
        return one_per_group(space, small, -self.rank)

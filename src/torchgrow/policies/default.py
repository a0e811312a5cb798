"""The default, top to bottom: grow all groups evenly beyond the budget, then give up the least important units.

One number decides, the share p: every pool (a group, or the layers of a stage) keeps its p best-ranked units, where p
is the largest whose cost stays under the plan. Units are re-ranked by importance at every update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .kit import around, deal, layers, multiples, running, settled, shed, smallest, staggered, trapezoid, within
from .policy import Policy, View


@dataclass(eq=False)
class Default(Policy):
    """Even growth along a planned cost. How it was found, and what each ingredient is worth: docs/log.md.

    Attributes:
        ramp: share of the updates in which the planned cost rises from the seed to its peak.
        peak: the peak, as a multiple of the budget; at most the frame. Layers go along only as far as the budget holds.
        hold: share of the updates after which the planned cost falls to the budget.
        settle: share of the updates at the end in which the structure no longer changes.
        layer_lag: where every group has the share p of its units, every stage has p^layer_lag of its layers. 3 suits a
            frame as deep as networks one would train, 16 one far deeper than that.
        prune: what goes where the plan falls: "alike": the same share of every group; "worth": by importance per cost.
        align: widths of groups with at least 2 x align units are held at multiples of it, or below it.
        rank: in its pool, in (0, 1), the best lowest, float64 [n].
        importance: running mean of (dL/dm)^2 (Molchanov et al., 2019), from 0 when a unit enters on, float64 [n]: one
            that has lived for less than some 100 steps counts less than it is worth.
    """

    ramp: float = 0.03
    peak: float = 1.35
    hold: float = 0.45
    settle: float = 0.4
    layer_lag: float = 3.0
    prune: str = "alike"
    align: int = 1
    sensitive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check(ramp=(0, 1), hold=(0, 1), settle=(0, 1), prune=("alike", "worth"))
        self.check(peak=(1, 1e6), layer_lag=(1, 1e3), align=(1, 4096))

    def seed(self, view: View) -> Tensor:
        """One unit per group, no layer that can be left out; ranks in random order."""
        space = view.space
        self.rank = around(space, staggered(view, self.layer_lag), view.start)
        self.importance, grown = torch.zeros_like(self.rank), layers(space)
        self.multiples = self._steps = multiples(space, self.align)
        self._most = torch.ones_like(self.rank)  # a layer beyond the budget would be trained only to be removed again
        self._most[grown] = within(view, self.rank, view.limits, self._steps, self._most)[1] if space.blocks else 1.0
        seed = smallest(space, self.rank) if view.start is None else view.start
        self._start = view.cost(seed)
        return seed

    def step(self, view: View, sensitivity: Tensor) -> None:
        """Update the running mean of importance."""
        self.importance = running(self.importance, sensitivity)

    def update(self, view: View) -> tuple[Tensor, bool]:
        """The largest structure within the plan: live units by importance, then others."""
        final = self.final(view.updates)
        if view.update > final:
            return view.keep, False
        self.importance = torch.where(view.space.present(view.keep), self.importance, 0.0)
        self.rank = deal(view.space, self.rank, self.importance, view.keep)
        exactly = torch.equal(planned := self.planned(view), view.limits) or view.update == final
        if self.prune == "worth" and bool((view.cost(view.keep) > planned).any()):
            return shed(view.space, view.costs, view.keep, self.importance.sqrt(), planned, self._steps), exactly
        return within(view, self.rank, planned, self._steps, self._most)[0], exactly

    def score(self, view: View) -> Tensor:
        """The lower the rank, the longer a unit stays."""
        return -self.rank

    def target(self, view: View) -> Tensor:
        """The best-ranked units now, at the budget."""
        return within(view, self.rank, view.limits, self._steps, self._most)[0]

    def planned(self, view: View) -> Tensor:
        """Up to the peak, along it, and down to the budget."""
        return trapezoid(view, self._start, self.peak, self.ramp, self.hold, self.final(view.updates))

    def final(self, updates: int) -> int:
        """Where the structure settles."""
        return settled(updates, self.settle)

    def check_state(self, state: dict[str, Any], events: int) -> str:
        """Numbers that no run reaches."""
        fine = bool((state["rank"] >= 0).all() and (state["rank"] <= 1).all() and (state["importance"] >= 0).all())
        return "" if fine else "rank must lie in [0, 1], importance must not be negative"

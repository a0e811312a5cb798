"""The paper's random baseline (its Table 5): nothing is learned about any unit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .kit import settled, smallest, spread, top_share
from .policy import Policy, View


@dataclass(eq=False)
class Random(Policy):
    """Every update draws all units with one probability, at which the draw costs what the budget allows.

    Attributes:
        settle: share of the updates at the end in which the structure no longer changes; at least the last one.
        drawn: a uniform number for every unit, float64 [n].
    """

    settle: float = 0.0

    def seed(self, view: View) -> Tensor:
        """One unit per group, at random."""
        self.drawn = spread(view)
        return smallest(view.space, self.drawn)

    def update(self, view: View) -> tuple[Tensor, bool]:
        """A draw at the budget, topped up to it exactly."""
        if view.update > self.final(view.updates):
            return view.keep, False
        self.drawn = torch.rand(view.space.n_units, generator=view.generator, dtype=torch.float64)
        return top_share(view, self.drawn, view.limits), True

    def score(self, view: View) -> Tensor:
        """The lower the draw, the longer a unit stays."""
        return -self.drawn

    def planned(self, view: View) -> Tensor:
        """The budget, from the first update on."""
        return view.limits if view.update else view.cost(view.keep)

    def final(self, updates: int) -> int:
        """The last update before the structure settles."""
        return settled(updates, self.settle)

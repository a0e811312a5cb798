"""Pruning a trained network to a budget, top to bottom: the least important units leave along a planned cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import TorchgrowError
from .importance import IMPORTANCES, levelled, steepness
from .kit import around, deal, multiples, running, shed, within
from .policy import Policy, View


@dataclass(eq=False)
class Shrink(Policy):
    """Start from the whole network or a part of it, and remove the least important units until the budget is met.

    The cost of the network follows budget + (start - budget) (1 - x)^power, where x goes from 0 to 1 while the plan
    falls (Zhu and Gupta, 2017, Eq 1, for power 3). How the defaults were found: docs/log.md.

    Attributes:
        until: share of the updates in which the plan falls; from then on the structure is final.
        power: see above; 1 falls evenly, more removes most at first, when the least important units are there.
        importance: what says how much a unit matters, of `torchgrow.policies.importance`: "taylor", "l1", "l2",
            "group_norm", "bn_scale", "random".
        allocation: what goes, of groups and layers: "uniform": the same share of each; "global": the least importance
            for the parameters or FLOPs that go with it; "levelled": as "global", with importance divided by its
            mean in the group; "measured": as "global", with how much the loss rises, as `rises` says.
        rises: for "measured": the rise of the loss when a tenth of a group goes, by the names of `Grower.widths`, and
            of the layers of a stage, by those of `Grower.depths`: what `torchgrow.measure_rises` gives. The rise is
            taken to grow with the square of the share that went.
        align: widths of groups with at least 2 x align units are held at multiples of it, or below it.
        rank: in its pool, in (0, 1), the best lowest, float64 [n].
        squared: running mean of (dL/dm)^2 over the steps in which a unit lived, float64 [n].
    """

    until: float = 0.2
    power: float = 3.0
    importance: str = "taylor"
    allocation: str = "uniform"
    align: int = 1
    rises: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        self.check(until=(0, 1), power=(0.1, 10), importance=tuple(IMPORTANCES), align=(1, 4096))
        self.check(allocation=("uniform", "global", "levelled", "measured"))
        if (self.allocation == "measured") != (self.rises is not None):
            raise TorchgrowError(
                f"Shrink(allocation={self.allocation!r}, rises={'given' if self.rises else None}): rises and "
                'allocation="measured" go together: rises = torchgrow.measure_rises(model, example_inputs, evaluate), '
                'then Shrink(allocation="measured", rises=rises)'
            )
        for name, rise in (self.rises or {}).items():
            if not isinstance(rise, (int, float)) or not math.isfinite(rise):
                raise TorchgrowError(f"rises[{name!r}] is {rise!r}, it must be a finite number, as measure_rises gives")

    @property
    def sensitive(self) -> bool:  # type: ignore[override]
        """Only if importance needs gradients."""
        return self.importance == "taylor"

    def seed(self, view: View) -> Tensor:
        """The whole frame, unless the run has a start."""
        space = view.space
        self.rank, self.squared = (torch.zeros(space.n_units, dtype=torch.float64) for _ in range(2))
        start = space.everything() if view.start is None else view.start
        self.rank = around(space, self.rank, start)
        self.multiples = self._steps = multiples(space, self.align)
        self._start = view.cost(start)
        return start

    def step(self, view: View, sensitivity: Tensor) -> None:
        """Update the running mean."""
        self.squared = running(self.squared, sensitivity)

    def update(self, view: View) -> tuple[Tensor, bool]:
        """The most important live units that cost no more than planned."""
        if view.update > (final := self.final(view.updates)):
            return view.keep, False
        importance = IMPORTANCES[self.importance](view, self.squared)
        self.squared = torch.where(view.space.present(view.keep), self.squared, 0.0)
        self.rank = deal(view.space, self.rank, importance, view.keep)
        planned = self.planned(view)
        if self.allocation == "uniform":
            return within(view, self.rank, planned, self._steps)[0], view.update == final
        importance = importance.sqrt() if self.importance == "taylor" else importance
        importance = levelled(view, importance) if self.allocation == "levelled" else importance
        importance = steepness(view, self.rank, self.rises) if self.rises is not None else importance
        return shed(view.space, view.costs, view.keep, importance, planned, self._steps), view.update == final

    def score(self, view: View) -> Tensor:
        """The more important, the longer a unit stays; by importance now, as the run may end before an update."""
        importance = IMPORTANCES[self.importance](view, self.squared)
        return -deal(view.space, self.rank, importance, view.keep)

    def planned(self, view: View) -> Tensor:
        """From the start down to the budget; a cost that is within it already stays free up to it."""
        left = max(0.0, 1 - view.update / self.final(view.updates)) ** self.power
        return view.limits + ((self._start - view.limits).clamp(min=0).double() * left).long()

    def final(self, updates: int) -> int:
        """The update at which the plan meets the budget."""
        return max(1, min(updates - 1, math.ceil(self.until * updates)))

    def check_state(self, state: dict[str, Any], events: int) -> str:
        """Numbers that no run reaches."""
        fine = bool((state["rank"] >= 0).all() and (state["rank"] <= 1).all() and (state["squared"] >= 0).all())
        return "" if fine else "rank must lie in [0, 1], squared must not be negative"

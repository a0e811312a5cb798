"""A policy of the tests: gates that are trained as in Eq 6, while a planned cost alone says how much lives.

It makes runs with gates that grow as told, whatever is learned. All indicators are shifted by the one number for which
the cost follows the plan. It is also a policy that nothing in the library knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchgrow.policies import Policy, View
from torchgrow.policies.kit import (
    SMALLEST_GATE,
    aligned,
    deal,
    multiples,
    settled,
    shed,
    smallest,
    spread,
    staggered,
    trapezoid,
)

SPAN = 200.0
MEMORY = 0.99


@dataclass(eq=False)
class Planned(Policy):
    """A unit lives where sigma(beta (s + shift)) exceeds its own number in (0, 1).

    Attributes:
        ramp, peak, hold, settle, prune, align, layer_lag: as of `Default`.
        ranked: whether the numbers are dealt anew in every update, the lowest to the most important units.
        final_inverse_temperature, lr, momentum, weight_decay: as of `Paper`.
    """

    ramp: float = 0.1
    peak: float = 1.0
    hold: float = 0.1
    settle: float = 0.0
    prune: str = "alike"
    align: int = 1
    layer_lag: float = 1.0
    ranked: bool = False
    final_inverse_temperature: float = 100.0
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-6
    sensitive: ClassVar[bool] = True

    def seed(self, view: View) -> Tensor:
        space, self.pressure = view.space, 0.0
        self.gamma = self.final_inverse_temperature ** (1 / view.updates)
        self.s, self.velocity, self.importance = (torch.zeros(space.n_units, dtype=torch.float64) for _ in range(3))
        self.t = torch.zeros(space.n_units, dtype=torch.int64)
        self.own = staggered(view, self.layer_lag) if self.ranked else spread(view)
        self._removable, self.multiples = space.removable, multiples(space, self.align)
        self.most = torch.ones_like(self.s)
        self._heated()
        layers = [block.unit for block in space.blocks]
        if layers and self.ranked:  # no more layers than the budget holds
            shift = self._shifted(view, view.limits)[0]
            self.most[layers] = torch.sigmoid(self.beta * (self.s + shift))[layers]
        seed = smallest(space, self.own)
        self._start = view.cost(seed)
        return seed

    def step(self, view: View, sensitivity: Tensor) -> None:
        assert self.gate is not None
        gradient = self.beta * (1 - self.gate) * sensitivity + self.weight_decay * self.s
        self.importance = MEMORY * self.importance + (1 - MEMORY) * sensitivity**2
        self.velocity = self.momentum * self.velocity + gradient
        self.s = self.s - self.lr * view.rate * self.velocity
        self._heated()

    def update(self, view: View) -> tuple[Tensor, bool]:
        if view.update > self.final(view.updates):
            return view.keep, False
        self.importance = torch.where(view.space.present(view.keep), self.importance, 0.0)
        if self.ranked:
            self.own = deal(view.space, self.own, self.importance, view.keep)
        planned = self.planned(view)
        exactly = view.update == self.final(view.updates) or torch.equal(planned, view.limits)
        if self.prune == "worth" and bool((view.cost(view.keep) > planned).any()):
            assert self.multiples is not None
            return shed(view.space, view.costs, view.keep, self.importance.sqrt(), planned, self.multiples), exactly
        self.pressure, keep = self._shifted(view, planned)  # in the history, for those who follow it
        self.s = self.s + self.pressure
        return keep, exactly

    def applied(self, view: View) -> None:
        if view.update:
            self.t = self.t + view.space.present(view.keep).long()
        self._heated()

    def score(self, view: View) -> Tensor:
        return torch.sigmoid(self.beta * self.s) - self.own

    def planned(self, view: View) -> Tensor:
        return trapezoid(view, self._start, self.peak, self.ramp, self.hold, self.final(view.updates))

    def final(self, updates: int) -> int:
        return settled(updates, self.settle)

    def check_state(self, state: dict[str, Any], events: int) -> str:
        return "" if bool((state["t"] >= 0).all() and (state["t"] <= events).all()) else "t must lie in the run"

    def _heated(self) -> None:
        self.beta = self.temperature = self.gamma ** self.t.double()
        gate = torch.sigmoid(self.beta * self.s).clamp(min=SMALLEST_GATE)
        self.gate = torch.where(self._removable, gate, 1.0)

    def _shifted(self, view: View, allowed: Tensor) -> tuple[float, Tensor]:
        """The largest shift whose structure is allowed, to 1e-6; where all fits, the smallest that lets all in."""
        must = smallest(view.space, self.own - torch.sigmoid(self.beta * self.s))

        def keep_at(shift: float) -> Tensor:
            margin = torch.sigmoid(self.beta * (self.s + shift)).minimum(self.most) - self.own
            assert self.multiples is not None
            return aligned(view.space, (margin > 0) | must, must, margin, self.multiples)

        low, high = -SPAN, SPAN
        best, most = keep_at(low), keep_at(high)
        if torch.equal(best, most):
            return 0.0, most
        everything = bool((view.cost(most) <= allowed).all())
        while high - low > 1e-6:
            middle = (low + high) / 2
            keep = keep_at(middle)
            if not torch.equal(keep, most) if everything else bool((view.cost(keep) <= allowed).all()):
                low, best = middle, keep
            else:
                high = middle
        return (high, most) if everything else (low, best)

"""Deprecated combinations of the settings of `Method`: indicators moved by a penalty or by a plan."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import TorchgrowError
from ..structure.budget import largest_shift, shed
from .indicators import Indicators, Method
from .kit import gap, settled, trapezoid
from .policy import Policy, View


class Combined(Policy):
    """A `Method` as a policy.

    Args:
        method: its settings.
    """

    sensitive: ClassVar[bool] = True

    def __init__(self, method: Method) -> None:
        self.method = method

    def seed(self, view: View) -> Tensor:
        """One unit per group."""
        method, space = self.method, view.space
        if view.start is not None:
            raise TorchgrowError(
                "a Method, or a preset that no policy of torchgrow.policies says, begins with a seed only; with start= "
                "give policy=torchgrow.policies.Shrink(), Default() or Paper()"
            )
        self.indicators = own = Indicators(space, method, view.updates, view.generator)
        self.lambda_share = torch.ones(space.n_units, dtype=torch.float64)  # of lambda_1, by unit
        for block in space.blocks:
            self.lambda_share[block.unit] = method.layer_lambda_base / (method.lambda_base or 1.0)
        if space.blocks and method.draws == "ranked":
            # The peak widens the layers that the budget holds: further ones would be trained only to be removed again.
            own.hold_layers(largest_shift(own.shifted(), view.costs, view.limits)[0])
        seed = own.seed_structure()
        self._start = view.cost(seed)
        return seed

    def step(self, view: View, sensitivity: Tensor) -> None:
        """A step of the indicators."""
        self.indicators.generator = view.generator
        self.indicators.step(sensitivity, self.penalty, view.rate)

    def update(self, view: View) -> tuple[Tensor, bool]:
        """Shifted along a plan, or drawn under a penalty."""
        own, method, final = self.indicators, self.method, self.final(view.updates)
        own.generator = view.generator
        if view.update > final:
            return view.keep, False
        own.rank(view.keep)
        planned = self.planned(view)
        if planned is None:
            return own.draw(), view.update == final
        exactly = view.update == final or torch.equal(planned, view.limits)
        if method.prune == "worth" and bool((view.cost(view.keep) > planned).any()):
            return shed(view.space, view.costs, view.keep, own.worth.sqrt(), planned, own.steps), exactly
        self.pressure, keep = largest_shift(own.shifted(), view.costs, planned)
        own.shift(self.pressure)
        return keep, exactly

    def applied(self, view: View) -> None:
        """Temperatures rise; the penalty until the next update."""
        if view.update:
            self.indicators.advance(view.keep, view.rate)
        if self.method.controller == "pressure":
            self.pressure = self.method.lambda_base * gap(view, view.keep)
        self.penalty = (self.pressure if self.method.controller == "pressure" else 0.0) * self.lambda_share

    def score(self, view: View) -> Tensor:
        """Probability minus draw."""
        return self.indicators.score()

    def planned(self, view: View) -> Tensor | None:
        """With controller "plan"."""
        method = self.method
        if method.controller != "plan":
            return None
        return trapezoid(view, self._start, method.peak, method.ramp, method.hold, self.final(view.updates))

    def final(self, updates: int) -> int:
        """Where the structure settles."""
        return settled(updates, self.method.settle)

    @property
    def gate(self) -> Tensor | None:  # type: ignore[override]
        """None where present units count in full."""
        return self.indicators.gate if self.method.gates else None

    @property
    def multiples(self) -> Tensor | None:  # type: ignore[override]
        """Those of the indicators."""
        return self.indicators.steps

    @property
    def temperature(self) -> Tensor | None:  # type: ignore[override]
        """Beta of every unit."""
        return self.indicators.beta

    def settings(self) -> dict[str, Any]:
        """The fields of the method."""
        return asdict(self.method)

    def state_dict(self) -> dict[str, Any]:
        """State of the indicators."""
        return {**self.indicators.state_dict(), "pressure": self.pressure}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Temperatures, gates and penalty follow."""
        self.pressure = state["pressure"]
        self.indicators = self.indicators.loaded(state)
        self.penalty = (self.pressure if self.method.controller == "pressure" else 0.0) * self.lambda_share

    def check_state(self, state: dict[str, Any], events: int) -> str:
        """Numbers that no run reaches."""
        for key in ("t", "exponent"):
            if bool(((state[key] < 0) | (state[key] > events)).any()):
                return f"{key} must lie in [0, {events}], the number of updates"
        if bool(((state["uniform"] < 0) | (state["uniform"] > 1)).any()):
            return "uniform must lie in [0, 1]"
        return "worth must not be negative" if bool((state["worth"] < 0).any()) else ""

    def copied(self) -> Combined:
        """With indicators of its own."""
        other = Combined(self.method)
        vars(other).update({**vars(self), "indicators": self.indicators.copy()})
        return other


def policy_of(method: Method) -> Policy:
    """The policy that equals a method; `Combined` if there is no other."""
    from .default import Default
    from .paper import Paper
    from .random import Random

    if method.literal:
        return Paper(
            lambda_base=method.lambda_base,
            layer_lambda_base=method.layer_lambda_base,
            penalised=method.penalised,
            start=method.start,
            paced=method.paced,
            final_inverse_temperature=method.heat,
            temperature_rises=method.temperature,
            relaxation=method.relaxation,
            settle=method.settle,
            lr=method.lr,
            momentum=method.momentum,
            weight_decay=method.weight_decay,
        )
    if method.controller == "plan" and method.draws == "ranked" and not method.gates and method.heat == 1:
        names = ("ramp", "peak", "hold", "settle", "layer_lag", "prune", "align")
        return Default(**{name: getattr(method, name) for name in names})
    at_once = method.ramp == 0 and method.peak == 1 and method.align == 1 and method.heat == 1
    if method.controller == "plan" and method.draws == "independent" and not method.gates and at_once:
        return Random(settle=method.settle)
    return Combined(method)

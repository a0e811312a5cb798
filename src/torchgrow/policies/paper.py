"""The paper, top to bottom (arXiv 2007.15353): Eq 4, 6, 7, 8 and Algorithm 1, in its order and letters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .kit import gap, none, one_per_group, pools, settled, spread
from .policy import Policy, View

SMALLEST_GATE = 1e-6
"""Gates are kept at or above this, so that a raw weight can always be told from its folded value in float32."""


@dataclass(eq=False)
class Paper(Policy):
    """One trainable indicator s per unit, gates m = sigma(beta s), structures q ~ Bernoulli(m).

    Attributes:
        lambda_base: lambda_1^base of Eq 4; None: 1.0 where layers grow too, else 0.5. Searches (4.3) use 2.0.
        layer_lambda_base: lambda_2^base, the same for layers.
        heat: gamma^T, how often beta is multiplied over the run for a unit that is always present.
        temperature_rises: when: "unit": in updates in which the unit is present (Eq 7); "global": in every one, for
            all alike; "learning_rate": as "unit", each time by gamma^(present / initial learning rate) (A.10).
        relaxation: "sigmoid": m = sigma(beta s); "gumbel": m = sigma(beta (s + g_1 - g_0)), with noise g (3.2).
        settle: share of the updates at the end in which the structure no longer changes; at least the last one.
        lr: learning rate of s; it follows the weights' schedule.
        momentum: of SGD on s.
        weight_decay: of s.
        s: indicators, float64 [n]; `velocity` is their momentum buffer.
        t: updates in which the unit was present, int64 [n].
        beta: temperature, gamma^exponent, float64 [n].
    """

    lambda_base: float | None = None
    layer_lambda_base: float = 0.1
    heat: float = 100.0
    temperature_rises: str = "unit"
    relaxation: str = "sigmoid"
    settle: float = 0.0
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-6
    sensitive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check(settle=(0, 1), momentum=(0, 1), heat=(1, 1e6), lr=(0, 1e3), relaxation=("sigmoid", "gumbel"))
        self.check(temperature_rises=("unit", "global", "learning_rate"))

    def seed(self, view: View) -> Tensor:
        """One unit per group, at random."""
        space, n = view.space, view.space.n_units
        self.s, self.velocity, self.exponent, self.noise = (torch.zeros(n, dtype=torch.float64) for _ in range(4))
        self.t, self._removable = none(space).long(), space.removable
        for pool in pools(space):  # sum sigma(s) = 1: one unit expected per group, and layer per stage
            self.s[pool] = torch.logit(torch.tensor(1 / pool.numel(), dtype=torch.float64).clamp(max=0.5))
        base = self.lambda_base if self.lambda_base is not None else 1.0 if space.slots else 0.5
        self._base, self.lambda_share = base, torch.ones(n, dtype=torch.float64)  # of lambda_1, by unit
        self.lambda_share[[slot.unit for slot in space.slots]] = self.layer_lambda_base / (base or 1.0)
        self.gamma = self.heat ** (1 / max(view.updates, 1))
        self._set_gates()
        return one_per_group(space, none(space), -spread(view))

    def step(self, view: View, sensitivity: Tensor) -> None:
        """Eq 6 and 8: one step of SGD on L(m w) + lambda |m|, where dL/ds = beta (1 - m) m dL/dm."""
        assert self.gate is not None
        slope = self.beta * (1 - self.gate)
        gradient = slope * (sensitivity + self.penalty * self.gate) + self.weight_decay * self.s
        self.velocity = self.momentum * self.velocity + gradient
        self.s = self.s - self.lr * view.rate * self.velocity
        if self.relaxation == "gumbel":
            uniform = torch.rand(2, self.s.numel(), generator=view.generator, dtype=torch.float64)
            gumbel = -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-12)))
            self.noise = gumbel[1] - gumbel[0]
        self._set_gates()

    def update(self, view: View) -> tuple[Tensor, bool]:
        """Algorithm 1: q ~ Bernoulli(m), for all units anew; in the end exactly to the budget."""
        if view.update > self.final(view.updates):
            return view.keep, False
        probability = self.score(view)
        drawn = torch.rand(self.s.numel(), generator=view.generator, dtype=torch.float64) < probability
        return one_per_group(view.space, drawn, probability), view.update == self.final(view.updates)

    def applied(self, view: View) -> None:
        """Eq 7: the temperature of what is present rises. Eq 4: the pressure until the next update."""
        if view.update:
            present = view.space.present(view.keep)
            rise = torch.ones_like(self.s) if self.temperature_rises == "global" else present.double()
            self.t = self.t + present.long()
            self.exponent = self.exponent + rise * (view.rate if self.temperature_rises == "learning_rate" else 1.0)
            self._set_gates()
        self.pressure = self._base * gap(view, view.keep)
        self.penalty = self.pressure * self.lambda_share

    def score(self, view: View) -> Tensor:
        """The probability of every unit, sigma(beta s)."""
        return torch.sigmoid(self.beta * self.s)

    def final(self, updates: int) -> int:
        """T - 1, or earlier where the structure settles."""
        return settled(updates, self.settle)

    def check_state(self, state: dict[str, Any], events: int) -> str:
        """Counters beyond the number of updates."""
        wrong = [key for key in ("t", "exponent") if bool(((state[key] < 0) | (state[key] > events)).any())]
        return f"{wrong[0]} must lie in [0, {events}], the number of updates" if wrong else ""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Gates follow from what is stored."""
        super().load_state_dict(state)
        self._set_gates()

    def _set_gates(self) -> None:
        self.beta = self.temperature = self.gamma**self.exponent
        gate = torch.sigmoid(self.beta * (self.s + self.noise)).clamp(min=SMALLEST_GATE)
        self.gate = torch.where(self._removable, gate, 1.0)

"""The paper, top to bottom (arXiv 2007.15353): Eq 4, 6, 7, 8 and Algorithm 1; what it leaves open: docs/paper.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .kit import SMALLEST_GATE, gap, gumbel, layers, none, one_per_group, settled, smallest, spread
from .pace import pace, starts
from .policy import Policy, View


@dataclass(eq=False)
class Paper(Policy):
    """One trainable indicator s per unit, gates m = sigma(beta s), structures q ~ Bernoulli(m).

    Attributes:
        lambda_base, layer_lambda_base: of Eq 4, for channels (None: 0.5, or 1.0 where layers grow too) and layers.
        penalised: whose gates the L1 norm of Eq 6 sums: "present": of the network that is trained; "all": of all units.
        start: at first m = size^-start, in a group of that size or a stage of so many layers; 1: one unit expected.
        paced: whether a run shorter than the paper's goes through its course faster (docs/paper.md).
        final_inverse_temperature: gamma^T, beta at the end of the run of a unit that is always present.
        temperature_rises: when: "unit": in updates in which the unit is present (Eq 7); "global": in every one, for
            all alike; "learning_rate": as "unit", each time by gamma^(present / initial learning rate) (A.10).
        relaxation: "sigmoid": m = sigma(beta s); "gumbel": m = sigma(beta (s + g_1 - g_0)), with noise g (3.2).
        settle: share of the updates at the end in which the structure no longer changes; at least the last one.
        lr, momentum, weight_decay: of SGD on s, whose rate follows the weights' schedule.
        s, velocity, t, beta: indicators, their momentum, updates in which the unit was present, temperatures; each [n].
    """

    lambda_base: float | None = None
    layer_lambda_base: float = 0.1
    penalised: str = "present"
    start: float = 0.5
    paced: bool = True
    final_inverse_temperature: float = 100.0
    temperature_rises: str = "unit"
    relaxation: str = "sigmoid"
    settle: float = 0.0
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-6
    sensitive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check(settle=(0, 1), momentum=(0, 1), final_inverse_temperature=(1, 1e6), lr=(0, 1e3))
        self.check(penalised=("present", "all"), start=(0, 10), paced=(True, False), relaxation=("sigmoid", "gumbel"))
        self.check(temperature_rises=("unit", "global", "learning_rate"), weight_decay=(0, 1e3))
        self.check(lambda_base=(0, 1e6), layer_lambda_base=(0, 1e6))

    def seed(self, view: View) -> Tensor:
        """One unit per group, at random."""
        space, self.steps, self.pace = view.space, 0, 0.0 if self.paced else 1.0  # 0: not known yet
        self.s, self.t, self._removable = starts(view, self.start, self.paced), none(space).long(), space.removable
        self.velocity, self.exponent, self.noise = (torch.zeros_like(self.s) for _ in range(3))
        base = self.lambda_base if self.lambda_base is not None else 1.0 if space.blocks else 0.5
        self._base, self.lambda_share = base, torch.ones_like(self.s)  # of lambda_1, by unit
        self.lambda_share[layers(space)] = self.layer_lambda_base / (base or 1.0)
        self.gamma = self.final_inverse_temperature ** (1 / max(view.updates, 1))
        return smallest(space, spread(view))

    def step(self, view: View, sensitivity: Tensor) -> None:
        """One step of SGD on s, or in a short run several of the paper's."""
        self.steps += not self.pace
        self._move(view, sensitivity, self.pace or 1.0)
        if self.relaxation == "gumbel":
            self.noise = gumbel(view)
            self._set_gates()

    def update(self, view: View) -> tuple[Tensor, bool]:
        """Algorithm 1: a new draw q ~ Bernoulli(m) of all units; in the end exactly to the budget."""
        if view.update > self.final(view.updates):
            return view.keep, False
        if self.steps and not self.pace:  # the steps of an update are known now; make up for those of the first
            self.pace = pace(self.steps)
            self._move(view, torch.zeros_like(self.s), (self.pace - 1) * self.steps)
        drawn = torch.rand(self.s.numel(), generator=view.generator, dtype=torch.float64) < self.score(view)
        return one_per_group(view.space, drawn, self.score(view)), view.update == self.final(view.updates)

    def applied(self, view: View) -> None:
        """Eq 7: the temperature of what is present rises. Eq 4: the pressure until the next update."""
        present = view.space.present(view.keep)
        if view.update:
            rise = torch.ones_like(self.s) if self.temperature_rises == "global" else present.double()
            self.t = self.t + present.long()
            self.exponent = self.exponent + rise * (view.rate if self.temperature_rises == "learning_rate" else 1.0)
        self.beta = self.temperature = self.gamma**self.exponent
        self._set_gates()
        self.pressure = self._base * gap(view, view.keep)  # Eq 4
        self.penalty = self.pressure * self.lambda_share * (self.penalised == "all" or present)

    def score(self, view: View) -> Tensor:
        """The probability of every unit, sigma(beta s)."""
        return torch.sigmoid(self.beta * self.s)  # Eq 5

    def final(self, updates: int) -> int:
        """T - 1, or earlier where the structure settles."""
        return settled(updates, self.settle)

    def check_state(self, state: dict[str, Any], events: int) -> str:
        """Counters must not exceed the number of updates."""
        wrong = [key for key in ("t", "exponent") if bool(((state[key] < 0) | (state[key] > events)).any())]
        return f"{wrong[0]} must lie in [0, {events}], the number of updates" if wrong else ""

    def _move(self, view: View, sensitivity: Tensor, steps: float) -> None:
        """Eq 6 and 8: `steps` steps of SGD on L(m w) + lambda |m|, where dL/ds = beta (1 - m) m dL/dm."""
        assert self.gate is not None
        task = sensitivity / self.gate
        for _ in range(count := round(steps)):
            slope = self.beta * (1 - self.gate) * self.gate
            self.velocity = self.momentum * self.velocity + slope * (task + self.penalty) + self.weight_decay * self.s
            self.s = self.s - self.lr * view.rate * (steps / count) * self.velocity
            self._set_gates()

    def _set_gates(self) -> None:
        gate = torch.sigmoid(self.beta * (self.s + self.noise)).clamp(min=SMALLEST_GATE)
        self.gate = torch.where(self._removable, gate, 1.0)

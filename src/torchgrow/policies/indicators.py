"""Indicators: one trainable number per unit, how it becomes a gate, and how structures are drawn from it.

Legend (paper): s indicator, m = sigma(beta s) gate, beta = beta_0 gamma^t_s temperature with one counter t_s per
unit (Eq 7), q in {0, 1} presence drawn with probability m (Eq 6). Everything is float64 on the host: n is small,
and ranks that run the same code decide alike.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import TorchgrowError
from ..structure.space import Space
from .kit import SMALLEST_GATE, aligned, deal, gumbel, multiples, one_per_group, pools, smallest, spread, staggered
from .pace import UPDATES
from .policy import RECORDED


def read_edits(plain: Any, edits: str) -> dict[str, Any]:
    """Fields of a dataclass as typed, "peak=1,gates=True", each of the type that it has in `plain`.

    Raises:
        ValueError: no such field, not a value of it, or one that stands there by another name; its text is the edit.
    """
    kinds = {field.name: type(getattr(plain, field.name)) for field in fields(plain)}
    changed, names = dict[str, Any](), dict[str, str]()
    for edit in filter(None, edits.split(",")):
        key, _, value = (part.strip() for part in edit.partition("="))
        try:
            name, key = key, RECORDED.get(key, key) if key not in kinds else key
            if names.setdefault(key, name) != name:  # by two names: which value is meant?
                raise ValueError
            kind = kinds[key]
            changed[key] = {"True": True, "False": False}[value] if kind is bool else kind(value)
        except (KeyError, ValueError, TypeError):  # the last of what cannot be typed
            raise ValueError(edit) from None
    return changed


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a network grows, in one class for all ways; deprecated: see `torchgrow.policies`.

    Attributes:
        controller: "pressure": the paper's L1 penalty with lambda of Eq 4; "plan": all indicators are shifted by
            the one number for which the realised cost follows a planned one.
        draws: "independent": q ~ Bernoulli(m), anew at every update; "persistent": one uniform number per unit,
            spread evenly over each group, kept for the whole run; "ranked": the same numbers, re-assigned by importance
            at every update: the lowest go to the most important present units, so that the least important unit of
            a group leaves first, and no present unit is replaced by an absent one.
        lambda_base: lambda_1^base of Eq 4 (controller "pressure" only).
        layer_lambda_base: lambda_2^base, the same for layers.
        penalised: whose gates the penalty counts: "present" or "all"; only for `Paper`, as `start` and `paced` are.
        start: at first m = size^-start in a group of that size.
        paced: whether a short run goes through the paper's course faster.
        layer_lag: by how much layers come after channels: where every group has the share p of its units, every stage
            has the share p^layer_lag of its layers (1: alike; draws "ranked" only). 3 suits a frame that is as deep as
            networks one would train, 16 a frame far deeper than that.
        ramp: share of the updates in which the planned cost rises from the seed to its peak ("plan" only).
        peak: the peak, as a multiple of the budget (at most the frame; "plan" only). Above 1 the network grows beyond
            its budget and is pruned back to it. Its layers do not, where draws are "ranked": no more come than the
            budget holds, and they widen.
        hold: share of the updates after which the planned cost falls from the peak to the budget, which it reaches
            where the structure settles ("plan" only; 1 - settle or more: all at once).
        prune: what goes where the planned cost falls: "alike": the same share of every group; "worth": the least
            important units, by |m dL/dm|, for the parameters or FLOPs that go with them ("plan" only).
        align: widths of groups with at least 2 x align units are held at multiples of it (8), or below it, since
            hardware computes channels in blocks; only the remainder that fills the budget up goes elsewhere.
            1: any width, as in `default()` ("plan" only).
        settle: share of the updates at the end in which the structure no longer changes; at least the last one
            (0.5: a unit that enters late, at a low learning rate, is hardly trained).
        heat: `final_inverse_temperature` of `Paper`: gamma^T, beta in the end of a unit that is always present (100).
        temperature: when beta rises: "unit": in updates in which the unit is present (Eq 7); "global": in every one,
            for all alike; "learning_rate": as "unit", each time by gamma^(present / initial learning rate), our
            reading of A.10's gamma that decays with the learning rate.
        relaxation: "sigmoid": m = sigma(beta s); "gumbel": m = sigma(beta (s + g_1 - g_0)) with Gumbel noise g drawn
            at every step, the Gumbel-softmax form of 3.2 for s = log s_1 - log s_0 and a falling temperature 1 / beta.
        gates: whether what is present is scaled by m; False: it counts in full, and the plan alone moves indicators.
        lr: learning rate of the indicators at the start; it follows the weights' schedule from there (0.1).
        momentum: SGD momentum of the indicators (0.9).
        weight_decay: of the indicators (1e-6).
    """

    controller: str = "plan"
    draws: str = "persistent"
    lambda_base: float = 0.5
    layer_lambda_base: float = 0.1
    penalised: str = "present"
    start: float = 0.5
    paced: bool = True
    layer_lag: float = 1.0
    ramp: float = 0.1
    peak: float = 1.0
    hold: float = 0.1
    prune: str = "alike"
    align: int = 8
    settle: float = 0.5
    heat: float = 100.0
    temperature: str = "unit"
    relaxation: str = "sigmoid"
    gates: bool = True
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-6

    def __post_init__(self) -> None:
        """Name the bad field."""
        for name, value, choices in (
            ("controller", self.controller, ("plan", "pressure")),
            ("draws", self.draws, ("persistent", "independent", "ranked")),
            ("temperature", self.temperature, ("unit", "global", "learning_rate")),
            ("relaxation", self.relaxation, ("sigmoid", "gumbel")),
            ("prune", self.prune, ("alike", "worth")),
            ("gates", self.gates, (True, False)),
            ("penalised", self.penalised, ("present", "all")),
            ("paced", self.paced, (True, False)),
        ):
            if value not in choices:
                raise TorchgrowError(f"Method.{name}={value!r} is unknown; use one of {choices}")
        for name, low, high in (
            ("ramp", 0, 1),
            ("hold", 0, 1),
            ("peak", 1, 1e6),
            ("settle", 0, 1),
            ("momentum", 0, 1),
            ("heat", 1, 1e6),
            ("lr", 0, 1e3),
            ("align", 1, 4096),
            ("layer_lag", 1, 1e3),
            ("start", 0, 10),
        ):
            if not low <= getattr(self, name) <= high:
                raise TorchgrowError(f"Method.{name}={getattr(self, name)!r} must lie in [{low}, {high}]")

    @classmethod
    def named(cls, text: str, *, layers: bool = False) -> Method:
        """A preset by its name, with other values behind a colon: "default", "default:peak=1,gates=True".

        Args:
            text: a name in `PRESETS`, and what differs from it.
            layers: whether layers grow too, which the paper's preset depends on.

        Raises:
            TorchgrowError: an unknown name, field or value.
        """
        name, _, edits = text.partition(":")
        if name not in PRESETS:
            raise TorchgrowError(f"preset {name!r} is unknown; use one of {sorted(PRESETS)} or a torchgrow.Method")
        base = cls.paper(layers=layers) if name == "paper" else PRESETS[name]()
        try:
            return replace(base, **read_edits(base, edits))
        except ValueError as edit:
            raise TorchgrowError(
                f"{str(edit)!r} in preset {text!r} is not a field of torchgrow.Method with its value, or there by its "
                f"other name too; write it like {name}:peak=1,gates=True (fields: "
                f"{', '.join(field.name for field in fields(cls))})"
            ) from None

    @property
    def literal(self) -> bool:
        """Whether it is the paper's own way, by the policy `Paper`."""
        return self.controller == "pressure" and self.draws == "independent" and self.gates

    @property
    def updates(self) -> int | None:
        """In how many updates a run of any length keeps to its course; None where any number will do."""
        return UPDATES if self.literal and self.paced else None

    @classmethod
    def default(cls) -> Method:
        """Grow evenly beyond the budget, then give up the least important units of every group; no gates.

        How it was found, and what each ingredient is worth: docs/log.md.
        """
        return cls(
            draws="ranked", gates=False, heat=1.0, align=1, ramp=0.03, peak=1.35, hold=0.45, settle=0.4, layer_lag=3.0
        )

    @classmethod
    def paper(cls, *, layers: bool = False) -> Method:
        """Eq 4, 6, 7 and Algorithm 1 to the letter; lambda_1^base is 1.0 where layers grow too, else 0.5."""
        return cls(controller="pressure", draws="independent", align=1, settle=0.0, lambda_base=1.0 if layers else 0.5)

    @classmethod
    def global_(cls) -> Method:
        """The paper's settings, but with one temperature for all that rises with the epochs, as it compares with."""
        return replace(cls.paper(), temperature="global")

    @classmethod
    def nas(cls) -> Method:
        """The paper's settings where architectures are searched (4.3): lambda_1^base 2.0 and lambda_2^base 0.1.

        The structure is grown to an absolute number of parameters, then trained with a schedule of its own.
        """
        return replace(cls.paper(layers=True), lambda_base=2.0)

    @classmethod
    def random(cls) -> Method:
        """The paper's random baseline (Table 5): at every update all units alike are drawn with one probability.

        It is the one at which the draw costs what the budget allows; nothing is learned about any unit, and no
        temperature rises with the updates in which one was present.
        """
        return cls(draws="independent", ramp=0.0, heat=1.0, align=1, settle=0.0, gates=False)


PRESETS = {
    "default": Method.default,
    "paper": Method.paper,
    "global": Method.global_,
    "nas": Method.nas,
    "random": Method.random,
}


MEMORY = 0.99
"""Decay of the running mean of importance, per step."""

STATE = ("s", "velocity", "t", "exponent", "noise", "uniform", "worth")
"""State of the indicators, apart from the generator; one entry per unit each."""


class Indicators:
    """State of all indicators.

    Args:
        space: the space.
        method: how to move and draw them.
        updates: T, the number of updates in the run.
        seed: of all draws, or the generator they come from.

    Attributes:
        s: float64 [n].
        t: int64 [n], updates in which the unit was present (t_s).
        exponent: float64 [n], beta = gamma^exponent; t, unless `Method.temperature` says otherwise.
        velocity: float64 [n], SGD momentum buffer of s.
        worth: float64 [n], running mean of (m dL/dm)^2 over the steps in which the unit was present, else 0: what the
            loss would rise by without the unit, up to a factor (Molchanov et al., 2019).
    """

    def __init__(self, space: Space, method: Method, updates: int, seed: int | torch.Generator) -> None:
        self.space, self.method = space, method
        self.generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
        n = space.n_units
        self.gamma = method.heat ** (1 / max(updates, 1))
        self.t = torch.zeros(n, dtype=torch.int64)
        self.exponent = torch.zeros(n, dtype=torch.float64)
        self.noise = torch.zeros(n, dtype=torch.float64)  # g_1 - g_0
        self.velocity = torch.zeros(n, dtype=torch.float64)
        self.worth = torch.zeros(n, dtype=torch.float64)
        self.s = torch.zeros(n, dtype=torch.float64)
        if method.controller == "pressure" and n:
            # one active unit per group (and layer per stage): sigma(s) = 1 / size, so that sum sigma(s) = 1
            for pool in pools(space):
                self.s[pool] = torch.logit(torch.tensor(1 / pool.numel(), dtype=torch.float64).clamp(max=0.5))
        self.steps = multiples(space, method.align)
        self.uniform = staggered(self, method.layer_lag) if method.draws == "ranked" else spread(self)
        self.most = torch.ones(n, dtype=torch.float64)  # largest probability of each unit
        self.beta = torch.ones(n, dtype=torch.float64)
        self.gate = self._gate()

    def _gate(self) -> Tensor:
        if not self.method.gates:
            return torch.ones_like(self.s)
        gate = torch.sigmoid(self.beta * (self.s + self.noise)).clamp(min=SMALLEST_GATE)
        return torch.where(self.space.removable, gate, 1.0)

    def seed_structure(self) -> Tensor:
        """The seed (bool [n]): one unit per group, no layer that can be left out, and what cannot be removed."""
        return smallest(self.space, self.uniform)

    def draw(self) -> Tensor:
        """Draw q ~ Bernoulli(sigma(beta s)), bool [n]; a group left without any unit gets its likeliest one."""
        uniform = self.uniform
        if self.method.draws == "independent":
            uniform = torch.rand(self.space.n_units, generator=self.generator, dtype=torch.float64)
        probability = torch.sigmoid(self.beta * self.s)
        return one_per_group(self.space, uniform < probability, probability)

    def shifted(self) -> _Shifted:
        """Draws as a function of a common shift of all s, with one set of uniform numbers."""
        if self.method.draws == "independent":
            self.uniform = torch.rand(self.space.n_units, generator=self.generator, dtype=torch.float64)
        must = smallest(self.space, self.uniform - torch.sigmoid(self.beta * self.s))
        return _Shifted(self.s, self.beta, self.uniform, must, self.space, self.steps, self.most)

    def hold_layers(self, shift: float) -> None:
        """Limit layers to those that `shift` gives now, however far indicators rise."""
        layers = [block.unit for block in self.space.blocks]
        self.most[layers] = torch.sigmoid(self.beta * (self.s + shift))[layers]

    def score(self) -> Tensor:
        """Priority of units when the structure is trimmed or filled: probability minus draw.

        The paper's probability alone where every unit was drawn by itself (controller "pressure").
        """
        alone = self.method.draws == "independent" and self.method.controller == "pressure"
        return torch.sigmoid(self.beta * self.s) - (0 if alone else self.uniform)

    def step(self, task_gradient: Tensor, penalty: Tensor | float, rate: float) -> None:
        """One SGD step on s (Eq 6 and Eq 8).

        Args:
            task_gradient: float64 [n], m * dL/dm of the task loss: `<dL/dw~, w~>` over the unit's gated weights;
                0 for absent units.
            penalty: lambda, the weight of the L1 term, which acts on absent units too; one number, or float64 [n].
            rate: present over initial learning rate of the weights.
        """
        slope = self.beta * (1 - self.gate)
        gradient = slope * (task_gradient + penalty * self.gate) + self.method.weight_decay * self.s
        self.worth = MEMORY * self.worth + (1 - MEMORY) * task_gradient**2
        self.velocity.mul_(self.method.momentum).add_(gradient)
        self.s = self.s - self.method.lr * rate * self.velocity
        if self.method.relaxation == "gumbel":
            self.noise = gumbel(self)
        self.gate = self._gate()

    def shift(self, amount: float) -> None:
        """Move all indicators alike."""
        self.s = self.s + amount

    def rank(self, keep: Tensor) -> None:
        """Re-assign the uniform numbers of every pool: to present units by falling importance, then to the others."""
        present = self.space.present(keep)
        self.worth = torch.where(present, self.worth, 0.0)
        if self.method.draws == "ranked":
            self.uniform = deal(self.space, self.uniform, self.worth, keep)

    def copy(self) -> Indicators:
        """A copy that an update may change."""
        other = copy.copy(self)
        other.generator = torch.Generator()
        other.generator.set_state(self.generator.get_state())
        return other

    def state_dict(self) -> dict[str, Tensor]:
        """All that changes in a run, as copies; temperatures and gates follow from it."""
        return {name: getattr(self, name).clone() for name in STATE}

    def loaded(self, state: Mapping[str, Tensor]) -> Indicators:
        """A copy of these indicators with a state of another run; `state` must have been checked."""
        other = self.copy()
        for name in STATE:
            setattr(other, name, state[name].cpu().clone())
        other.beta = other.gamma**other.exponent
        other.gate = other._gate()
        return other

    def advance(self, keep: Tensor, rate: float = 1.0) -> None:
        """Raise the counters of the present units and their temperature (Eq 7); `rate` as for `step`."""
        present, temperature = self.space.present(keep), self.method.temperature
        self.t = self.t + present.to(torch.int64)
        rise = torch.ones_like(self.exponent) if temperature == "global" else present.double()
        self.exponent = self.exponent + (rise * rate if temperature == "learning_rate" else rise)
        self.beta = self.gamma**self.exponent
        self.gate = self._gate()


@dataclass(frozen=True)
class _Shifted:
    """Shift -> keep vector; the number of units in a group never falls when the shift rises."""

    s: Tensor
    beta: Tensor
    uniform: Tensor
    must: Tensor
    space: Space
    steps: Tensor
    most: Tensor

    def __call__(self, shift: float) -> Tensor:
        margin = torch.sigmoid(self.beta * (self.s + shift)).minimum(self.most) - self.uniform
        keep = (margin > 0) | self.must
        if bool((self.steps == 1).all()):
            return keep
        return aligned(self.space, keep, self.must, margin, self.steps)

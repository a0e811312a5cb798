"""The constants of a run: space, costs, budget, schedule length, seed, start."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TorchgrowError
from ..policies import Policy, Shrink, View, named
from ..policies.kit import evenly, one_per_group
from ..policies.policy import RECORDED
from ..structure.budget import check_feasible, fit
from ..structure.cost import Cost, CostModel
from ..structure.limits import Budget, Limits
from ..structure.space import Space
from .attaching import tell_share
from .birth import birth_scales
from .start import SEED


@dataclass(frozen=True)
class Plan:
    """The constants of a run."""

    space: Space  # the units of the frame, n of them
    costs: CostModel  # of all its networks
    frame_cost: Cost  # of the frame
    budget: Budget  # as it was given
    limits: Limits  # the same in numbers
    updates: int  # how many there will be
    seed: int  # of all draws
    start: Tensor | None = None  # bool [n], the structure it begins with; None: the policy chooses
    begins: str = SEED  # the same, as stored in a state
    rescale: bool = True  # whether fresh weights begin at the scale of the widths that are planned
    scales: Mapping[str, float] = field(default_factory=dict)  # what that multiplies them by, by name

    @classmethod
    def of(cls, model: nn.Module, space: Space, budget: Budget, updates: int, seed: int) -> Plan:
        """The plan for a model of this space; a `BudgetError` names what is feasible if the budget is out of reach."""
        costs = CostModel(space)
        frame_cost = costs.cost(space.everything())
        tell_share(model, budget, frame_cost)
        limits = budget.limits(frame_cost)
        check_feasible(budget, limits, costs)
        return cls(space, costs, frame_cost, budget, limits, updates, seed)

    @cached_property
    def limit_tensor(self) -> Tensor:
        """The limits as policies see them, int64 [2]."""
        return self.limits.tensor()

    def view(
        self,
        number: int,
        keep: Tensor,
        rate: float,
        generator: torch.Generator,
        weights: Callable[[], Mapping[str, Tensor]],
    ) -> View:
        """The run as a policy sees it at an update, in copies: a policy may edit what it is given."""
        limits, start = self.limit_tensor.clone(), None if self.start is None else self.start.clone()
        return View(self.space, self.costs, limits, number, self.updates, keep.clone(), rate, generator, start, weights)

    def target(self, policy: Policy, view: View, seed: Tensor) -> Tensor:
        """A structure of about the widths that the run will end with; if it begins with more, its seed."""
        planned = policy.target(view)
        planned = evenly(view) if planned is None else self.legal(planned, policy, "target")
        return seed if bool((view.cost(seed) > view.cost(planned)).any()) else planned

    def scaled(self, model: nn.Module, policy: Policy, view: View, seed: Tensor, held: Container[str]) -> Plan:
        """The plan with what the fresh weights of its frame are multiplied by; `held`: names of those that train."""
        return replace(self, scales=birth_scales(model, self.space, self.target(policy, view, seed), self.seed, held))

    def policy(self, given: Policy | None, *, layers: bool) -> Policy:
        """The policy that was given; else one that grows, or that shrinks where the start is beyond the budget."""
        if given is not None:
            return given
        beyond = self.start is not None and (self.costs.both(self.costs.live(self.start)) > self.limit_tensor).any()
        return Shrink() if beyond else named("default", layers=layers)

    def legal(self, keep: Any, policy: Policy, asked: str) -> Tensor:
        """A structure as a policy wants it (else a `TorchgrowError`), with what stays and one unit of every group."""
        n = self.space.n_units
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != (n,):
            found = f"{keep.dtype} {tuple(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
            raise TorchgrowError(
                f"{type(policy).__name__}.{asked} returned {found} for a structure, it must be a bool tensor of "
                f"{n} units, True where one lives; nothing was changed"
            )
        return one_per_group(self.space, keep.cpu(), torch.zeros(n))

    def fitted(self, keep: Tensor, policy: Policy, view: View) -> Tensor:
        """The nearest structure exactly at the budget."""
        score: Any = policy.score(view)
        if not isinstance(score, Tensor) or score.shape != keep.shape:
            raise TorchgrowError(
                f"{type(policy).__name__}.score returned {getattr(score, 'shape', type(score).__name__)}, it must be a "
                f"tensor of {keep.numel()} numbers, one a unit; nothing was changed"
            )
        multiples = self.checked(policy, "multiples", torch.int64)
        return fit(self.space, self.costs, keep, score.cpu(), self.limit_tensor, multiples, thin=True)

    def checked(self, policy: Policy, name: str, kind: torch.dtype, of: Tensor | slice = slice(None)) -> Tensor | None:
        """The gate of units, or the multiples of groups, of a policy: None, or as its documentation says."""
        value, n = getattr(policy, name), self.space.n_units if name == "gate" else self.space.n_groups
        fits = isinstance(value, Tensor) and value.dtype == kind and value.shape == (n,)
        if value is None or (fits and bool(((value[of] > 0) & ((value[of] <= 1) | (name != "gate"))).all())):
            return value
        found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        rule = f"{kind} ({n},), {'in (0, 1]' if name == 'gate' else 'above 0'}"
        raise TorchgrowError(f"{type(policy).__name__}.{name} is {found}, must be None or {rule}; nothing was changed")

    def settings(self, policy: Policy) -> dict[str, Any]:
        """Settings that must be equal when a state is loaded."""
        return {
            "updates": self.updates,
            "seed": self.seed,
            "params": self.limits.params,
            "flops": self.limits.flops,
            "start": self.begins,
            "rescale": self.rescale,
            "policy": type(policy).__name__,
            **{f"policy.{RECORDED.get(name, name)}": value for name, value in policy.settings().items()},
        }

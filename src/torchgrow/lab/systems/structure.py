"""The units of a network for a system: which may go, what is left of which share of them, and the exact budget.

Sources say which units go first; how many of each layer, they say as rates by hand or by a search. Where they know only
rates, a system here keeps the same share of every group, the largest within the budget, and then fills the budget up.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from torchgrow import Limits, Space, TraceError, policies, shrink_, trace
from torchgrow.lab.from_recipe import example
from torchgrow.lab.systems.system import Task, UnfitError
from torchgrow.structure.cost import CostModel

Importance = Callable[[policies.View, Tensor], Tensor]
"""As those of `torchgrow.policies.importance`."""


def folded(model: nn.Module, space: Space, gates: Tensor) -> dict[str, Tensor]:
    """The parameters, by name, in which gates are folded that scale what the units (float [n]) put out."""
    parameters, found = dict(model.named_parameters()), dict[str, Tensor]()
    for (name, axis), vector in space.fold.items():
        place = vector.to(gates.device)
        factor = torch.where(place >= 0, gates[place.clamp(min=0)], 1.0)
        weight = found.get(name, parameters[name])
        shape = [-1 if i == axis else 1 for i in range(weight.dim())]
        found[name] = weight * factor.view(shape)
    return found


class Structure:
    """The units of a network and what its structures cost.

    Args:
        model: the network, with all its units.
        task: names what keeps its width, and the data to trace on.
        depth: whether layers may go too, if the network has some that may.

    Attributes:
        model: the network.
        space: its units, n of them.
        costs: of its structures.
    """

    def __init__(self, model: nn.Module, task: Task, *, depth: bool = False) -> None:
        inputs, carried = example(model, task.data)
        traced = partial(trace, model, inputs, carried=carried, protect=task.recipe.freeze)
        try:
            self.model, self.space = model, traced(depth=depth)
        except TraceError:
            if not depth:
                raise
            self.model, self.space = model, traced()
        self.costs = CostModel(self.space)

    def cost(self, keep: Tensor) -> Tensor:
        """Parameters and FLOPs of a structure (bool [n]), int64 [2]."""
        return self.costs.both(self.costs.live(keep))

    def view(self) -> policies.View:
        """All units, as the importances of `torchgrow.policies` look at them."""
        weights = dict(self.model.named_parameters())
        limits, keep = Limits(None, None).tensor(), self.space.everything()
        return policies.View(self.space, self.costs, limits, 0, 1, keep, 1.0, torch.Generator(), None, lambda: weights)

    def scores(self, importance: Importance) -> Tensor:
        """Importance of every unit, float64 [n]."""
        return importance(self.view(), torch.zeros(self.space.n_units, dtype=torch.float64))

    def places(self, score: Tensor) -> Tensor:
        """Where a unit stands in its pool, float64 [n] in (0, 1]: the best of C at 1 / C, the last at 1."""
        found = torch.ones(self.space.n_units, dtype=torch.float64)
        for pool in policies.kit.pools(self.space):
            order = pool[torch.argsort(score[pool], descending=True, stable=True)]
            found[order] = torch.arange(1, pool.numel() + 1, dtype=torch.float64) / pool.numel()
        return found

    def alike(self, places: Tensor, share: float) -> Tensor:
        """The structure (bool [n]) with the first floor(C x share) units of every pool of C, at least one."""
        must = policies.kit.one_per_group(self.space, torch.zeros_like(self.space.removable), -places)
        return (places <= share + 1e-9) | must

    def share(self, limits: Limits) -> float:
        """The largest share of every pool at which the network is within the limits."""
        places = self.places(torch.zeros(self.space.n_units))
        shares = [0.0, *places.unique().tolist()]
        low, high = 0, len(shares)
        while high - low > 1:
            middle = (low + high) // 2
            fits = bool((self.cost(self.alike(places, shares[middle])) <= limits.tensor()).all())
            low, high = (middle, high) if fits else (low, middle)
        return shares[low]

    def exact(self, keep: Tensor, score: Tensor, limits: Limits) -> Tensor:
        """The structure nearest to `keep` that uses the budget: none above it, and no unit fits any more.

        Args:
            keep: bool [n].
            score: float64 [n]; units of high score go last and come first.
            limits: the budget.

        Raises:
            UnfitError: not even the smallest network fits.
        """
        self.check(limits)
        keep = policies.kit.one_per_group(self.space, keep.clone(), score)
        return policies.kit.fit(self.space, self.costs, keep, score, limits.tensor())

    def check(self, limits: Limits) -> None:
        """Compare the smallest structure with the limits: what cannot go, one unit a group, no layer that may go.

        Raises:
            UnfitError: not even that fits.
        """
        least = self.costs.both(self.costs.space.least)
        if bool((least > limits.tensor()).any()):
            raise UnfitError(
                f"the budget is below the smallest network here, of {least[0]:,} parameters and {least[1]:,} FLOPs; "
                "give a larger --budget"
            )

    def at_most(self, keep: Tensor, score: Tensor, limits: Limits) -> Tensor:
        """The structure itself, with one unit a group at least, where it is within the limits; else as `exact`."""
        least = policies.kit.one_per_group(self.space, keep.clone(), score)
        fits = bool((self.cost(least) <= limits.tensor()).all())
        return least if fits else self.exact(keep, score, limits)

    def depths(self, keep: Tensor) -> dict[str, int]:
        """Blocks of every stage in a structure: those that cannot go are not counted, but for one."""
        found: dict[str, int] = {}
        for block in self.space.blocks:
            found[block.stage] = found.get(block.stage, 1) + int(keep[block.unit])
        return found

    def widths(self) -> dict[str, int]:
        """Units of every group, by the group's name."""
        sizes = torch.bincount(self.space.group_of, minlength=self.space.n_groups).tolist()
        return dict(zip(self.space.group_names, sizes, strict=True))

    def within(self, score: Tensor, limits: Limits) -> Tensor:
        """The structure that keeps the same share of every pool, those of high score, exactly at the budget."""
        places = self.places(score)
        return self.exact(self.alike(places, self.share(limits)), -places, limits)

    def widened(self, alive: Tensor, score: Tensor, limits: Limits) -> Tensor:
        """All widths of a structure times one factor, the largest within the budget; then exactly at the budget.

        No group gets wider than it is in the network.

        Args:
            alive: bool [n], the structure.
            score: float [n]; units of high score come first.
            limits: the budget.
        """
        group, most = self.space.group_of, torch.bincount(self.space.group_of, minlength=self.space.n_groups)
        widths = torch.bincount(group[alive], minlength=self.space.n_groups).clamp(min=1).double()
        place = (self.places(score.double()) * most[group]).round()

        def at(factor: float) -> Tensor:
            wanted = (widths * factor).round().clamp(min=1)
            return (place <= wanted[group]) | ~self.space.removable

        low, high = 0.0, float(most.max())
        for _ in range(40):
            middle = (low + high) / 2
            fits = bool((self.cost(at(middle)) <= limits.tensor()).all())
            low, high = (middle, high) if fits else (low, middle)
        return self.exact(at(low), -place / widths[group], limits)

    def cut(self, keep: Tensor, model: nn.Module | None = None) -> None:
        """Cut the network, or a copy of it, down to a structure (bool [n]), in place; what is cut off is gone."""
        shrink_(model or self.model, self.space, keep, store=False)

    def rows(self, units: Tensor) -> dict[str, Tensor]:
        """By name, the rows of matrices (axis 0 of weights of two axes and more) that make these units (bool [n])."""
        found = {}
        for name in self.space.parameters:
            if len(self.space.shapes[name]) > 1 and 0 in self.space.cut_axes.get(name, ()):
                vector = self.space.unit_of[name, 0]
                found[name] = torch.nonzero(units[vector.clamp(min=0)] & (vector >= 0)).flatten()
        return found

    @torch.no_grad()
    def zero_rows(self, units: Tensor) -> None:
        """Set the rows that make these units (bool [n]) to zero, but for weights that are frozen."""
        weights = dict(self.model.named_parameters())
        for name, rows in self.rows(units).items():
            if weights[name].requires_grad:
                weights[name].index_fill_(0, rows.to(weights[name].device), 0)

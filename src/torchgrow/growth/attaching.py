"""Checks before a model grows: is it free, which parameters are trained, what a relative budget refers to."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from ..errors import OptimizerError, StructureError
from ..renamed import frames_to_user
from ..structure.cost import Cost
from ..structure.limits import Budget
from ..structure.record import growths, recorded
from ..structure.space import Frozen, Space
from .gates import attached


def check_free(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Refuse what another, unfinished grower uses: model (`StructureError`) or optimizers (`OptimizerError`)."""
    advice = (
        "go on with the grower that is there, or end it with grower.finish() before another one begins. To begin anew, "
        "build model and optimizer anew (in a notebook: run their cell again too)"
    )
    for growth in (one for one in growths(model) if not one.copied):
        raise StructureError(f"{type(model).__name__} is growing already: {growth}; {advice}")
    for optimizer in optimizers:
        if attached(optimizer):
            raise OptimizerError(f"{type(optimizer).__name__} already trains a network that is growing; {advice}")


def tell_share(model: nn.Module, budget: Budget, cost: Cost) -> None:
    """Warn of a share of a network that was itself cut from a larger one."""
    shares = [x for x in (budget.params, budget.flops) if isinstance(x, float) or (isinstance(x, str) and "%" in x)]
    cut = recorded(model.named_modules())
    if shares and any(cut.kept.values()):
        first = sum(math.prod(cut.shapes.get(name, p.shape)) for name, p in model.named_parameters())
        warnings.warn(
            f"the budget {shares[0]} is a share of the network as it is, {cost.params:,} parameters, which was cut "
            f"from a frame of {first:,} before; for a share of that frame give a number, such as Budget(params=...)",
            stacklevel=frames_to_user(),
        )


def trained_names(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> set[str]:
    """Names of the trainable parameters that the optimizers hold."""
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in held and p.requires_grad}


def check_removable(space: Space, what: str, hint: str = "") -> None:
    """Refuse (`StructureError`) a space in which nothing can "grow", or "be cut"."""
    if not bool(space.removable.any()):
        reasons = "; ".join(str(frozen) for frozen in space.frozen[:5]) or "the model has no units"
        raise StructureError(f"nothing can {what} here, because {reasons}{hint}")


def pin_untrained(space: Space, trained: set[str]) -> Space:
    """Mark units as not removable if their gate has no place, or only untrained ones: no gradient would reach it."""
    gated = torch.zeros(space.n_units, dtype=torch.bool)
    for (name, axis), vector in space.fold.items():
        units = vector[vector >= 0].unique()
        gated[units] = True
        if name not in trained:
            units = units[space.removable[units]]
            reason = "the unit's gate would sit on a parameter that the optimizer does not train"
            if units.numel():
                space = space.freeze(
                    units.tolist(), Frozen("gate", name.rpartition(".")[0], "", reason, ((name, axis),))
                )
    bare = torch.nonzero(~gated & space.removable).flatten().tolist()
    if bare:
        reason = f"{len(bare)} units have no place where a gate of 0 equals removal"
        names = {space.group_names[int(space.group_of[u])] for u in bare}
        space = space.freeze(bare, Frozen("gate", ", ".join(sorted(names)[:3]), "", reason, ()))
    return space

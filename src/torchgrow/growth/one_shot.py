"""A trained network cut to a budget at once, without a run around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StructureError, TorchgrowError
from ..onednn_guard import guard_
from ..persistence.portable import shrink_
from ..policies import Shrink
from ..structure.cost import Cost
from ..structure.limits import Budget
from ..structure.space import Place
from ..tracing.blocks import Named
from ..tracing.model_call import Carries
from ..tracing.requests import Couples
from ..tracing.verification import trace
from .attaching import check_free
from .gates import Fold
from .plan import Plan


def prune_(
    model: nn.Module,
    example_inputs: Any,
    *,
    budget: Budget,
    policy: Shrink | None = None,
    freeze: Sequence[str | Place] = (),
    couple: Couples = (),
    depth: bool | Sequence[Named] = False,
    carried: Carries | None = None,
    proof: bool = True,
    seed: int = 0,
) -> Cost:
    """Cut a trained model to a budget in place, at once; what is cut off is gone.

    For models too large to train here, and as a start for a training loop of your own. `Grower(..., start="frame")`
    cuts little by little while it trains, which keeps more of what was learnt.

    Memory: the model, its largest tensor, and with `proof` several copies of it in float64.

    Args:
        model: the trained network.
        example_inputs: as for `trace`.
        budget: what may be left of it.
        policy: what says how much a unit matters and from where units go; its plan has no say here. With "taylor" it
            is the gradients that the model has: call `backward` on some batches before. Default:
            `Shrink(importance="group_norm")`.
        freeze: as for `trace`.
        couple: as for `trace`.
        depth: as for `trace`.
        carried: as for `trace`.
        proof: as for `trace`; without, nothing is tried on the model.
        seed: of importance "random".

    Returns:
        What is left.

    Raises:
        TraceError, BudgetError, StructureError: as for `Grower`; nothing was changed.
        TorchgrowError: importance "taylor" and no gradients.
    """
    check_free(model, ())
    space = trace(model, example_inputs, freeze=freeze, couple=couple, depth=depth, carried=carried, proof=proof)
    if not bool(space.removable.any()):
        reasons = "; ".join(str(frozen) for frozen in space.frozen[:5]) or "the model has no units"
        raise StructureError(f"nothing can be cut here, because {reasons}")
    plan = Plan.of(model, space, budget, updates=2, seed=seed)
    keep = _chosen(model, plan, policy or Shrink(importance="group_norm"))
    shrink_(model, space, keep, store=False)
    guard_(model)
    return plan.costs.cost(keep)


def _chosen(model: nn.Module, plan: Plan, policy: Shrink) -> Tensor:
    """The structure (bool [n]) that a policy takes at the end of its plan, at the budget.

    Raises:
        TorchgrowError: importance "taylor" and no gradients.
    """
    chosen, generator = replace(policy, until=1.0), torch.Generator()
    weights = dict(model.named_parameters())
    view = plan.view(0, plan.space.everything(), 1.0, generator.manual_seed(plan.seed), lambda: weights)
    chosen.seed(view)
    if chosen.importance == "taylor":
        fold = Fold(plan.space, weights, view.keep, {}, gated=False)
        if all(parameter.grad is None for parameter in fold.parameters):
            raise TorchgrowError(
                'importance "taylor" reads gradients, and the model has none: call loss.backward() on a few batches '
                'before prune_, or use policy=torchgrow.policies.Shrink(importance="group_norm")'
            )
        chosen.squared = fold.gate_gradient([parameter.grad for parameter in fold.parameters]) ** 2
    view = replace(view, update=chosen.final(plan.updates))
    keep = plan.legal(chosen.update(view)[0], chosen, "update")
    return plan.fitted(keep, chosen, view)

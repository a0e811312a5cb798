"""One-shot pruning: cut a trained network to a budget at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn

from ..default_device import on_default, on_host
from ..errors import StructureError, TorchgrowError
from ..onednn_guard import guard_
from ..persistence.portable import shrink_
from ..policies import Shrink, View
from ..policies.importance import IMPORTANCES, names_of
from ..policies.kit import pools
from ..structure.cost import Cost, CostModel
from ..structure.limits import Budget, Limits
from ..structure.space import Place, Space, live_positions
from ..structure.store import gather, index_of, is_meta
from ..tracing.blocks import Named
from ..tracing.model_call import Carries, call, examples_of, fresh
from ..tracing.nested import put_out
from ..tracing.passes import twin
from ..tracing.requests import Couples
from ..tracing.verification import trace
from .attaching import check_free, check_removable
from .compensation import shifts_of
from .gates import Fold
from .plan import Plan
from .teacher import recalibrate

SINGLE, HALF = 1e-3, 0.1
"""Largest relative error of outputs after a cut that was not proven, in float32 and above, and in 16 bits."""

TENTH = 0.1
"""Share of a group that is left out to see how much it matters."""


@on_host()
def prune_(
    model: nn.Module,
    example_inputs: Any,
    *,
    budget: Budget,
    policy: Shrink | None = None,
    protect: Sequence[str | Place] = (),
    couple: Couples = (),
    depth: bool | Sequence[Named] = False,
    carried: Carries | None = None,
    proof: bool = True,
    seed: int = 0,
    batches: Iterable[Any] | None = None,
) -> Cost:
    """Cut a trained model to a budget in place, at once; what is cut off is gone.

    Make the optimizer afterwards. For models too large to train here, and as a start for a training loop of your own:
    `Grower(..., start="frame")` cuts little by little while it trains, which keeps more of what was learnt. It takes
    the memory of the model and its largest tensor, and with `proof` of several copies of it in float64.

    Args:
        model: the trained network.
        example_inputs: as for `trace`.
        budget: what the cut model may cost.
        policy: what says how much a unit matters and from where units go; its plan has no say here. With "taylor" it
            is the gradients that the model has: call `backward` on some batches before. Default:
            `Shrink(importance="group_norm")`.
        protect: as for `trace`.
        couple: as for `trace`.
        depth: as for `trace`.
        carried: as for `trace`.
        proof: as for `trace`. Without, outputs on the first example before and after are compared in the model's own
            dtype, in evaluation mode; layers are not (leave `depth` out).
        seed: of importance "random".
        batches: on which means are measured that biases take over from the units that go, as in `Grower.update`.

    Returns:
        Cost of the cut model.

    Raises:
        TraceError, BudgetError, StructureError: as for `Grower`; nothing was changed. StructureError also if the cut
            was not proven and came out wrong: then the model is of no use.
        TorchgrowError: importance "taylor" and no gradients; no batches in `batches`, or a mean that is not finite.
    """
    _check(model, budget, policy)
    space = trace(model, example_inputs, protect=protect, couple=couple, depth=depth, carried=carried, proof=proof)
    check_removable(space, "be cut")
    plan = Plan.of(model, space, budget, updates=2, seed=seed)
    keep = _chosen(model, plan, policy or Shrink(importance="group_norm"))
    shifts = shifts_of(model, space, space.everything(), keep, batches)
    expected = None if space.proven or space.blocks else _outputs(zero_(model, space, keep), example_inputs)
    shrink_(model, space, keep, store=False)
    guard_(model)
    if expected is not None:
        _compare(_outputs(model, example_inputs), expected)
    for name, shift in shifts.items():
        bias = model.get_parameter(name).data
        bias += gather(shift, index_of(space, name, keep)).to(bias)
    return plan.costs.cost(keep)


def _check(model: nn.Module, budget: Budget, policy: Shrink | None) -> None:
    """Refuse (`TorchgrowError`) no budget, no such policy, a model without weights, and one that a grower holds."""
    if not isinstance(budget, Budget) or not isinstance(policy, (Shrink, type(None))):
        raise TorchgrowError(
            'prune_ takes budget=torchgrow.Budget(params="50%") and policy=torchgrow.policies.Shrink(importance="l1"), '
            f"got {budget!r} and {policy!r}"
        )
    if is_meta(model):
        raise TorchgrowError(
            f"{type(model).__name__} is on the meta device: there are no weights to choose by; load them"
        )
    check_free(model, ())


@on_host()
def measure_rises(
    model: nn.Module,
    example_inputs: Any,
    evaluate: Callable[[nn.Module], float],
    *,
    batches: Iterable[Any] = (),
    importance: str = "group_norm",
    protect: Sequence[str | Place] = (),
    couple: Couples = (),
    depth: bool | Sequence[Named] = False,
    carried: Carries | None = None,
) -> dict[str, float]:
    """How much a trained model's loss rises when a tenth of a group of units is gone (Li et al., 2017, 3.2).

    For `torchgrow.policies.Shrink(allocation="measured", rises=...)`. The model is not changed; it is evaluated once
    for every group, and once as it is.

    Args:
        model: the trained network.
        example_inputs: as for `trace`.
        evaluate: returns the mean loss of the model that it is given, in evaluation mode and without gradients, on the
            same few batches every time.
        batches: as for `recalibrate`: statistics of batch norms are re-estimated on them before each
            evaluation. Default: they stay.
        importance: which units are the least important, of `torchgrow.policies.importance`; not "taylor".
        protect: as for `trace`.
        couple: as for `trace`.
        depth: as for `trace`; of a stage, a tenth of its layers goes, at least one.
        carried: as for `trace`.

    Returns:
        The rise by the name of a group (`Grower.widths`) or stage (`Grower.depths`); a loss that falls is negative.

    Raises:
        TraceError, TorchgrowError: as for `prune_`; a loss that is not finite.
    """
    _check_measured(model, importance)
    space = trace(model, example_inputs, protect=protect, couple=couple, depth=depth, carried=carried)
    whole, generator, weights = space.everything(), torch.Generator().manual_seed(0), dict(model.named_parameters())
    view = View(
        space, CostModel(space), Limits(None, None).tensor(), 0, 2, whole, 1.0, generator, None, lambda: weights
    )
    order = IMPORTANCES[importance](view, torch.zeros(space.n_units, dtype=torch.float64))
    loss = partial(_loss_with, model, space, evaluate, list(batches))
    before, found = loss(whole), dict[str, float]()
    for name, pool in zip(names_of(space), pools(space), strict=True):
        free = pool[space.removable[pool]]
        if few := min(len(free), max(1, round(TENTH * len(pool)))):
            keep = whole.clone()
            keep[free[torch.argsort(order[free], stable=True)[:few]]] = False
            found[name] = (loss(keep) - before) * (TENTH * len(pool) / few) ** 2  # as of a tenth, where it was not one
    return found


def _check_measured(model: nn.Module, importance: str) -> None:
    """Refuse (`TorchgrowError`) a model without weights, and importance that wants gradients."""
    if Shrink(importance=importance).sensitive or is_meta(model):
        raise TorchgrowError(
            f"measure_rises needs a trained model with its weights and an importance that needs no gradients, got "
            f"importance={importance!r} of {type(model).__name__}"
            f"{' on the meta device' if is_meta(model) else ''}; use importance='group_norm'"
        )


def _loss_with(
    model: nn.Module, space: Space, evaluate: Callable[[nn.Module], float], batches: list[Any], keep: Tensor
) -> float:
    """The loss of a copy with the units of a structure (bool [n]) only; a `TorchgrowError` if it is not finite."""
    copied = twin(model)
    zero_(copied, space, keep)
    if batches:
        recalibrate(copied, batches)
    with torch.no_grad(), on_default():  # tensors that the user's code makes are where it wants them
        found: Any = evaluate(copied.eval())
    if not isinstance(found, SupportsFloat) or not math.isfinite(found):
        raise TorchgrowError(f"evaluate returned {found}; it must return the mean loss of the model, a finite number")
    return float(found)


@torch.no_grad()
def zero_(model: nn.Module, space: Space, keep: Tensor) -> nn.Module:
    """Set all units and layers that a structure (bool [n]) does not have to zero, in place; returns the model."""
    tensors = dict(model.named_parameters())
    for name in space.parameters:
        if space.absent(name, keep):
            tensors[name].zero_()
            continue
        for axis in space.cut_axes.get(name, ()):
            dead = torch.nonzero(~live_positions(space.unit_of[name, axis], keep)).flatten()
            tensors[name].index_fill_(axis, dead.to(tensors[name].device), 0)
    return model


@torch.no_grad()
def _outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """Outputs of the model in evaluation mode for the first example."""
    modes = {module: module.training for module in model.modules()}
    try:
        found = call(model.eval(), fresh(examples_of(example_inputs)[0]))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return [leaf.value for leaf in put_out(found) if isinstance(leaf.value, Tensor) and leaf.value.is_floating_point()]


def _compare(found: list[Tensor], expected: list[Tensor]) -> None:
    """Raise a `StructureError` if the cut has changed what the model computes."""
    worst = 0.0 if len(found) == len(expected) else math.inf
    for a, b in zip(found, expected, strict=False):
        gap = (
            float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-12)) if b.numel() else 0.0
        )
        exact = a.shape == b.shape and gap <= (HALF if b.dtype.itemsize < 4 else SINGLE)
        worst = max(worst, 0.0 if exact else gap)
    if worst:
        raise StructureError(
            f"the cut model's outputs differ by {worst:.1e} from those of the model with the same units zeroed, so an "
            "operation or attribute depends on removed units. This model can no longer be used: reload its weights, "
            "and leave out proof=False, or protect what is cut wrongly (protect=[...])"
        )


def _chosen(model: nn.Module, plan: Plan, policy: Shrink) -> Tensor:
    """The structure (bool [n]) at the end of a policy's plan; a `TorchgrowError` if it wants gradients and has none."""
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

"""Which optimizers can be served, found out by behaviour rather than by a list of names."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import OptimizerError

MATRIX = (5, 3)
"""Shape of the parameter that a trial step is taken on."""


def check_optimizers(optimizers: Sequence[torch.optim.Optimizer], model: nn.Module) -> None:
    """Refuse early optimizers that cannot be served, one by one and together.

    Raises:
        OptimizerError: there is none, or a parameter is held by two.
    """
    if not optimizers:
        raise OptimizerError("there is no optimizer; pass one, or a list of those that train the model")
    for optimizer in optimizers:
        check_optimizer(optimizer, model)
    held: dict[int, int] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for i, optimizer in enumerate(optimizers):
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if held.setdefault(id(parameter), i) != i:
                raise OptimizerError(
                    f"{names[id(parameter)]} is held by optimizers {held[id(parameter)]} and {i} of the list "
                    f"({type(optimizers[held[id(parameter)]]).__name__} and {type(optimizer).__name__}); "
                    "give every parameter to one of them"
                )


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuse early an optimizer that cannot be served.

    A throw-away copy of the optimizer takes one step on a small matrix; every slot it keeps must be a scalar or
    have the parameter's shape, so that it can be re-cut with it.

    Raises:
        OptimizerError: it is not an optimizer, trains none of the model's parameters or foreign ones, needs a
            closure for every step, or keeps slots of another layout.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptimizerError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    name = type(optimizer).__name__
    held = [p for group in optimizer.param_groups for p in group["params"]]
    own = {id(p) for p in model.parameters()}
    foreign = [p for p in held if id(p) not in own]
    trained = [p for p in held if id(p) in own and p.requires_grad]
    if not trained:
        raise OptimizerError(
            f"{name} holds none of the model's trainable parameters; build it from this very module: "
            f"torch.optim.{name}(model.parameters(), ...), and do not copy or move the model in between"
        )
    if foreign:
        raise OptimizerError(
            f"{name} also holds {len(foreign)} parameters that are not the model's, e.g. one of shape "
            f"{tuple(foreign[0].shape)}; give those an optimizer of their own"
        )
    kept_slots(optimizer, next(g for g in optimizer.param_groups if any(p is trained[0] for p in g["params"])), trained)


def kept_slots(optimizer: torch.optim.Optimizer, group: dict[str, Any], trained: Sequence[Tensor]) -> dict[str, Any]:
    """What an optimizer keeps for a matrix of shape `MATRIX` in one of its groups: a copy of it takes a step there.

    Args:
        optimizer: stays as it is.
        group: one of its parameter groups, for the settings.
        trained: parameters whose dtype, device and kinds of slots the matrix takes over.

    Raises:
        OptimizerError: the step failed, or left slots that are neither a number nor of the matrix's shape.
    """
    name, kind = type(optimizer).__name__, type(optimizer)
    device = "cpu" if trained[0].is_meta else trained[0].device
    matrix = nn.Parameter(torch.zeros(MATRIX, dtype=trained[0].dtype, device=device))
    matrix.grad = torch.ones_like(matrix)
    settings = {key: copy.copy(value) for key, value in group.items() if key != "params"}
    works = "use SGD, Adam, AdamW or RMSprop, or another optimizer whose state has the shape of its parameters"
    probe = object.__new__(kind)
    probe.__dict__.update({key: value for key, value in vars(optimizer).items() if "hook" not in key})
    try:
        probe.__setstate__(
            {
                "state": defaultdict(dict, {matrix: _first_slots(optimizer, trained, matrix)}),
                "param_groups": [{**settings, "params": [matrix]}],
                "defaults": optimizer.defaults,
            }
        )
        kind.step(probe)  # not probe.step: a learning rate scheduler has bound that one to the original
    except Exception as error:
        raise OptimizerError(
            f"{name} cannot be served: a trial step failed ({type(error).__name__}: {error}); {works}"
        ) from error
    for key, slot in probe.state[matrix].items():
        if isinstance(slot, Tensor) and slot.numel() > 1 and slot.shape != matrix.shape:
            raise OptimizerError(
                f"{name} cannot be served: it keeps {key!r} of shape {tuple(slot.shape)} for a parameter of shape "
                f"{tuple(matrix.shape)}, which cannot be re-cut; {works}"
            )
    return dict(probe.state[matrix])


def _first_slots(optimizer: torch.optim.Optimizer, trained: Sequence[Tensor], like: Tensor) -> dict[str, object]:
    """Slots for `like` such as a trained parameter has by now: Adagrad makes its own at construction."""
    for parameter in trained:
        if parameter.dim() > 1 and optimizer.state.get(parameter):
            return {
                key: torch.zeros_like(like)
                if isinstance(slot, Tensor) and slot.shape == parameter.shape
                else copy.deepcopy(slot)
                for key, slot in optimizer.state[parameter].items()
            }
    return {}


# --- learning rates ---


def present_rate(optimizer: torch.optim.Optimizer) -> float:
    """Learning rate of the first group of parameters; 0 where it has none of its own."""
    return float(optimizer.param_groups[0].get("lr") or 0.0)


def peak_rate(optimizer: torch.optim.Optimizer) -> float:
    """The rate that a one-cycle schedule leads to, which it writes into the group; 0 without one."""
    return float(optimizer.param_groups[0].get("max_lr") or 0.0)


def first_rate(optimizer: torch.optim.Optimizer) -> float:
    """Learning rate that the first group was made with, which a schedule made since may have changed.

    Most schedules note it as `initial_lr`. Those that go in cycles note there the low rate that they begin with and
    set that for all groups; what the optimizer was made with is then left in its defaults alone.
    """
    rates = [group.get("initial_lr", group.get("lr")) for group in optimizer.param_groups]
    made_with = optimizer.defaults.get("lr")
    cycles = {"max_lr", "max_momentum"} & optimizer.param_groups[0].keys()
    usual = inspect.signature(type(optimizer).__init__).parameters.get("lr")
    given = made_with is not None and (usual is None or usual.default != made_with)
    replaced = "initial_lr" in optimizer.param_groups[0] and (cycles or (given and made_with not in rates))
    return float((made_with if replaced else rates[0]) or 0.0)

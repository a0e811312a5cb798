"""Which optimizers are supported, found by a trial rather than by a list of names; and their learning rates."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import OptimizerError
from .optimizer_checks import WORKS, inner_optimizers, is_optimizer
from .optimizer_slots import Layout

HANDS_ON = {
    "AcceleratedOptimizer": "optimizer",
    "LightningOptimizer": "_optimizer",
    "_FabricOptimizer": "_optimizer",
    "OptimWrapper": "optimizer",
}
"""Wrappers of Accelerate, Lightning and MMEngine, and the attribute that holds the optimizer."""


def unwrapped(optimizer: Any) -> Any:
    """The optimizer itself, or the one inside a wrapper that only delegates to it."""
    while True:
        names = (HANDS_ON[kind.__name__] for kind in type(optimizer).__mro__ if kind.__name__ in HANDS_ON)
        inner = next((vars(optimizer)[name] for name in names if name in vars(optimizer)), None)
        if inner is None or inner is optimizer:
            return optimizer
        optimizer = inner


def optimizers_of(optimizer: Any) -> tuple[Any, ...]:
    """The unwrapped optimizers of what a user gives: one optimizer, a list of several, or None."""
    listed = optimizer if isinstance(optimizer, Sequence) else (optimizer,)
    return tuple(unwrapped(one) for one in listed if one is not None)


def layouts_of(optimizer: Any) -> list[Layout]:
    """The slots that optimizers keep; an `OptimizerError` if one cannot be served."""
    return [Layout(one) for one in optimizers_of(optimizer)]


def check_optimizers(optimizers: Sequence[torch.optim.Optimizer], model: nn.Module) -> list[Layout]:
    """Refuse unsupported optimizers early, alone and together; returns their slots.

    Raises:
        OptimizerError: there is none, or a parameter is held by two.
    """
    if not optimizers:
        raise OptimizerError("there is no optimizer; pass one, or a list of those that train the model")
    layouts = [check_optimizer(optimizer, model) for optimizer in optimizers]
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
    return layouts


def untrained_hint(optimizers: Sequence[torch.optim.Optimizer], model: nn.Module) -> str:
    """What to do about trainable parameters that no optimizer holds; nothing if there are none."""
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    names = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if not names:
        return ""
    kinds = ", ".join(type(optimizer).__name__.lower() for optimizer in optimizers)
    return (
        f". No optimizer holds {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}; pass one for the rest "
        f"too: Grower(model, [{kinds}, torch.optim.AdamW(the_others)], ...)"
    )


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> Layout:
    """Refuse an unsupported optimizer early; returns its slots.

    A throw-away copy of the optimizer takes steps on stand-ins for the parameters; every slot it keeps must be a
    number or have the parameter's shape, so that it can be re-cut with it.

    Raises:
        OptimizerError: it is not an optimizer, trains none of the model's parameters or foreign ones, holds another
            optimizer, needs a closure for every step, or keeps slots of another layout.
    """
    name = type(optimizer).__name__
    inner = inner_optimizers(optimizer) if is_optimizer(optimizer) else []
    if inner:
        path, other = inner[0]
        raise OptimizerError(
            f"{name} cannot be served: it holds another optimizer ({type(other).__name__}, in .{path}) and steps that "
            "itself, so that what it does to the weights and keeps of them cannot be followed. Give the Grower, and "
            f"step, the other one alone, optimizer.{path}, if that is a torch.optim.Optimizer of the model's own "
            f"parameters; {WORKS}"
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptimizerError(f"optimizer must be a torch.optim.Optimizer, got {name}")
    held = [p for group in optimizer.param_groups for p in group["params"]]
    own = {id(p) for p in model.parameters()}
    foreign = [p for p in held if id(p) not in own]
    trained = [p for p in held if id(p) in own and p.requires_grad]
    if not any(p.requires_grad for p in model.parameters()):
        raise OptimizerError(
            f"all parameters of {type(model).__name__} are frozen (requires_grad is False), so none could be trained; "
            "thaw what is to be trained: model.requires_grad_(True)"
        )
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
    return Layout(optimizer)


# --- learning rates ---


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

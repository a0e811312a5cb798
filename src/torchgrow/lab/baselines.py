"""What grown networks are compared with: narrowed uniformly, or of the same structure from scratch."""

import warnings
from collections.abc import Callable

import torch
from torch import nn

from torchgrow import measure
from torchgrow.lab.data import Data
from torchgrow.lab.recipes import Recipe


def uniform_width(
    build: Callable[[float], nn.Module],
    limit: int,
    count: Callable[[nn.Module], int] | None = None,
) -> float:
    """The largest width factor at which ``build(factor)`` costs at most ``limit``.

    Args:
        build: makes a network with every width scaled by a factor in (0, 1].
        limit: cost not to exceed.
        count: what a network on the meta device costs. Default: its parameters.

    Returns:
        the factor; if even one channel everywhere is too many, the factor of that smallest network.
    """
    costs: dict[tuple[torch.Size, ...], int] = {}  # most of the widths tried give a network that was seen before

    def fits(width: float) -> bool:
        with torch.device("meta"):  # counts need shapes only
            model = build(width)
        shapes = tuple(p.shape for p in model.parameters())
        if shapes not in costs:
            costs[shapes] = count(model) if count else sum(shape.numel() for shape in shapes)
        return costs[shapes] <= limit

    if fits(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(20):  # far finer than one channel of any layer
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def twin_width(recipe: Recipe, data: Data, *, params: int, flops: int) -> float:
    """The width factor of the uniform network: at most these parameters and FLOPs, of what is budgeted."""
    widths = [uniform_width(recipe.build, params)] if recipe.budget.params is not None else []
    if recipe.budget.flops is not None:
        widths.append(uniform_width(recipe.build, flops, lambda model: measure(model, data.example()).flops))
    return min(widths)


def initialised(model: nn.Module) -> nn.Module:
    """The model with weights as its modules, and then its own `initialise`, begin with at the sizes they have now."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # those of layers that are left out
        for module in model.modules():
            reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
            own = list(module.parameters(recurse=False))
            left_out = bool(own) and not any(parameter.numel() for parameter in own)
            if reset is not None and not left_out:  # an empty weight does not say how many inputs it has
                reset()
        if hasattr(model, "initialise"):
            model.initialise()  # type: ignore[operator]
    return model

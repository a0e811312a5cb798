"""Cutting a model down to chosen units, without growing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .bank import Bank
from .space import Space


def shrink_(model: nn.Module, space: Space, keep: Tensor, optimizer: torch.optim.Optimizer | None = None) -> Bank:
    """Cut the model down to the units in `keep`, in place.

    Every Parameter object stays; its contents, its optimizer state, buffers and counting attributes are re-cut.
    Gradients are dropped.

    Args:
        model: the full frame.
        space: what `trace` found for it.
        keep: bool [n]; False removes a unit.
        optimizer: its state is re-cut too.

    Returns:
        The bank with everything that was cut off: `bank.restore_()` is the inverse, bit for bit.

    Raises:
        StructureError: the space does not allow `keep`, or the model is not the full frame.
        OptimizerError: the optimizer keeps state in a layout that cannot be cut.
    """
    bank = Bank(model, space, optimizer)
    bank.resize_(keep)
    return bank

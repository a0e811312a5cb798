"""The cost of a model as it is."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..default_device import on_host
from ..structure.cost import Cost, CostModel
from .tracer import replay


@on_host()
def measure(model: nn.Module, example_inputs: Any) -> Cost:
    """Parameters and FLOPs (2 x multiply-accumulates, one sample) of a model as it is.

    Args:
        model: any plain module.
        example_inputs: a small batch: a tensor, a tuple, or a dict of keywords; of a list of them the first counts.

    Raises:
        TraceError: the model cannot be run on the inputs.
    """
    space = replay(model, example_inputs, counting=True)
    return CostModel(space).cost(space.everything())

"""Spaces by hand: chains of linear maps."""

import itertools

import torch
from torch import Tensor

from torchgrow import Space
from torchgrow.structure.space import FlopTerm


def chain(widths: list[int], pixels: list[int], stuck: int = 0) -> Space:
    """A chain of linear maps 3 -> widths... -> 2; the k-th is applied at `pixels[k]` places. One group per width.

    The first `stuck` units of the first group cannot be removed.
    """
    starts = [0, *itertools.accumulate(widths)]
    units = [torch.arange(a, b) for a, b in itertools.pairwise(starts)]
    sides = [torch.full((3,), -1), *units, torch.full((2,), -1)]
    unit_of: dict[tuple[str, int], Tensor] = {}
    shapes, flops = {}, []
    for k, (inner, outer) in enumerate(itertools.pairwise(sides)):
        unit_of[f"w{k}", 0], unit_of[f"w{k}", 1] = outer, inner
        shapes[f"w{k}"] = (outer.numel(), inner.numel())
        flops.append(FlopTerm(2 * pixels[k], (outer, inner), f"w{k}"))
    removable = torch.ones(sum(widths), dtype=torch.bool)
    removable[:stuck] = False
    return Space(
        unit_of=unit_of,
        removable=removable,
        group_of=torch.cat([torch.full((w,), g) for g, w in enumerate(widths)]),
        group_names=tuple(f"g{g}" for g in range(len(widths))),
        shapes=shapes,
        parameters=tuple(shapes),
        flops=tuple(flops),
        batch=1,
        fold={(f"w{k}", 0): u for k, u in enumerate(units)},
        columns={},
        attributes=(),
    )

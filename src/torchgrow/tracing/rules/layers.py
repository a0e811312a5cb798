"""What rules do with layers of labels: bring them to one rank, keep or merge axes, tie them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..labels import Layer
from .registry import Context


def first_tensor(out: Any) -> Tensor:
    """The main output of an operation."""
    return out if isinstance(out, Tensor) else next(x for x in out if isinstance(x, Tensor))


def without_axes(ctx: Context, layers: Sequence[Layer], axes: Sequence[int], reason: str) -> list[Layer]:
    """Every layer made constant along all of `axes`."""
    kept: list[Layer] = []
    for start in layers:
        layer: Layer | None = start
        for axis in axes:
            if layer is not None and axis in layer.axes:
                layer = ctx.without_axis(layer, axis, reason)
        if layer is not None:
            kept.append(layer)
    return kept


def on_axis(layers: Sequence[Layer], axis: int) -> Layer | None:
    """The layer that varies along `axis` and nowhere else."""
    return next((layer for layer in layers if layer.axes == (axis,)), None)


def aligned(layers: Sequence[Layer], rank: int) -> list[Layer]:
    """Layers with leading axes of size 1 added, as broadcasting does."""
    return [
        x
        if x.packed.dim() == rank
        else Layer(x.packed.reshape((1,) * (rank - x.packed.dim()) + x.packed.shape), x.sources, x.compact)
        for x in layers
    ]


def placed(layer: Layer, rank: int, axis: int) -> Layer:
    """A one-axis layer laid along `axis` of a tensor of `rank` axes."""
    shape = [1] * rank
    shape[axis] = layer.packed.numel()
    return Layer(layer.packed.reshape(shape), layer.sources, layer.compact)


def harmonize(
    ctx: Context, operands: Sequence[tuple[Tensor, list[Layer]]], axes: Sequence[int], rank: int, reason: str
) -> None:
    """Make operands that meet position by position agree along `axes`; edits the layer lists in place.

    Along an axis every operand of size > 1 must carry layers varying over the same set of axes. What some vary over
    and others do not is merged away; an operand without layers there takes the axis from all.
    """
    changed = len(operands) > 1 or len(operands[0][1]) > 1  # one layer agrees with itself
    while changed:
        changed = False
        for axis in axes:
            varying = [layer for _, layers in operands for layer in layers if axis in layer.axes]
            if not varying:
                continue
            common = set.intersection(*(set(layer.axes) for layer in varying))
            agree = all(set(layer.axes) == common for layer in varying)
            if not agree and _worth_keeping(ctx, operands, axis, common):
                changed = agree = True
                for _, layers in operands:
                    for i, layer in enumerate(layers):
                        if axis in layer.axes:
                            layers[i : i + 1] = without_axes(ctx, [layer], sorted(set(layer.axes) - common), reason)
            for tensor, layers in operands:
                own = axis - (rank - tensor.dim())
                varies = own >= 0 and tensor.shape[own] > 1 and tensor.numel() > 0
                if varies and not any(axis in layer.axes for layer in layers):
                    agree = agree and ctx.constant_along(tensor, own)
            if not agree:
                changed = True
                for _, layers in operands:
                    layers[:] = without_axes(ctx, layers, [axis], reason)


def _worth_keeping(ctx: Context, operands: Sequence[tuple[Tensor, list[Layer]]], axis: int, common: set[int]) -> bool:
    """Whether labels over `common` axes stay where they meet such over more axes, which are then given up.

    Heads do where heads x width meet heads, and channels where several maps of them meet the channels of another
    activation. Constants (positions, scales of a width) give way to heads instead.
    """
    largest = max((layer.axes for _, layers in operands for layer in layers if axis in layer.axes), key=len)
    fewest = [(tensor, layer) for tensor, layers in operands for layer in layers if set(layer.axes) == common]
    return largest[0] in common or any(ctx.depends_on_input(tensor) and ctx.owned(layer) for tensor, layer in fewest)


PROBES = (0.7391, -1.913)
"""Arbitrary non-zero values standing for "anything" when asking what an operation makes of zeros."""

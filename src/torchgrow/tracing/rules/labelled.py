"""What rules do with the labels of tensors: bring them to one rank, keep or merge axes, tie them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ..labels import Labelled
from .registry import Context


def first_tensor(out: Any) -> Tensor:
    """The main output of an operation."""
    return out if isinstance(out, Tensor) else next(x for x in out if isinstance(x, Tensor))


def freeze_all(ctx: Context, labelled: Iterable[Labelled | None], reason: str) -> None:
    """Freeze all labels that there are."""
    for labels in labelled:
        if labels is not None:
            ctx.freeze(labels, reason)


def without_axes(ctx: Context, labelled: Sequence[Labelled], axes: Sequence[int], reason: str) -> list[Labelled]:
    """All labels made constant along all of `axes`."""
    kept: list[Labelled] = []
    for start in labelled:
        labels: Labelled | None = start
        for axis in axes:
            if labels is not None and axis in labels.axes:
                labels = ctx.without_axis(labels, axis, reason)
        if labels is not None:
            kept.append(labels)
    return kept


def on_axis(labelled: Sequence[Labelled], axis: int) -> Labelled | None:
    """The labels that vary along `axis` and nowhere else."""
    return next((labels for labels in labelled if labels.axes == (axis,)), None)


def aligned(labelled: Sequence[Labelled], rank: int) -> list[Labelled]:
    """Labels with leading axes of size 1 added, as broadcasting does."""
    return [
        x
        if x.packed.dim() == rank
        else Labelled(x.packed.reshape((1,) * (rank - x.packed.dim()) + x.packed.shape), x.sources, x.compact)
        for x in labelled
    ]


def placed(labels: Labelled, rank: int, axis: int) -> Labelled:
    """Labels of one axis laid along `axis` of a tensor of `rank` axes."""
    shape = [1] * rank
    shape[axis] = labels.packed.numel()
    return Labelled(labels.packed.reshape(shape), labels.sources, labels.compact)


def tie_rows(ctx: Context, symbols: Tensor) -> None:
    """Tie the rows of a matrix of symbols: the same place in every row is one unit."""
    ctx.tie(symbols, symbols[:1])


def harmonize(
    ctx: Context, operands: Sequence[tuple[Tensor, list[Labelled]]], axes: Sequence[int], rank: int, reason: str
) -> None:
    """Make operands that meet position by position agree along `axes`; edits the lists in place.

    Along an axis every operand of size > 1 must carry labels varying over the same set of axes. What some vary over
    and others do not is merged away; an operand without labels there takes the axis from all.
    """
    changed = len(operands) > 1 or len(operands[0][1]) > 1  # alone it agrees with itself
    while changed:
        changed = False
        for axis in axes:
            varying = [labels for _, labelled in operands for labels in labelled if axis in labels.axes]
            if not varying:
                continue
            common = set.intersection(*(set(labels.axes) for labels in varying))
            agree = all(set(labels.axes) == common for labels in varying)
            if not agree and _worth_keeping(ctx, operands, axis, common):
                changed = agree = True
                for _, labelled in operands:
                    for i, labels in enumerate(labelled):
                        if axis in labels.axes:
                            labelled[i : i + 1] = without_axes(ctx, [labels], sorted(set(labels.axes) - common), reason)
            for tensor, labelled in operands:
                own = axis - (rank - tensor.dim())
                varies = own >= 0 and tensor.shape[own] > 1 and tensor.numel() > 0
                if varies and not any(axis in labels.axes for labels in labelled):
                    agree = agree and ctx.constant_along(tensor, own)
            if not agree:
                changed = True
                for _, labelled in operands:
                    labelled[:] = without_axes(ctx, labelled, [axis], reason)


def _worth_keeping(
    ctx: Context, operands: Sequence[tuple[Tensor, list[Labelled]]], axis: int, common: set[int]
) -> bool:
    """Whether labels over `common` axes stay where they meet such over more axes, which are then given up.

    Heads do where heads x width meet heads, and channels where several maps of them meet the channels of another
    activation. Constants (positions, scales of a width) give way to heads instead.
    """
    largest = max((labels.axes for _, labelled in operands for labels in labelled if axis in labels.axes), key=len)
    fewest = [(tensor, labels) for tensor, labelled in operands for labels in labelled if set(labels.axes) == common]
    return largest[0] in common or any(ctx.depends_on_input(tensor) and ctx.owned(labels) for tensor, labels in fewest)


PROBES = (0.7391, -1.913)
"""Arbitrary non-zero values for "any value", to test what an operation does with zeros."""

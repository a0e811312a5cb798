"""Rules for reading and writing at places: lookups by index, scatters, fills and copies, also through views.

The axes that are looked up or written to by index are merged away or frozen; along the others, every position is
read and written by itself, so that labels pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..labels import Labelled
from .labelled import aligned, freeze_all, harmonize, on_axis, placed, without_axes
from .pointwise import combined, joined
from .registry import Context, rule

Operand = tuple[Tensor, list[Labelled]]


def met(ctx: Context, operands: Sequence[Operand], axes: Sequence[int], rank: int, reason: str) -> list[Labelled]:
    """Labels of a result in which operands meet along `axes`, position by position; zero where all of them are."""
    harmonize(ctx, operands, axes, rank, reason)
    return joined(ctx, [labelled for tensor, labelled in operands if labelled or not ctx.zero(tensor)])


def is_mask(index: Tensor) -> bool:
    """Whether an index says of every position whether it is meant."""
    return index.dtype in (torch.bool, torch.uint8)


def looked_up(indices: Sequence[Tensor | None]) -> tuple[list[int], int, int]:
    """Axes that `tensor[indices]` looks up, where the axes of the index begin in the result, and how many they are."""
    axes: list[int] = []
    ranks, axis = [], 0
    for index in indices:
        covered = index.dim() if index is not None and is_mask(index) else 1  # a mask covers as many axes as it has
        if index is not None:
            axes += range(axis, axis + covered)
            ranks.append(1 if is_mask(index) else index.dim())
        axis += covered
    adjacent = axes == list(range(axes[0], axes[0] + len(axes)))
    return axes, axes[0] if adjacent else 0, max(ranks)


def _shown(labels: Labelled, axes: Sequence[int], first: int, width: int) -> Labelled:
    """Labels of a tensor that do not vary along the axes looked up, in the axes of the result."""
    packed = labels.packed.squeeze(tuple(axes))
    return Labelled(packed.reshape(*packed.shape[:first], *[1] * width, *packed.shape[first:]), labels.sources)


def _put_back(labels: Labelled, axes: Sequence[int], first: int, width: int) -> Labelled:
    """The inverse of `_shown`."""
    packed = labels.packed.squeeze(tuple(range(first, first + width)))
    for axis in axes:
        packed = packed.unsqueeze(axis)
    return Labelled(packed, labels.sources)


@rule("index", "_unsafe_index")
def index(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """Positions of some axes are looked up; the other axes pass."""
    axes, first, width = looked_up(named["indices"])
    labelled = without_axes(ctx, ctx.labelled(named["self"]), axes, "looks this axis up by index")
    ctx.set_labelled(out, [_shown(labels, axes, first, width) for labels in labelled])


@rule("index_select")
def index_select(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """As `index`, along one axis, which stays."""
    axis = named["dim"] % max(1, named["self"].dim())
    ctx.set_labelled(out, without_axes(ctx, ctx.labelled(named["self"]), [axis], "looks this axis up by index"))


@rule("gather")
def gather(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """As `index_select`, with an index for each element; it must span the other axes."""
    source, index_ = named["self"], named["index"]
    rank, reason = out.dim(), "looks this axis up by index"
    axes = {named["dim"] % max(1, rank), *(k for k in range(rank) if index_.shape[k] != source.shape[k])}
    labelled = without_axes(ctx, ctx.labelled(source), sorted(axes), reason)
    places = without_axes(ctx, ctx.labelled(index_), sorted(axes), reason)
    if places:
        operands = [(source, labelled), (index_, [place.with_zeros(True) for place in places])]
        labelled = met(ctx, operands, [k for k in range(rank) if k not in axes], rank, reason)
    ctx.set_labelled(out, labelled)


WRITTEN = "is written to by index"


@rule("index_add", "index_copy", "index_reduce", "index_fill", "scatter", "scatter_add", "scatter_reduce")
def scatter(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """Adds or writes rows at places of one axis; the other axes meet position by position, if they are as long."""
    target, index_ = named["self"], named["index"]
    source, value = named.get("source", named.get("src")), named.get("value", 0)
    rank = target.dim()
    by_element = func._overloadpacket.__name__.startswith("scatter")  # each element has a place of its own
    spans = index_.shape if by_element else source.shape if isinstance(source, Tensor) else target.shape
    axes = sorted({named["dim"] % max(1, rank), *(k for k in range(rank) if spans[k] != target.shape[k])})
    operands = [(target, without_axes(ctx, ctx.labelled(target), axes, WRITTEN))]
    if isinstance(source, Tensor):
        operands.append((source, without_axes(ctx, ctx.labelled(source), axes, WRITTEN)))
    if by_element and ctx.labelled(index_):
        places = without_axes(ctx, ctx.labelled(index_), axes, WRITTEN)
        operands.append((index_, [place.with_zeros(True) for place in places]))
    result = met(ctx, operands, [k for k in range(rank) if k not in axes], rank, WRITTEN)
    zero = not isinstance(value, Tensor) and value == 0
    ctx.set_labelled(out, result if zero else [labels.with_zeros(False) for labels in result])


@rule("index_put", "_unsafe_index_put", "_index_put_impl", "_index_put_impl_")
def index_put(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """`tensor[indices] = values`, as `scatter`; a mask of elements and one value choose position by position."""
    target, values, indices = named["self"], named["values"], named["indices"]
    rank = target.dim()
    first_index = next(x for x in indices if x is not None)
    if values.numel() == 1 and len([x for x in indices if x is not None]) == 1 and is_mask(first_index):
        _masked_fill(ctx, target, first_index, indices.index(first_index), values, out)
        return
    axes, first, width = looked_up(indices)
    full = rank - len(axes) + width
    within = range(first, first + width)
    labelled = without_axes(ctx, ctx.labelled(target), axes, WRITTEN)
    operands = [
        (_stand_in(ctx, target, axes, within), [_shown(labels, axes, first, width) for labels in labelled]),
        (values, without_axes(ctx, aligned(ctx.labelled(values), full), within, WRITTEN)),
    ]
    result = met(ctx, operands, [k for k in range(full) if k not in within], full, WRITTEN)
    ctx.set_labelled(out, [_put_back(labels, axes, first, width) for labels in result])


def _stand_in(ctx: Context, target: Tensor, axes: Sequence[int], within: range) -> Tensor:
    """A tensor in the axes of what is looked up in another one, zero or the same along them where that one is."""
    rest = [axis for axis in range(target.dim()) if axis not in axes]
    shape = [target.shape[axis] for axis in rest]
    shape[within.start : within.start] = [1] * len(within)
    result = torch.full([1] * len(shape), 0.0 if ctx.zero(target) else 1.0, dtype=torch.float64)
    for axis, own in zip(rest, [k for k in range(len(shape)) if k not in within], strict=True):
        if not ctx.constant_along(target, axis):
            result = result + torch.arange(target.shape[axis]).reshape(
                [-1 if k == own else 1 for k in range(len(shape))]
            )
    return result.expand(shape)


def _masked_fill(ctx: Context, target: Tensor, mask: Tensor, start: int, value: Tensor, out: Tensor) -> None:
    """One value where a mask over some axes, from `start` on, says so."""
    rank = target.dim()
    behind = (1,) * (rank - start - mask.dim())
    chosen = [
        Labelled(x.packed.reshape((1,) * start + x.packed.shape + behind), x.sources).with_zeros(True)
        for x in ctx.labelled(mask)
    ]
    labelled = ctx.labelled(target)
    covered = range(start, start + mask.dim())
    if not chosen:  # the mask is not of these units: it says which positions of its axes are written
        labelled = without_axes(ctx, labelled, [k for k in covered if not ctx.constant_along(mask, k - start)], WRITTEN)
    elif start + mask.dim() == rank:
        labelled = met(ctx, [(target, labelled), (mask, chosen)], range(rank), rank, WRITTEN)
    else:
        freeze_all(ctx, chosen, WRITTEN)
        labelled = without_axes(ctx, labelled, covered, WRITTEN)
    ctx.set_labelled(out, labelled if ctx.zero(value) else [x.with_zeros(False) for x in labelled])


@rule("fill", "zero")
def fill(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """One value everywhere, for as many positions as before."""
    value = named.get("value", 0)
    zero = ctx.zero(value) if isinstance(value, Tensor) else value == 0
    ctx.set_labelled(out, [labels.with_zeros(zero) for labels in ctx.labelled(named["self"])])


@rule("copy")
def copy(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """Overwrites a tensor, or the part of one that a view shows."""
    target, source = named["self"], named["src"]
    labelled = aligned(ctx.labelled(source), target.dim())
    if not labelled and ctx.zero(source):
        labelled = [labels.with_zeros(True) for labels in ctx.labelled(target)]
    ctx.set_labelled(target, labelled)


def write_through(ctx: Context, view: Tensor) -> None:
    """Pass on to its base what an operation has written to a view.

    Labels pass along axes that both have. If the base had none there, the rest of it must be constant along the axis.
    """
    base = view._base
    assert base is not None
    under = ctx.labelled(base)
    written = {axis for labels in ctx.labelled(view) if (axis := _axis_of_base(view, base, labels)) is not None}
    for i, old in enumerate(under):  # other values may lie beside them now
        if written.isdisjoint(old.axes):
            under[i] = old.with_zeros(False)
    kept = [labels for labels in ctx.labelled(view) if _carried_over(ctx, view, base, under, labels)]
    ctx.set_labelled(base, under)
    ctx.set_labelled(view, kept)


def _axis_of_base(view: Tensor, base: Tensor, labels: Labelled) -> int | None:
    """The axis of the base that is the one along which labels of a view vary."""
    if len(labels.axes) != 1:
        return None
    place = (view.stride(labels.axes[0]), view.shape[labels.axes[0]])
    fitting = [k for k in range(base.dim()) if (base.stride(k), base.shape[k]) == place]
    return fitting[0] if len(fitting) == 1 else None


def _carried_over(ctx: Context, view: Tensor, base: Tensor, under: list[Labelled], labels: Labelled) -> bool:
    """Carry labels over to the base of a view, if the axis is one of the base's; else freeze them."""
    axis = _axis_of_base(view, base, labels)
    if axis is None:
        ctx.freeze(labels, "is written to a part of a tensor")
        return False
    moved = placed(labels, base.dim(), axis)
    old = on_axis(under, axis)
    if old is not None:
        ctx.unify(old, moved)
        under[under.index(old)] = combined(old, [(0, old), (1, moved)], 2)
    elif ctx.filled(base):
        under.append(moved if ctx.zero(base) else moved.with_zeros(False))
    else:
        ctx.freeze(labels, "is written beside values that cannot be removed")
        return False
    return True

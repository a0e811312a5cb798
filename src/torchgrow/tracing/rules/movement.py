"""Rules for operations that only move entries: shapes, orders, windows, concatenation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..labels import Labelled, compressed, standing
from .labelled import aligned, harmonize, placed, without_axes
from .pointwise import joined
from .registry import CONSTANT, Context, rule


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten")
def reshape(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Replayed on the labels; a view that spreads one axis over several must stay a box."""
    source = named["self"]
    before, after = _reshaped(source.shape, out.shape)
    empty = [axis for axis, size in enumerate(out.shape) if not size]

    def moved(packed: Tensor) -> Tensor:
        packed = packed.reshape(after)
        for axis in empty:  # no two positions there that could differ
            packed = packed.narrow(axis, 0, 1)
        return packed

    labelled = _apart(ctx, ctx.labelled(source), lambda labels: labels.move(before, moved))
    for labels in labelled:
        if len(labels.axes) > 1:
            ctx.split_view(labels)
    ctx.set_labelled(out, labelled)


def _reshaped(source: Sequence[int], out: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of as many elements in place of those of an empty tensor before and after a view."""
    full = [math.prod(size for size in shape if size) for shape in (source, out)]
    common = math.gcd(*full)
    shapes = []
    for shape, other in ((list(source), full[1]), (list(out), full[0])):
        if 0 in shape:
            shape[shape.index(0)] = 2 * other // common
        shapes.append(tuple(size or 1 for size in shape))
    return shapes[0], shapes[1]


def _apart(ctx: Context, labelled: Sequence[Labelled], joined: Callable[[Labelled], Labelled | None]) -> list[Labelled]:
    """Labels after a view that joins axes; of two that now vary along one axis the second is frozen.

    A position there would belong to two units. Labels of parameters take precedence over followers, then the outer
    axis over the inner one: heads, rather than what is the same in each of them, as long as they can go. Of followers
    the inner one stays: the outer one is the batch.
    """
    kept: list[Labelled] = []
    if len(labelled) > 1:
        sign = -1 if ctx.turned() else 1
        labelled = sorted(labelled, key=lambda x: (0, sign * x.axes[0]) if ctx.owned(x) else (1, -x.axes[0]))
    for labels in labelled:
        moved = joined(labels)
        if moved is None:
            continue
        rivals = [other for other in kept if not set(other.axes).isdisjoint(moved.axes)]
        if rivals:
            if ctx.owned(labels):
                ctx.disputed(rivals)
            ctx.freeze(labels, "lies along one axis with other units")
        else:
            kept.append(moved)
    return kept


@rule("expand", "broadcast_to", "expand_as")
def expand(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """One position repeated: as often as the labels need that it meets."""
    source, lead = named["self"], out.dim() - named["self"].dim()
    labelled: list[Labelled | None] = list(aligned(ctx.labelled(source), out.dim()))
    if labelled or ctx.depends_on_input(source):
        stretched = [k for k in range(out.dim()) if out.shape[k] > 1 and (k < lead or source.shape[k - lead] == 1)]
        labelled += [placed(ctx.follower(out.shape[axis]), out.dim(), axis) for axis in reversed(stretched)]
    ctx.set_labelled(out, labelled)


@rule(
    "permute", "transpose", "t", "unsqueeze", "squeeze", "flip", "repeat", "movedim", "pixel_shuffle",
    "pixel_unshuffle", "numpy_T", "diagonal", "T", "mT",
)  # fmt: skip
def movement(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Replay the same operation on the labels."""
    source = named.pop("self")
    named.update({key: standing(named[key]) for key in ("size", "repeats") if key in named})
    ctx.set_labelled(
        out, _apart(ctx, ctx.labelled(source), lambda labels: labels.move(source.shape, lambda t: func(t, **named)))
    )


@rule("view_as_real")
def view_as_real(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """Real and imaginary part, side by side along a new last axis."""
    ctx.set_labelled(out, [Labelled(x.packed[..., None], x.sources) for x in ctx.labelled(named["self"])])


@rule("view_as_complex")
def view_as_complex(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """And back."""
    source = named["self"]
    labelled = without_axes(ctx, ctx.labelled(source), [out.dim()], "takes this axis for real and imaginary parts")
    ctx.set_labelled(out, [Labelled(labels.packed[..., 0], labels.sources) for labels in labelled])


@rule("unfold")
def windows(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """`Tensor.unfold`: windows along an axis, each along a new last one. Windows side by side may go as a whole."""
    source, size = named["self"], named["size"]
    dim = named["dimension"] % max(1, source.dim())
    beside = size == named["step"] and source.shape[dim] == out.shape[dim] * size
    result: list[Labelled | None] = []
    for labels in ctx.labelled(source):
        if labels.axes == (dim,) and beside:
            window = labels.symbols.reshape(-1, size)
            ctx.tie(window, window[:, :1])
            result.append(labels.move(source.shape, lambda t: t.unfold(dim, size, size)))
        else:
            kept = without_axes(ctx, [labels], [dim], "slides a window along this axis")
            result += [Labelled(x.packed[..., None], x.sources) for x in kept]
    ctx.set_labelled(out, result)


@rule("im2col")
def image_windows(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """[N, C, H, W] to [N, C x kernel, positions]: every channel becomes a block of rows."""
    source = named["self"]
    spatial = [source.dim() - 2, source.dim() - 1]
    labelled = without_axes(ctx, ctx.labelled(source), spatial, "slides a window along this axis")
    axis, result = out.dim() - 2, []
    for labels in labelled:
        each = math.prod(named["kernel_size"]) if axis in labels.axes else 1
        packed = labels.packed.squeeze(-1).repeat_interleave(each, axis)  # the sides are of size 1
        result.append(Labelled(packed, labels.sources))
    ctx.set_labelled(out, result)


@rule("col2im")
def fold(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """The inverse of `im2col`: the rows of a channel go together."""
    source, kernel = named["self"], named["kernel_size"]
    rows, last, each = source.dim() - 2, source.dim() - 1, kernel[0] * kernel[1]
    result = []
    for labels in without_axes(ctx, ctx.labelled(source), [last], "slides a window along this axis"):
        if labels.axes == (rows,):
            channels = labels.packed.flatten().reshape(-1, each)
            ctx.tie(channels >> 1, channels[:, :1] >> 1)
            whole = channels[:, 0] & ~1 | (channels & 1).amin(1)
            result.append(placed(Labelled(whole, labels.sources), out.dim(), out.dim() - 3))
        else:
            result += [
                Labelled(x.packed[..., None], x.sources) for x in without_axes(ctx, [labels], [rows], "folds windows")
            ]
    ctx.set_labelled(out, result)


@rule("roll")
def roll(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Rolls axes by numbers fixed in the forward: what wraps around is no longer the same once an axis is cut."""
    source = named["self"]
    axes = [axis % source.dim() for axis in named["dims"]] or list(range(source.dim()))
    reason = "rolls this axis by a number fixed in the forward"
    ctx.set_labelled(out, without_axes(ctx, ctx.labelled(source), axes, reason))


@rule(
    "constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
    "replication_pad2d", "replication_pad3d",
)  # fmt: skip
def pad(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Padding by a fixed number freezes the padding, cropping by a fixed number freezes the axis.

    Labels that do not vary along a padded axis stay: a removed channel has no padding either.
    """
    source, amounts = named["self"], list(named["pad"] if "pad" in named else named["padding"])
    constant = func._overloadpacket.__name__ == "constant_pad_nd" or named.get("mode") == "constant"
    value = named.get("value") or 0
    labelled = ctx.labelled(source)
    if not constant or any(amount < 0 for amount in amounts):
        axes = [source.dim() - 1 - i // 2 for i, amount in enumerate(amounts) if amount]
        labelled = without_axes(ctx, labelled, axes, "pads with values or crops by a number fixed in the forward")
    result: list[Labelled | None] = []
    for labels in labelled:
        here = [amount if source.dim() - 1 - i // 2 in labels.axes else 0 for i, amount in enumerate(amounts)]
        zero = labels.with_zeros(False) if constant and value != 0 else labels
        # the filler 0 is FIXED
        result.append(compressed(Labelled(torch.nn.functional.pad(zero.packed, here), zero.sources)))
    ctx.set_labelled(out, result)


@rule("select", "unbind")
def select(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Taking one index of an axis: the axis is merged away first."""
    source = named["self"]
    dim = named.get("dim", 0) % source.dim()
    labelled = without_axes(ctx, ctx.labelled(source), [dim], "takes one index of this axis")
    moved = [labels.move(source.shape, lambda t: t.select(dim, 0)) for labels in labelled]
    for part in [out] if isinstance(out, Tensor) else out:
        ctx.set_labelled(part, moved)


@rule("tril", "triu")
def triangle(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Zeros on one side of the diagonal of matrices in the last two axes."""
    source = named["self"]
    axes = [source.dim() - 2, source.dim() - 1]
    ctx.set_labelled(out, without_axes(ctx, ctx.labelled(source), axes, "sets a triangle of these axes to zero"))


@rule(*CONSTANT)
def constant(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """The same value everywhere. Made `like` a tensor it has as many positions; else a size of its own, unlabelled."""
    kind = func._overloadpacket.__name__
    if kind.endswith("_like") and out is not None:
        zero = kind == "zeros_like"
        ctx.set_labelled(out, [labels.with_zeros(zero) for labels in ctx.labelled(named["self"])])


@rule("cat", "concat", "concatenate", counted=True)
def cat(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Labels are laid side by side; a part without labels is FIXED, but for zeros beside others.

    Of these, the initial state of a recurrent cell, there may be as many as units. Only the proof can tell; on the meta
    device there is none.
    """
    parts = [part for part in named["tensors"] if part.dim() == out.dim()]  # torch leaves out empty vectors
    dim = named.get("dim", 0) % out.dim()
    operands = [(part, ctx.labelled(part)) for part in parts]
    if any(labelled or ctx.depends_on_input(part) for part, labelled in operands):
        for part, labelled in operands:
            if part.shape[dim] > 1 and not part.is_meta and ctx.zero(part):
                labelled.append(placed(ctx.follower(part.shape[dim], zeros=True), out.dim(), dim))
    others = [axis for axis in range(out.dim()) if axis != dim]
    harmonize(ctx, operands, others, out.dim(), "concatenates parts with different or no labels")
    along = [[labels for labels in labelled if dim in labels.axes] for _, labelled in operands]
    if len({tuple(labels.axes for labels in labelled) for labelled in along}) > 1 or len(along[0]) > 1:
        reason = "concatenates along one of several labelled axes"
        for _, labelled in operands:  # only now: the other axes may have been given up already
            multi = [labels for labels in labelled if dim in labels.axes and len(labels.axes) > 1]
            single = [labels for labels in labelled if labels not in multi]
            labelled[:] = single + without_axes(ctx, multi, [dim], reason)
        along = [[labels for labels in labelled if labels.axes == (dim,)] for _, labelled in operands]
    row = [_in_a_row(ctx, [part.shape[dim] for part in parts], along, dim)] if any(along) else []
    beside = [[labels for labels in labelled if dim not in labels.axes] for _, labelled in operands]
    ctx.set_labelled(out, [*row, *joined(ctx, beside)])


def _in_a_row(ctx: Context, sizes: Sequence[int], along: Sequence[Sequence[Labelled]], dim: int) -> Labelled:
    """The labels of parts of such sizes along an axis; of each those that vary there, if any do."""
    given = [labelled[0] for labelled in along if labelled]
    rest = torch.broadcast_shapes(*(labels.packed.movedim(dim, 0).shape[1:] for labels in given))
    nothing = torch.zeros((1,) * given[0].packed.dim(), dtype=torch.int64)
    packed = [
        (labelled[0].packed if labelled else nothing).expand(*rest[:dim], size, *rest[dim:])
        for size, labelled in zip(sizes, along, strict=True)
    ]
    row = Labelled(torch.cat(packed, dim), frozenset().union(*(labels.sources for labels in given)))
    if len(row.axes) > 1:
        ctx.split_view(row)
    return row


@rule("stack")
def stack(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Parts laid side by side along a new axis, labels as they are; a part without labels follows the others."""
    parts = named["tensors"]
    dim, rank = named.get("dim", 0) % out.dim(), out.dim() - 1
    operands = [(part, ctx.labelled(part)) for part in parts]
    harmonize(ctx, operands, range(rank), rank, "stacks parts with different or no labels")
    by_axes: dict[tuple[int, ...], list[Labelled | None]] = {}
    for index, (_, labelled) in enumerate(operands):
        for labels in labelled:
            by_axes.setdefault(labels.axes, [None] * len(parts))[index] = labels
    result: list[Labelled | None] = []
    for members in by_axes.values():
        head = next(labels for labels in members if labels is not None)
        packed = [(head.with_zeros(False) if x is None else x).packed for x in members]
        shape = torch.broadcast_shapes(*(x.shape for x in packed))
        sources = frozenset().union(*(x.sources for x in members if x is not None))
        full = Labelled(torch.stack([x.expand(shape) for x in packed], dim), sources)
        result.append(full.move(full.packed.shape, lambda t: t))
    for stacked in result:
        if stacked is not None and len(stacked.axes) > 1:
            ctx.split_view(stacked)
    ctx.set_labelled(out, result)

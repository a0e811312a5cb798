"""Rules for parts of an axis: slices, splits and halves.

Equal parts are tied index by index: however their size is computed, they stay equal. Unequal parts can be cut
independently if their sizes are attributes of the running modules, or sums and multiples of such; the proof
decides whether they are, and makes the attributes follow. Any other cut is at a place fixed in the forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..labels import Labelled
from .labelled import tie_rows
from .registry import Context, rule

MULTIPLES = (2, 3, 4)
"""Numbers that a forward may multiply an attribute by."""

FIXED_PLACE = "takes a part of this axis at a place fixed in the forward"


@rule("slice", "narrow")
def slice_(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """A full slice is a movement; any other cuts the axis before and behind the slice."""
    source = named["self"]
    dim = named["dim"] % source.dim()
    size, length = source.shape[dim], out.shape[dim]
    labelled = ctx.labelled(source)
    if not length:
        ctx.set_labelled(out, [labels for labels in labelled if dim not in labels.axes])
        return
    if length != size:
        start = named["start"] or 0
        start = max(0, start + size) if start < 0 else start
        sizes = [start, length, size - start - length] if named.get("step", 1) == 1 else []
        labelled = [kept for labels in labelled for kept in cut(ctx, labels, dim, sizes, chunk=length, said=False)]
    rest = {key: value for key, value in named.items() if key != "self"}
    ctx.set_labelled(out, [labels.move(source.shape, lambda t: func(t, **rest)) for labels in labelled])


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes")
def split(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """All parts at once."""
    source = named["self"]
    dim = named.get("dim", 0) % source.dim()
    sizes = [part.shape[dim] for part in out]
    lengths = [size for size in sizes if size]
    chunk = lengths[0] if len(set(lengths)) == 1 else 0
    labelled = ctx.labelled(source)
    if len(lengths) > 1:
        labelled = [kept for labels in labelled for kept in cut(ctx, labels, dim, sizes, chunk=chunk)]
    start = 0
    for part, size in zip(out, sizes, strict=True):
        if size:
            here = partial(torch.narrow, dim=dim, start=start, length=size)
            ctx.set_labelled(part, [labels.move(source.shape, here) for labels in labelled])
        else:
            ctx.set_labelled(part, [labels for labels in labelled if dim not in labels.axes])
        start += size


def cut(
    ctx: Context, labels: Labelled, axis: int, sizes: Sequence[int], *, chunk: int, said: bool = True
) -> list[Labelled]:
    """Make labels ready to be cut along an axis into parts of such sizes (none: in another way).

    `chunk` is the size of equal chunks that the cuts may lie between, `said` whether the forward names all sizes.
    Returns the labels, or what is left of them.
    """
    if axis not in labels.axes:
        return [labels]
    if len(labels.axes) == 1 and sizes:
        symbols = labels.symbols.flatten()
        sizes = [size for size in sizes if size]
        held, careful = ctx.held()
        found = explained(sizes, held, careful=careful, said=said) if held and len(set(sizes)) > 1 else None
        if found is not None:
            pieces, alike = found
            parts = symbols.split(pieces)
            for first, *others in alike:
                for other in others:
                    ctx.tie(parts[first], parts[other])
            ctx.part(parts)
            return [labels]
        if chunk and all(size % chunk == 0 for size in sizes):
            tie_rows(ctx, symbols.reshape(-1, chunk))
            return [labels]
    rest = ctx.without_axis(labels, axis, FIXED_PLACE)
    return [] if rest is None else [rest]


def explained(
    sizes: Sequence[int], held: Sequence[tuple[int, ...]], *, careful: bool = False, said: bool = True
) -> tuple[list[int], list[list[int]]] | None:
    """How attributes may give sizes: pieces, one attribute each, and which pieces are alike; None if they cannot.

    A list that holds all the sizes explains them at once. Else each part is one attribute, a product or a sum of
    two, or a multiple of one; one part may be what is left over. Pieces of one attribute are alike.

    `held` is what attributes hold. With `careful`, what may be a multiple is one, and no product, sum or rest: more
    pieces are alike then, and all of these spellings are served. `said`: the forward names the last size too, as slices
    do not.
    """
    if any(len(values) > 1 and values == tuple(sizes) for values in held):
        return list(sizes), []
    known = {value for values in held for value in values if value > 1}
    found = [_pieces(size, known, careful) for size in sizes]
    unknown = [i for i, pieces in enumerate(found) if not pieces]
    left_over = unknown[0] if len(unknown) == 1 else None
    if not said and (left_over is None or len(sizes) > 2) and not (careful and found[-1]):
        left_over = len(sizes) - 1
    if left_over is not None:
        found[left_over] = [sizes[left_over]]
    found = [pieces or _multiple(size, known) for pieces, size in zip(found, sizes, strict=True)]
    if not all(found):
        return None
    pieces = [piece for parts in found for piece in parts]
    alike = [[i for i, piece in enumerate(pieces) if piece == value] for value in sorted(set(pieces))]
    return pieces, [one for one in alike if len(one) > 1]


def _pieces(size: int, known: set[int], careful: bool) -> list[int]:
    """A size as attributes that are known may make it up; empty if they cannot."""
    if size in known:
        return [size]
    if careful and (several := _multiple(size, known)):
        return several
    if any(size % one == 0 and size // one in known for one in known):
        return [size]  # a product
    return next(([one, size - one] for one in sorted(known) if size - one in known - {one}), [])


def _multiple(size: int, known: set[int]) -> list[int]:
    """A size as several times an attribute that is known; empty if it is none."""
    return next(([size // n] * n for n in MULTIPLES if size % n == 0 and size // n in known), [])


@rule("glu")
def glu(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """First half times sigmoid of the second: the halves tie, and a first half of zero makes the result zero."""
    source, dim = named["self"], named["dim"] % named["self"].dim()
    half: int = out.shape[dim]
    labelled = [kept for labels in ctx.labelled(source) for kept in cut(ctx, labels, dim, [half, half], chunk=half)]
    ctx.set_labelled(out, [labels.move(source.shape, lambda t: t.narrow(dim, 0, half)) for labels in labelled])


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Interleaves a fixed number of groups: the same place in every group is one unit."""
    source, groups = named["self"], named["groups"]
    each = source.shape[1] // groups
    labelled = [kept for labels in ctx.labelled(source) for kept in cut(ctx, labels, 1, [each] * groups, chunk=each)]

    def shuffled(t: Tensor) -> Tensor:
        return t.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)

    ctx.set_labelled(out, [labels.move(source.shape, shuffled) for labels in labelled])

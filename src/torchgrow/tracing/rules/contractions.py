"""Rules for contractions: convolutions, matrix products and embeddings, which read labels through weights."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

from torch import Tensor

from ..labels import Labelled
from .labelled import aligned, first_tensor, freeze_all, harmonize, on_axis, placed, tie_rows, without_axes
from .pointwise import combined
from .registry import Context, rule

Side = Labelled | None
"""The labels on one side of a contraction, if there are any."""


def contract(ctx: Context, produced: Side, weight: Side) -> None:
    """Sum over an axis: tie what enters with the columns that read it; freeze the side that stands alone."""
    sides: list[Side] = []
    for labels in (produced, weight):
        follows = labels is not None and ctx.follows(labels)  # it has met nothing that it could follow
        if labels is not None and follows:
            ctx.freeze(labels, "")
        sides.append(None if follows else labels)
    produced, weight = sides
    if weight is not None:
        ctx.read(produced, weight)
    if produced is not None and weight is not None:
        ctx.unify(produced, weight)
    elif weight is not None:
        ctx.freeze(weight, "reads values that cannot be removed")
    elif produced is not None:
        ctx.freeze(produced, "is summed over against values that carry no labels")


@rule("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution", counted=True)
def convolution(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """Rows of the weight become the output channels; columns read the input channels; groups: see `grouped`."""
    x, weight, bias = named["input"], named["weight"], named["bias"]
    groups, transposed, rank = named["groups"], named["transposed"], out.dim()
    spatial = list(range(2, rank))
    of_x = without_axes(ctx, ctx.labelled(x), spatial, "convolves over this axis")
    of_x = [labels for labels in of_x if labels.axes == (1,)] + without_axes(
        ctx, [labels for labels in of_x if labels.axes != (1,)], [1], ""
    )  # heads in the batch: their width is kept
    of_weight = without_axes(ctx, ctx.labelled(weight), spatial, "")  # kernel axes: not worth a mention
    row_axis, column_axis = (1, 0) if transposed else (0, 1)
    entering, rows, columns = on_axis(of_x, 1), on_axis(of_weight, row_axis), on_axis(of_weight, column_axis)
    offset, counted = on_axis(ctx.labelled(bias), 0), (rows, columns)
    if transposed and groups > 1:
        rows = grouped_transposed(ctx, weight, entering, rows, columns, groups)
    elif groups > 1:
        grouped(ctx, x, weight, entering, rows, columns, groups)
    else:
        contract(ctx, entering, columns)
    ctx.set_labelled(out, [labels for labels in of_x if labels.axes == (0,)] + [output(ctx, rows, offset, rank, 1)])
    positions = math.prod((x if transposed else out).shape[2:])
    kernel = math.prod(weight.shape[2:])
    ctx.flop(
        2 * out.shape[0] * positions * kernel,
        counted[0] or weight.shape[row_axis],
        counted[1] or weight.shape[column_axis],
    )


def output(ctx: Context, rows: Side, bias: Side, rank: int, axis: int) -> Side:
    """The labels of a contraction's output, from the weight's rows and the bias."""
    if rows is None:
        freeze_all(ctx, [bias], "is added to values that cannot be removed")
        return None
    rows = placed(rows, rank, axis)
    if bias is None:
        return rows
    bias = placed(bias, rank, axis)
    ctx.unify(rows, bias)
    return combined(rows, [(0, rows), (1, bias)], 2)


def grouped(ctx: Context, x: Tensor, weight: Tensor, entering: Side, rows: Side, columns: Side, groups: int) -> None:
    """Grouped convolution: whole groups are units if there are at least as many as channels in each.

    Otherwise the same place in every group is one unit.
    """
    per_group = weight.shape[1]
    whole = groups >= per_group
    if entering is None:
        if rows is not None and whole:
            ctx.freeze(rows, "is grouped over values that cannot be removed")
        elif rows is not None:  # as many outputs must stay in every group
            tie_rows(ctx, rows.symbols.reshape(groups, -1))
        freeze_all(ctx, [columns], "reads values that cannot be removed")
        return
    inputs = entering.symbols.reshape(groups, per_group)
    if whole:
        ctx.tie(inputs, inputs[:, :1])
        if rows is not None:
            ctx.tie(rows.symbols.reshape(groups, -1), inputs[:, :1])
        else:
            ctx.freeze(entering, "its groups put out values that cannot be removed")
        freeze_all(ctx, [columns], "every group keeps all its inputs: whole groups are the units")
        ctx.count(weight, "groups", inputs[:, 0])
        return
    tie_rows(ctx, inputs)
    if rows is not None:
        tie_rows(ctx, rows.symbols.reshape(groups, -1))
    if columns is None:
        ctx.freeze(entering, "is read by columns that cannot be removed")
    else:
        ctx.tie(inputs, columns.symbols.reshape(1, per_group))
        ctx.read(entering, columns)


def grouped_transposed(ctx: Context, weight: Tensor, entering: Side, rows: Side, columns: Side, groups: int) -> Side:
    """Weight [in, out / groups, ...]: as `grouped`, with the output channels on columns that all groups share.

    Returns the labels of the output channels, one-axis.
    """
    per_group = weight.shape[0] // groups
    if entering is None or columns is None:
        reason = "enters a grouped transposed convolution beside values that cannot be removed"
        freeze_all(ctx, (entering, columns), reason)
    if groups >= per_group:
        freeze_all(ctx, [rows], "every group keeps all its outputs: whole groups are the units")
        if entering is None or columns is None:
            return None
        inputs, own = entering.symbols.reshape(groups, per_group), columns.packed.reshape(groups, per_group)
        ctx.tie(inputs, inputs[:, :1])
        ctx.tie(own >> 1, inputs[:, :1])
        ctx.count(weight, "groups", inputs[:, 0])
        whole = own[:, :1] & ~1 | (own & 1).min(1, keepdim=True).values
        return Labelled(whole.repeat(1, weight.shape[1]).flatten(), columns.sources)
    if entering is not None and columns is not None:
        inputs = entering.symbols.reshape(groups, per_group)
        ctx.tie(inputs, inputs[:1])
        ctx.tie(columns.symbols.reshape(groups, per_group), inputs)
        ctx.read(entering, columns)
    return None if rows is None else Labelled(rows.packed.flatten().repeat(groups), rows.sources)


@rule("mv", "dot", "vdot", "inner", counted=True)
def with_vector(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """Matrix [n, k] (or vector [k]) times vector [k]."""
    a = named["self"]
    vector = next(x for key, x in named.items() if key != "self" and isinstance(x, Tensor))
    if vector.dim() != 1:
        labelled = [*ctx.labelled(a), *ctx.labelled(vector)]
        freeze_all(ctx, labelled, "is an inner product of matrices, which has no rule")
        return
    labelled = ctx.labelled(a)
    last = a.dim() - 1
    contract(ctx, *sorted_by_input(ctx, (a, on_axis(labelled, last)), (vector, on_axis(ctx.labelled(vector), 0))))
    rest = [x for x in labelled if x.axes != (last,)]
    rows = without_axes(ctx, rest, [last], "sums over one of several labelled axes")
    ctx.set_labelled(out, [Labelled(labels.packed.squeeze(last), labels.sources) for labels in rows])
    ctx.flop(2, *(on_axis(rows, k) or a.shape[k] for k in range(a.dim() - 1)), on_axis(labelled, last) or a.shape[-1])


def sorted_by_input(ctx: Context, first: tuple[Tensor, Side], second: tuple[Tensor, Side]) -> tuple[Side, Side]:
    """The operand computed from the inputs, then the one that reads it."""
    turned = ctx.depends_on_input(second[0]) and not ctx.depends_on_input(first[0])
    return (second[1], first[1]) if turned else (first[1], second[1])


@rule("linear", counted=True)
def linear(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """Input [..., k] times weight [m, k], plus bias [m]."""
    x, weight = named["input"], named["weight"]
    turned = [Labelled(labels.packed.t(), labels.sources) for labels in ctx.labelled(weight)]
    product(ctx, x, ctx.labelled(x), weight.t(), turned, named["bias"], out)


@rule("mm", "bmm", "matmul", "_sparse_mm_reduce_impl", counted=True)
def matmul(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """A [..., n, k] times B [..., k, m]; of a sparse A also the mean or the largest of the products."""
    a, b = named["self"], named.get("mat2", named.get("other"))
    assert isinstance(b, Tensor)
    product(ctx, a, ctx.labelled(a), b, ctx.labelled(b), None, first_tensor(out))


@rule("addmm", "baddbmm", "addbmm", "_sparse_addmm", counted=True)
def addmm(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """A times B, plus a bias."""
    a, b = named.get("mat1", named.get("batch1")), named.get("mat2", named.get("batch2"))
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    bias = named["self"] if named.get("beta", 1) != 0 else None  # then it is not read
    product(ctx, a, ctx.labelled(a), b, ctx.labelled(b), bias, out)


def product(
    ctx: Context, a: Tensor, of_a: list[Labelled], b: Tensor, of_b: list[Labelled], bias: Tensor | None, out: Tensor
) -> None:
    """A [..., n, k] times b [..., k, m], plus a bias [m] or of the shape of the output."""
    rank = out.dim()
    if a.dim() < 2 or b.dim() < 2 or max(a.dim(), b.dim()) != rank:  # vectors are rare: not handled
        freeze_all(ctx, [*of_a, *of_b, *ctx.labelled(bias)], "is a product with a vector, which has no rule")
        ctx.set_labelled(out, [])
        return
    of_a, of_b = aligned(of_a, rank), aligned(of_b, rank)
    of_a, of_b = _summed(ctx, of_a, rank - 1), _summed(ctx, of_b, rank - 2)
    summed_a, summed_b = on_axis(of_a, rank - 1), on_axis(of_b, rank - 2)
    # Of zeros as the initial state of a recurrent cell there are as many as the columns that read them.
    if summed_a is not None or ctx.depends_on_input(a) or not ctx.constant_along(a, a.dim() - 1):
        contract(ctx, *sorted_by_input(ctx, (a, summed_a), (b, summed_b)))
    left = [x for x in of_a if rank - 1 not in x.axes]
    right = [x for x in of_b if rank - 2 not in x.axes]
    if rank > 2:
        harmonize(ctx, [(a, left), (b, right)], range(rank - 2), rank, "multiplies batches with different labels")
    groups: dict[tuple[int, ...], list[Labelled]] = {}
    for labels in [*left, *right]:
        groups.setdefault(labels.axes, []).append(labels)
    result: list[Labelled] = []
    for members in groups.values():
        for other in members[1:]:
            ctx.unify(members[0], other)
        result.append(next((x for x in members if x.all_zero), members[0]))
    rows, columns = on_axis(result, rank - 2), on_axis(result, rank - 1)
    batch: list[Labelled | int] = [on_axis(result, k) or out.shape[k] for k in range(rank - 2)]
    ctx.flop(2, *batch, rows or out.shape[-2], columns or out.shape[-1], summed_a or summed_b or a.shape[-1])
    added = aligned(ctx.labelled(bias), rank)
    if bias is not None and (added or result):
        operands = [(out, result), (bias, added)]
        harmonize(ctx, operands, range(rank), rank, "adds a bias with different or no labels")
        for labels in added:
            mate = next((x for x in result if x.axes == labels.axes), None)
            if mate is None:
                continue
            ctx.unify(mate, labels)
            result[result.index(mate)] = mate.with_zeros(mate.zero & labels.zero, mate.sources | labels.sources)
        result = [x if any(x.axes == y.axes for y in added) else x.with_zeros(False) for x in result]
    ctx.set_labelled(out, result)


def _summed(ctx: Context, labelled: list[Labelled], axis: int) -> list[Labelled]:
    """Labels that vary along a summed axis alone, or elsewhere alone; of both, elsewhere as long as that can go."""
    alone, wide = on_axis(labelled, axis), [x for x in labelled if axis in x.axes and len(x.axes) > 1]
    turned = alone is None and len(wide) == 1 and ctx.turned()
    given_up = [k for k in wide[0].axes if k != axis] if turned else [axis]
    kept = without_axes(ctx, wide, given_up, "sums over one of several labelled axes")
    if alone is None and len(wide) == 1:
        ctx.disputed(kept)
    return [x for x in labelled if axis not in x.axes or len(x.axes) == 1] + kept


@rule("linalg_solve_triangular")
def solve(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """The X of A X = B for matrices in the last two axes (left; else X A = B): only what A does not mix can go."""
    a, b, rank = named["self"], named["B"], out.dim()
    reason = "solves for values along this axis"
    mixed = rank - 2 if named.get("left", True) else rank - 1
    batches = without_axes(ctx, aligned(ctx.labelled(a), rank), [rank - 2, rank - 1], reason)
    sides = without_axes(ctx, aligned(ctx.labelled(b), rank), [mixed], reason)
    harmonize(ctx, [(a, batches), (b, sides)], range(rank - 2), rank, "solves batches with different or no labels")
    for labels in sides:
        for mate in batches:
            if mate.axes == labels.axes:
                ctx.unify(labels, mate)
    alone = [x.with_zeros(False) for x in batches if all(x.axes != y.axes for y in sides)]
    ctx.set_labelled(out, [*sides, *alone])


@rule("embedding", "embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def embedding(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Rows are looked up by the input (a bag sums, averages or maximises some) and stay; columns are features."""
    labelled = without_axes(ctx, ctx.labelled(named["weight"]), [0], "looks rows up by index")
    first = first_tensor(out)
    ctx.set_labelled(first, [placed(labels, first.dim(), first.dim() - 1) for labels in labelled])


@rule("_trilinear", counted=True)
def bilinear(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """As `nn.Bilinear` calls it: a [N, A], weight [O, A, B], b [N, B] to [N, O]."""
    a, weight, b = named["i1"], named["i2"], named["i3"]
    labelled = [ctx.labelled(tensor) for tensor in (a, weight, b)]
    expected = ([1, 3], [0], [1, 2], [2, 3])
    if tuple(list(named[key]) for key in ("expand1", "expand2", "expand3", "sumdim")) != expected:
        reason = "is a trilinear product of another form than nn.Bilinear's, which has no rule"
        freeze_all(ctx, chain(*labelled), reason)
        ctx.set_labelled(out, [])
        return
    rows, first, second = (on_axis(labelled[1], axis) for axis in range(3))
    contract(ctx, on_axis(labelled[0], 1), first)
    contract(ctx, on_axis(labelled[2], 1), second)
    ctx.set_labelled(out, [] if rows is None else [placed(rows, out.dim(), 1)])
    ctx.flop(2 * out.shape[0], *(labels or weight.shape[k] for k, labels in enumerate((rows, first, second))))


@rule("_cdist_forward", "_euclidean_dist")
def distances(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """Distances of vectors a [..., P, M] and b [..., R, M], as [..., P, R]: what is zero in both adds nothing."""
    a, b, rank, reason = named["x1"], named["x2"], out.dim(), "is compared with values that carry no labels"
    sides = [(tensor, aligned(ctx.labelled(tensor), rank)) for tensor in (a, b)]
    vectors = [on_axis(labelled, rank - 1) for _, labelled in sides]
    if any(vector is None or not vector.all_zero for vector in vectors) or not named.get("p", 2) > 0:
        freeze_all(ctx, vectors, reason)
    else:
        contract(ctx, vectors[0], vectors[1])
    rows = without_axes(ctx, [x for x in sides[0][1] if x is not vectors[0]], [rank - 1], reason)
    columns = without_axes(ctx, [x for x in sides[1][1] if x is not vectors[1]], [rank - 1], reason)
    columns = [Labelled(labels.packed.transpose(-1, -2), labels.sources) for labels in columns]
    harmonize(ctx, [(a, rows), (b, columns)], range(rank - 2), rank, reason)
    result: list[Labelled] = []
    for labels in [*rows, *columns]:
        mate = next((x for x in result if x.axes == labels.axes), None)
        if mate is None:
            result.append(labels.with_zeros(False))
        else:
            ctx.unify(mate, labels)
    ctx.set_labelled(out, result)

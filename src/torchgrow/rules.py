"""One rule per kind of operation: how labels pass through it. The only place that knows operations by name.

A rule may unify symbols, freeze them with a reason, and set the layers of the output; saying too much costs
freedom, never correctness, and the proof (`verify`) judges the whole. An operation without a rule freezes
whatever enters it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .labels import Layer
from .space import Place


class Context(Protocol):
    """What a rule may do; implemented by the tracer."""

    def layers(self, tensor: Tensor | None) -> list[Layer]:
        """Canonical layers of a tensor ([] for None, inputs and constants)."""

    def set_layers(self, tensor: Tensor, layers: Sequence[Layer | None]) -> None:
        """Give an output its layers."""

    def unify(self, a: Layer, b: Layer) -> None:
        """Tie two layers position by position (shapes broadcast)."""

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Tie two tensors of symbols entry by entry."""

    def freeze(self, layer: Layer, reason: str) -> None:
        """Never remove anything of this layer; an empty reason goes unrecorded."""

    def without_axis(self, layer: Layer, axis: int, reason: str) -> Layer | None:
        """The layer made constant along `axis`: merged if it varies elsewhere too, else frozen (None)."""

    def read(self, produced: Layer, weight: Layer) -> None:
        """Note that a contraction reads `produced` through the columns `weight`."""

    def flop(self, constant: int, *counted: Layer | int) -> None:
        """Count FLOPs: a constant times the live positions of each layer (or a plain size)."""

    def count(self, owner: Tensor, attribute: str, symbols: Tensor) -> None:
        """Note that an int attribute of the module owning a parameter counts `symbols`."""

    def constant_along(self, tensor: Tensor, axis: int) -> bool:
        """Whether an unlabelled tensor has the same values all along an axis, whatever the inputs are."""

    def depends_on_input(self, tensor: Tensor) -> bool:
        """Whether a tensor was computed from the model's inputs."""

    def split_view(self, layer: Layer) -> None:
        """Note a layer that varies along several axes of a view: its live positions must form a box."""


Rule = Callable[[Context, Any, dict[str, Any], Any], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operations by name."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


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
    return [Layer(x.packed.reshape((1,) * (rank - x.packed.dim()) + x.packed.shape), x.sources) for x in layers]


def placed(layer: Layer, rank: int, axis: int) -> Layer:
    """A one-axis layer laid along `axis` of a tensor of `rank` axes."""
    shape = [1] * rank
    shape[axis] = layer.packed.numel()
    return Layer(layer.packed.reshape(shape), layer.sources)


def harmonize(
    ctx: Context, operands: Sequence[tuple[Tensor, list[Layer]]], axes: Sequence[int], rank: int, reason: str
) -> None:
    """Make operands that meet position by position agree along `axes`; edits the layer lists in place.

    Along an axis every operand of size > 1 must carry layers varying over the same set of axes; otherwise the
    axis is merged away from all of them.
    """
    changed = True
    while changed:
        changed = False
        for axis in axes:
            varying = [layer for _, layers in operands for layer in layers if axis in layer.axes]
            if not varying:
                continue
            agree = len({layer.axes for layer in varying}) == 1
            for tensor, layers in operands:
                own = axis - (rank - tensor.dim())
                if own >= 0 and tensor.shape[own] > 1 and not any(axis in layer.axes for layer in layers):
                    agree = agree and ctx.constant_along(tensor, own)
            if not agree:
                changed = True
                for _, layers in operands:
                    layers[:] = without_axes(ctx, layers, [axis], reason)


# --- position by position -------------------------------------------------------------------------------------

PROBES = (0.7391, -1.913)
"""Arbitrary non-zero values standing for "anything" when asking what an operation makes of zeros."""


def silencers(ctx: Context, func: Any, named: dict[str, Any], labelled: Sequence[Tensor]) -> tuple[set[int], bool]:
    """Which labelled operands alone make the result zero when they are zero, and whether all together do."""
    name = func._overloadpacket.__name__
    if func._schema.is_mutable:
        packet = getattr(torch.ops.aten, name.rstrip("_"), None)
        func = getattr(packet, func._overloadname, None) if packet is not None else None
        if func is None:
            return set(), False

    def result_is_zero(zeroed: set[int]) -> bool:
        for probe in PROBES:

            def stand_in(value: Any, probe: float = probe) -> Any:
                if isinstance(value, (list, tuple)):
                    return type(value)(stand_in(v) for v in value)
                if not isinstance(value, Tensor):
                    return value
                index = next((i for i, t in enumerate(labelled) if t is value), None)
                if index is None and not ctx.depends_on_input(value):
                    return value
                fill = 0.0 if index in zeroed else probe
                return torch.full((1,) * value.dim(), fill, dtype=torch.float64).to(value.dtype)

            try:
                out = func(**{key: stand_in(value) for key, value in named.items()})
            except Exception:
                return False
            if not isinstance(out, Tensor) or out.is_meta or bool(out.any()):
                return False
        return True

    alone = {i for i in range(len(labelled)) if result_is_zero({i})}
    return alone, result_is_zero(set(range(len(labelled))))


def pointwise(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Operands meet position by position, with broadcasting: tie their labels."""
    out = first_tensor(out)
    tensors: list[Tensor] = []
    for value in named.values():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, Tensor) and not any(item is t for t in tensors):
                tensors.append(item)
    operands = [(tensor, aligned(ctx.layers(tensor), out.dim())) for tensor in tensors]
    harmonize(ctx, operands, range(out.dim()), out.dim(), "operands with different or no labels meet here")
    labelled = [tensor for tensor, layers in operands if layers]
    alone, together = silencers(ctx, func, named, labelled) if labelled else (set(), False)
    groups: dict[tuple[int, ...], list[tuple[int, Layer]]] = {}
    for tensor, layers in operands:
        for layer in layers:
            index = next(i for i, t in enumerate(labelled) if t is tensor)
            groups.setdefault(layer.axes, []).append((index, layer))
    result: list[Layer | None] = []
    for members in groups.values():
        head = members[0][1]
        for _, other in members[1:]:
            ctx.unify(head, other)
        result.append(combined(head, members, alone, together, len(labelled)))
    ctx.set_layers(out, result)


POINTWISE = (
    "hardswish", "hardsigmoid", "hardtanh", "relu6", "leaky_relu", "elu", "selu", "celu", "silu", "mish", "gelu", "relu",
    "threshold", "softplus", "logsigmoid", "prelu", "_prelu_kernel", "glu_jvp", "add", "mul", "sub", "div", "where",
)  # fmt: skip
"""Pointwise operations that some releases of torch do not tag as such."""
RULES.update(dict.fromkeys(POINTWISE, pointwise))


def combined(
    head: Layer, members: Sequence[tuple[int, Layer]], alone: set[int], together: bool, operands: int
) -> Layer:
    """What is known of the silence of a pointwise result, from that of the operands sharing its labels."""
    enough = [layer for index, layer in members if index in alone]
    if enough:
        whole = next((layer for layer in enough if bool(layer.silent.all())), None)
        if whole is not None:
            return head.with_silence(True, whole.sources)
        silent = enough[0].silent
        for layer in enough[1:]:
            silent = silent | layer.silent
        return head.with_silence(silent, frozenset().union(*(layer.sources for layer in enough)))
    if together and len({index for index, _ in members}) == operands:
        silent = members[0][1].silent
        for _, layer in members[1:]:
            silent = silent & layer.silent
        return head.with_silence(silent, frozenset().union(*(layer.sources for _, layer in members)))
    return head.with_silence(False, frozenset())


# --- data movement --------------------------------------------------------------------------------------------


@rule("alias", "detach", "clone", "_to_copy", "lift_fresh", "contiguous", "dropout", "dropout_", "feature_dropout")
def same(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Every element stays where it is."""
    source = next(value for value in named.values() if isinstance(value, Tensor))
    ctx.set_layers(first_tensor(out), ctx.layers(source))


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten")
def reshape(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Replayed on the labels; a view that spreads one axis over several must stay a box."""
    source = named["self"]
    moved = [layer.move(source.shape, lambda t: t.reshape(out.shape)) for layer in ctx.layers(source)]
    for layer in moved:
        if layer is not None and len(layer.axes) > 1:
            ctx.split_view(layer)
    ctx.set_layers(out, moved)


@rule(
    "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "flip", "roll", "repeat", "movedim", "expand_as",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "broadcast_to", "numpy_T", "diagonal", "T", "mT",
)  # fmt: skip
def movement(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Replay the same operation on the labels."""
    source = named.pop("self")
    ctx.set_layers(out, [layer.move(source.shape, lambda t: func(t, **named)) for layer in ctx.layers(source)])


@rule("constant_pad_nd", "pad")
def pad(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Padding an axis by a number fixed in the forward fixes what is beside it in place; cropping fixes the axis."""
    source, amounts = named["self"], list(named["pad"])
    layers = ctx.layers(source)
    if named.get("mode", "constant") != "constant" or any(amount < 0 for amount in amounts):
        axes = [source.dim() - 1 - i // 2 for i, amount in enumerate(amounts) if amount]
        layers = without_axes(ctx, layers, axes, "pads with values or crops by a number fixed in the forward")
    # the filler 0 is FIXED; the shape is the same for every padding mode
    moved = [layer.move(source.shape, lambda t: torch.nn.functional.pad(t, amounts)) for layer in layers]
    ctx.set_layers(out, moved)


@rule("slice", "narrow")
def slice_(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """A full slice moves; an equal chunk ties the chunks index by index; any other cut freezes the axis."""
    source = named["self"]
    dim = named["dim"] % source.dim()
    size, length = source.shape[dim], out.shape[dim]
    layers = ctx.layers(source)
    if length != size:
        start = named["start"] or 0
        start = start + size if start < 0 else start
        chunk = named.get("step", 1) == 1 and length > 0 and size % length == 0 and start % length == 0
        layers = tie_chunks(ctx, layers, dim, size // length if chunk else 0)
    ctx.set_layers(out, [layer.move(source.shape, lambda t: func(t, **_rest(named))) for layer in layers])


def _rest(named: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in named.items() if key != "self"}


def tie_chunks(ctx: Context, layers: Sequence[Layer], axis: int, chunks: int) -> list[Layer]:
    """Tie position i of every chunk of an axis; 0 chunks: the axis cannot be cut at all."""
    kept: list[Layer] = []
    for layer in layers:
        if axis not in layer.axes:
            kept.append(layer)
        elif chunks and len(layer.axes) == 1:
            slots = layer.symbols.flatten().reshape(chunks, -1)
            ctx.tie(slots, slots[:1])
            kept.append(layer)
        else:
            rest = ctx.without_axis(layer, axis, "takes a part of this axis at a place fixed in the forward")
            kept.extend([] if rest is None else [rest])
    return kept


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def split(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Equal parts tie index by index; unequal parts freeze the axis."""
    source = named["self"]
    dim = named.get("dim", 0) % source.dim()
    sizes = [part.shape[dim] for part in out]
    layers = tie_chunks(ctx, ctx.layers(source), dim, len(sizes) if len(set(sizes)) == 1 else 0)
    pieces = [[layer.packed.expand(source.shape).split(sizes, dim), layer.sources] for layer in layers]
    for i, part in enumerate(out):
        moved = [Layer(piece[i], sources).move(part.shape, lambda t: t) for piece, sources in pieces]
        ctx.set_layers(part, moved)


@rule("select", "unbind")
def select(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Taking one index of an axis: the axis is merged away first."""
    source = named["self"]
    dim = named.get("dim", 0) % source.dim()
    layers = without_axes(ctx, ctx.layers(source), [dim], "takes one index of this axis")
    moved = [layer.move(source.shape, lambda t: t.select(dim, 0)) for layer in layers]
    for part in [out] if isinstance(out, Tensor) else out:
        ctx.set_layers(part, moved)


@rule("cat", "concat", "concatenate")
def cat(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Labels are laid side by side; a part without labels is FIXED."""
    parts = [part for part in named["tensors"] if part.numel()]
    dim = named.get("dim", 0) % out.dim()
    operands = [(part, ctx.layers(part)) for part in parts]
    for _, layers in operands:
        multi = [layer for layer in layers if dim in layer.axes and len(layer.axes) > 1]
        single = [layer for layer in layers if layer not in multi]
        layers[:] = single + without_axes(ctx, multi, [dim], "concatenates along one of several labelled axes")
    others = [axis for axis in range(out.dim()) if axis != dim]
    harmonize(ctx, operands, others, out.dim(), "concatenates parts with different or no labels")
    result: list[Layer | None] = []
    along = [on_axis(layers, dim) for _, layers in operands]
    if any(layer is not None for layer in along):
        shape = [1] * out.dim()
        packed = []
        for part, layer in zip(parts, along, strict=True):
            shape[dim] = part.shape[dim]
            packed.append(torch.zeros(shape, dtype=torch.int64) if layer is None else layer.packed)
        sources = frozenset().union(*(layer.sources for layer in along if layer is not None))
        result.append(Layer(torch.cat(packed, dim), sources))
    groups: dict[tuple[int, ...], list[tuple[int, Layer]]] = {}
    for index, (_, layers) in enumerate(operands):
        for layer in layers:
            if dim not in layer.axes:
                groups.setdefault(layer.axes, []).append((index, layer))
    for members in groups.values():
        for _, other in members[1:]:
            ctx.unify(members[0][1], other)
        result.append(combined(members[0][1], members, set(), True, len(operands)))
    ctx.set_layers(out, result)


# --- contractions with a parameter ----------------------------------------------------------------------------


def contract(ctx: Context, produced: Layer | None, weight: Layer | None) -> None:
    """Sum over an axis: tie what enters with the columns that read it; freeze the side that stands alone."""
    if produced is not None and weight is not None:
        ctx.unify(produced, weight)
        ctx.read(produced, weight)
    elif weight is not None:
        ctx.freeze(weight, "reads values that cannot be removed")
    elif produced is not None:
        ctx.freeze(produced, "is summed over against values that carry no labels")


@rule("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution")
def convolution(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """Rows of the weight become the output channels; columns read the input channels; groups: see `grouped`."""
    x, weight, bias = named["input"], named["weight"], named["bias"]
    groups, transposed, rank = named["groups"], named["transposed"], out.dim()
    spatial = list(range(2, rank))
    x_layers = without_axes(ctx, ctx.layers(x), spatial, "convolves over this axis")
    w_layers = without_axes(ctx, ctx.layers(weight), spatial, "")  # kernel axes: not worth a mention
    row_axis, column_axis = (1, 0) if transposed else (0, 1)
    entering, rows, columns = on_axis(x_layers, 1), on_axis(w_layers, row_axis), on_axis(w_layers, column_axis)
    offset = on_axis(ctx.layers(bias), 0)
    if transposed and groups > 1:
        for layer in (entering, rows, columns, offset):
            if layer is not None:
                ctx.freeze(layer, "is a grouped transposed convolution, which has no rule yet")
        rows = None
    elif groups > 1:
        grouped(ctx, x, weight, entering, rows, columns, groups)
    else:
        contract(ctx, entering, columns)
    ctx.set_layers(out, [layer for layer in x_layers if layer.axes == (0,)] + [output(ctx, rows, offset, rank, 1)])
    positions = math.prod((x if transposed else out).shape[2:])
    kernel = math.prod(weight.shape[2:])
    ctx.flop(
        2 * out.shape[0] * positions * kernel, rows or weight.shape[row_axis], columns or weight.shape[column_axis]
    )


def output(ctx: Context, rows: Layer | None, bias: Layer | None, rank: int, axis: int) -> Layer | None:
    """The layer of a contraction's output, from the weight's rows and the bias."""
    if rows is None:
        if bias is not None:
            ctx.freeze(bias, "is added to values that cannot be removed")
        return None
    rows = placed(rows, rank, axis)
    if bias is None:
        return rows
    bias = placed(bias, rank, axis)
    ctx.unify(rows, bias)
    return rows.with_silence(rows.silent & bias.silent, rows.sources | bias.sources)


def grouped(
    ctx: Context, x: Tensor, weight: Tensor, entering: Layer | None, rows: Layer | None, columns: Layer | None,
    groups: int,
) -> None:  # fmt: skip
    """Grouped convolution: whole groups are units if there are at least as many as channels in each.

    Otherwise the same slot of every group is one unit.
    """
    per_group = weight.shape[1]
    whole = groups >= per_group
    if entering is None:
        if rows is not None and whole:
            ctx.freeze(rows, "is grouped over values that cannot be removed")
        if columns is not None:
            ctx.freeze(columns, "reads values that cannot be removed")
        return
    inputs = entering.symbols.reshape(groups, per_group)
    if whole:
        ctx.tie(inputs, inputs[:, :1])
        if rows is not None:
            ctx.tie(rows.symbols.reshape(groups, -1), inputs[:, :1])
        else:
            ctx.freeze(entering, "its groups put out values that cannot be removed")
        if columns is not None:
            ctx.freeze(columns, "every group keeps all its inputs: whole groups are the units")
        ctx.count(weight, "groups", inputs[:, 0])
        return
    ctx.tie(inputs, inputs[:1])
    if rows is not None:
        slots = rows.symbols.reshape(groups, -1)
        ctx.tie(slots, slots[:1])
    if columns is None:
        ctx.freeze(entering, "is read by columns that cannot be removed")
    else:
        ctx.tie(inputs, columns.symbols.reshape(1, per_group))
        ctx.read(entering, columns)


@rule("linear")
def linear(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """x [..., k] times weight [m, k], plus bias [m]."""
    x, weight = named["input"], named["weight"]
    turned = [Layer(layer.packed.t(), layer.sources) for layer in ctx.layers(weight)]
    product(ctx, x, ctx.layers(x), weight.t(), turned, named["bias"], out)


@rule("mm", "bmm", "matmul")
def matmul(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """A [..., n, k] times B [..., k, m]."""
    a, b = named["self"], named.get("mat2", named.get("other"))
    assert isinstance(b, Tensor)
    product(ctx, a, ctx.layers(a), b, ctx.layers(b), None, out)


@rule("addmm", "baddbmm", "addbmm")
def addmm(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """bias + A times B."""
    a, b = named.get("mat1", named.get("batch1")), named.get("mat2", named.get("batch2"))
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    product(ctx, a, ctx.layers(a), b, ctx.layers(b), named["self"], out)


def product(
    ctx: Context, a: Tensor, a_layers: list[Layer], b: Tensor, b_layers: list[Layer], bias: Tensor | None, out: Tensor
) -> None:
    """out [..., n, m] = a [..., n, k] b [..., k, m] (+ bias [m] or of out's shape)."""
    rank = out.dim()
    if a.dim() < 2 or b.dim() < 2 or max(a.dim(), b.dim()) != rank:  # vectors: rare, not worth a case
        for layer in [*a_layers, *b_layers, *ctx.layers(bias)]:
            ctx.freeze(layer, "is a product with a vector, which has no rule")
        ctx.set_layers(out, [])
        return
    a_layers, b_layers = aligned(a_layers, rank), aligned(b_layers, rank)
    several = "sums over one of several labelled axes"
    a_layers = [x for x in a_layers if x.axes == (rank - 1,)] + without_axes(
        ctx, [x for x in a_layers if x.axes != (rank - 1,)], [rank - 1], several)  # fmt: skip
    b_layers = [x for x in b_layers if x.axes == (rank - 2,)] + without_axes(
        ctx, [x for x in b_layers if x.axes != (rank - 2,)], [rank - 2], several)  # fmt: skip
    summed_a, summed_b = on_axis(a_layers, rank - 1), on_axis(b_layers, rank - 2)
    if ctx.depends_on_input(b) and not ctx.depends_on_input(a):
        contract(ctx, summed_b, summed_a)
    else:
        contract(ctx, summed_a, summed_b)
    left = [x for x in a_layers if rank - 1 not in x.axes]
    right = [x for x in b_layers if rank - 2 not in x.axes]
    if rank > 2:
        harmonize(ctx, [(a, left), (b, right)], range(rank - 2), rank, "multiplies batches with different labels")
    groups: dict[tuple[int, ...], list[Layer]] = {}
    for layer in [*left, *right]:
        groups.setdefault(layer.axes, []).append(layer)
    result: list[Layer] = []
    for members in groups.values():
        for other in members[1:]:
            ctx.unify(members[0], other)
        result.append(next((x for x in members if bool(x.silent.all())), members[0]))
    rows, columns = on_axis(result, rank - 2), on_axis(result, rank - 1)
    batch: list[Layer | int] = [on_axis(result, k) or out.shape[k] for k in range(rank - 2)]
    ctx.flop(2, *batch, rows or out.shape[-2], columns or out.shape[-1], summed_a or a.shape[-1])
    added = aligned(ctx.layers(bias), rank)
    if bias is not None and (added or result):
        operands = [(out, result), (bias, added)]
        harmonize(ctx, operands, range(rank), rank, "adds a bias with different or no labels")
        for layer in added:
            mate = next((x for x in result if x.axes == layer.axes), None)
            if mate is None:
                continue
            ctx.unify(mate, layer)
            result[result.index(mate)] = mate.with_silence(mate.silent & layer.silent, mate.sources | layer.sources)
        result = [x if any(x.axes == y.axes for y in added) else x.with_silence(False, frozenset()) for x in result]
    ctx.set_layers(out, result)


@rule("embedding")
def embedding(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """Rows are looked up by the input and stay; columns are features."""
    layers = without_axes(ctx, ctx.layers(named["weight"]), [0], "looks rows up by index")
    ctx.set_layers(out, [placed(layer, out.dim(), out.dim() - 1) for layer in layers])


# --- normalisation, pooling, reduction ------------------------------------------------------------------------


def affine(ctx: Context, layer: Layer, weight: Tensor | None, bias: Tensor | None, axis: int) -> Layer:
    """Tie scale and offset [C] of a normalisation to the channels, and let them be what silences these."""
    rank = layer.packed.dim()
    if weight is None or bias is None:
        return layer.with_silence(False, frozenset())
    sources: frozenset[Place] = frozenset()
    silent = torch.ones_like(layer.packed, dtype=torch.bool)
    for vector in (weight, bias):
        own = on_axis(ctx.layers(vector), 0)
        if own is None:
            return layer.with_silence(False, frozenset())
        ctx.unify(layer, placed(own, rank, axis))
        sources, silent = sources | own.sources, silent & placed(own, rank, axis).silent
    return layer.with_silence(silent, sources)


@rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "_batch_norm_with_update", "_batch_norm_no_update", "batch_norm",
)  # fmt: skip
def batch_norm(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Each channel on its own; scale and offset are the last affine map of the channel."""
    x, out = named["input"], first_tensor(out)
    layers = without_axes(ctx, ctx.layers(x), [k for k in range(x.dim()) if k != 1], "takes statistics along this axis")
    channels = on_axis(layers, 1)
    names = ("weight", "bias", "running_mean", "running_var")
    vectors = [named.get(name) for name in names]
    if channels is None:
        for vector in vectors:
            for layer in ctx.layers(vector):
                ctx.freeze(layer, "normalises values that cannot be removed")
        ctx.set_layers(out, [])
        return
    for vector in vectors[2:]:
        own = on_axis(ctx.layers(vector), 0)
        if own is not None:
            ctx.unify(channels, placed(own, x.dim(), 1))
    ctx.set_layers(out, [affine(ctx, channels, vectors[0], vectors[1], 1)])


@rule("native_group_norm", "group_norm")
def group_norm(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Statistics run over a group's channels: whole groups are the units."""
    x, out = named["input"], first_tensor(out)
    groups = named.get("group", named.get("num_groups"))
    weight, bias = named["weight"], named["bias"]
    layers = without_axes(ctx, ctx.layers(x), [k for k in range(x.dim()) if k != 1], "takes statistics along this axis")
    channels = on_axis(layers, 1)
    if channels is None or groups == 1:
        for layer in [*layers, *ctx.layers(weight), *ctx.layers(bias)]:
            ctx.freeze(layer, "takes statistics over all channels")
        ctx.set_layers(out, [])
        return
    symbols = channels.symbols.reshape(groups, -1)
    ctx.tie(symbols, symbols[:, :1])
    if weight is not None:
        ctx.count(weight, "num_groups", symbols[:, 0])
    ctx.set_layers(out, [affine(ctx, channels, weight, bias, 1)])


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Statistics run over the last axes: nothing on them can go."""
    x, out = named["input"], first_tensor(out)
    reason = "takes statistics over this axis"
    normalized = range(x.dim() - len(named["normalized_shape"]), x.dim())
    layers = without_axes(ctx, ctx.layers(x), normalized, reason)
    for vector in (named.get("weight"), named.get("bias")):
        for layer in ctx.layers(vector):
            ctx.freeze(layer, reason)
    ctx.set_layers(out, [layer.with_silence(False, frozenset()) for layer in layers])


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "logcumsumexp", "cumprod")
def along_one_axis(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """Mixes values along one axis."""
    dim = named["dim"] % out.dim()
    layers = without_axes(ctx, ctx.layers(named["self"]), [dim], "mixes values along this axis")
    ctx.set_layers(out, [layer.with_silence(False, frozenset()) for layer in layers])


@rule("mean", "sum", "amax", "amin", "var", "std", "var_mean", "logsumexp", "prod", "any", "all", "norm")
def reduction(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Reduces over some axes, which must carry no labels."""
    x = named["self"]
    dims = named.get("dim")
    dims = list(range(x.dim())) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    dims = sorted((dim % x.dim() for dim in dims), reverse=True)
    layers = without_axes(ctx, ctx.layers(x), dims, "reduces over this axis")
    if func._overloadpacket.__name__ not in ("mean", "sum", "amax", "amin"):
        layers = [layer.with_silence(False, frozenset()) for layer in layers]
    if not named.get("keepdim", False):
        for dim in dims:
            layers = [Layer(layer.packed.squeeze(dim), layer.sources) for layer in layers]
    for part in [out] if isinstance(out, Tensor) else out:
        ctx.set_layers(part, layers)


def spatial(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Pooling and resampling: the last one to three axes change size, channels pass; zero stays zero."""
    out = first_tensor(out)
    x = next(value for value in named.values() if isinstance(value, Tensor))
    axes = range(x.dim() - SPATIAL[func._overloadpacket.__name__], x.dim())
    ctx.set_layers(out, without_axes(ctx, ctx.layers(x), axes, "pools or resamples along this axis"))


SPATIAL = {
    "max_pool1d": 1, "max_pool2d": 2, "max_pool3d": 3, "max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3,
    "max_pool1d_with_indices": 1, "avg_pool1d": 1, "avg_pool2d": 2, "avg_pool3d": 3, "adaptive_avg_pool1d": 1,
    "adaptive_avg_pool2d": 2, "adaptive_avg_pool3d": 3, "_adaptive_avg_pool2d": 2, "_adaptive_avg_pool3d": 3,
    "adaptive_max_pool1d": 1, "adaptive_max_pool2d": 2, "adaptive_max_pool3d": 3, "upsample_nearest1d": 1,
    "upsample_nearest2d": 2, "upsample_nearest3d": 3, "_upsample_nearest_exact2d": 2, "upsample_linear1d": 1,
    "upsample_bilinear2d": 2, "upsample_trilinear3d": 3, "upsample_bicubic2d": 2, "_upsample_bilinear2d_aa": 2,
    "mkldnn_max_pool2d": 2,
}  # fmt: skip
RULES.update(dict.fromkeys(SPATIAL, spatial))


def unknown(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """No rule: freeze whatever enters. Never guess."""
    for value in named.values():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, Tensor):
                for layer in ctx.layers(item):
                    ctx.freeze(layer, "has no rule, so what enters it is kept")

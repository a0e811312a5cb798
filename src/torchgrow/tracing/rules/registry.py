"""One rule per kind of operation: how labels pass through it.

A rule may unify symbols, freeze them with a reason, and set the layers of the output; saying too much costs
freedom, never correctness, and the proof (`verify`) judges the whole. An operation without a rule freezes
whatever enters it. Here are pointwise operations and data movement; `contractions` and `reductions` the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from ..labels import Layer, compressed, standing


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

    def freeze_if_used(self, out: Tensor, layer: Layer, reason: str) -> None:
        """Freeze as soon as anything reads `out`; a result that nobody looks at costs no freedom."""

    def read(self, produced: Layer, weight: Layer) -> None:
        """Note that a contraction reads `produced` through the columns `weight`."""

    def flop(self, constant: int, *counted: Layer | int) -> None:
        """Count FLOPs: a constant times the live positions of each layer (or a plain size)."""

    def count(self, owner: Tensor, attribute: str, symbols: Tensor) -> None:
        """Note that an int attribute of the module owning a parameter counts `symbols`."""

    def owned(self, layer: Layer) -> bool:
        """Whether any of its symbols is of a parameter or a carried state."""

    def follows(self, layer: Layer) -> bool:
        """Whether it has met nothing but followers yet."""

    def follower(self, size: int) -> Layer:
        """A new layer, one-axis, of positions that will be as many as those they meet."""

    def constant_along(self, tensor: Tensor, axis: int) -> bool:
        """Whether an unlabelled tensor has the same values all along an axis, whatever the inputs are."""

    def before(self, tensor: Tensor) -> Tensor:
        """A tensor as it was before an operation wrote to it in place, if it was unlabelled and the same everywhere."""

    def zero(self, tensor: Tensor) -> bool:
        """Whether an unlabelled tensor holds (held, if it is written to in place) only zeros, whatever the inputs."""

    def filled(self, tensor: Tensor) -> bool:
        """Whether a tensor was made with one value everywhere, and since then written to by `copy_` at most."""

    def depends_on_input(self, tensor: Tensor) -> bool:
        """Whether a tensor was computed from the model's inputs."""

    def held(self) -> tuple[list[tuple[int, ...]], bool]:
        """Sizes that attributes of the modules under way hold: single ones, and those of lists and tuples.

        And whether to take them with care, since the proof has failed on a cut made here before.
        """

    def part(self, pieces: Sequence[Tensor]) -> None:
        """Note symbols of the pieces into which an axis is cut at places that attributes may hold."""

    def split_view(self, layer: Layer) -> None:
        """Note a layer that varies along several axes of a view: its live positions must form a box."""


Rule = Callable[[Context, Any, dict[str, Any], Any], None]
ModuleRule = Callable[[Context, Any, dict[str, Any], Any], None]
RULES: dict[str, Rule] = {}
MODULE_RULES: dict[type, ModuleRule] = {}
"""Modules that are followed as a whole: nothing inside them is looked at."""
COUNTED: set[Rule] = set()
"""Rules that count FLOPs, and so must run even where nothing carries labels."""


def rule(*names: str, counted: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operations by name."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        if counted:
            COUNTED.add(function)
        return function

    return register


def module_rule(*kinds: type) -> Callable[[ModuleRule], ModuleRule]:
    """Register a rule for whole modules of these classes (not of their subclasses).

    The rule is called as `rule(context, module, named, output)`, `named` being the arguments of `forward`.
    """

    def register(function: ModuleRule) -> ModuleRule:
        MODULE_RULES.update(dict.fromkeys(kinds, function))
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


# --- position by position -------------------------------------------------------------------------------------

PROBES = (0.7391, -1.913)
"""Arbitrary non-zero values standing for "anything" when asking what an operation makes of zeros."""


@dataclass(frozen=True)
class StandIn:
    """A tensor among the arguments of an operation whose values are not looked at.

    Attributes:
        index: which of the labelled operands it is; None for another tensor computed from the inputs.
        rank: number of its axes.
        dtype: its type.
    """

    index: int | None
    rank: int
    dtype: torch.dtype


def silencers(ctx: Context, func: Any, named: dict[str, Any], labelled: Sequence[Tensor]) -> tuple[set[int], bool]:
    """Which labelled operands alone make the result zero when they are zero, and whether all together do."""
    if func._schema.is_mutable:
        packet = getattr(torch.ops.aten, func._overloadpacket.__name__.rstrip("_"), None)
        func = getattr(packet, func._overloadname, None) if packet is not None else None
        if func is None:
            return set(), False
    values = False

    def described(value: Any) -> Any:
        """Stand-ins in place of tensors; constants and plain arguments as they are."""
        nonlocal values
        if isinstance(value, (list, tuple)):
            return tuple(described(v) for v in value)
        if not isinstance(value, Tensor):
            return value
        index = next((i for i, t in enumerate(labelled) if t is value), None)
        if index is None and not ctx.depends_on_input(value):
            values = True
            return ctx.before(value)
        return StandIn(index, value.dim(), value.dtype)

    call = tuple((key, described(value)) for key, value in named.items())
    return (probed if values else probed_once)(func, call, len(labelled))


def probed(func: Any, call: tuple[tuple[str, Any], ...], labelled: int) -> tuple[set[int], bool]:
    """`silencers`, by running the operation on zeros."""

    def result_is_zero(zeroed: set[int]) -> bool:
        """Whether zeros for these operands, and anything for the others, give zero."""
        for probe in PROBES:

            def stand_in(value: Any, probe: float = probe) -> Any:
                """One number in place of a tensor."""
                if isinstance(value, tuple):
                    return [stand_in(v) for v in value]
                if not isinstance(value, StandIn):
                    return value
                fill = 0.0 if value.index in zeroed else probe
                return torch.full((1,) * value.rank, fill, dtype=torch.float64).to(value.dtype)

            try:
                out = func(**{key: stand_in(value) for key, value in call})
            except Exception:
                return False
            out = out[0] if isinstance(out, tuple) else out
            if not isinstance(out, Tensor) or out.is_meta or bool(out.any()):
                return False
        return True

    alone = {i for i in range(labelled) if result_is_zero({i})}
    return alone, result_is_zero(set(range(labelled)))


probed_once = lru_cache(maxsize=1024)(probed)
"""`probed` for calls in which no values count: a network has few kinds of them."""


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
    "hardswish", "hardsigmoid", "hardtanh", "relu6", "leaky_relu", "elu", "selu", "celu", "silu", "mish", "gelu",
    "relu", "threshold", "softplus", "logsigmoid", "prelu", "_prelu_kernel", "glu_jvp", "add", "mul", "sub", "div",
    "where", "log_sigmoid_forward", "rsub", "rrelu_with_noise", "complex", "polar", "normal", "bernoulli", "poisson",
    "fake_quantize_per_tensor_affine_cachemask",
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams", "_fake_quantize_learnable_per_tensor_affine",
)  # fmt: skip
"""Pointwise operations that some releases of torch do not tag as such."""
RULES.update(dict.fromkeys(POINTWISE, pointwise))


def combined(
    head: Layer, members: Sequence[tuple[int, Layer]], alone: set[int], together: bool, operands: int
) -> Layer:
    """What is known of the silence of a pointwise result, from that of the operands sharing its labels."""
    enough = [layer for index, layer in members if index in alone]
    if enough:
        whole = next((layer for layer in enough if layer.all_silent), None)
        if whole is not None:
            return head if whole is head else head.with_silence(True, whole.sources)
        silent = enough[0].silent
        for layer in enough[1:]:
            silent = silent | layer.silent
        return head.with_silence(silent, frozenset().union(*(layer.sources for layer in enough)))
    if together and len({index for index, _ in members}) == operands:
        sources = frozenset().union(*(layer.sources for _, layer in members))
        if all(layer.all_silent for _, layer in members):
            return head.with_silence(True, sources)
        silent = members[0][1].silent
        for _, layer in members[1:]:
            silent = silent & layer.silent
        return head.with_silence(silent, sources)
    return head.with_silence(False, frozenset())


def either(ctx: Context, one: Tensor, other: Tensor) -> None:
    """Whatever reads `other` may get `one` instead: both carry the same labels, silent where both are."""
    operands = [(tensor, list(ctx.layers(tensor))) for tensor in (one, other)]
    harmonize(ctx, operands, range(other.dim()), other.dim(), "meets no such labels where the layer is left out")
    result: list[Layer | None] = []
    for layer in operands[1][1]:
        mate = next(x for x in operands[0][1] if x.axes == layer.axes)
        ctx.unify(layer, mate)
        result.append(combined(layer, [(0, mate), (1, layer)], set(), True, 2))
    ctx.set_layers(other, result)


# --- data movement --------------------------------------------------------------------------------------------


@rule(
    "alias", "detach", "clone", "_to_copy", "lift_fresh", "contiguous", "dropout", "dropout_", "feature_dropout",
    "native_dropout", "_fused_dropout",
    "_conj", "_conj_physical", "conj_physical", "_neg_view", "resolve_conj", "resolve_neg",
)  # fmt: skip
def same(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Every element stays where it is."""
    source = next(value for value in named.values() if isinstance(value, Tensor))
    ctx.set_layers(first_tensor(out), ctx.layers(source))


RANDOM = (
    "rand_like", "randn_like", "randint_like", "normal_", "uniform_", "exponential_", "random_", "bernoulli_",
    "cauchy_", "geometric_", "log_normal_", "normal_functional",
)  # fmt: skip


@rule(*RANDOM)
def noise(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """Random values for as many positions: those of a unit go with it, though others are then drawn for the rest."""
    ctx.set_layers(out, [layer.with_silence(False, frozenset()) for layer in ctx.layers(named["self"])])


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten")
def reshape(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Replayed on the labels; a view that spreads one axis over several must stay a box."""
    source = named["self"]
    before, after = _reshaped(source.shape, out.shape)
    empty = [axis for axis, size in enumerate(out.shape) if not size]

    def moved(labels: Tensor) -> Tensor:
        labels = labels.reshape(after)
        for axis in empty:  # no two positions there that could differ
            labels = labels.narrow(axis, 0, 1)
        return labels

    layers = _apart(ctx, ctx.layers(source), lambda layer: layer.move(before, moved))
    for layer in layers:
        if len(layer.axes) > 1:
            ctx.split_view(layer)
    ctx.set_layers(out, layers)


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


def _apart(ctx: Context, layers: Sequence[Layer], joined: Callable[[Layer], Layer | None]) -> list[Layer]:
    """Layers after a view that joins axes; of two that now vary along one axis the second is frozen.

    A position there would go with either of two units. What parameters own stays before what follows, and then what
    varied along the outer axis: heads, not what is the same in each of them. Of followers the inner one stays: the
    outer one is the batch.
    """
    kept: list[Layer] = []
    if len(layers) > 1:
        layers = sorted(layers, key=lambda x: (0, x.axes[0]) if ctx.owned(x) else (1, -x.axes[0]))
    for layer in layers:
        moved = joined(layer)
        if moved is None:
            continue
        if any(not set(other.axes).isdisjoint(moved.axes) for other in kept):
            ctx.freeze(layer, "lies along one axis with other units")
        else:
            kept.append(moved)
    return kept


@rule("expand", "broadcast_to", "expand_as")
def expand(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """One position shown many times: as many as the labels ask for that it meets."""
    source, lead = named["self"], out.dim() - named["self"].dim()
    layers: list[Layer | None] = list(aligned(ctx.layers(source), out.dim()))
    if layers or ctx.depends_on_input(source):
        stretched = [k for k in range(out.dim()) if out.shape[k] > 1 and (k < lead or source.shape[k - lead] == 1)]
        layers += [placed(ctx.follower(out.shape[axis]), out.dim(), axis) for axis in reversed(stretched)]
    ctx.set_layers(out, layers)


@rule(
    "permute", "transpose", "t", "unsqueeze", "squeeze", "flip", "repeat", "movedim", "pixel_shuffle",
    "pixel_unshuffle", "numpy_T", "diagonal", "T", "mT",
)  # fmt: skip
def movement(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Replay the same operation on the labels."""
    source = named.pop("self")
    named.update({key: standing(named[key]) for key in ("size", "repeats") if key in named})
    ctx.set_layers(
        out, _apart(ctx, ctx.layers(source), lambda layer: layer.move(source.shape, lambda t: func(t, **named)))
    )


@rule("view_as_real")
def view_as_real(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """Real and imaginary part, side by side along a new last axis."""
    ctx.set_layers(out, [Layer(layer.packed[..., None], layer.sources) for layer in ctx.layers(named["self"])])


@rule("view_as_complex")
def view_as_complex(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """And back."""
    source = named["self"]
    layers = without_axes(ctx, ctx.layers(source), [out.dim()], "takes this axis for real and imaginary parts")
    ctx.set_layers(out, [Layer(layer.packed[..., 0], layer.sources) for layer in layers])


@rule("unfold")
def windows(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """`Tensor.unfold`: windows along an axis, each along a new last one. Windows side by side may go as a whole."""
    source, size = named["self"], named["size"]
    dim = named["dimension"] % max(1, source.dim())
    beside = size == named["step"] and source.shape[dim] == out.shape[dim] * size
    result: list[Layer | None] = []
    for layer in ctx.layers(source):
        if layer.axes == (dim,) and beside:
            slots = layer.symbols.flatten().reshape(-1, size)
            ctx.tie(slots, slots[:, :1])
            result.append(layer.move(source.shape, lambda t: t.unfold(dim, size, size)))
        else:
            kept = without_axes(ctx, [layer], [dim], "slides a window along this axis")
            result += [Layer(x.packed[..., None], x.sources) for x in kept]
    ctx.set_layers(out, result)


@rule("im2col")
def image_windows(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """[N, C, H, W] to [N, C x kernel, positions]: every channel becomes a block of rows."""
    source = named["self"]
    spatial = [source.dim() - 2, source.dim() - 1]
    layers = without_axes(ctx, ctx.layers(source), spatial, "slides a window along this axis")
    ctx.set_layers(out, [windowed(layer, out.dim(), named["kernel_size"]) for layer in layers])


def windowed(layer: Layer, rank: int, kernel: Sequence[int]) -> Layer:
    """A layer of images, constant along both sides, on their windows."""
    packed = layer.packed.squeeze(-1)  # the sides are of size 1
    axis = rank - 2
    if axis in layer.axes:
        packed = packed.repeat_interleave(kernel[0] * kernel[1], axis)
    return Layer(packed, layer.sources)


@rule("col2im")
def fold(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """The inverse of `im2col`: the rows of a channel go together."""
    source, kernel = named["self"], named["kernel_size"]
    rows, last, each = source.dim() - 2, source.dim() - 1, kernel[0] * kernel[1]
    result = []
    for layer in without_axes(ctx, ctx.layers(source), [last], "slides a window along this axis"):
        if layer.axes == (rows,):
            channels = layer.packed.flatten().reshape(-1, each)
            ctx.tie(channels >> 1, channels[:, :1] >> 1)
            whole = channels[:, 0] & ~1 | (channels & 1).amin(1)
            result.append(placed(Layer(whole, layer.sources), out.dim(), out.dim() - 3))
        else:
            result += [
                Layer(x.packed[..., None], x.sources) for x in without_axes(ctx, [layer], [rows], "folds windows")
            ]
    ctx.set_layers(out, result)


@rule("roll")
def roll(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Rolls axes by numbers fixed in the forward: what wraps around is no longer the same once an axis is cut."""
    source = named["self"]
    axes = [axis % source.dim() for axis in named["dims"]] or list(range(source.dim()))
    ctx.set_layers(out, without_axes(ctx, ctx.layers(source), axes, "rolls this axis by a number fixed in the forward"))


@rule(
    "constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
    "replication_pad2d", "replication_pad3d",
)  # fmt: skip
def pad(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Padding an axis by a number fixed in the forward fixes what is beside it in place; cropping fixes the axis.

    Labels that do not vary along a padded axis stay as they are: a channel that is gone has no padding either.
    """
    source, amounts = named["self"], list(named["pad"] if "pad" in named else named["padding"])
    constant = func._overloadpacket.__name__ == "constant_pad_nd" or named.get("mode") == "constant"
    value = named.get("value") or 0
    layers = ctx.layers(source)
    if not constant or any(amount < 0 for amount in amounts):
        axes = [source.dim() - 1 - i // 2 for i, amount in enumerate(amounts) if amount]
        layers = without_axes(ctx, layers, axes, "pads with values or crops by a number fixed in the forward")
    result: list[Layer | None] = []
    for layer in layers:
        here = [amount if source.dim() - 1 - i // 2 in layer.axes else 0 for i, amount in enumerate(amounts)]
        silent = layer.with_silence(False, frozenset()) if constant and value != 0 else layer
        # the filler 0 is FIXED
        result.append(compressed(Layer(torch.nn.functional.pad(silent.packed, here), silent.sources)))
    ctx.set_layers(out, result)


@rule("select", "unbind")
def select(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Taking one index of an axis: the axis is merged away first."""
    source = named["self"]
    dim = named.get("dim", 0) % source.dim()
    layers = without_axes(ctx, ctx.layers(source), [dim], "takes one index of this axis")
    moved = [layer.move(source.shape, lambda t: t.select(dim, 0)) for layer in layers]
    for part in [out] if isinstance(out, Tensor) else out:
        ctx.set_layers(part, moved)


@rule("tril", "triu")
def triangle(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Zeros on one side of the diagonal of matrices in the last two axes."""
    source = named["self"]
    axes = [source.dim() - 2, source.dim() - 1]
    ctx.set_layers(out, without_axes(ctx, ctx.layers(source), axes, "sets a triangle of these axes to zero"))


CONSTANT = frozenset(
    {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"}
)
"""New tensors that do not depend on the values of the tensor they are made from."""
FILLED = CONSTANT | {"zeros", "ones", "full", "empty"}
"""What makes tensors with one value everywhere (or with none that counts)."""


@rule(*CONSTANT)
def constant(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """The same value everywhere. Made `like` a tensor it has as many positions; else a size of its own, unlabelled."""
    kind = func._overloadpacket.__name__
    if kind.endswith("_like") and out is not None:
        zero = kind == "zeros_like"
        ctx.set_layers(out, [layer.with_silence(zero, frozenset()) for layer in ctx.layers(named["self"])])


@rule("cat", "concat", "concatenate")
def cat(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Labels are laid side by side; a part without labels is FIXED."""
    parts = [part for part in named["tensors"] if part.dim() == out.dim()]  # torch leaves out empty vectors
    dim = named.get("dim", 0) % out.dim()
    operands = [(part, ctx.layers(part)) for part in parts]
    others = [axis for axis in range(out.dim()) if axis != dim]
    harmonize(ctx, operands, others, out.dim(), "concatenates parts with different or no labels")
    along = [[layer for layer in layers if dim in layer.axes] for _, layers in operands]
    if len({tuple(layer.axes for layer in layers) for layers in along}) > 1 or len(along[0]) > 1:
        reason = "concatenates along one of several labelled axes"
        for _, layers in operands:  # only now: the other axes may have been given up already
            multi = [layer for layer in layers if dim in layer.axes and len(layer.axes) > 1]
            single = [layer for layer in layers if layer not in multi]
            layers[:] = single + without_axes(ctx, multi, [dim], reason)
        along = [[layer for layer in layers if layer.axes == (dim,)] for _, layers in operands]
    result: list[Layer | None] = []
    if any(along):
        result.append(_in_a_row(ctx, [part.shape[dim] for part in parts], along, dim))
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


def _in_a_row(ctx: Context, sizes: Sequence[int], along: Sequence[Sequence[Layer]], dim: int) -> Layer:
    """The labels of parts of such sizes along an axis; of each the layer that varies there, if one does."""
    given = [layers[0] for layers in along if layers]
    rest = torch.broadcast_shapes(*(layer.packed.movedim(dim, 0).shape[1:] for layer in given))
    nothing = torch.zeros((1,) * given[0].packed.dim(), dtype=torch.int64)
    packed = [
        (layers[0].packed if layers else nothing).expand(*rest[:dim], size, *rest[dim:])
        for size, layers in zip(sizes, along, strict=True)
    ]
    row = Layer(torch.cat(packed, dim), frozenset().union(*(layer.sources for layer in given)))
    if len(row.axes) > 1:
        ctx.split_view(row)
    return row


@rule("stack")
def stack(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Parts laid side by side along a new axis, labels as they are; a part without labels follows the others."""
    parts = named["tensors"]
    dim, rank = named.get("dim", 0) % out.dim(), out.dim() - 1
    operands = [(part, ctx.layers(part)) for part in parts]
    harmonize(ctx, operands, range(rank), rank, "stacks parts with different or no labels")
    by_axes: dict[tuple[int, ...], list[Layer | None]] = {}
    for index, (_, layers) in enumerate(operands):
        for layer in layers:
            by_axes.setdefault(layer.axes, [None] * len(parts))[index] = layer
    result: list[Layer | None] = []
    for slots in by_axes.values():
        head = next(layer for layer in slots if layer is not None)
        packed = [(head.with_silence(False, frozenset()) if x is None else x).packed for x in slots]
        shape = torch.broadcast_shapes(*(x.shape for x in packed))
        sources = frozenset().union(*(x.sources for x in slots if x is not None))
        full = Layer(torch.stack([x.expand(shape) for x in packed], dim), sources)
        result.append(full.move(full.packed.shape, lambda t: t))
    for stacked in result:
        if stacked is not None and len(stacked.axes) > 1:
            ctx.split_view(stacked)
    ctx.set_layers(out, result)


def unknown(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """No rule: freeze whatever enters. Never guess."""
    for value in named.values():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, Tensor):
                for layer in ctx.layers(item):
                    ctx.freeze(layer, "has no rule, so what enters it is kept")

"""Rules for statistics over an axis: normalisation, softmax, reductions, pooling and resampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..labels import FIXED, Labelled
from .labelled import first_tensor, freeze_all, harmonize, on_axis, without_axes
from .registry import RULES, Context, rule


def _of_channels(ctx: Context, x: Tensor) -> list[Labelled]:
    """Labels of what a normalisation takes statistics of, along the axis of channels alone."""
    others = [k for k in range(x.dim()) if k != 1]
    return without_axes(ctx, ctx.labelled(x), others, "takes statistics along this axis")


def affine(
    ctx: Context, labels: Labelled, weight: Tensor | None, bias: Tensor | None, *statistics: Tensor | None
) -> Labelled:
    """Tie scale and offset [C] of a normalisation (and statistics) to the channels; zero if both are."""
    given = [on_axis(ctx.labelled(vector), 0) for vector in (weight, bias) if vector is not None]
    own = [vector for vector in given if vector is not None]
    known = own + [x for x in (on_axis(ctx.labelled(vector), 0) for vector in statistics) if x is not None]
    if known:
        ctx.tie(torch.stack([vector.symbols for vector in known]), labels.symbols.flatten())
    if weight is None or len(own) < len(given):
        return labels.with_zeros(False)
    sources = frozenset().union(*(vector.sources for vector in own))
    if all(vector.all_zero for vector in own):
        return labels.with_zeros(True, sources)
    zero = torch.stack([vector.zero for vector in own]).all(0)
    return labels.with_zeros(zero.reshape(labels.packed.shape), sources)


@rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "miopen_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update", "batch_norm",
)  # fmt: skip
def batch_norm(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Each channel on its own; scale and offset are the last affine map of the channel."""
    x, out = named["input"], first_tensor(out)
    channels = on_axis(_of_channels(ctx, x), 1)
    vectors = [named.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    if channels is None:
        for vector in vectors:
            freeze_all(ctx, ctx.labelled(vector), "normalises values that cannot be removed")
        ctx.set_labelled(out, [])
        return
    ctx.set_labelled(out, [affine(ctx, channels, *vectors)])


@rule("native_group_norm", "group_norm")
def group_norm(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Statistics run over a group's channels: whole groups are the units."""
    x, out = named["input"], first_tensor(out)
    groups: int = named["group"] if "group" in named else named["num_groups"]
    weight, bias = named["weight"], named["bias"]
    labelled = _of_channels(ctx, x)
    channels = on_axis(labelled, 1)
    if channels is None or groups == 1:
        freeze_all(ctx, [*labelled, *ctx.labelled(weight), *ctx.labelled(bias)], "takes statistics over all channels")
        ctx.set_labelled(out, [])
        return
    symbols = channels.symbols.reshape(groups, -1)
    ctx.tie(symbols, symbols[:, :1])
    if weight is not None:
        ctx.count(weight, "num_groups", symbols[:, 0])
    ctx.set_labelled(out, [affine(ctx, channels, weight, bias)])


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Statistics run over the last axes: nothing on them can go."""
    x, out = named["input"], first_tensor(out)
    reason = "takes statistics over this axis"
    normalized = range(x.dim() - len(named["normalized_shape"]), x.dim())
    labelled = without_axes(ctx, ctx.labelled(x), normalized, reason)
    freeze_all(ctx, ctx.labelled(named.get("weight")), reason)
    freeze_all(ctx, ctx.labelled(named.get("bias")), reason)
    ctx.set_labelled(out, [labels.with_zeros(False) for labels in labelled])


MIXING = {
    "softmax": False, "_softmax": False, "_safe_softmax": False, "log_softmax": False, "_log_softmax": False,
    "logcumsumexp": False, "argsort": False, "cumsum": True, "cumprod": True, "cummax": True, "cummin": True,
    "sort": True, "topk": True, "_fft_c2c": True, "_fft_r2c": True, "_fft_c2r": True,
}  # fmt: skip
"""Operations that mix values along axes, and whether they map zeros to zeros."""


def along_axes(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Mixes values along some axes, which stay; further results are positions."""
    x, dims = named["self"], named["dim"]
    dims = [dim % max(1, x.dim()) for dim in ([dims] if isinstance(dims, int) else dims)]
    labelled = without_axes(ctx, ctx.labelled(x), dims, "mixes values along this axis")
    zero = MIXING[func._overloadpacket.__name__.removesuffix("_")]
    for i, part in enumerate([out] if isinstance(out, Tensor) else out):
        ctx.set_labelled(part, labelled if zero and i == 0 else _any_values(labelled))


RULES.update(dict.fromkeys(MIXING, along_axes))


def _any_values(labelled: Sequence[Labelled]) -> list[Labelled]:
    return [labels.with_zeros(False) for labels in labelled]


SUMS = {"sum", "nansum", "any", "norm", "linalg_vector_norm"}
"""Reductions to which zeros add nothing."""
REDUCTIONS = {
    "logsumexp": False, "count_nonzero": False, "prod": False, "all": False, "var": False, "std": False,
    "std_mean": False, "var_mean": False, "argmax": False, "argmin": False, "mean": True, "amax": True, "amin": True,
    "max": True, "min": True, "median": True,
    "nanmedian": True, "mode": True, "kthvalue": True, **dict.fromkeys(SUMS, True), "aminmax": True,
}  # fmt: skip
"""Reductions, and whether they map zeros to zeros (if they return values and positions, for the values)."""


def reduction(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Reduces over some axes, which must carry no labels, or none but those of zeros that are summed up."""
    x, name, parts = named["self"], func._overloadpacket.__name__, [out] if isinstance(out, Tensor) else list(out)
    dims = named.get("dim")
    dims = list(range(x.dim())) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    dims = sorted((dim % max(1, x.dim()) for dim in dims), reverse=True)
    reason = "reduces over this axis"
    inside: list[Labelled] = []  # labels that end here
    across: list[Labelled] = []  # labels that vary elsewhere too
    for labels in ctx.labelled(x):
        (inside if set(labels.axes) <= set(dims) else across).append(labels)
    for labels in inside:
        if _adds_nothing(name, named, labels):
            if ctx.depends_on_input(x):  # a reader of the sum reads these units: they are gated where they are computed
                ctx.read(labels, labels.with_zeros(True))
            continue
        for part in parts:
            ctx.freeze_if_used(part, labels, reason)
    labelled = without_axes(ctx, across, dims, reason)
    if not named.get("keepdim", False):
        for dim in dims:
            labelled = [Labelled(labels.packed.squeeze(dim), labels.sources) for labels in labelled]
    for i, part in enumerate(parts):
        zero = REDUCTIONS[name] and (i == 0 or name == "aminmax")
        ctx.set_labelled(part, labelled if zero else _any_values(labelled))


RULES.update(dict.fromkeys(REDUCTIONS, reduction))


def _adds_nothing(name: str, named: dict[str, Any], labels: Labelled) -> bool:
    """Whether a sum, or a norm, is the same without the units of these labels: they are zero when they go."""
    order = named.get("p", named.get("ord"))
    order = 2 if order is None else order
    zero = bool((labels.zero | (labels.symbols == FIXED)).all())
    return name in SUMS and zero and not isinstance(order, (str, Tensor)) and order > 0


@rule("segment_reduce")
def segments(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """Reduces rows that follow each other along one axis."""
    labelled = without_axes(
        ctx, ctx.labelled(named["data"]), [named["axis"] % named["data"].dim()], "reduces over segments"
    )
    ctx.set_labelled(out, _any_values(labelled))


@rule("renorm")
def renorm(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """Scales every slice of an axis whose norm is too large; zeros add nothing to it."""
    x, dim = named["self"], named["dim"] % named["self"].dim()
    across = [axis for axis in range(x.dim()) if axis != dim]
    result = []
    for labels in ctx.labelled(x):
        if labels.axes == (dim,) or _adds_nothing("norm", named, labels):
            result.append(labels)
        else:
            result += without_axes(ctx, [labels], across, "is normalised together with other axes")
    ctx.set_labelled(out, result)


@rule("_weight_norm_interface")
def weight_norm(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Directions `v` over their norms, times lengths `g` along `dim`: only a length of zero makes the result zero."""
    v, dim, out = named["v"], named["dim"] % named["v"].dim(), first_tensor(out)
    reason = "is normalised together with other axes"
    labelled = ctx.labelled(v)
    along = [x for x in labelled if x.axes == (dim,)]
    rest = without_axes(ctx, [x for x in labelled if x.axes != (dim,)], [dim], reason)
    operands = [(v, along), (named["g"], ctx.labelled(named["g"]))]
    harmonize(ctx, operands, [dim], v.dim(), reason)
    result = [labels.with_zeros(False) for labels in rest]
    for direction, length in zip(along, operands[1][1], strict=True):
        ctx.unify(direction, length)
        result.append(length)
    ctx.set_labelled(out, result)


def spatial(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Pooling and resampling: the last one to three axes change size, channels pass; zero stays zero.

    So do the channels of the places that pooling also returns.
    """
    out, *places = [out] if isinstance(out, Tensor) else out
    x = next(value for value in named.values() if isinstance(value, Tensor))
    axes = range(x.dim() - SPATIAL[func._overloadpacket.__name__], x.dim())
    labelled = without_axes(ctx, ctx.labelled(x), axes, "pools or resamples along this axis")
    ctx.set_labelled(out, labelled)
    for part in places:
        ctx.set_labelled(part, [labels.with_zeros(False) for labels in labelled])


@rule("max_unpool2d", "max_unpool3d")
def max_unpool(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """Values go back to the places they were pooled from, with zeros around them; each channel on its own."""
    x, places, rank = named["self"], named["indices"], out.dim()
    spatial_axes = range(rank - (2 if func._overloadpacket.__name__ == "max_unpool2d" else 3), rank)
    reason = "puts values back at places"
    operands = [(t, without_axes(ctx, ctx.labelled(t), spatial_axes, reason)) for t in (x, places)]
    harmonize(ctx, operands, range(spatial_axes[0]), rank, "puts values back at places with different or no labels")
    for labels in operands[0][1]:
        for mate in operands[1][1]:
            if mate.axes == labels.axes:
                ctx.unify(labels, mate)
    ctx.set_labelled(out, operands[0][1])


SPATIAL = {
    "max_pool1d": 1, "max_pool2d": 2, "max_pool3d": 3, "max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3,
    "max_pool1d_with_indices": 1, "avg_pool1d": 1, "avg_pool2d": 2, "avg_pool3d": 3, "adaptive_avg_pool1d": 1,
    "adaptive_avg_pool2d": 2, "adaptive_avg_pool3d": 3, "_adaptive_avg_pool2d": 2, "_adaptive_avg_pool3d": 3,
    "adaptive_max_pool1d": 1, "adaptive_max_pool2d": 2, "adaptive_max_pool3d": 3, "upsample_nearest1d": 1,
    "upsample_nearest2d": 2, "upsample_nearest3d": 3, "_upsample_nearest_exact2d": 2, "upsample_linear1d": 1,
    "upsample_bilinear2d": 2, "upsample_trilinear3d": 3, "upsample_bicubic2d": 2, "_upsample_bilinear2d_aa": 2,
    "_upsample_bicubic2d_aa": 2,
    "mkldnn_max_pool2d": 2, "fractional_max_pool2d": 2, "fractional_max_pool3d": 3,
}  # fmt: skip
RULES.update(dict.fromkeys(SPATIAL, spatial))

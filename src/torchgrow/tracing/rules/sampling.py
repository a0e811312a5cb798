"""Rules for sampling maps at given places: grids, boxes, deformed kernels. Channels pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..labels import Labelled
from .contractions import convolution
from .indexing import met
from .labelled import freeze_all, on_axis, placed, tie_rows, without_axes
from .registry import Context, rule

PLACES = "says where values are sampled"


@rule("grid_sampler_2d", "grid_sampler_3d", "cudnn_grid_sampler", "_grid_sampler_2d_cpu_fallback")
def grid_sample(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """Maps [N, C, ...] at the places of a grid [N, ..., 2 or 3], linearly: zero stays zero."""
    x, grid, rank = named.get("input", named.get("self")), named["grid"], out.dim()
    labelled = without_axes(ctx, ctx.labelled(x), range(2, rank), "is sampled along this axis")
    places = without_axes(ctx, ctx.labelled(grid), range(1, rank), PLACES)
    if places or any(0 in labels.axes for labels in labelled):  # channels in the batch
        operands = [(x, labelled), (grid, [labels.with_zeros(True) for labels in places])]
        labelled = met(ctx, operands, [0], rank, PLACES)
    ctx.set_labelled(out, labelled)


@rule("roi_align", "roi_pool")
def regions(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Boxes of maps [N, C, H, W], resampled to [boxes, C, h, w] (torchvision)."""
    labelled = _of_channels(ctx, named)
    for part, zero in zip([out] if isinstance(out, Tensor) else out, (True, False), strict=False):
        ctx.set_labelled(part, [x if zero else x.with_zeros(False) for x in labelled])


@rule("ps_roi_align", "ps_roi_pool")
def regions_of_blocks(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """As `regions`, every place of a box reading a channel of its own: the channels of a block of h x w go together."""
    x, first = named["input"], out[0]
    labelled = _of_channels(ctx, named)
    result = []
    for labels in labelled:
        blocks = labels.packed.reshape(first.shape[1], -1)
        ctx.tie(blocks >> 1, blocks[:, :1] >> 1)
        whole = blocks[:, 0] & ~1 | (blocks & 1).amin(1)
        result.append(placed(Labelled(whole, labels.sources), x.dim(), 1))
    ctx.set_labelled(first, result)


def _of_channels(ctx: Context, named: dict[str, Any]) -> list[Labelled]:
    """The labels of the channels of maps in which boxes are looked up."""
    freeze_all(ctx, ctx.labelled(named["rois"]), PLACES)
    return without_axes(ctx, ctx.labelled(named["input"]), [0, 2, 3], "is sampled along this axis")


@rule("deform_conv2d", counted=True)
def deform_conv(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """A convolution whose kernel is moved and scaled place by place (torchvision); groups of channels share that."""
    x = named["input"]
    freeze_all(ctx, [*ctx.labelled(named["offset"]), *ctx.labelled(named["mask"])], PLACES)
    labelled = without_axes(ctx, ctx.labelled(x), [0], "is sampled along this axis")
    channels, groups = on_axis(labelled, 1), named["offset_groups"]
    if channels is not None and groups > 1:  # as many must stay in each
        tie_rows(ctx, channels.symbols.reshape(groups, -1))
    convolution(ctx, func, {**named, "transposed": False}, out)

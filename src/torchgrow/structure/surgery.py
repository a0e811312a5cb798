"""Surgery: new contents of any shape for the tensors of a model, in place; the objects stay the same."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..exchange import Exchange, outdate, run, uninterrupted, writes
from .space import live_positions


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def recut(tensor: Tensor, units: Mapping[int, Tensor], old: Tensor, new: Tensor) -> Tensor:
    """Re-cut a carried tensor (a hidden state) from the units in `old` to the units in `new` (bool [n]).

    `units`: per axis, int64 unit ids of its positions in the frame. Returned is the same tensor, detached, without the
    entries of units that left, and with zeros for those that came.
    """
    tensor = tensor.detach()
    for axis, vector in units.items():
        before, after = (torch.nonzero(live_positions(vector, keep)).flatten().to(tensor.device) for keep in (old, new))
        if not torch.equal(before, after):
            full = tensor.new_zeros([*tensor.shape[:axis], vector.numel(), *tensor.shape[axis + 1 :]])
            tensor = full.index_copy_(axis, before, tensor).index_select(axis, after)
    return tensor


def replace_(tensor: Tensor, new: Tensor) -> None:
    """Give a parameter or buffer new contents of any shape; the object, its hooks and requires_grad stay."""
    outdate(tensor)
    run(writes(tensor, new))


def scale_(tensors: Mapping[str, Tensor], scales: Mapping[str, float], exchange: Exchange) -> None:
    """Multiply tensors by name, in place; the exchange's `undo` takes it back."""
    for name, scale in scales.items():
        tensor = tensors[name].detach()
        exchange.after(tensor.copy_, tensor.clone())
        tensor.mul_(scale)


def materialise_(
    model: nn.Module, tensors: Mapping[str, Tensor], contents: Callable[[str], Tensor], exchange: Exchange | None = None
) -> None:
    """Exchange the named tensors of a model on the meta device for real ones, with `contents` of the name.

    The objects stay; the exchange's `undo` will bring the tensors back.
    """
    recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    for module in recurrent:
        module._flat_weight_refs.clear()  # weak references forbid the exchange; `exchange` holds the list
    if any(weakref.getweakrefs(tensor) for tensor in tensors.values()):
        gc.collect()  # those of a trace that failed hang on its frames
    for name, tensor in tensors.items():
        new = contents(name)
        other = nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        if exchange is not None:
            exchange.after(_swap_back, tensor, other)
        with uninterrupted():
            torch.utils.swap_tensors(tensor, other)
    for module in recurrent:
        module._init_flat_weights()


def _swap_back(tensor: Tensor, other: Tensor) -> None:
    """Undo the replacement of a tensor on the meta device, if it was made."""
    if not tensor.is_meta:
        torch.utils.swap_tensors(tensor, other)

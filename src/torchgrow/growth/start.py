"""The start of a run: a seed, the whole frame, some of its units, or a network that was cut from it before."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptimizerError, StructureError, TorchgrowError
from ..exchange import Exchange
from ..persistence.wrappers import plain_modules, stored_tensors, unwrapped
from ..structure.bank import Bank
from ..structure.kept import keep_of
from ..structure.record import mark_of, recorded, skip_of
from ..structure.space import Space
from ..structure.store import index_of, is_meta, live_shape, scatter_

SEED, FRAME = "seed", "frame"
"""Starts by name."""


def check_start(start: Any) -> None:
    """Refuse (`TorchgrowError`) a start that is neither a name, nor a structure, nor a network."""
    if isinstance(start, str) and start not in (SEED, FRAME):
        raise TorchgrowError(f'start={start!r} is unknown; use "seed" or "frame", a keep vector, or a smaller network')
    if not isinstance(start, (str, Tensor, nn.Module)):
        raise TorchgrowError(
            f'start must be "seed", "frame", a keep vector (bool [n] of space.everything()\'s kind), or a network '
            f"that was cut from such a model before, got {type(start).__name__}"
        )


def check_unspent(start: Any, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Refuse (`OptimizerError`) optimizers that have stepped on weights which a smaller network will replace."""
    for optimizer in optimizers if isinstance(start, nn.Module) else ():
        slots = [slot for state in optimizer.state.values() for slot in state.values() if isinstance(slot, Tensor)]
        if any(bool(slot.any()) for slot in slots):
            raise OptimizerError(
                f"{type(optimizer).__name__} has stepped on weights that start= replaces by those of another network; "
                "build the optimizer anew before Grower(...)"
            )


def begin(start: str | Tensor | nn.Module, model: nn.Module, space: Space, exchange: Exchange) -> Tensor | None:
    """The structure (bool [n]) that a run of a model begins with; None where its policy chooses.

    A network that was cut before gives the model its weights and buffers, at its places in the frame; the exchange's
    `undo` takes them back. Errors are as for `Grower`.
    """
    if isinstance(start, str) and start == SEED:
        return None
    if isinstance(start, nn.Module):
        return _taken_over(model, space, unwrapped(start), exchange)
    if is_meta(model):
        raise TorchgrowError(
            f"{type(model).__name__} is on the meta device, without weights that a run could begin with; load them "
            'before (load_state_dict(..., assign=True)), or begin with start="seed" or a smaller network'
        )
    if isinstance(start, str):
        return space.everything()
    keep = space.check_keep(start)
    live = torch.bincount(space.group_of[keep], minlength=space.n_groups)
    short = torch.nonzero(live < space.least).flatten().tolist()
    if short:
        raise StructureError(
            f"start leaves nothing of {', '.join(space.group_names[g] for g in short[:3])}; one unit of every group "
            "that is no layer has to stay"
        )
    return keep.clone()


def name_of(start: str | Tensor | nn.Module, keep: Tensor | None) -> str:
    """A start as stored in a state: its name, or a digest of its units."""
    if isinstance(start, str) or keep is None:
        return str(start)
    kind = "network" if isinstance(start, nn.Module) else "units"
    return f"{kind} {hashlib.sha256(keep.numpy().tobytes()).hexdigest()[:16]}"


@torch.no_grad()
def _taken_over(model: nn.Module, space: Space, small: nn.Module, exchange: Exchange) -> Tensor:
    """Copy the weights of a network that was cut from such a frame into the model; returns its units (bool [n])."""
    if is_meta(model) or is_meta(small):
        raise TorchgrowError(
            f"{type(model if is_meta(model) else small).__name__} is on the meta device, without weights to be "
            "taken over; build the frame and the smaller network on a real device"
        )
    modules = plain_modules(small)
    if all(mark_of(module) is None for module in modules.values()):
        raise StructureError(
            f"start is a {type(small).__name__} that torchgrow did not cut, so nothing says which units of the frame "
            'it has; for the model as it is use start="frame", else take a network that was grown, or that '
            "torchgrow.load or load_state_dict brought back"
        )
    left_out = [path for path, module in modules.items() if skip_of(module) is not None]
    keep = keep_of(Bank(model, space), recorded(modules.items()), left_out, "start", earlier=True)
    own, given = stored_tensors(plain_modules(model)), stored_tensors(modules)
    strange = sorted(own.keys() ^ given.keys())
    if strange:
        where = "the network" if strange[0] in own else "the frame"
        raise StructureError(f"start is no network of this frame: {strange[0]} is missing in {where}")
    whole = {}
    for name, tensor in own.items():
        index = index_of(space, name, keep)
        shape = (0,) if index is None else live_shape(tuple(tensor.shape), index)
        if tuple(given[name].shape) != shape:
            raise StructureError(
                f"start is no network of this frame: {name} is {tuple(given[name].shape)}, not {shape} of "
                f"{tuple(tensor.shape)}. Nothing was changed"
            )
        whole[name] = tensor.detach().clone()
        scatter_(whole[name], index and {k: v.to(tensor.device) for k, v in index.items()}, given[name].to(tensor))
    for name, value in whole.items():
        exchange.after(own[name].detach().copy_, own[name].detach().clone())
        own[name].copy_(value)
    return keep

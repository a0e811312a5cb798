"""Banks of copies that follow the structure of a network, such as moving averages."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..adapters.registry import adapt_
from ..errors import StructureError
from ..exchange import Exchange
from .bank import Bank
from .record import mark_
from .store import gather
from .surgery import named_tensors, scale_


def follower_of(bank: Bank, model: nn.Module, exchange: Exchange) -> Bank:
    """A bank of another model of the same frame as that of `bank`, which `exchange` will bring to the live structure.

    The model is the whole frame, with weights of its own, or a copy of the live one; of the latter everything that is
    stored starts as it is stored here.

    Raises:
        StructureError: its tensors are neither; the message names them.
    """
    tensors = named_tensors(model)
    frozen = [name for name, tensor in tensors.items() if tensor.is_inference()]
    if frozen:
        raise StructureError(
            f"{frozen[0]} was made under torch.inference_mode(), so that nothing can write into it; make the copy "
            "outside of it"
        )
    shared = [name for name, tensor in tensors.items() if tensor is bank.tensors.get(name)]
    if shared:
        raise StructureError(f"{shared[0]} is the network's own; pass a copy.deepcopy(model)")
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    live = {name: tuple(tensor.shape) for name, tensor in bank.tensors.items()}
    full = {name: bank.space.shapes[name] for name in live}
    if found == full:
        _begun_alike_(bank, tensors, exchange)
        other = Bank(model, bank.space)
        other.stage(bank.keep).into(exchange)
        return other
    if found != live:
        differing = [name for name in {**live, **found} if found.get(name) not in (live.get(name), full.get(name))]
        differing = differing or [name for name in live if live[name] != full[name]]
        seen = "; ".join(
            f"{name} is {found.get(name, 'missing')}, not {full.get(name, 'there')} as in the frame "
            f"or {live.get(name, 'missing')} as in the live network"
            for name in differing[:3]
        )
        raise StructureError(
            f"{type(model).__name__} is neither the whole frame nor a copy of the live network: {seen}; "
            "make it with copy.deepcopy(model)"
        )
    adapt_(model, bank.adapted)
    other = copy.copy(bank)
    other.model, other.tensors, other.layouts, other.slots = model, tensors, (), {}
    other.full = {name: stored.copy(tensors[name].dtype) for name, stored in bank.full.items()}
    for name, stored in other.full.items():
        stored.write(bank.index[name], tensors[name].detach().cpu())
    mark_(model.named_modules(), bank.record)
    return other


@torch.no_grad()
def _begun_alike_(bank: Bank, tensors: Mapping[str, Tensor], exchange: Exchange) -> None:
    """Rescale the initial weights of a copy of the frame as the frame's were; other weights stay."""
    for name in bank.scales.keys() & bank.full.keys():
        dtype = bank.tensors[name].dtype  # an average may be kept in another
        scaled, mine = tensors[name].detach().cpu().to(dtype) * bank.scales[name], bank.full[name].copy(dtype)
        mine.write(bank.index[name], gather(scaled, bank.index[name]))
        if not torch.equal(mine.read({}), scaled):
            return
    scale_(tensors, bank.scales, exchange)


def stored_alike(bank: Bank, other: Bank) -> bool:
    """Whether all stored parameters of another bank equal this one's, apart from the live part."""
    for name in bank.full.keys() & set(bank.space.parameters):
        index, theirs = bank.index[name], other.full[name].read({})
        mine = bank.full[name].copy(theirs.dtype)
        mine.write(index, gather(theirs, index))
        if not torch.equal(mine.read({}), theirs):
            return False
    return True

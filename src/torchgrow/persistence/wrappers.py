"""Unwrapping: models inside wrappers, with the names of the plain model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ..structure.record import join, own_tensors


def _inside(module: nn.Module) -> nn.Module | None:
    """The module in a wrapper that has no state of its own: compiled, DataParallel, DistributedDataParallel."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # else nothing has been compiled
    if dynamo is not None and isinstance(module, dynamo.OptimizedModule):
        return module._modules["_orig_mod"]
    return module.module if isinstance(module, (DataParallel, DistributedDataParallel)) else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside any wrappers, including an average of its weights."""
    inner = model.module if isinstance(model, AveragedModel) else _inside(model)
    return model if inner is None else unwrapped(inner)


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by name, shared ones once, as if wrappers in between were not there."""
    return dict(_walk("", model, set()))


def _walk(path: str, module: nn.Module, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    inner = _inside(module)
    if inner is not None:
        yield from _walk(path, inner, seen)
    elif id(module) not in seen:
        seen.add(id(module))
        yield path, module
        for name, child in module._modules.items():
            if child is not None:
                yield from _walk(join(path, name), child, seen)


def stored_tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once: parameters first, as in `named_tensors`.

    Sparse buffers that are not persistent are the frame's to make.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for buffers in (False, True):
        for path, module in modules.items():
            own = module._buffers if buffers else module._parameters
            for name, tensor in own_tensors(module).items():
                if name in own and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[join(path, name)] = tensor
    transient = {join(path, name) for path, module in modules.items() for name in module._non_persistent_buffers_set}
    return {name: x for name, x in found.items() if x.layout == torch.strided or name not in transient}

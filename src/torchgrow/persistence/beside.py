"""State beside the weights: buffers of any shape, extra states of modules, tensors of an average."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SavedModelError
from ..exchange import Exchange
from ..structure.space import Shapes, Space
from ..structure.store import live_shapes
from ..structure.surgery import named_tensors
from .folder import pack
from .plain_data import Field
from .wrappers import stored_tensors


def late_buffers(space: Space, model: nn.Module) -> set[str]:
    """Names of buffers that are never cut: a forward may create, drop or replace them, with any shape."""
    return {name for name, _ in model.named_buffers() if name not in space.cut_axes}


def of_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that a state holds: not sparse buffers that are not persistent, which the frame has."""
    return stored_tensors(dict(model.named_modules()))


def late_shapes(space: Space, model: nn.Module) -> dict[str, list[int]]:
    """Shapes of the buffers that nothing cuts, for a state: the frame does not say what they must be."""
    late = late_buffers(space, model)
    return {name: list(x.shape) for name, x in of_state(model).items() if name in late}


def check_late(field: Field, found: Mapping[str, Tensor], space: Space, model: nn.Module) -> None:
    """Refuse buffers that nothing cuts if they are not as the state's own list of them says."""
    present = named_tensors(model)
    free = late_buffers(space, model) | (found.keys() - present.keys())
    here = {name: list(tensor.shape) for name, tensor in found.items() if name in free}
    if field.value != here:
        field.refuse(f"{here}, as the buffers of the network are")


def check_network(space: Space, keep: Tensor, model: nn.Module) -> None:
    """Refuse to save a network that could not be loaded.

    Raises:
        SavedModelError: a parameter, or a buffer that is cut, is not as the structure makes it; the message names it.
    """
    shapes, free = live_shapes(space, keep), late_buffers(space, model)
    for name, tensor in named_tensors(model).items():
        if name not in free and tensor.shape != shapes.get(name):
            raise SavedModelError(
                f"{name} is {tuple(tensor.shape)}, but {shapes.get(name, 'not there')} in the structure that torchgrow "
                "made: it was exchanged or has grown since, and such a state could not be loaded. Nothing was saved"
            )


def read_network(field: Field, space: Space, model: nn.Module, shapes: Shapes) -> dict[str, Tensor]:
    """Parameters and buffers by name: of the shapes given, or, of buffers that nothing cuts, of any.

    The latter may be missing, or be there though the model has not made them yet.
    """
    found, present, free = field.fields(), named_tensors(model), late_buffers(space, model)
    fixed, modules = present.keys() - free, dict(model.named_modules())
    known = {name for name in found if name in present or may_appear(modules, name)}
    if not fixed <= known or len(known) < len(found):
        field.fields(fixed | known)  # raises if names are missing or unknown
    tensors, layouts = {}, {name: (tensor.layout,) for name, tensor in present.items()}
    for name, entry in found.items():
        if name in fixed:
            tensors[name] = entry.tensor(shapes[name], present[name].dtype)
        elif isinstance(entry.value, Tensor) and entry.value.layout in (torch.strided, *layouts.get(name, ())):
            tensors[name] = entry.value.detach()
        else:
            entry.refuse("a dense tensor")
    return tensors


def may_appear(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether a forward may make a buffer of this name: its module is there, and nothing else stands in its place."""
    path, _, own = name.rpartition(".")
    module = modules.get(path)
    return bool(own) and module is not None and (own in module._buffers or not hasattr(module, own))


def take_buffers(exchange: Exchange, model: nn.Module, contents: Mapping[str, Tensor]) -> None:
    """Have `exchange` make the buffers that only `contents` has, not persistent, and drop those that it lacks."""
    modules, held = dict(model.named_modules()), of_state(model)
    present = {name: buffer for name, buffer in model.named_buffers() if name in held}
    for name in [*(n for n in contents if n not in present), *(n for n in present if n not in contents)]:
        path, _, own = name.rpartition(".")
        module = modules[path]
        if name in contents and own not in module._parameters:
            device = next((p.device for p in model.parameters()), contents[name].device)
            if own not in module._buffers:
                exchange.call(module._non_persistent_buffers_set.add, own)
            exchange.put(module._buffers, own, contents[name].to(device, copy=True))
        elif name not in contents:
            exchange.put(module._buffers, own, None)


def has_extra_state(module: nn.Module) -> bool:
    """Whether a class keeps state beside its tensors."""
    return type(module).get_extra_state is not nn.Module.get_extra_state


def extra_states(model: nn.Module) -> dict[str, Any]:
    """Results of the modules' `get_extra_state`, by path, as copies.

    Raises:
        SavedModelError: one of them is not plain data; the message names the module.
    """
    states = {}
    for path, module in model.named_modules():
        if has_extra_state(module):
            states[path] = copy.deepcopy(module.get_extra_state())
            pack(states[path], {}, f"get_extra_state() of {path or 'the model'} ({type(module).__name__})")
    return states


@contextmanager
def extra_states_set(model: nn.Module, states: Mapping[str, Any]) -> Iterator[None]:
    """Set extra states of modules; restore the old ones if the block raises.

    Raises:
        SavedModelError: a module does not take its own; the message names it.
    """
    before = extra_states(model)
    try:
        for path, state in states.items():
            module = model.get_submodule(path)
            try:
                module.set_extra_state(copy.deepcopy(state))
            except Exception as error:
                raise SavedModelError(
                    f"{path or 'the model'} ({type(module).__name__}) does not take its extra state: "
                    f"{type(error).__name__}: {error}; nothing was changed"
                ) from error
        yield
    except BaseException:
        for path, state in before.items():
            model.get_submodule(path).set_extra_state(state)
        raise


def held_beside(outer: nn.Module, inner: nn.Module) -> dict[str, Tensor]:
    """Tensors of a wrapper that are not those of the model in it, such as how often an average was updated."""
    own = {id(tensor) for tensor in named_tensors(inner).values()}
    return {name: tensor for name, tensor in named_tensors(outer).items() if id(tensor) not in own}

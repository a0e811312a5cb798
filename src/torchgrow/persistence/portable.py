"""The structure inside `state_dict()`: a uint8 tensor with the record, by which a module is cut before loading.

A hook after `state_dict()` adds the record, a hook before `load_state_dict()` takes it out again, checks it and cuts
the module. So code that stores and loads a `state_dict` (torch, safetensors, Lightning, accelerate) works with grown
networks too. The hooks are functions of this module: copies and pickles of a model keep them.
"""

from __future__ import annotations

import json
import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, MutableMapping
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..adapters.registry import ADAPTERS, adapt_, adaptable
from ..default_device import on_host
from ..errors import SavedModelError, StructureError, TorchgrowError
from ..exchange import Exchange, forget_compiled
from ..onednn_guard import guard_
from ..structure.attributes import get
from ..structure.bank import Bank, cut_
from ..structure.record import Mark, Record, growths, mark_of, recorded, rewrite, skip_of
from ..structure.space import PassThrough, Space
from ..structure.store import Index, gather, laid_out, live_shape, memory_order
from . import structure_record as form
from .folder import SEAL, check_size, digest
from .wrappers import plain_modules, stored_tensors, unwrapped

KEY = "torchgrow_structure__load_into_torchgrow_portable_"
"""Key of the record in a state dict. PyTorch prints it as unexpected if no hook takes it, so it says what to do."""

ASIDE = "_torchgrow_aside"
"""Name of a plain attribute: a dict into which the state dict of another structure goes, in place of the module."""

Kind = TypeVar("Kind", bound=nn.Module)


# --- what users and growers call ---


@on_host()
def portable_(model: Kind, on: bool = True) -> Kind:
    """Let the structure of a model travel inside its `state_dict()`, in place.

    From then on `model.state_dict()` holds the record of what was cut, as one uint8 tensor, and
    `model.load_state_dict(state)` of a state dict with such a record cuts the model to that structure first: a fresh
    frame (the full-size model), or a model that is cut otherwise. Then PyTorch loads the weights, with `strict` and
    `assign` as ever.

    Growing, `torchgrow.load` and `torchgrow.shrink_` call this for their models, and copies and pickles keep it. Call
    it yourself for a fresh model that is to load a grown one, best in the constructor of your class:
    `self.net = torchgrow.portable_(Net())`.

    A model that was never cut adds nothing to its state dict. Load before you wrap a model in
    DistributedDataParallel, and before you make its optimizer: both know the shapes there were. A model that a Grower
    is growing takes a state dict of another structure too: the run continues from that structure.

    Args:
        model: the model, or a part of a larger one; of wrappers (`torch.compile`, DataParallel,
            DistributedDataParallel, AveragedModel) the model in them.
        on: False takes the hooks off again: the state dict holds the weights alone.

    Returns:
        The same model.

    Raises:
        TorchgrowError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise TorchgrowError(f"portable_ takes a torch.nn.Module, got {type(model).__name__}; call portable_(model)")
    inner = unwrapped(model)
    for hooks in (inner._state_dict_hooks, inner._load_state_dict_pre_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in (add_structure, take_structure):
                del hooks[key]
    vars(inner).pop(KEY, None)
    if on:
        # torch.distributed.checkpoint and torch.func.functional_call ask a module for a tensor of every name.
        vars(inner)[KEY] = torch.zeros(0, dtype=torch.uint8)
        inner.register_state_dict_post_hook(add_structure)
        inner.register_load_state_dict_pre_hook(take_structure)
    return model


@on_host()
def shrink_(
    model: nn.Module,
    space: Space,
    keep: Tensor,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    store: bool = True,
) -> Bank:
    """Cut the model down to the units in `keep`, in place.

    Every Parameter object stays; its contents, its optimizer state, buffers and counting attributes are re-cut.
    Gradients are dropped. The structure travels in its `state_dict()` from then on; see `portable_`.

    Args:
        model: the full frame.
        space: what `trace` found for it.
        keep: bool [n]; False removes a unit.
        optimizer: its state is re-cut too.
        store: whether what is cut off is kept. Without, the model is cut one tensor after the other, so that memory is
            needed for one of them only; what was cut is gone, and a failure half-way leaves a model of no use.

    Returns:
        The bank with everything that was cut off: `bank.restore_()` is the inverse, bit for bit.

    Raises:
        StructureError: the space does not allow `keep`, or the model is not the full frame.
        OptimizerError: the optimizer keeps state in a layout that cannot be cut, or has some and nothing is stored.
    """
    bank = Bank(model, space, optimizer, stores=store)
    if store:
        bank.resize_(keep)
    else:
        cut_(bank, keep)
    portable_(model)
    return bank


class Owner(Protocol):
    """Cuts a model while a state dict is loaded: a run of growth."""

    @property
    def finished(self) -> bool:
        """Whether the run is over and nothing is stored any more."""

    def loaded(
        self, model: nn.Module, record: Record, left_out: Collection[str], contents: Mapping[str, Tensor]
    ) -> None:
        """Take over the structure of a state dict that will be loaded into a model of its own.

        Args:
            model: the network or a follower.
            record: the structure, relative to the first frame.
            left_out: names of modules that are left out.
            contents: what the network's tensors hold until they are loaded, of those that are cut; empty while
                the rest of them is stored.
        """

    def took(self, model: nn.Module) -> None:
        """Note that a model of its own has other weights now, by a state dict."""


_owners: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Owner]] = weakref.WeakKeyDictionary()
"""By model, its grower. Not an attribute of the model: a copy of it is not the grower's."""


def owned_(model: nn.Module, owner: Owner) -> None:
    """Make a model portable, and ask its grower before it is cut."""
    _owners[portable_(model)] = weakref.ref(owner)
    if tell_owner not in model._load_state_dict_post_hooks.values():
        model.register_load_state_dict_post_hook(tell_owner)


def tell_owner(module: nn.Module, keys: Any) -> None:
    """The hook after `load_state_dict()` of what grows; of a copy, which keeps it, nobody is told."""
    owner = _owners[module]() if module in _owners else None
    if owner is not None:
        owner.took(module)


# --- out ---

_written: weakref.WeakKeyDictionary[nn.Module, tuple[list[tuple[str, Mark]], dict[str, Any], Tensor]] = (
    weakref.WeakKeyDictionary()
)
"""What was written last, of which marks: averages ask for a state dict at every step."""


@on_host()
def add_structure(module: nn.Module, state: MutableMapping[str, Any], prefix: str, metadata: Any) -> None:
    """The hook after `state_dict()`: add the record, if anything was ever cut."""
    found = structure_of(module)
    if found is not None:
        state[prefix + KEY] = found[1].clone()


def structure_of(module: nn.Module) -> tuple[dict[str, Any], Tensor] | None:
    """The record of a module, and that as a tensor; None for a whole frame that is not growing."""
    modules = plain_modules(module)
    marks = [(path, mark) for path, one in modules.items() if (mark := mark_of(one)) is not None]
    cut = any(mark.record.growth or mark.record.kept for _, mark in marks)
    if not cut and all(skip_of(one) is None for one in modules.values()):
        return None
    known = _written.get(module)
    if known is None or [(path, id(mark)) for path, mark in known[0]] != [(path, id(mark)) for path, mark in marks]:
        try:
            structure = form.described(modules, stored_tensors(modules), recorded(modules.items()), {}, {})
            text = json.dumps({**structure, SEAL: digest(structure)}).encode()
            check_size(text)
        except (SavedModelError, ValueError) as error:
            warnings.warn(
                f"the state_dict() of {type(module).__name__} holds weights without their structure, since {error}",
                stacklevel=4,
            )
            return None
        known = _written[module] = marks, structure, torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return known[1:]


# --- in ---


@on_host()
def take_structure(module: nn.Module, state: MutableMapping[str, Any], prefix: str, *rest: Any) -> None:
    """The hook before `load_state_dict()`: cut the module, and those in it, as the records in the state dict say."""
    modules = plain_modules(module)
    inside = {f"{prefix}{name}.": one for name, one in module.named_modules() if name}
    cuts = []
    for key in [key for key in state if key.startswith(prefix) and key.endswith(KEY)]:
        lead = key.removesuffix(KEY)
        part = module if lead == prefix else unwrapped(inside[lead]) if lead in inside else None
        if part is None or part not in modules.values():
            continue  # PyTorch will call it unexpected
        blob = state.pop(key)
        structure = _read(blob, key, part, state, lead)
        now = structure_of(part)
        if structure is None or (now is not None and now[0] == structure):
            continue
        if ASIDE in vars(part):
            mine = {name.removeprefix(lead): value for name, value in state.items() if name.startswith(lead)}
            vars(part)[ASIDE] = {**mine, KEY: blob}
            present = {lead + name: tensor.detach() for name, tensor in _all_tensors(part).items()}
            state.update((name, tensor) for name, tensor in present.items() if name in state)
        else:
            cuts.append(_plan(part, structure, state, lead, f"state_dict[{key!r}]"))
    for cut in cuts:
        cut()


def _all_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all names that they have in a state dict."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}


def _read(blob: Any, key: str, module: nn.Module, state: Mapping[str, Any], prefix: str) -> dict[str, Any] | None:
    """The record in a tensor, its names not checked yet; None if averaging destroyed it and the shapes fit already."""
    where = f"state_dict[{key!r}]"
    if not isinstance(blob, Tensor) or blob.dim() != 1 or blob.is_meta or blob.is_complex():
        found = (
            f"{blob.dtype} {tuple(blob.shape)} on {blob.device}" if isinstance(blob, Tensor) else type(blob).__name__
        )
        raise SavedModelError(
            f"{where} is {found}, it must be the uint8 tensor that torchgrow put there; load the state dict as it was "
            "saved"
        )
    whole = blob.detach().cpu()
    if whole.dtype != torch.uint8:  # the whole state dict was converted, or averaged with others
        whole = whole.double().nan_to_num(0, 0, 0).round().clamp(0, 255).to(torch.uint8)
    try:
        text = whole.contiguous().numpy().tobytes()
        check_size(text)
        record = json.loads(text)
        seal = record.pop(SEAL, None) if isinstance(record, dict) else None
        if seal is None or seal != digest(record):
            raise ValueError("its contents do not fit its checksum")
    except (ValueError, RecursionError, MemoryError) as error:
        given = [(state.get(prefix + name), tensor) for name, tensor in _all_tensors(module).items()]
        fits = all(value.shape == tensor.shape for value, tensor in given if isinstance(value, Tensor))
        if blob.dtype != torch.uint8 and fits:
            return None
        raise SavedModelError(
            f"{where} is damaged: {error or 'it takes too much memory'}. It is text, not numbers: of state dicts that "
            f"are averaged or converted take it from one of them, average[{key!r}] = one[{key!r}]"
        ) from error
    if record.get("format") != form.FORMAT:
        raise SavedModelError(
            f"{where} has format {record.get('format')!r}, this version of torchgrow reads {form.FORMAT}"
        )
    form.check_form(where, record)
    return record


def _plan(
    module: nn.Module, structure: dict[str, Any], state: Mapping[str, Any], prefix: str, where: str
) -> Callable[[], None]:
    """Check a record and its tensors for a module; the function returned cuts it."""
    modules = plain_modules(module)
    own, now = stored_tensors(modules), recorded(modules.items())
    frame = {name: _shaped(now.shapes.get(name, tuple(x.shape)), x) for name, x in own.items()}
    kept = form.read_kept(where, structure, frame)
    skipped = form.read_skipped(where, structure, modules, frame)
    below = tuple(f"{path}." for path in skipped)
    lowered = form.read_attributes(where, structure, modules, kept, frame, below, now.wholes)
    attributes = {**now.wholes, **lowered}
    adaptable(module)  # imports the adapters of other libraries
    bare = [path for path in structure["adapted"] if not {type(modules.get(path))} & {*ADAPTERS, *ADAPTERS.values()}]
    if bare:
        raise SavedModelError(
            f"{where} needs an adapter for {bare[0]} ({type(modules.get(bare[0])).__name__}), and there is none here; "
            "import the one it was saved with, or register it with torchgrow.adapter. Nothing was changed"
        )
    live = {n: (0,) if n.startswith(below) else live_shape(tuple(x.shape), kept.get(n, {})) for n, x in frame.items()}
    form.check_convolutions(where, modules, {n: _shaped(live[n], x) for n, x in frame.items()}, attributes, below)
    changing = [name for name, tensor in own.items() if name in kept or name in now.shapes or name.startswith(below)]
    names = {id(own[name]): name for name in changing}
    given: dict[str, Tensor] = {}
    for alias, tensor in _all_tensors(module).items():
        name, value = names.get(id(tensor)), state.get(prefix + alias)
        if name is None or not isinstance(value, Tensor):
            continue
        if tuple(value.shape) != live[name]:
            raise SavedModelError(
                f"{prefix}{alias} of the state dict is {tuple(value.shape)}, but {where} makes it {live[name]} of "
                f"{tuple(frame[name].shape)}: weights and structure are of two networks, or the frame is another. "
                "Nothing was changed"
            )
        given[name] = value
    absent = tuple(f"{path}." for path, one in modules.items() if skip_of(one) is not None)
    owner, contents = _owner(module), {}
    for name in changing if owner is None or owner.finished else ():  # of a run that lasts, the rest is stored
        old = None if name.startswith(absent) else now.kept.get(name, {})
        new = None if name.startswith(below) else kept.get(name, {})
        contents[name] = _interim(name, own[name], old, new, live[name], name in given)
    wholes = {place: now.wholes.get(place) or get(modules[place[0]], place[1]) or 0 for place in attributes}
    shapes = {name: tuple(frame[name].shape) for name in changing}
    blocks = tuple((path, *form.left_out_with(structure, path)) for path in skipped)
    record = Record({**now.shapes, **shapes}, kept, wholes, attributes, tuple(dict.fromkeys((*now.blocks, *blocks))))
    if owner is not None:
        return partial(owner.loaded, module, record, skipped.keys(), contents)
    return partial(_cut, module, record, contents, attributes, skipped, structure["adapted"])


def _shaped(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A tensor of a shape, without values."""
    return torch.empty(shape, dtype=like.dtype, device="meta")


def _interim(
    name: str, tensor: Tensor, old: Index | None, new: Index | None, shape: tuple[int, ...], given: bool
) -> Tensor:
    """Contents of a tensor between cut and load: its part of the new structure, else arbitrary.

    Raises:
        StructureError: the state dict lacks it, and the model has only a part of it.
    """
    tensor = tensor.detach()
    if new is None:
        return gather(tensor, None)
    within: Index | None = {} if old is not None else None
    for axis, where in (old or {}).items():
        wanted = new.get(axis)
        if within is None or wanted is None or not bool(torch.isin(wanted, where).all()):
            within = None
            break
        within[axis] = torch.searchsorted(where, wanted)
    if within is not None:
        index = {axis: within.get(axis, where).to(tensor.device) for axis, where in new.items()}
        return laid_out(gather(tensor, index), memory_order(tensor, range(tensor.dim())))
    if not given:
        raise StructureError(
            f"{name} is not in the state dict, and the model, which is cut to another structure, has not all of it: "
            f"{tuple(tensor.shape)} of {shape}. Load into a model that is built anew: "
            "torchgrow.portable_(build()).load_state_dict(state). Nothing was changed"
        )
    return laid_out(tensor.new_empty(shape), memory_order(tensor, range(len(shape))))


def _cut(
    module: nn.Module,
    record: Record,
    contents: Mapping[str, Tensor],
    attributes: Mapping[tuple[str, str], int],
    skipped: Mapping[str, PassThrough],
    adapted: Collection[str],
) -> None:
    """Cut a module, all of it or nothing."""
    modules = plain_modules(module)
    own, exchange = stored_tensors(modules), Exchange()
    exchange.remember(module)
    try:
        names = {one: path for path, one in module.named_modules()}
        adapt_(module, [names.get(modules[path], path) if path in modules else path for path in adapted])
        for name, new in contents.items():
            exchange.write(own[name], new)
        paths = [path for path, one in modules.items() if path in skipped or skip_of(one) is not None]
        rewrite(exchange, modules, record, attributes, paths, skipped)
        exchange.make()
    except BaseException:
        exchange.undo()
        raise
    guard_(module)
    forget_compiled()


def _owner(module: nn.Module) -> Owner | None:
    """The grower that a module belongs to, if any.

    Raises:
        StructureError: only a part of the module is growing, or it is a part of what is growing.
    """
    found = _owners.get(module)
    owner = found() if found is not None else None
    if owner is not None:
        return owner
    growing, own = growths(module), {id(tensor) for tensor in module.parameters()}
    for part, reference in list(_owners.items()) if growing else ():
        if reference() is not None and any(id(tensor) in own for tensor in part.parameters()):
            raise StructureError(
                f"the state dict is of another structure, and {type(part).__name__}, which shares tensors with the "
                f"{type(module).__name__} that loads it, is growing: {growing[0]}. Load it into that "
                f"{type(part).__name__} itself, or end the run with grower.finish() before, or load it into a model "
                "that is built anew: torchgrow.portable_(build()). Nothing was changed"
            )
    return None

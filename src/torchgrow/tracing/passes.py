"""Passes: the runs of a model that tracing and proof share, on copies, in both modes, with fixed random numbers.

Legend: a *pass* is one run on one of the example inputs, in evaluation or training mode. Dropout is off in all of them.
Other random numbers are the same in every run and do not depend on the number of units. A forward whose control flow
may depend on them is run on several draws.
"""

from __future__ import annotations

import copy
import random
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.overrides import _pop_mode as _pop_function_mode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils._python_dispatch import _pop_mode as _pop_dispatch_mode

from ..default_device import gpus_in_use
from ..errors import TraceError
from ..exchange import as_before
from .nested import leaves

HIGH, LOW = 0, 1
"""Extreme draws: all Bernoulli draws 1 and all uniform numbers near their maximum, and the reverse."""

DRAWS = (LOW, 2, 3)
"""Further draws for a forward whose control flow may depend on random numbers."""


@dataclass(frozen=True)
class Pass:
    """One run of a model."""

    example: int = 0  # which of the example inputs
    training: bool = False  # in training mode
    draw: int = HIGH  # which random numbers

    def drawn_anew(self) -> list[Pass]:
        """The same run on other random numbers."""
        return [replace(self, draw=draw) for draw in DRAWS]


def passes(examples: int) -> list[Pass]:
    """Every example in evaluation mode, then every example in training mode."""
    return [Pass(i, training) for training in (False, True) for i in range(examples)]


def twin(model: nn.Module, *, meta: bool = False) -> nn.Module:
    """A copy that shares no tensor with the model, without gradients; with `meta`, on that device, without values.

    Raises:
        TraceError: the model cannot be copied.
    """
    memo: dict[int, Any] = {id(p.grad): None for p in model.parameters() if p.grad is not None}
    for tensor in (*model.parameters(), *model.buffers()) if meta else ():
        empty = tensor.detach().to("meta")
        kept = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if kept else empty
    try:
        try:
            return copy.deepcopy(model, dict(memo))
        except RecursionError:
            raise
        except Exception:
            return copy.deepcopy(model, {**_uncopied(model), **memo})
    except RecursionError as error:
        raise TraceError(
            "the model nests deeper than Python's stack allows (RecursionError while copying it); call "
            "sys.setrecursionlimit(20_000) first"
        ) from error
    except Exception as error:
        raise TraceError(
            f"tracing needs a copy of the model, but deepcopy failed: {type(error).__name__}: {error}"
        ) from error


def _uncopied(model: nn.Module) -> dict[int, Any]:
    """Objects on which deepcopy fails, by id: tensors with a history are detached, locks and open files are shared.

    It also fails on tensors in compressed rows or columns.
    """
    memo: dict[int, Any] = {}
    for path, module in model.named_modules():
        held = {name: value for name, value in vars(module).items() if name != "_modules"}
        for leaf in leaves(held, path):
            if isinstance(leaf.value, Tensor):
                if not leaf.value.is_leaf or leaf.value.layout not in (torch.strided, torch.sparse_coo):
                    memo[id(leaf.value)] = leaf.value.detach().clone()
            elif not isinstance(leaf.value, nn.Module):
                try:
                    copy.deepcopy(leaf.value)
                except Exception:
                    memo[id(leaf.value)] = leaf.value
    return memo


def storage(tensor: Tensor) -> int:
    """A key of a tensor's memory, equal for views of the same memory; 0 for tensors without memory of their own."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return 0


def storages(model: nn.Module) -> dict[int, str]:
    """The memory of every parameter and buffer of a model, and its name."""
    found = {storage(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    return {key: name for key, name in found.items() if key}


def foreign(tensor: Tensor, original: Mapping[int, str]) -> None:
    """Refuse (`TraceError`) a tensor of the original model in the forward of its copy."""
    name = original.get(storage(tensor)) if original else None
    if name is not None:
        raise TraceError(
            f"the forward of a copy of the model reads {name} of the original: a function that is kept on the model (a "
            "closure, a lambda, a hook) holds the module or its tensor, so that nothing can be proven on the copy, "
            "and copy.deepcopy or a moving average would go wrong too; make it a method, or give it the module as an "
            "argument"
        )


def fingerprint(model: nn.Module) -> list[tuple[int, str]]:
    """A fingerprint of the parameters, to detect a forward that writes into them."""
    with torch.no_grad():
        seen = [(p, p.detach().flatten()) for p in model.parameters() if not p.is_meta]
        return [(p.data_ptr(), str(flat[:: 1 + flat.numel() // 1024].sum().item())) for p, flat in seen]


def _states() -> tuple[Any, ...]:
    """The states of Python's and numpy's random numbers, which can be compared."""
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, np.asarray(keys).tobytes(), *rest


def too_small(error: Exception) -> bool:
    """Whether an error says that a batch is too small for batch norm."""
    return isinstance(error, ValueError) and "more than 1 value per channel" in str(error)


@contextmanager
def running(model: nn.Module, one: Pass, *, still_norms: bool = False) -> Iterator[Chance]:
    """The mode of a pass, without gradients; buffers and random states are as before afterwards.

    The model, a copy, stays in that mode, and keeps what its forward writes elsewhere. With `still_norms` batch norms
    are in evaluation mode, for a batch that is too small to have statistics.
    """
    model.train() if one.training else model.eval()
    modules = list(model.modules())
    if still_norms:
        for module in modules:
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.training = False
    alone = [m for m in modules if isinstance(m, nn.SyncBatchNorm) and "forward" not in vars(m)]
    kept = [(module, dict(module._buffers)) for module in modules if module._buffers]
    values = {id(b): (b, b.detach().clone()) for _, own in kept for b in own.values() if b is not None}
    states = random.getstate(), np.random.get_state()
    chance = Chance(one.draw)
    operations, functions = len(_get_current_dispatch_mode_stack()), len(_get_current_function_mode_stack())
    try:
        for module in alone:  # a copy asks no other process, which runs no copy of its own at this moment
            vars(module)["forward"] = types.MethodType(nn.modules.batchnorm._BatchNorm.forward, module)
        with torch.random.fork_rng(devices=gpus_in_use()), torch.no_grad():
            random.seed(one.draw)
            np.random.seed(one.draw)
            began = _states()
            yield chance
        chance.decides |= began != _states()
    finally:
        # What was entered since: an interrupt between a `with` block and its exit leaves a mode behind.
        while len(_get_current_dispatch_mode_stack()) > operations:
            _pop_dispatch_mode()
        while len(_get_current_function_mode_stack()) > functions:
            _pop_function_mode()
        for module in alone:
            vars(module).pop("forward", None)
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, own in kept:
            module._buffers.update(own)
        with torch.no_grad():
            for buffer, before in values.values():
                buffer.copy_(before)


BARE = frozenset(vars(nn.Module()))
"""What every module has: parameters, buffers and submodules, and hooks."""


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore afterwards what modules hold beside parameters and buffers: counters, schedules, histories.

    Containers have their entries again, instances of Python classes their attributes, tensors their values, and
    generators their states; the objects stay the same. A cache that is there stays, one that was made is gone.
    """
    undo: list[Callable[[], Any]] = []
    waiting: list[Any] = []
    for module in model.modules():
        own = vars(module)
        undo.append(partial(_refill, own, dict(own)))
        waiting += [value for name, value in own.items() if name not in BARE]
    seen = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (type, nn.Module, types.ModuleType, types.FunctionType)):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.layout == torch.strided and not value.is_meta and not value.is_inference():
                undo.append(partial(as_before, value, value.detach().clone(), value._version))
        elif isinstance(value, np.random.Generator):
            undo.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        elif isinstance(value, random.Random):
            undo.append(partial(value.setstate, value.getstate()))
        elif isinstance(value, torch.Generator):
            undo.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, (dict, set)):
            undo.append(partial(_refill, value, value.copy()))
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, (list, deque)):
            undo.append(partial(_refill, value, list(value)))
            waiting += value
        elif isinstance(value, tuple):
            waiting += value
        elif isinstance(getattr(value, "__dict__", None), dict):
            undo.append(partial(_refill, vars(value), dict(vars(value))))
            waiting += vars(value).values()
    try:
        yield
    finally:
        for step in undo:
            step()


def _refill(container: Any, entries: Any) -> None:
    container.clear()
    (container.update if isinstance(container, (dict, set)) else container.extend)(entries)


COINS = frozenset({"bernoulli"})
UNIFORM = frozenset({"rand", "rand_like", "uniform"})
SPREAD = COINS | UNIFORM | {"randn", "randn_like", "normal", "exponential", "cauchy", "log_normal", "geometric"}
"""Random numbers that are made equal along all axes but the first, since units may lie on any of them."""


class Chance(TorchDispatchMode):
    """Random numbers that are the same in every run, whatever the widths.

    Args:
        draw: `HIGH`, `LOW`, or the number of a common draw.
    """

    def __init__(self, draw: int = HIGH) -> None:
        super().__init__()
        self.draw, self.count = draw, 0
        self.decides = False  # whether a single number was drawn, on which control flow may depend
        self.original: Mapping[int, str] = {}  # memory of the original model, which its copy's forward must not read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        kwargs = kwargs or {}
        if self.original:
            for x in (*args, *kwargs.values()):
                for tensor in x if isinstance(x, (list, tuple)) else (x,):
                    if isinstance(tensor, Tensor):
                        foreign(tensor, self.original)
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        self.count += 1
        given = [x.device for x in args if isinstance(x, Tensor)]
        self._seed(given[0] if given else torch.device(kwargs.get("device") or "cpu"))
        out = func(*args, **kwargs)
        name = func._overloadpacket.__name__.rstrip("_")
        if isinstance(out, Tensor) and not out.is_meta and out.numel():
            self.decides |= out.numel() == 1
            numbers_given = name != "normal" or not any(isinstance(x, Tensor) for x in args[int(args[0] is out) :])
            if name in SPREAD and numbers_given:
                with _disable_current_modes():
                    self._hold_still(out, name, func, args, kwargs)
        return out

    def _seed(self, device: torch.device) -> None:
        """Begin the numbers of this draw, on a device.

        On the host without `torch.manual_seed`, which writes the whole stack down for every accelerator that nobody has
        used yet: milliseconds, and a queue that grows for the rest of the process.
        """
        seed = torch.default_generator.manual_seed if device.type in ("cpu", "meta") else torch.manual_seed
        seed(1_000_003 * self.draw + self.count)

    def _hold_still(self, out: Tensor, name: str, func: Any, args: Any, kwargs: Any) -> None:
        """One number for every position of the first axis, as many as there are units or not; extreme ones if asked."""
        self._seed(out.device)
        drawn = out.new_empty(out.shape[:1])
        if name in ("rand", "rand_like"):
            drawn.uniform_()
        elif name in ("randn", "randn_like"):
            drawn.normal_()
        elif args and args[0] is out and not any(isinstance(x, Tensor) for x in args[1:]):  # in place
            func(drawn, *args[1:], **kwargs)
        else:
            drawn.copy_(out.flatten(1)[:, 0] if out.dim() > 1 else out)
        if name in COINS and self.draw in (HIGH, LOW):
            drawn.fill_(1 - self.draw)
        if name in UNIFORM and self.draw in (HIGH, LOW):
            given = name == "uniform"
            low = (args[1] if len(args) > 1 else kwargs.get("from", 0.0)) if given else 0.0
            high = (args[2] if len(args) > 2 else kwargs.get("to", 1.0)) if given else 1.0
            drawn.sub_(low).mul_(0.01).add_(low + (high - low) * (0.005 if self.draw else 0.985))
        out.copy_(drawn.reshape(drawn.shape + (1,) * (out.dim() - drawn.dim())).expand_as(out))


LEAVING_OUT: dict[Any, tuple[int, str]] = {
    **dict.fromkeys(
        (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout), (2, "training")
    ),
    **dict.fromkeys(
        (
            torch.dropout, torch.dropout_, torch.feature_dropout, torch.feature_dropout_, torch.alpha_dropout,
            torch.alpha_dropout_, torch.feature_alpha_dropout, torch.feature_alpha_dropout_, torch.native_dropout,
        ),
        (2, "train"),
    ),
    **dict.fromkeys((F.rrelu, F.rrelu_, torch.rrelu, torch.rrelu_), (3, "training")),
    F.scaled_dot_product_attention: (4, "dropout_p"),
    F.multi_head_attention_forward: (13, "training"),
}  # fmt: skip
"""Functions that leave entries out in training, and the argument that is False (or 0) where they do not."""

RECURRENT = frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu})
"""Functions that leave entries out between layers. Dropout is behind the state, the weights, a bool and the layers."""


class Steady(TorchFunctionMode):
    """Switches dropout off everywhere; `used` tells whether there was any."""

    used = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch."""
        kwargs = dict(kwargs or {})
        if func in LEAVING_OUT:
            position, name = LEAVING_OUT[func]
            self.used |= bool(args[position] if len(args) > position else kwargs.get(name, True))
            if len(args) > position:
                args = (*args[:position], False, *args[position + 1 :])
            else:
                kwargs[name] = False
        elif func in RECURRENT:
            at = 5 if isinstance(args[3], bool) else 6  # packed sequences have their lengths before the state
            self.used |= bool(args[at])
            args = (*args[:at], 0.0, *args[at + 1 :])
        return func(*args, **kwargs)

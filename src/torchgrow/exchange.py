"""Atomic changes of many objects: plain writes, prepared in advance and made by one call into C.

Signal handlers, trace functions and exceptions sent by other threads come in between two instructions of Python.
`Exchange.make` has none: it hands a list of built-in calls to a built-in loop. So no exception can leave
half of them made, and if one of the calls itself fails, all of them are undone.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from operator import setitem
from typing import Any

import torch
from torch import Tensor, nn

from .default_device import on_host
from .errors import TorchgrowError

Call = partial[Any]
"""A call of something built in, with its arguments."""


def run(calls: Iterable[Call]) -> None:
    """Make all calls, in order; there is no instruction of Python between two of them."""
    deque(map(partial.__call__, calls), maxlen=0)


def writes(tensor: Tensor, new: Tensor, *, reshapes: bool | None = None) -> list[Call]:
    """The calls that give a parameter or buffer other contents of any shape; object, hooks and requires_grad stay.

    The gradient goes first: it has the old shape. Passing through an empty tensor of another dtype drops the
    gradient accumulator of the old shape, which a live graph would otherwise keep; hooks survive. `reshapes`: whether
    the tensor will have another shape when the calls are made (None: if it has now).
    """
    calls: list[Call] = [partial(setattr, tensor, "grad", None)]
    if tensor.shape != new.shape if reshapes is None else reshapes:
        other = torch.float16 if tensor.dtype != torch.float16 else torch.float32
        calls.append(partial(setattr, tensor, "data", torch.empty(0, dtype=other, device=tensor.device)))
    return [*calls, partial(setattr, tensor, "data", new)]


def outdate(tensor: Tensor) -> None:
    """Raise the version counter: a graph built before refuses its backward instead of using other values."""
    torch.autograd.graph.increment_version(tensor)


class Exchange:
    """Writes that are made together or not at all; the old values are noted when they are added."""

    def __init__(self) -> None:
        self._forth: list[Call] = []
        self._back: deque[Call] = deque()
        self._outdated: list[Tensor] = []

    def _add(self, forth: Sequence[Call], back: Sequence[Call] = ()) -> None:
        """Add a call made after all others, and its undo, made before all others."""
        self._forth.extend(forth)
        self._back.extendleft(reversed(back))

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call a built-in that needs no undo."""
        self._add([partial(function, *arguments)])

    def put(self, mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """`mapping[key] = value`."""
        self._add([partial(setitem, mapping, key, value)], [_as_now(mapping, key)])

    def drop(self, mapping: MutableMapping[Any, Any], key: Any) -> None:
        """Take a key out, if it is there."""
        self._add([partial(mapping.pop, key, None)], [_as_now(mapping, key)])

    def fill(self, mapping: MutableMapping[Any, Any], contents: Mapping[Any, Any]) -> None:
        """Give a mapping other contents; the object stays."""
        clear, now = partial(mapping.clear), partial(mapping.update, dict(mapping))
        self._add([clear, partial(mapping.update, dict(contents))], [clear, now])

    def append(self, items: list[Any], item: Any) -> None:
        """Lengthen a list by one."""
        end = slice(len(items), None)
        self._add([partial(setitem, items, end, [item])], [partial(setitem, items, end, [])])

    def fields(self, owner: object, **values: Any) -> None:
        """Plain attributes of an object, written past its `__setattr__`."""
        for name, value in values.items():
            self.put(vars(owner), name, value)

    def write(self, tensor: Tensor, new: Tensor) -> None:
        """Other contents of a parameter or buffer; its gradient goes."""
        gradient = partial(setattr, tensor, "grad", tensor.grad if tensor.is_leaf else None)
        back = writes(tensor, tensor.data, reshapes=tensor.shape != new.shape)
        self._add(writes(tensor, new), [*back, gradient])
        self._outdated.append(tensor)

    def forget_gradient(self, parameter: Tensor) -> None:
        """No gradient, and no graph built before that still goes backward."""
        self._add([partial(setattr, parameter, "grad", None)], [partial(setattr, parameter, "grad", parameter.grad)])
        self._outdated.append(parameter)

    def give_gradient(self, parameter: Tensor, gradient: Tensor) -> None:
        """A gradient for a parameter that is written in this exchange too, which brings the old one back."""
        self._add([partial(setattr, parameter, "grad", gradient)], [partial(setattr, parameter, "grad", None)])

    def remember(self, model: nn.Module) -> None:
        """Have `undo` bring back classes, attributes, hooks and buffers of all modules as they are now.

        For what is done to a model while this exchange is prepared; contents of parameters are not among it.
        """
        for module in model.modules():
            own = vars(module)
            for inner in (value for value in own.values() if isinstance(value, dict)):
                self._add([], [partial(inner.clear), partial(inner.update, dict(inner))])
            self._add([], [partial(own.clear), partial(own.update, dict(own))])
            self._add([], [partial(object.__setattr__, module, "__class__", type(module))])
        for buffer in model.buffers():
            if not buffer.is_meta:
                held = buffer.detach()  # shares contents and version, not the graph
                contents = partial(as_before, held, held.clone(), held._version)
                self._add([], [partial(setattr, buffer, "data", buffer.data), contents])

    def after(self, call: Callable[..., object], *arguments: Any) -> None:
        """Have `undo` make a call that undoes something done outside this exchange."""
        self._add([], [partial(call, *arguments)])

    def make(self) -> None:
        """Make all writes, or, if one fails, none."""
        for tensor in self._outdated:  # first: refusing a valid graph is better than a wrong gradient
            outdate(tensor)
        with uninterrupted():  # dicts and tensors may be of classes written in Python
            try:
                run(self._forth)
            except BaseException:
                self.undo()
                raise

    def undo(self) -> None:
        """Undo everything that was made; if one call fails, the others are still made."""
        calls, failed = iter(tuple(self._back)), None
        for _ in range(len(self._back) + 1):
            try:
                run(calls)
                break
            except BaseException as error:
                failed = failed or error
        if failed is not None:
            raise failed


def _as_now(mapping: MutableMapping[Any, Any], key: Any) -> Call:
    """The call that gives a key what it has now."""
    return partial(setitem, mapping, key, mapping[key]) if key in mapping else partial(mapping.pop, key, None)


@torch.no_grad()
def as_before(tensor: Tensor, before: Tensor, version: int) -> None:
    """Copy contents back, if anything was written."""
    if tensor._version != version:
        tensor.copy_(before)


@contextmanager
def trainable() -> Iterator[None]:
    """A context outside `torch.inference_mode` and the default device: tensors made inside could never be trained.

    Whether gradients are on is as before afterwards, also if an exception came while a `no_grad` was left.
    """
    enabled = torch.is_grad_enabled()
    try:
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext(), on_host():
            yield
    finally:
        torch.set_grad_enabled(enabled)


@contextmanager
def by_one_thread(inside: dict[str, int]) -> Iterator[None]:
    """A context for one thread at a time, others get a `TorchgrowError`; `inside` says which: no lock can stay shut."""
    own = threading.get_ident()
    if inside.setdefault("thread", own) != own:
        raise TorchgrowError(
            "another thread is changing this network's structure; call update(), finish(), release() and "
            "load_state_dict() from one thread, or hold one threading.Lock around these calls"
        )
    try:
        yield
    finally:
        inside.pop("thread", None)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Defer all signals that have a handler in Python to the end of the block, then deliver them in order.

    Nothing to do outside the main thread, where Python runs no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: deque[tuple[int, Any]] = deque()
    before: dict[int, Any] = {}

    def release() -> None:
        run(partial(signal.signal, number, handler) for number, handler in before.items())

    try:
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if callable(handler):
                before[number] = handler
                signal.signal(number, lambda number, frame: held.append((number, frame)))
        yield
    finally:
        try:
            release()
        finally:
            release()  # once more, in case an exception came just before
            _deliver(held, before)


def _deliver(held: deque[tuple[int, Any]], handlers: Mapping[int, Any]) -> None:
    """Call the handlers of held signals; one that raises keeps none of the others from being called."""
    try:
        while held:
            number, frame = held.popleft()
            handlers[number](number, frame)
    finally:
        if held:
            _deliver(held, handlers)


def forget_compiled() -> None:
    """Drop the code that Dynamo compiled for the old shapes; it is recompiled at its next call.

    Otherwise Dynamo stops compiling a function after 8 recompilations and stays eager, with a warning at most.
    """
    if "torch._dynamo" in sys.modules:  # else nothing has been compiled
        torch.compiler.reset()

"""Walks over nested values: every tensor inside arguments and outputs, in any kind of object.

Example inputs, outputs, carried states, replay and proof share one walk, so that all see the same tensors. It
opens containers, dataclasses, instances (`__dict__` and `__slots__`), closures, and tensors with attributes; what it
cannot open is a leaf.
"""

from __future__ import annotations

import copy
import datetime
import enum
import functools
import logging
import numbers
import pathlib
import re
import types
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Set, ValuesView
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import TraceError

PLAIN = (
    type(None), str, bytes, bytearray, range, slice, type(Ellipsis), type(NotImplemented), type, types.ModuleType,
    enum.Enum, np.dtype, torch.dtype, torch.device, torch.layout, torch.memory_format,
    torch.Generator, torch.finfo, torch.iinfo, datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo,
    pathlib.PurePath, re.Pattern, uuid.UUID, logging.Logger,
)  # fmt: skip
"""Data in which no tensor can be."""

CONTAINERS = (list, tuple, deque, Set, ValuesView)
"""What is opened by position."""

HEAP_TYPE = 1 << 9
"""Flag of classes made while Python runs (`Py_TPFLAGS_HEAPTYPE`): all that are written in Python."""


@dataclass(frozen=True)
class Leaf:
    """A tensor, a number, an array, or what cannot be opened."""

    value: Any  # itself
    path: str  # how to reach it, such as `output.features[2].handle`
    entries: tuple[Hashable, ...] = ()  # position or name of the top-level entry it lies in; a named tuple's have both


def leaves(value: Any, name: str) -> list[Leaf]:
    """Everything inside a value, in a fixed order; a container that is met again is not opened again.

    That is: tensors, numbers, arrays of numpy, and objects that cannot be opened; not strings and other plain data.
    """
    found: list[Leaf] = []
    opened: dict[int, Any] = {}  # by id; held, so that no other object gets the id
    waiting = [Leaf(value, name)]
    while waiting:
        leaf = waiting.pop()
        inside = _inside(leaf.value)
        if inside is None or isinstance(leaf.value, (Tensor, numbers.Number)):
            found.append(leaf)
        if not inside or id(leaf.value) in opened:
            continue
        opened[id(leaf.value)] = leaf.value
        waiting += [
            Leaf(part, leaf.path + step, leaf.entries or entries) for entries, step, part in reversed(list(inside))
        ]
    return found


Part = tuple[tuple[Hashable, ...], str, Any]
"""Entries that name a part, how its path goes on, and the part."""


def _inside(value: Any) -> Sequence[Part] | None:
    """The parts of a value; none for plain data; None if it cannot be opened."""
    if isinstance(value, (PLAIN, numbers.Number)) or type(value) is object:
        return ()
    if isinstance(value, Tensor):
        return _attributes(getattr(value, "__dict__", {}))
    if isinstance(value, np.ndarray):
        return _positions(value.flat) if value.dtype == object else None
    if isinstance(value, (nn.Module, Iterator)):
        return None
    if isinstance(value, weakref.ref):
        return [((), "()", value())]
    if isinstance(value, functools.partial):
        return [((), ".func", value.func), ((), ".args", value.args), ((), ".keywords", value.keywords)]
    if isinstance(value, (types.MethodType, types.BuiltinMethodType)):
        return [((), ".__self__", value.__self__)]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        held = (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        return [((), f".<closure {k}>", part) for k, part in enumerate(held)] + _attributes(vars(value))
    return _of_instance(value)


def _of_instance(value: Any) -> Sequence[Part] | None:
    """Entries of a container and attributes of an instance; attributes that repeat entries are left out."""
    parts: list[Part] = []
    if isinstance(value, Mapping):
        parts += [((key,) if isinstance(key, Hashable) else (), f"[{key!r}]", part) for key, part in value.items()]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        parts += [((k, key), f".{key}", part) for k, (key, part) in enumerate(zip(value._fields, value, strict=True))]
    elif isinstance(value, Set) and any(isinstance(part, Tensor) for part in value):
        return None  # in another order every time
    elif isinstance(value, CONTAINERS):
        parts += _positions(value)
    elif isinstance(value, BaseException):
        parts += _positions(value.args)
    elif not _shows_all(type(value)):
        return None
    entries = {id(part) for _, _, part in parts}
    held = {**getattr(value, "__dict__", {}), **_slots(value)}
    return parts + _attributes({key: part for key, part in held.items() if id(part) not in entries})


def _shows_all(kind: type) -> bool:
    """Whether `__dict__` and `__slots__` hold everything of an instance: no base class keeps more, in C."""
    bases = [base for base in kind.__mro__ if not base.__flags__ & HEAP_TYPE]
    keeps = kind.__dictoffset__ != 0 or any("__slots__" in base.__dict__ for base in kind.__mro__)
    return keeps and all(base in (object, types.SimpleNamespace, Generic) for base in bases)


def _positions(values: Iterable[Any]) -> list[Part]:
    return [((k,), f"[{k}]", part) for k, part in enumerate(values)]


def _attributes(held: Mapping[str, Any]) -> list[Part]:
    return [((key,), f".{key}", part) for key, part in held.items()]


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (it raises where nothing was assigned yet)
    except ValueError:
        return False
    return True


def _slots(value: Any) -> dict[str, Any]:
    """What an instance keeps under the names that the `__slots__` of its classes declare."""
    held = {}
    for base in type(value).__mro__:
        names = base.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            private = name.startswith("__") and not name.endswith("__")
            own = f"_{base.__name__.lstrip('_')}{name}" if private else name
            if own not in ("__dict__", "__weakref__") and hasattr(value, own):
                held[own] = getattr(value, own)
    return held


def tensors(value: Any, name: str = "value") -> list[Tensor]:
    """All tensors inside a value."""
    return [leaf.value for leaf in leaves(value, name) if isinstance(leaf.value, Tensor)]


def mapped(value: Any, change: Callable[[Tensor], Tensor], name: str = "example_inputs") -> Any:
    """A copy of a value with other tensors inside, in the same objects otherwise; `name`: what errors call it.

    `change` gives the tensor in place of one of `tensors(value)`; it is called once for each, in that order.

    Raises:
        TraceError: it holds an object that cannot be copied.
    """
    memo: dict[int, Any] = {}
    found = leaves(value, name)
    given = [leaf.value for leaf in found if isinstance(leaf.value, Tensor)]
    for leaf in found:
        if isinstance(leaf.value, Tensor):
            memo.setdefault(id(leaf.value), change(leaf.value))
        elif _inside(leaf.value) is None:
            memo[id(leaf.value)] = leaf.value
    try:
        for x in given:  # attributes that Python code has set on a tensor
            vars(memo[id(x)]).update(copy.deepcopy(vars(x), memo))
        result = copy.deepcopy(value, memo)  # which finds the parts in the memo
    except Exception as error:
        raise TraceError(
            f"{name} cannot be copied with other tensors in it ({type(error).__name__}: {error}); give tensors, "
            "numbers and plain containers of them"
        ) from error
    for old, new in zip(found, leaves(result, name), strict=True):
        if isinstance(old.value, Tensor) and new.value is old.value is not memo[id(old.value)]:
            raise TraceError(f"{new.path} is a tensor held by a function; give it as a tensor or in a container")
    return result


def put_out(outputs: Any) -> list[Leaf]:
    """The tensors of a model's outputs, then its numbers and arrays as tensors.

    Raises:
        TraceError: something in the outputs cannot be looked into; the message names its path.
    """
    found, numeric = [], []
    for leaf in leaves(outputs, "output"):
        value = leaf.value
        if isinstance(value, Tensor):
            found.append(leaf)
        elif isinstance(value, (bool, int, float, complex, np.number, np.bool_)):
            numeric.append(Leaf(torch.tensor(value, dtype=_exact(value)), leaf.path))
        elif isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            numeric.append(Leaf(torch.from_numpy(np.array(value)), leaf.path))
        elif isinstance(value, np.ndarray) and value.dtype.kind in "SUmM":
            continue
        elif isinstance(value, Iterator):
            raise TraceError(
                f"{leaf.path} is a {type(value).__name__}, whose values are made after the forward has ended; return "
                "a list or a tuple"
            )
        elif not isinstance(value, numbers.Number):
            raise TraceError(
                f"{leaf.path} is a {type(value).__qualname__}, in which tensors cannot be looked for, and everything "
                "that a model puts out has to stay; return tensors, plain data, and containers or instances of "
                "Python classes that hold them"
            )
    return found + numeric


def _exact(value: Any) -> torch.dtype | None:
    """The dtype in which a number loses nothing; of whole numbers too large for 64 bits it is about right."""
    if isinstance(value, (int, np.integer)) and not -(2**63) <= int(value) < 2**63:
        return torch.float64
    if isinstance(value, (float, np.floating)):
        return torch.float64
    return torch.complex128 if isinstance(value, (complex, np.complexfloating)) else None

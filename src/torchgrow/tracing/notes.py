"""What the tracer records about tensors and operations while a model runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from ..structure.space import Frozen
from .labels import Labelled
from .rules.pointwise import pointwise
from .rules.registry import RULES, Rule


@dataclass(slots=True)
class Note:
    """What the tracer knows of a tensor."""

    tensor: ref[Tensor]  # the tensor it is about
    labelled: tuple[Labelled, ...] | None = None  # its labels; None if no rule has set them
    from_input: bool = False  # whether it was computed from the inputs
    filled: bool = False  # whether it was made with one value everywhere
    deferred: tuple[tuple[Labelled, Frozen], ...] = ()  # labels that are frozen as soon as it is used
    shadow: Tensor | None = None  # on the meta device, its real values, if no weight influences them
    name: str = ""  # of a parameter or buffer
    used: bool = False  # whether a rule has asked for its labels


BY_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Tags of operations whose results depend on values, in kind or shape."""


@dataclass(frozen=True, slots=True)
class Operation:
    """What the tracer knows of an operation."""

    name: str
    handler: Rule | None
    mutable: bool
    by_values: bool
    arguments: tuple[Any, ...]

    @staticmethod
    def of(func: Any) -> Operation:
        """Look an operation up."""
        name = func._overloadpacket.__name__
        handler = RULES.get(name) or RULES.get(name.rstrip("_"))
        twin = getattr(getattr(torch.ops.aten, name.rstrip("_"), None), func._overloadname, func)  # not in place
        if handler is None and any(torch.Tag.pointwise in f.tags for f in (func, twin)):
            handler = pointwise
        by_values = not BY_VALUES.isdisjoint(func.tags) or name == "is_nonzero"
        return Operation(name, handler, func._schema.is_mutable, by_values, tuple(func._schema.arguments))

    def bind(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """Arguments by their schema names, defaults included."""
        named = {}
        for i, argument in enumerate(self.arguments):
            if i < len(args):
                named[argument.name] = args[i]
            elif argument.name in kwargs:
                named[argument.name] = kwargs[argument.name]
            elif argument.has_default_value():
                named[argument.name] = argument.default_value
        return named


@dataclass(frozen=True, slots=True)
class Fresh:
    """A tensor that an operation is about to write to, and the one value that it holds so far."""

    tensor: Tensor
    value: float

    def shown_by(self, tensor: Tensor) -> bool:
        """Whether a tensor is this one or a view of it."""
        return tensor is self.tensor or tensor._base is self.tensor


@dataclass(slots=True)
class Step:
    """An operation that has run and whose labels have not been passed on yet."""

    operation: Operation
    func: Any
    args: Any
    kwargs: Any
    out: Any
    notes: list[Note]  # of its tensor arguments
    empty: bool  # whether it gave no tensor
    fresh: Fresh | None
    module: str
    line: tuple[str, int] | None


def tensors_among(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among values and in lists of them: arguments and results of operations nest in no other way."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_among(value)
    return found

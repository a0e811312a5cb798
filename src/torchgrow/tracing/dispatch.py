"""Runs every operation of a traced model and queues it, so that its labels can be passed on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..default_device import on_host
from .context import TraceContext
from .module_hooks import ModuleHooks, user_line
from .notes import Fresh, Note, Operation, Step, tensors_among
from .pending import Pending
from .rules.indexing import is_mask
from .rules.movement import constant
from .rules.registry import CONSTANT, FILLED

IN_PLACE_VIEWS = {"squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes_", "swapdims_"}
"""Operations that change the shape of a tensor in place, so that its old shape is lost."""

READERS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}
"""Methods that read values without running an operation."""


class ValuesRead(BaseException):
    """The forward reads values that were not computed. Not an `Exception`, which a forward might catch."""


class Readers(TorchFunctionMode):
    """Calls `on_read` with tensors whose values Python reads without running an operation."""

    def __init__(self, on_read: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.on_read = on_read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch."""
        if func in READERS:
            self.on_read(args[0])
        return func(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    """Sees every operation. `context` is what is known, `pending` are steps whose labels wait.

    Without `values`, convolutions, matrix products and the like of what depends on the inputs are not computed. Labels
    do not need them, and a forward seldom looks at values; where it does, `ValuesRead` is raised.
    """

    def __init__(self, context: TraceContext, pending: Pending, hooks: ModuleHooks, *, values: bool = True) -> None:
        super().__init__()
        self.context, self.pending, self.hooks, self.values = context, pending, hooks, values
        self.operations: dict[Any, Operation] = {}

    @on_host()
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and pass the labels through it."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.as_strided_.default and _changes_nothing(*args):
            return args[0]  # what pooling a channels_last image to one pixel ends with
        operation = self.operations.get(func)
        if operation is None:
            operation = self.operations[func] = Operation.of(func)
        handler = operation.handler
        if handler is None and self.hooks.whole is None:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if operation.name in IN_PLACE_VIEWS:
            return self._as_a_view(operation, func, args, kwargs)
        tensors = tensors_among((*args, *kwargs.values()))
        notes = [self.context.note(x) for x in tensors]
        if operation.mutable and self.pending.steps and not self.pending.harmless(operation, args[0]):
            self.pending.catch_up()
        fresh = self._fresh(args[0], tensors) if operation.mutable else None
        known = self._shadow(func, args, kwargs, tensors, notes) if self.context.meta else None
        if known is not None and func is torch.ops.aten._local_scalar_dense.default:
            out = known
        else:
            out = None if self.values else self._shaped(operation, args, notes)
            out = func(*args, **kwargs) if out is None else out
        results = [out] if isinstance(out, Tensor) else tensors_among((out,))
        if known is not None:
            for mine, real in zip(tree_leaves(out), tree_leaves(known), strict=False):
                if isinstance(mine, Tensor) and isinstance(real, Tensor):
                    self.context.note(mine).shadow = real
        self._trace_values(operation, tensors, notes, results)
        if self.hooks.whole is None and tensors:
            module = self.hooks.stack[-1] if self.hooks.stack else ""
            # torch copies a factory's result if there are other references to it
            held = ref(out) if operation.handler is constant else out
            step = Step(operation, func, args, kwargs, held, notes, not results, fresh, module, user_line())
            self.pending.add(step, results)
        return out

    def _as_a_view(self, operation: Operation, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Run an operation that changes a shape in place; a view of the old shape stands for its input."""
        self.pending.catch_up()
        target, note = args[0], self.context.note(args[0])
        before = target.detach()
        func(*args, **kwargs)
        self.context.notes[id(before)] = replace(note, tensor=ref(before), name="")
        packet = getattr(torch.ops.aten, operation.name.rstrip("_"))
        plain = packet.int if operation.name == "transpose_" else getattr(packet, func._overloadname)
        if note.shadow is not None:
            note.shadow = plain(note.shadow, *args[1:], **kwargs)
        line, module = user_line(), self.hooks.stack[-1] if self.hooks.stack else ""
        step = Step(Operation.of(plain), plain, (before, *args[1:]), kwargs, target, [note], False, None, module, line)
        if self.hooks.whole is None:
            self.pending.label(step)
        del self.context.notes[id(before)]
        return target

    def _fresh(self, target: Any, tensors: Sequence[Tensor]) -> Fresh | None:
        """The tensor that an in-place operation is about to write to, if it holds one value whatever the inputs are."""
        if not isinstance(target, Tensor) or target.layout != torch.strided or len(tensors) < 2:
            return None
        root = target if target._base is None else target._base
        note = self.context.note(root)
        values = note.shadow if root.is_meta else root
        if note.from_input or note.name or (note.labelled is not None and not note.filled) or values is None:
            return None
        if not values.numel() or values.is_complex():
            return None
        first = values[(0,) * values.dim()]
        if bool((values == first).all()):
            return Fresh(root, float(first))
        return Fresh(root, 1.0) if note.filled and not note.labelled else None  # uninitialised: anything, but not zero

    def _shaped(self, operation: Operation, args: Any, notes: list[Note]) -> Any:
        """Zeros in place of what depends on the inputs, of the most costly operations; None for what is computed."""
        if not any(note.from_input for note in notes) or any(x.layout != torch.strided for x in tensors_among(args)):
            return None
        masked = operation.name != "index" or any(x is not None and is_mask(x) for x in args[1])
        if operation.by_values and masked:
            raise ValuesRead
        if operation.name in SHAPES:
            shape = SHAPES[operation.name](*args)
            return None if shape is None else args[0].new_zeros(shape)
        if operation.name == "cat" and all(note.from_input for note in notes):
            return beside(*args)
        if operation.name == "native_batch_norm" and not args[5]:
            return torch.zeros_like(args[0]), args[0].new_zeros(0), args[0].new_zeros(0)
        if operation.name == "relu":
            return torch.zeros_like(args[0])
        return args[0] if operation.name == "relu_" else None

    def read_values(self, tensor: Tensor) -> None:
        """Python reads the values of a tensor: `ValuesRead` if they were not computed."""
        if not self.values and self.context.depends_on_input(tensor):
            raise ValuesRead

    def _trace_values(
        self, operation: Operation, tensors: list[Tensor], notes: list[Note], results: list[Tensor]
    ) -> None:
        """Note whether the results depend on the inputs, or are filled with one value."""
        from_input = operation.name not in CONSTANT and any(note.from_input for note in notes)
        filled = operation.name in FILLED
        if from_input or filled:
            for result in results:
                note = self.context.note(result)
                note.from_input |= from_input
                note.filled |= filled
                if from_input and operation.mutable and result._base is not None:
                    self.context.note(result._base).from_input = True
        if operation.mutable and operation.name != "copy_" and tensors:
            self.context.note(tensors[0] if tensors[0]._base is None else tensors[0]._base).filled = False

    def _shadow(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], notes: list[Note]) -> Any:
        """On the meta device, the real result of the operation, since positions and masks may decide control flow.

        None if it depends on a weight or a floating-point input, whose values are unknown.
        """
        shadows = {id(x): note.shadow for x, note in zip(tensors, notes, strict=True)}
        if any(shadows.get(id(x)) is None for x in tensors):
            return None

        def real(x: Any) -> Any:
            if isinstance(x, torch.device):
                return torch.device("cpu")
            return shadows[id(x)] if isinstance(x, Tensor) else x

        return func(*tree_map(real, args), **tree_map(real, kwargs))


def _changes_nothing(tensor: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> bool:
    """Whether `as_strided_` leaves every element in place: only axes of size 1 get other strides."""
    same = offset in (None, tensor.storage_offset()) and tuple(size) == tuple(tensor.shape)
    return same and all(n == 1 or old == new for n, old, new in zip(size, tensor.stride(), stride, strict=True))


# --- shapes of the results of costly operations, so that tracing need not compute them ---


def _convolved(
    x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, *rest: Any
) -> tuple[int, ...] | None:
    """Shape of a convolution's result, if it is laid out in memory as it is named and the shapes fit."""
    fits = x.dim() == weight.dim() and x.shape[1] == weight.shape[1] * rest[1]
    if transposed or not fits or not x.is_contiguous() or not weight.is_contiguous():
        return None
    each = (
        given if len(given) > 1 else given * (x.dim() - 2) for given in (stride, padding, dilation)
    )  # [0] by "valid"
    sides = [
        (size + 2 * pad - step * (kernel - 1) - 1) // by + 1
        for size, kernel, by, pad, step in zip(x.shape[2:], weight.shape[2:], *each, strict=True)
    ]
    return (x.shape[0], weight.shape[0], *sides) if min(sides) > 0 else None


def _multiplied(a: Tensor, b: Tensor, *_: Any) -> tuple[int, ...] | None:
    """Shape of a product of matrices, or of batches of them, if the shapes fit."""
    return (*a.shape[:-1], b.shape[-1]) if a.shape[:-2] == b.shape[:-2] and a.shape[-1] == b.shape[-2] else None


SHAPES: dict[str, Callable[..., tuple[int, ...] | None]] = {
    "convolution": _convolved,
    "mm": _multiplied,
    "bmm": _multiplied,
    "addmm": lambda offset, a, b, *_: (
        _multiplied(a, b) if offset.dim() == 1 and offset.shape[0] == b.shape[1] else None
    ),
}
"""Shapes of contractions by the arguments; None where the result has to be computed (or is an error)."""


def beside(parts: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    """Zeros of the shape of concatenated parts; None if they are not of one dtype and number of axes."""
    if len({(part.dim(), part.dtype) for part in parts}) > 1 or not all(part.is_contiguous() for part in parts):
        return None
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return parts[0].new_zeros(shape)

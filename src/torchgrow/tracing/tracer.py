"""Label replay: run the frame, carry labels beside every tensor, read off the space.

A copy of the model runs as it is, on real tensors, under a `TorchDispatchMode`: data-dependent Python, helper functions
and raw parameters need no special care. What cannot be understood is frozen with its operation, module and line.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..adapters.registry import adapted
from ..errors import TraceError
from ..structure.attributes import around, held
from ..structure.space import Frozen, Parts, Place, Slot, Space
from .labels import FIXED, NOTHING, Array, Labels, Layer
from .model_call import Carries, call, carried_inputs, carried_outputs, check_model, examples_of, fresh
from .nested import mapped, put_out, tensors
from .passes import HIGH, Pass, Steady, fingerprint, foreign, passes, running, storages, too_small, twin
from .rules import contractions, parts, reductions, sampling, sequences  # noqa: F401 (importing them registers their rules)
from .rules.indexing import write_through
from .rules.registry import (
    CONSTANT,
    COUNTED,
    FILLED,
    MODULE_RULES,
    RULES,
    Rule,
    constant,
    either,
    placed,
    pointwise,
    unknown,
)
from .shapes import SHAPES, beside
from .space_from_labels import Findings, Freezing, Read


@dataclass(slots=True)
class Note:
    """What the tracer knows of a tensor.

    Attributes:
        tensor: the tensor it is about.
        layers: its labels; None if no rule has spoken of it.
        from_input: whether it was computed from the inputs.
        filled: whether it was made with one value everywhere.
        deferred: what its use would freeze.
        shadow: on the meta device, the values of what no weight has touched.
        name: of a parameter or buffer.
        used: whether a rule has asked for its labels.
    """

    tensor: ref[Tensor]
    layers: tuple[Layer, ...] | None = None
    from_input: bool = False
    filled: bool = False
    deferred: tuple[tuple[Layer, Frozen], ...] = ()
    shadow: Tensor | None = None
    name: str = ""
    used: bool = False


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
    """A tensor that an operation is about to write to, and what it holds everywhere as yet."""

    tensor: Tensor
    value: float

    def shown_by(self, tensor: Tensor) -> bool:
        """Whether a tensor is this one or a view of it."""
        return tensor is self.tensor or tensor._base is self.tensor


@dataclass(slots=True)
class Step:
    """An operation that has run and whose labels have not been looked at yet."""

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


UNSEEN = (
    "could be read by {name}, which no example used: add one that does, example_inputs=[..., ...], or take that "
    "parameter out of the model or out of training (requires_grad_(False))"
)
"""Reason of what is frozen for the sake of a parameter that took part in no run."""

IN_PLACE_VIEWS = {"squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes_", "swapdims_"}
"""Operations that give a tensor another shape in place, so that afterwards nobody knows the one it had."""

PENDING_BYTES = 2**25
"""How much the results of pending steps may hold; they are kept until their labels have been looked at."""


Entering = dict[tuple[int | str, int | str], list[int]]
"""For every (argument, output) that is carried, the indices of the argument's tensors in an example."""

States = dict[int, dict[int, Tensor]]
"""For every carried tensor of an example, by index, its symbols per axis."""


class Unsettled(BaseException):
    """The forward writes into parameters: at its first call, or at every one; not an `Exception`, as below."""


class ValuesRead(BaseException):
    """The forward looks at values that were not computed; not an `Exception`, which a forward might catch."""


READERS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}
"""What looks at values without running an operation."""

BY_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Tags of operations whose results depend on values in what they are or in shape."""


Failed = Mapping[tuple[str, str], int]


class Readers(TorchFunctionMode):
    """Calls `on_read` with what Python looks at without running an operation."""

    def __init__(self, on_read: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.on_read = on_read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch."""
        if func in READERS:
            self.on_read(args[0])
        return func(*args, **(kwargs or {}))


class Replay(TorchDispatchMode):
    """The tracer: implements `rules.Context` while the frame runs.

    Args:
        model: the frame.
        slots: layers that may hand their input on.
        values: whether to compute convolutions, matrix products and the like of what depends on the inputs. Labels do
            not need them, and a forward seldom looks at values; where it does, `ValuesRead` is raised.
        failed: how often the proof has failed on a cut of an axis there, by module and line.
    """

    def __init__(
        self, model: nn.Module, slots: Sequence[Slot] = (), *, values: bool = True, failed: Failed | None = None
    ) -> None:
        super().__init__()
        self.model, self.slots, self.values = model, slots, values
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.labels = Labels()
        self.found = Findings(model, self.labels, tuple(name for name, _ in model.named_parameters()), tensors)
        self.notes: dict[int, Note] = {}  # by id, which a tensor takes with it when it goes
        self.operations: dict[Any, Operation] = {}
        self.split_layers: list[Layer] = []
        self.ends = 0, 0, 0  # of the symbols of parameters, of buffers, of carried states; followers come after
        self.entering: dict[int, Tensor] = {}  # inputs of the layers under way that may be left out
        self.modules, self.failed = dict(model.named_modules()), failed or {}
        self.module_names = {id(module): name for name, module in self.modules.items()}
        self.stack: list[str] = []
        self.whole: nn.Module | None = None  # the module under way that has a rule of its own
        self.fresh: Fresh | None = None  # what the operation whose labels are looked at writes to
        self.pending: list[Step] = []
        self.pending_bytes = 0
        self.op, self.module = "", ""
        self.line: tuple[str, int] | None = None
        self.meta = any(parameter.is_meta for parameter in model.parameters())
        self.pristine = model  # what a copy is made of where one is needed
        self.original: dict[int, str] = {}  # memory of the model of which this one is a copy
        self.settled: bool | None = None  # False: a forward that writes into parameters is to be reported
        self.first = True  # no run has ended yet
        self.own: dict[str, tuple[Layer, ...]] = {}  # the labels that every parameter and buffer begins with
        self.finished: list[Array] = []  # what each run has found of the symbols: their roots
        self.made: list[Any] = []  # examples, held on to
        self.visible: dict[str, list[Note]] = {}  # what the forward of every module has at hand
        self._label(tensors)

    def _label(self, tensors: dict[str, Tensor]) -> None:
        """Fresh symbols for every axis of every parameter and buffer; sparse buffers stay whole."""
        dense = {name: tensor for name, tensor in tensors.items() if tensor.layout == torch.strided}
        places = [(name, k) for name, tensor in dense.items() for k, size in enumerate(tensor.shape) if size > 1]
        sizes = [tensors[name].shape[axis] for name, axis in places]
        symbols = self.labels.new(sum(sizes))
        self.found.symbols.update(zip(places, symbols.split(sizes), strict=True))
        packed = dict(zip(places, (symbols << 1 | 1).split(sizes), strict=True))
        parameters = set(self.found.parameters)
        of_parameters = sum(n for (name, _), n in zip(places, sizes, strict=True) if name in parameters)
        self.ends = 1 + of_parameters, self.labels.count, self.labels.count
        for name, tensor in tensors.items():
            layers = []
            for axis, size in enumerate(tensor.shape):
                if size < 2 or name not in dense:
                    continue
                own, sources = packed[name, axis], frozenset([(name, axis)])
                if name not in parameters:
                    sources = frozenset()
                    own ^= 1 if tensor.is_meta else _nonzero_along(tensor, axis)
                shape = [1] * tensor.dim()
                shape[axis] = size
                layers.append(Layer(own.view(shape), sources, compact=True))
            self.note(tensor).name, self.own[name] = name, tuple(layers)
        self._label_anew()

    def _label_anew(self) -> None:
        """Give every parameter and buffer the labels of its own."""
        for name, layers in self.own.items():
            self.note(self.found.tensors[name]).layers = layers

    def _join(self) -> None:
        """Put together what the runs have found: equal is what one of them ties, and fixed what one of them keeps.

        Every run has labels to itself, as rules take what is FIXED for what cannot be seen through: one that met
        what another run has kept would keep more than either of them has to.
        """
        self.labels.join(self.finished)
        for freezing in self.found.freezings:  # known by the places of its class too, as another run sees it
            freezing.symbols = torch.cat([freezing.symbols, self.labels.find(freezing.symbols)]).unique()
        for roots in self.finished:
            self.labels.freeze(torch.from_numpy(np.flatnonzero(roots == FIXED)))
        self._label_anew()

    def note(self, tensor: Tensor) -> Note:
        """What is known of a tensor, to be written to."""
        key, notes = id(tensor), self.notes
        found = notes.get(key)
        if found is None:
            foreign(tensor, self.original)
            found = notes[key] = Note(ref(tensor, lambda _: notes.pop(key, None)))
        return found

    # --- rules.Context ---

    def layers(self, tensor: Tensor | None) -> list[Layer]:
        """Canonical layers of a tensor."""
        if tensor is None:
            return []
        note = self.notes.get(id(tensor))
        if note is None:
            return []
        note.used = True
        if not note.layers:
            return []
        note.layers = tuple(layer for layer in map(self.labels.canonical, note.layers) if layer is not None)
        return list(note.layers)

    def set_layers(self, tensor: Tensor, layers: Sequence[Layer | None]) -> None:
        """Give an output its layers."""
        self.note(tensor).layers = tuple(layer for layer in layers if layer is not None)

    def unify(self, a: Layer, b: Layer) -> None:
        """Tie two layers; one-axis layers are matched along their axes."""
        first, second = a.symbols, b.symbols
        if len(a.axes) == 1 and len(b.axes) == 1:
            first, second = first.flatten(), second.flatten()
        self.tie(first, second)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Tie two tensors of symbols entry by entry; what meets FIXED is frozen, on the record."""
        self._record(self.labels.unify(a, b), "meets values that cannot be removed")

    def freeze(self, layer: Layer, reason: str) -> None:
        """Never remove anything of this layer; an empty reason goes unrecorded."""
        self._freeze(layer.symbols, reason)

    def freeze_if_used(self, out: Tensor, layer: Layer, reason: str) -> None:
        """Freeze as soon as anything reads `out`."""
        self.note(out).deferred += ((layer, self._reason(reason)),)

    def _used(self, notes: Iterable[Note | None]) -> None:
        """Make the freezes that waited for a use of these tensors."""
        for note in notes:
            if note is not None and note.deferred:
                deferred, note.deferred = note.deferred, ()
                for layer, frozen in deferred:
                    self._freeze(layer.symbols, frozen)

    def _line(self) -> str:
        return f"{self.line[0].rpartition('/')[2]}:{self.line[1]}" if self.line else ""

    def _reason(self, reason: str) -> Frozen:
        return Frozen(self.op, self.module, self._line(), reason, ())

    def _freeze(self, symbols: Tensor, reason: str | Frozen) -> None:
        self._record(self.labels.freeze(symbols), reason)

    def _record(self, roots: Tensor, reason: str | Frozen) -> None:
        """Put on the record what was frozen, if anything was."""
        if roots.numel() and reason:
            frozen = self._reason(reason) if isinstance(reason, str) else reason
            self.found.freezings.append(Freezing(frozen, roots))

    def without_axis(self, layer: Layer, axis: int, reason: str) -> Layer | None:
        """Merge the axis away if the layer varies elsewhere too, else freeze it."""
        if len(layer.axes) > 1:
            return self.labels.merge_along(layer, axis)
        self.freeze(layer, reason)
        return None

    def read(self, produced: Layer, weight: Layer) -> None:
        """Note a contraction."""
        self.found.reads.append(Read(produced, weight))

    def flop(self, constant: int, *counted: Layer | int) -> None:
        """Count FLOPs."""
        vectors: list[Tensor] = []
        for item in counted:
            if isinstance(item, int):
                constant *= item
            else:
                vectors.append(item.symbols.flatten())
        if self.first:
            self.found.flop_terms.append((constant, vectors, self.module))

    def count(self, owner: Tensor, attribute: str, symbols: Tensor) -> None:
        """Note an attribute of the module that owns a parameter."""
        note = self.notes.get(id(owner))
        if note is not None and note.name:
            self.found.counted[note.name.rpartition(".")[0], attribute] = symbols

    def owned(self, layer: Layer) -> bool:
        """Whether any of its symbols is of a parameter or a carried state."""
        roots = self.labels.find(layer.symbols)  # the smallest of their classes; parameters come before buffers
        of_parameters, of_tensors, given = self.ends
        owned = (roots > FIXED) & (roots < of_parameters) | (roots >= of_tensors) & (roots < given)
        return bool(owned.any())

    def follows(self, layer: Layer) -> bool:
        """Whether it has met nothing but followers yet."""
        return bool((self.labels.find(layer.symbols) >= self.ends[2]).all())

    def follower(self, size: int) -> Layer:
        """Fresh symbols: no tensor of the model has them."""
        return Layer(self.labels.new(size) << 1, frozenset(), compact=True)

    def constant_along(self, tensor: Tensor, axis: int) -> bool:
        """Constant by construction (stride 0), or by value where no input has a say."""
        if tensor.layout != torch.strided:
            return False
        if tensor.stride(axis) == 0 or (self.fresh is not None and self.fresh.shown_by(tensor)):
            return True
        note = self.notes.get(id(tensor))
        if note is not None and (note.from_input or (note.layers is not None and not note.filled)):
            return False
        values = tensor if not tensor.is_meta else note.shadow if note is not None else None
        return values is not None and bool((values == values.narrow(axis, 0, 1)).all())

    def before(self, tensor: Tensor) -> Tensor:
        """What an in-place operation found, where that was the same everywhere."""
        if self.fresh is None or not self.fresh.shown_by(tensor):
            return tensor
        return torch.full((), self.fresh.value, dtype=tensor.dtype).expand(tensor.shape)

    def zero(self, tensor: Tensor) -> bool:
        """Unlabelled zeros."""
        note = self.notes.get(id(tensor))
        if (note is not None and note.layers) or self.depends_on_input(tensor):
            return False
        values = self.before(tensor)
        values = values if not values.is_meta or note is None or note.shadow is None else note.shadow
        return not values.is_meta and values.layout == torch.strided and not bool(values.any())

    def filled(self, tensor: Tensor) -> bool:
        """Made with one value everywhere."""
        note = self.notes.get(id(tensor))
        fresh = self.fresh is not None and self.fresh.tensor is tensor
        return fresh or (note is not None and note.filled)

    def depends_on_input(self, tensor: Tensor) -> bool:
        """Whether a tensor was computed from the inputs."""
        if self.fresh is not None and self.fresh.shown_by(tensor):
            return False
        note = self.notes.get(id(tensor))
        return note is not None and note.from_input

    def held(self) -> tuple[list[tuple[int, ...]], bool]:
        """Sizes that attributes of the modules under way hold, and whether to take them with care."""
        failed = self.failed.get((self.module, self._line()), 0)
        if failed > 1 or self.meta or self.module not in self.modules:  # on meta nothing can be proven
            return [], True
        near = around(self.modules, self.module)
        return [sizes for path in near for sizes in held(self.modules[path]).values()], failed > 0

    def part(self, pieces: Sequence[Tensor]) -> None:
        """Note a cut at places that attributes may hold."""
        self.found.parts.append(Parts(self.module, self._line(), tuple(pieces)))

    def split_view(self, layer: Layer) -> None:
        """Note a layer whose live positions must form a box."""
        self.split_layers.append(layer)

    # --- running ---

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and pass the labels through it."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.as_strided_.default and _changes_nothing(*args):
            return args[0]  # what pooling a channels_last image to one pixel ends with
        operation = self.operations.get(func)
        if operation is None:
            operation = self.operations[func] = Operation.of(func)
        handler = operation.handler
        if handler is None and self.whole is None:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if operation.name in IN_PLACE_VIEWS:
            return self._as_a_view(operation, func, args, kwargs)
        tensors = _tensors((*args, *kwargs.values()))
        notes = [self.note(x) for x in tensors]
        if operation.mutable and self.pending and not self._harmless(operation, args[0]):
            self._catch_up()
        fresh = self._fresh(args[0], tensors) if operation.mutable else None
        known = self._shadow(func, args, kwargs, tensors, notes) if self.meta else None
        if known is not None and func is torch.ops.aten._local_scalar_dense.default:
            out = known
        else:
            out = None if self.values else self._shaped(operation, args, notes)
            out = func(*args, **kwargs) if out is None else out
        results = [out] if isinstance(out, Tensor) else _tensors((out,))
        if known is not None:
            for mine, real in zip(tree_leaves(out), tree_leaves(known), strict=False):
                if isinstance(mine, Tensor) and isinstance(real, Tensor):
                    self.note(mine).shadow = real
        self._trace_values(operation, tensors, notes, results)
        if self.whole is None and tensors:
            module = self.stack[-1] if self.stack else ""
            # torch makes another tensor of a factory's result if somebody holds on to it
            held = ref(out) if operation.handler is constant else out
            step = Step(operation, func, args, kwargs, held, notes, not results, fresh, module, _user_line())
            self.pending.append(step)
            self.pending_bytes += sum(x.nbytes for x in results if x.layout == torch.strided)
            if self.pending_bytes > PENDING_BYTES:
                self._catch_up()
        return out

    def _as_a_view(self, operation: Operation, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Run an operation that gives a tensor another shape in place: what it was stands in for what enters."""
        self._catch_up()
        target, note = args[0], self.note(args[0])
        before = target.detach()
        func(*args, **kwargs)
        self.notes[id(before)] = replace(note, tensor=ref(before), name="")
        packet = getattr(torch.ops.aten, operation.name.rstrip("_"))
        plain = packet.int if operation.name == "transpose_" else getattr(packet, func._overloadname)
        if note.shadow is not None:
            note.shadow = plain(note.shadow, *args[1:], **kwargs)
        line, module = _user_line(), self.stack[-1] if self.stack else ""
        step = Step(Operation.of(plain), plain, (before, *args[1:]), kwargs, target, [note], False, None, module, line)
        if self.whole is None:
            self._label_results(step)
        del self.notes[id(before)]
        return target

    def _fresh(self, target: Any, tensors: Sequence[Tensor]) -> Fresh | None:
        """What an in-place operation is about to write to, if it is the same everywhere whatever the inputs are."""
        if not isinstance(target, Tensor) or target.layout != torch.strided or len(tensors) < 2:
            return None
        root = target if target._base is None else target._base
        note = self.note(root)
        values = note.shadow if root.is_meta else root
        if note.from_input or note.name or (note.layers is not None and not note.filled) or values is None:
            return None
        if not values.numel() or values.is_complex():
            return None
        first = values[(0,) * values.dim()]
        if bool((values == first).all()):
            return Fresh(root, float(first))
        return Fresh(root, 1.0) if note.filled and not note.layers else None  # uninitialised: anything, but not zero

    def _shaped(self, operation: Operation, args: Any, notes: list[Note]) -> Any:
        """Zeros in place of what depends on the inputs, of the most costly operations; None for what is computed.

        Raises:
            ValuesRead: the result depends on values that are not there.
        """
        if not any(note.from_input for note in notes) or any(x.layout != torch.strided for x in _tensors(args)):
            return None
        if operation.by_values and not (operation.name == "index" and not _has_mask(args[1])):
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
        """Python looks at a tensor.

        Raises:
            ValuesRead: its values are not there.
        """
        if not self.values and self.depends_on_input(tensor):
            raise ValuesRead

    def _harmless(self, operation: Operation, target: Any) -> bool:
        """Whether no pending step would see a difference if this in-place operation ran before it.

        Rules read values of nothing that depends on the inputs.
        """
        if operation.handler is not pointwise or not isinstance(target, Tensor):
            return False
        base = target if target._base is None else target._base
        return self.note(target).from_input and not self.note(base).filled

    def _trace_values(
        self, operation: Operation, tensors: list[Tensor], notes: list[Note], results: list[Tensor]
    ) -> None:
        """Note whether the results depend on the inputs, or are filled with one value."""
        from_input = operation.name not in CONSTANT and any(note.from_input for note in notes)
        filled = operation.name in FILLED
        if from_input or filled:
            for result in results:
                note = self.note(result)
                note.from_input |= from_input
                note.filled |= filled
                if from_input and operation.mutable and result._base is not None:
                    self.note(result._base).from_input = True
        if operation.mutable and operation.name != "copy_" and tensors:
            self.note(tensors[0] if tensors[0]._base is None else tensors[0]._base).filled = False

    def _catch_up(self) -> None:
        """Pass the labels through all pending steps.

        Many at once and not each after its operation: a convolution leaves nothing of the tracer in the caches of
        the processor, and the tracer then takes several times as long.
        """
        pending, self.pending, self.pending_bytes = self.pending, [], 0
        for step in pending:
            self._label_results(step)

    def _label_results(self, step: Step) -> None:
        """Pass the labels through one operation."""
        handler = step.operation.handler
        self._used(step.notes)
        if handler not in COUNTED and not any(note.layers for note in step.notes):
            return
        self.op = f"{step.func.namespace}.{step.operation.name}"
        self.module, self.line, self.fresh = step.module, step.line, step.fresh
        target = step.args[0] if step.operation.mutable and step.args else None
        mutated = target if isinstance(target, Tensor) and target._is_view() else None
        before = self.layers(mutated) if mutated is not None else []
        named = step.operation.bind(step.args, step.kwargs)
        rule = unknown if handler is None or step.empty else handler
        out = step.out() if handler is constant else step.out  # None, if it has gone
        kept, results = self._own_layers(target), _tensors((out,))
        self._obey(partial(rule, self, step.func, named, out), step.notes, results)
        if isinstance(target, Tensor) and kept is not None:
            self._keep_own(target, kept)
        if mutated is not None and not self._unchanged(before, self.layers(mutated)):
            self._obey(partial(write_through, self, mutated), step.notes, [mutated])
        self.fresh = None
        self._show(step.module, [*step.notes, *(self.notes[id(x)] for x in results if id(x) in self.notes)])

    def _obey(self, rule: Callable[[], None], given: Iterable[Tensor | Note], results: Iterable[Tensor]) -> None:
        """Apply a rule; one that raises keeps what enters, as an operation without a rule does.

        Raises:
            RecursionError: the forward has left no stack for the rule, which is not the rule's fault.
        """
        notes = [x if isinstance(x, Note) else self.note(x) for x in given]
        entering = [layer for note in notes for layer in note.layers or ()]
        try:
            rule()
        except RecursionError:
            raise
        except Exception as error:
            text = next(iter(str(error).splitlines()), "")
            reason = f"has a rule that failed ({type(error).__name__}: {text}), so what enters it is kept"
            for note in notes:
                note.used = True
            said = [layer for note in map(self.note, results) for layer in note.layers or ()]
            self._freeze(torch.cat([NOTHING, *(layer.symbols.flatten() for layer in (*entering, *said))]), reason)

    def _own_layers(self, target: Any) -> list[Layer] | None:
        """The labels of a parameter or buffer that an operation is about to write to; None for another tensor."""
        note = self.notes.get(id(target)) if isinstance(target, Tensor) else None
        return self.layers(target) if note is not None and note.name else None

    def _keep_own(self, target: Tensor, own: Sequence[Layer]) -> None:
        """What is written into a parameter or buffer has its labels, which it keeps."""
        written = self.layers(target)
        for layer in written:
            mate = next((x for x in own if x.axes == layer.axes), None)
            if mate is None:
                self.freeze(layer, "is written to a parameter or buffer that does not vary with it")
            else:
                self.unify(mate, layer)
        for layer in own:
            if not any(layer.axes == x.axes for x in written):
                self.freeze(layer, "is overwritten with values that cannot be removed")
        self.set_layers(target, own)

    def _show(self, path: str, notes: Iterable[Note]) -> None:
        """Note what the forward of a module has at hand."""
        self.visible.setdefault(path, []).extend(note for note in notes if note.layers and not note.name)

    def _shadow(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], notes: list[Note]) -> Any:
        """On the meta device, what the operation gives in fact: positions and masks decide which way a forward goes.

        None where a weight or a floating-point input has a say, whose values nobody knows.
        """
        shadows = {id(x): note.shadow for x, note in zip(tensors, notes, strict=True)}
        if any(shadows.get(id(x)) is None for x in tensors):
            return None

        def real(x: Any) -> Any:
            if isinstance(x, torch.device):
                return torch.device("cpu")
            return shadows[id(x)] if isinstance(x, Tensor) else x

        return func(*tree_map(real, args), **tree_map(real, kwargs))

    def _unchanged(self, before: list[Layer], after: list[Layer]) -> bool:
        """Whether an operation in place has left the labels of its target as they were."""
        return len(before) == len(after) and all(
            torch.equal(a.symbols, b.symbols) and torch.equal(a.silent, b.silent)
            for a, b in zip(map(self.labels.canonical, before), after, strict=True)
            if a is not None
        )

    def run(self, example_inputs: Any, carries: Carries | None = None, *, counting: bool = False) -> None:
        """Run the frame on every example in both modes; afterwards freeze what the runs left open.

        With `counting`, run it on the first in evaluation mode only.

        Raises:
            TraceError: the first example fails in evaluation mode, or one of the others in both modes.
        """
        examples = examples_of(example_inputs)
        if self.meta:
            examples = [self._on_meta(example) for example in examples]
        given = [self._given(example, carries or {}) for example in examples]
        self.ends = *self.ends[:2], self.labels.count
        failed: dict[Pass, Exception] = {}
        waiting = [Pass()] if counting else passes(len(examples))
        while waiting:
            one = waiting.pop(0)
            try:
                decides = self._run_pass(examples[one.example], one, *given[one.example])
            except TraceError:
                raise
            except Exception as error:
                self.pending.clear()
                self.stack, self.whole, self.entering = [], None, {}
                failed[one] = error
                if one == Pass() or (one.training and replace(one, training=False) in failed):
                    raise self._failure(examples[one.example], replace(one, training=False), failed) from error
                continue
            finally:
                self.finished.append(self.labels.set_aside())
            if decides and one.draw == HIGH and not counting:
                waiting += one.drawn_anew()
            self.first = False
        if not counting:
            self._warn_of_untrained(failed, len(examples))
        self.stack, self.line = [], None
        self._join()
        if not counting:
            self._freeze_unused()
        for layer in self.split_layers:
            self._make_box(layer)
        self.notes.clear()

    def _on_meta(self, example: Any) -> Any:
        """An example on the meta device; positions and masks keep their values beside it."""
        real = iter(tensors(example))
        example = mapped(example, lambda x: x.to("meta"))
        for x in tensors(example):
            value = next(real)
            if not value.is_floating_point():
                self.note(x).shadow = value
        self.made.append(example)
        return example

    def _own(self, example: Any) -> Any:
        """A copy of an example for one call, with what is known of it."""
        own = fresh(example)
        for x, old in zip(tensors(own), tensors(example), strict=True):
            self.note(x).from_input, self.note(x).shadow = True, self.note(old).shadow
        self.made.append(own)
        return own

    def _given(self, example: Any, carries: Carries) -> tuple[Entering, States]:
        """Which tensors of an example are carried states, and fresh symbols for them."""
        entering, found = carried_inputs(example, carries), tensors(example)
        for x in found:
            self.note(x).from_input = True
        return entering, {i: self._new_state(found[i]) for indices in entering.values() for i in indices}

    def _run_pass(self, example: Any, one: Pass, entering: Entering, states: States) -> bool:
        """One run; returns whether chance may have decided which way it went."""
        for still_norms in (False, True):
            own = self._own(example)
            given = tensors(own)
            self.labels.set_aside()  # a run that failed half way begins again
            self._label_anew()
            for i, symbols in states.items():
                self._label_state(given[i], symbols)
            with self._hooked(), adapted(self.model), running(self.model, one, still_norms=still_norms) as chance:
                before = fingerprint(self.model)
                try:
                    with Steady(), Readers(self.read_values), self, chance:
                        outputs = call(self.model, own)
                except ValueError as error:
                    if still_norms or not one.training or not too_small(error):
                        raise
                    self.pending.clear()
                    self.stack, self.whole, self.entering = [], None, {}
                    continue
                self._catch_up()
                if self.settled is False and fingerprint(self.model) != before:
                    raise Unsettled
                break
        self.op, self.module, self.line = "output", "", None
        leaving = carried_outputs(outputs, given, entering)
        for i, leaf in enumerate(put_out(outputs)):
            x = leaf.value
            self._used([self.notes.get(id(x))])
            self.op = "output" if "." not in leaf.path and leaf.path.count("[") < 2 else leaf.path
            if i in leaving:
                self._close_state(x, states[leaving[i]])
                if self.first:
                    self.found.carried.append((leaving[i], i, states[leaving[i]]))
                continue
            for layer in self.layers(x):
                self.freeze(layer, "is an output of the model")
        if entering and not self.first:
            self._same_states(leaving, states)
        return chance.decides

    def _same_states(self, leaving: dict[int, int], states: States) -> None:
        """Carried tensors of a further run have the units of those of the first."""
        known = {i: (o, symbols) for i, o, symbols in self.found.carried}
        for o, i in leaving.items():
            if i not in known or known[i][0] != o:
                raise TraceError(
                    f"carried output {o} of {len(leaving)} is at another place among the tensors put out than in the "
                    "first run (another example, or training mode); put what comes in training only behind the state"
                )
            for axis, own in states[i].items():
                other = known[i][1].get(axis)
                if other is not None and other.numel() == own.numel():
                    self.tie(own, other)
                else:
                    self._freeze(own, "")

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        """The tracer's hooks on the model, for a while."""
        pre = nn.modules.module.register_module_forward_pre_hook(self._enter)
        post = nn.modules.module.register_module_forward_hook(self._leave, always_call=True)
        handles: list[Any] = [pre, post]
        for module in self.model.modules():
            if type(module) in MODULE_RULES:
                handles.append(module.register_forward_pre_hook(self._enter_whole))
                handles.append(module.register_forward_hook(self._leave_whole, with_kwargs=True))
        for slot in self.slots:
            first, last = (self.model.get_submodule(slot.modules[k]) for k in (0, -1))
            handles.append(first.register_forward_pre_hook(partial(self._enter_slot, slot), with_kwargs=True))
            handles.append(last.register_forward_hook(partial(self._leave_slot, slot)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _failure(self, example: Any, one: Pass, failed: Mapping[Pass, Exception]) -> TraceError:
        """What to say of a run that failed: whether the model cannot be run, or only the tracer cannot follow."""
        error = failed[one]
        model, fault = twin(self.pristine), None
        try:
            with running(model, one):
                call(model, fresh(example))
        except Exception as own:
            fault = own
        if fault is None and isinstance(error, RecursionError):
            return TraceError(
                "tracing this model needs a deeper stack than Python allows (RecursionError), though its forward "
                "alone does not; call sys.setrecursionlimit(20_000) first"
            )
        if fault is None:
            where = f"{self.op} in {self.module or 'the model'}"
            return TraceError(
                f"tracing failed at {where}: {type(error).__name__}: {error}; the forward itself runs on these inputs, "
                "so the fault lies in torchgrow or in a rule that was given to it, not in example_inputs"
            )
        shapes = [tuple(x.shape) for x in tensors(example)]
        return TraceError(
            f"the model's forward failed on example_inputs of shapes {shapes}: {type(fault).__name__}: {fault}; "
            "pass inputs that model(...) accepts (a tuple for several arguments, a dict for keywords; a list holds "
            "several examples)"
        )

    def _warn_of_untrained(self, failed: Mapping[Pass, Exception], examples: int) -> None:
        """Say so if the forward ran on no example in training mode."""
        errors = [error for one, error in failed.items() if one.training and one.draw == HIGH]
        if len(errors) == examples:
            warnings.warn(
                f"in training mode the forward failed on all of example_inputs ({type(errors[0]).__name__}: "
                f"{errors[0]}), so that what it does only there is neither followed nor proven; add an example that it "
                "takes in training: example_inputs=[for_evaluation, for_training]",
                stacklevel=2,
            )

    def _freeze_unused(self) -> None:
        """Freeze tensors that no run used, and what parameters among them could read in a run that was not made.

        The forward of a module can give a parameter what it was given, what its submodules return, and what it computes
        itself, but not what is computed inside of them. Lengths do not tell what meets: by slices and concatenations
        any length can meet any other, and only a single number meets all positions alike.
        """
        parameters = dict(self.model.named_parameters())
        unused = [name for name, tensor in self.found.tensors.items() if not self.note(tensor).used]
        for name in unused:
            self.op, self.module = "unused", name.rpartition(".")[0]
            for layer in self.layers(self.found.tensors[name]):
                self.freeze(layer, "is not used by the forward")
        for name in unused:
            tensor = parameters.get(name)
            if tensor is None or not tensor.requires_grad or (tensor.dim() < 2 and tensor.numel() < 2):
                continue
            above = name.split(".")[:-1]
            for path in (".".join(above[:n]) for n in range(len(above), -1, -1)):
                self.op, self.module = "unused", path
                for note in self.visible.get(path, ()):
                    for layer in filter(None, map(self.labels.canonical, note.layers or ())):
                        self.freeze(layer, UNSEEN.format(name=name))

    def _new_state(self, state: Tensor) -> dict[int, Tensor]:
        """Fresh symbols for every axis of a carried input, of which nothing is known but that it comes back."""
        return {axis: self.labels.new(size) for axis, size in enumerate(state.shape) if size > 1}

    def _label_state(self, state: Tensor, symbols: Mapping[int, Tensor]) -> None:
        """Give a carried input its symbols."""
        layers = [placed(Layer(s << 1, frozenset()), state.dim(), axis) for axis, s in symbols.items()]
        self.set_layers(state, layers)

    def _close_state(self, out: Tensor, symbols: dict[int, Tensor]) -> None:
        """A carried output is the input of the next call: the same units at the same positions."""
        layers = self.layers(out)
        for layer in layers:
            if len(layer.axes) != 1:
                self.freeze(layer, "is carried on, but not along one axis")
        for axis, own in symbols.items():
            ends = [layer for layer in layers if layer.axes == (axis,)]
            for end in ends:
                self.tie(own, end.symbols.flatten())
            if not ends:
                self._freeze(own, "is carried over from positions that cannot be removed")

    def _make_box(self, layer: Layer) -> None:
        """Live positions of a view over several axes must form a box: keep freedom along one axis only."""
        current = self.labels.canonical(layer)
        if current is None or len(current.axes) < 2:
            return

        symbols = current.symbols

        def distinct(axis: int) -> int:
            return int(symbols.movedim(axis, 0).flatten(1).unique(dim=0).shape[0])

        free = max(current.axes, key=lambda axis: (distinct(axis), symbols.shape[axis]))
        for axis in current.axes:
            if axis != free and current is not None:
                current = self.labels.merge_along(current, axis)

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        path = self.module_names.get(id(module), type(module).__name__)
        self.stack.append(path)
        self._at_hand(path, inputs)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.stack.pop()
        if output is not None and self.whole is None:
            self._at_hand(self.stack[-1] if self.stack else "", output)

    def _at_hand(self, path: str, value: Any) -> None:
        """What is handed to a module, or back to one; it may be without labels yet."""
        found = [value] if isinstance(value, Tensor) else tensors(value)
        self.visible.setdefault(path, []).extend(self.note(x) for x in found)

    def _enter_slot(self, slot: Slot, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = slot.skip(*args, **kwargs)
        self.entering[slot.unit] = x[0] if slot.skip.outputs else x

    def _leave_slot(self, slot: Slot, module: nn.Module, args: Any, output: Any) -> None:
        """Whatever follows a layer that may be left out reads its output or its input: their labels are one."""
        self._catch_up()
        self.module = self.module_names.get(id(module), type(module).__name__)
        self.op, self.line = "left out", _user_line()
        ends = self.entering.pop(slot.unit), output[0] if slot.skip.outputs else output
        self._obey(partial(either, self, *ends), ends, ends)

    def _enter_whole(self, module: nn.Module, inputs: Any) -> None:
        """Look away until `_leave_whole`: the module has a rule of its own."""
        if self.whole is None:
            self.whole = module

    def _leave_whole(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module is not self.whole:
            return
        self.whole = None
        self._catch_up()
        self.module = self.module_names.get(id(module), type(module).__name__)
        self.op, self.line = type(module).__name__, _user_line()
        named = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        given = _tensors(tree_leaves(named))
        self._used(self.notes.get(id(x)) for x in given)
        rule = partial(MODULE_RULES[type(module)], self, module, named, output)
        with torch.utils._python_dispatch._disable_current_modes():
            self._obey(rule, [*given, *module.parameters(), *module.buffers()], _tensors(tree_leaves(output)))


def _has_mask(indices: Any) -> bool:
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)


def _changes_nothing(tensor: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> bool:
    """Whether `as_strided_` leaves every element in place: only axes of size 1 get other strides."""
    same = offset in (None, tensor.storage_offset()) and tuple(size) == tuple(tensor.shape)
    return same and all(n == 1 or old == new for n, old, new in zip(size, tensor.stride(), stride, strict=True))


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among values and in lists of them: arguments and results of operations nest in no other way."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _nonzero_along(tensor: Tensor, axis: int) -> Tensor:
    """For every position of an axis, whether anything is not zero there."""
    nonzero = (tensor.detach() != 0).cpu()
    return nonzero if nonzero.dim() == 1 else nonzero.movedim(axis, 0).flatten(1).any(1)


def _user_line() -> tuple[str, int] | None:
    """File and line of the innermost frame of the model itself; None where all its modules are torch's or ours.

    What lies outside of the call of the model, such as a command line or a test runner, is not to blame.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != call.__module__:
        if not _inner(frame.f_globals.get("__name__", "")):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return None


TOOLS = (__name__.partition(".")[0], "torch", "contextlib", "functools", "einops", "opt_einsum")
"""Packages that run operations on behalf of a model."""


@cache
def _inner(module: str) -> bool:
    """Whether a module is torch's or ours or a tool; the lab's models are models like others."""
    return module.partition(".")[0] in TOOLS and not module.startswith(f"{TOOLS[0]}.lab.")


Couples = Sequence[tuple[Place, Place]]


def _frozen_by_name(symbols: dict[Place, Tensor], names: Sequence[str | Place]) -> list[Place]:
    """Places of the tensors, modules, patterns and single axes named."""
    found: list[Place] = []
    for name in names:
        if isinstance(name, str):
            matching = [p for p in symbols if p[0] == name or p[0].startswith(f"{name}.") or fnmatchcase(p[0], name)]
        else:
            matching = [name] if name in symbols else []
        if not matching:
            raise TraceError(f"freeze names {name!r}, which no parameter or buffer {_close(name, symbols)}")
        found += matching
    return found


def _coupled(symbols: dict[Place, Tensor], couple: Couples) -> Couples:
    """The pairs, once both sides are known and as long as each other."""
    for pair in couple:
        for place in pair:
            if place not in symbols:
                raise TraceError(f"couple names {place!r}, which no parameter or buffer {_close(place, symbols)}")
        sizes = [symbols[place].numel() for place in pair]
        if sizes[0] != sizes[1]:
            raise TraceError(
                f"couple names {pair[0]} of {sizes[0]} positions and {pair[1]} of {sizes[1]}; only axes "
                "of the same length can be cut alike"
            )
    return couple


def _close(name: str | Place, symbols: dict[Place, Tensor]) -> str:
    """The end of an error about a name: what there is instead."""
    near = get_close_matches(name if isinstance(name, str) else str(name[0]), {place[0] for place in symbols}, 3, 0.3)
    axes = [f"{tensor} (axes {[a for t, a in symbols if t == tensor]})" for tensor in near]
    return f"of two or more positions has; close are {', '.join(axes) or 'none: see model.named_parameters()'}"


def _on_a_copy(model: nn.Module, slots: Sequence[Slot], failed: Failed | None, *, values: bool) -> Replay:
    """A tracer of a copy, so that nothing the forward writes reaches the model."""
    tracer = Replay(twin(model), slots, values=values, failed=failed)
    tracer.pristine, tracer.original = model, storages(model)
    return tracer


def settle(model: nn.Module, example_inputs: Any) -> None:
    """Run a copy as the user's loop would, for what a forward does at its first call only."""
    for one in passes(len(examples := examples_of(example_inputs))):
        with suppress(Exception), running(model, one), Steady():
            call(model, fresh(examples[one.example]))


def replay(
    model: nn.Module,
    example_inputs: Any,
    *,
    freeze: Sequence[str | Place] = (),
    couple: Couples = (),
    slots: Sequence[Slot] = (),
    carried: Carries | None = None,
    failed: Failed | None = None,
    counting: bool = False,
) -> Space:
    """Trace the frame by label replay, without proof.

    Args:
        model: the frame, on one device, not wrapped and not compiled.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs, or a list of several such
            examples; the first axis of the first tensor is taken for the batch.
        freeze: parameters or modules that keep their shape, by qualified name or pattern ("head.*"); or single
            axes, such as ("head.weight", 1).
        couple: pairs of axes that are cut alike, position by position, such as (("a.weight", 0), ("b.weight", 0)).
        slots: layers that may hand their input on instead; they become units in `depth.with_layers`.
        carried: outputs that become arguments of the next call, {argument: output}, by position or name.
        failed: how often the proof has failed on parts of an axis (`Space.parts`), by module and line.
        counting: run the first example in evaluation mode only: enough for parameters and FLOPs, not for cutting.

    Raises:
        TraceError: the model or the inputs cannot be traced; the message says what would work.
    """
    check_model(model, example_inputs)
    tracer, settled, values = _on_a_copy(model, slots, failed, values=False), False, False
    wanted = _frozen_by_name(tracer.found.symbols, freeze), _coupled(tracer.found.symbols, couple)
    while True:
        tracer.settled = settled
        try:
            tracer.run(example_inputs, carried, counting=counting)
            break
        except ValuesRead:
            values = True
        except Unsettled:
            settled = True
        tracer = _on_a_copy(model, slots, failed, values=values)
        if settled:
            settle(tracer.model, example_inputs)
    tracer.op = "the user"
    for a, b in wanted[1]:
        tracer.tie(tracer.found.symbols[a], tracer.found.symbols[b])
    for place in wanted[0]:
        tracer._freeze(tracer.found.symbols[place], "was named to stay as it is")
    first = tensors(examples_of(example_inputs)[0])[0]
    return tracer.found.space(batch=max(1, first.shape[0]) if first.dim() else 1)

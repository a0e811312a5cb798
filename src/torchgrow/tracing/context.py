"""What is known while a model is traced: the labels of every tensor, and what the rules have found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from weakref import ref

import torch
from torch import Tensor, nn

from ..renamed import renamed_attribute
from ..structure.attributes import around, held
from ..structure.space import Frozen, Parts
from .labels import FIXED, Labelled, UnionFind
from .notes import Fresh, Note
from .passes import foreign
from .space_from_labels import Findings, Freezing, Read

Failed = Mapping[tuple[str, ...], int]
"""How often a cut of an axis failed in the proof, by module and line; by operation too, where a choice was in vain."""


class TraceContext:
    """Implements `rules.Context`."""

    def __init__(self, model: nn.Module, failed: Failed | None = None) -> None:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.classes = UnionFind()
        self.found = Findings(model, self.classes, tuple(name for name, _ in model.named_parameters()), tensors)
        self.notes: dict[int, Note] = {}  # by id; removed when the tensor dies
        self.ends = 0, 0, 0  # of the symbols of parameters, of buffers, of carried states; followers come after
        self.modules, self.failed = dict(model.named_modules()), failed or {}
        self.kept: dict[tuple[str, ...], list[Tensor]] = {}  # symbols that operations keep at others' cost
        self.fresh: Fresh | None = None  # what the operation whose labels are looked at writes to
        self.op, self.module = "", ""
        self.line: tuple[str, int] | None = None
        self.meta = any(parameter.is_meta for parameter in model.parameters())
        self.original: dict[int, str] = {}  # memory of the model of which this one is a copy
        self.first = True  # no run has ended yet
        self.own: dict[str, tuple[Labelled, ...]] = {}  # the labels that every parameter and buffer begins with
        self.visible: dict[str, list[Note]] = {}  # tensors that the forward of every module can see
        self._label(tensors)

    def note(self, tensor: Tensor) -> Note:
        """What is known of a tensor, to be written to."""
        key, notes = id(tensor), self.notes
        found = notes.get(key)
        if found is None:
            foreign(tensor, self.original)
            found = notes[key] = Note(ref(tensor, lambda _: notes.pop(key, None)))
        return found

    layers = renamed_attribute("layers", "labelled")
    set_layers = renamed_attribute("set_layers", "set_labelled")

    def labelled(self, tensor: Tensor | None) -> list[Labelled]:
        """Labels of a tensor, every symbol by its root."""
        note = self.notes.get(id(tensor)) if tensor is not None else None
        if note is None:
            return []
        note.used = True
        if note.labelled:
            note.labelled = tuple(labels for labels in map(self.classes.canonical, note.labelled) if labels is not None)
        return list(note.labelled or ())

    def set_labelled(self, tensor: Tensor, labelled: Sequence[Labelled | None]) -> None:
        """Give an output its labels."""
        self.note(tensor).labelled = tuple(labels for labels in labelled if labels is not None)

    def unify(self, a: Labelled, b: Labelled) -> None:
        """Tie labels to labels; those along one axis are matched along it."""
        first, second = a.symbols, b.symbols
        if len(a.axes) == 1 and len(b.axes) == 1:
            first, second = first.flatten(), second.flatten()
        self.tie(first, second)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Tie two tensors of symbols entry by entry; what meets FIXED is frozen and recorded."""
        self._record(self.classes.unify(a, b), "meets values that cannot be removed")

    def freeze(self, labels: Labelled, reason: str) -> None:
        """Never remove anything of these labels; an empty reason goes unrecorded."""
        self.freeze_symbols(labels.symbols, reason)

    def freeze_if_used(self, out: Tensor, labels: Labelled, reason: str) -> None:
        """Freeze as soon as anything reads `out`."""
        self.note(out).deferred += ((labels, self.reason(reason)),)

    def used(self, notes: Iterable[Note | None]) -> None:
        """Apply the freezes that waited for a use of these tensors."""
        for note in notes:
            if note is not None and note.deferred:
                deferred, note.deferred = note.deferred, ()
                for labels, frozen in deferred:
                    self.freeze_symbols(labels.symbols, frozen)

    def _line(self) -> str:
        return f"{self.line[0].rpartition('/')[2]}:{self.line[1]}" if self.line else ""

    def reason(self, reason: str) -> Frozen:
        """A reason with the operation, module and line that are running."""
        return Frozen(self.op, self.module, self._line(), reason, ())

    def freeze_symbols(self, symbols: Tensor, reason: str | Frozen) -> None:
        """Never remove anything of these symbols; an empty reason goes unrecorded."""
        self._record(self.classes.freeze(symbols), reason)

    def _record(self, roots: Tensor, reason: str | Frozen) -> None:
        """Record what was frozen, if anything was."""
        if roots.numel() and reason:
            frozen = self.reason(reason) if isinstance(reason, str) else reason
            self.found.freezings.append(Freezing(frozen, roots))

    def without_axis(self, labels: Labelled, axis: int, reason: str) -> Labelled | None:
        """Merge the axis away if the labels vary elsewhere too, else freeze them."""
        if len(labels.axes) > 1:
            return self.classes.merge_along(labels, axis)
        self.freeze(labels, reason)
        return None

    def read(self, produced: Labelled | None, weight: Labelled) -> None:
        """Note a contraction, of values without labels too."""
        self.found.reads += [] if produced is None else [Read(produced, weight)]
        self.found.summed |= weight.sources

    def flop(self, constant: int, *counted: Labelled | int) -> None:
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

    def owned(self, labels: Labelled) -> bool:
        """Whether any of their symbols belongs to a parameter or a carried state."""
        roots = self.classes.find(labels.symbols)  # the smallest of their classes; parameters come before buffers
        of_parameters, of_tensors, given = self.ends
        owned = (roots > FIXED) & (roots < of_parameters) | (roots >= of_tensors) & (roots < given)
        return bool(owned.any())

    def follows(self, labels: Labelled) -> bool:
        """Whether they have met only followers so far."""
        return bool((self.classes.find(labels.symbols) >= self.ends[2]).all())

    def follower(self, size: int, *, zeros: bool = False) -> Labelled:
        """Fresh symbols: no tensor of the model has them."""
        symbols = self.classes.new(size)
        self.found.zeros += [symbols] if zeros else []
        return Labelled(symbols << 1, compact=True)

    def constant_along(self, tensor: Tensor, axis: int) -> bool:
        """Constant by construction (stride 0), or by value where it does not depend on inputs."""
        if tensor.layout != torch.strided:
            return False
        if tensor.stride(axis) == 0 or (self.fresh is not None and self.fresh.shown_by(tensor)):
            return True
        note = self.notes.get(id(tensor))
        if note is not None and (note.from_input or (note.labelled is not None and not note.filled)):
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
        if (note is not None and note.labelled) or self.depends_on_input(tensor):
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
        """Sizes that attributes of the running modules hold, and whether to take them with care."""
        failed = self.failed.get((self.module, self._line()), 0)
        if failed > 1 or self.meta or self.module not in self.modules:  # on meta nothing can be proven
            return [], True
        near = around(self.modules, self.module)
        return [sizes for path in near for sizes in held(self.modules[path]).values()], failed > 0

    def part(self, pieces: Sequence[Tensor]) -> None:
        """Note a cut at places that attributes may hold."""
        self.found.parts.append(Parts(self.module, self._line(), tuple(pieces)))

    def turned(self) -> bool:
        """Whether, in an earlier trace, nothing could go of what was `disputed` here."""
        return (self.module, self._line(), self.op) in self.failed

    def disputed(self, kept: Sequence[Labelled]) -> None:
        """Note labels that are kept at the cost of others."""
        self.kept.setdefault((self.module, self._line(), self.op), []).extend(labels.symbols for labels in kept)

    def in_vain(self) -> dict[tuple[str, ...], int]:
        """Where nothing can go of what was `disputed`."""
        return {at: 1 for at, kept in self.kept.items() if not any(bool(self.classes.find(x).any()) for x in kept)}

    def split_view(self, labels: Labelled) -> None:
        """Note labels whose live positions must form a box."""
        self.found.views.append((self.module, labels))

    def _label(self, tensors: dict[str, Tensor]) -> None:
        """Fresh symbols for every axis of every parameter and buffer; sparse buffers stay whole."""
        dense = {name: tensor for name, tensor in tensors.items() if tensor.layout == torch.strided}
        places = [(name, k) for name, tensor in dense.items() for k, size in enumerate(tensor.shape) if size > 1]
        sizes = [tensors[name].shape[axis] for name, axis in places]
        symbols = self.classes.new(sum(sizes))
        self.found.symbols.update(zip(places, symbols.split(sizes), strict=True))
        packed = dict(zip(places, (symbols << 1 | 1).split(sizes), strict=True))
        parameters = set(self.found.parameters)
        of_parameters = sum(n for (name, _), n in zip(places, sizes, strict=True) if name in parameters)
        self.ends = 1 + of_parameters, self.classes.count, self.classes.count
        for name, tensor in tensors.items():
            labelled = []
            for axis, size in enumerate(tensor.shape):
                if size < 2 or name not in dense:
                    continue
                own, sources = packed[name, axis], frozenset([(name, axis)])
                if name not in parameters:
                    sources = frozenset()
                    nonzero = (tensor.detach() != 0).movedim(axis, 0).unsqueeze(-1).flatten(1).any(1)
                    own ^= 1 if tensor.is_meta else nonzero.cpu()
                shape = [1] * tensor.dim()
                shape[axis] = size
                labelled.append(Labelled(own.view(shape), sources, compact=True))
            self.note(tensor).name, self.own[name] = name, tuple(labelled)
        self.label_anew()

    def label_anew(self) -> None:
        """Give every parameter and buffer its own labels again."""
        for name, labelled in self.own.items():
            self.note(self.found.tensors[name]).labelled = labelled

    def show(self, path: str, notes: Iterable[Note]) -> None:
        """Note tensors that the forward of a module can see."""
        self.visible.setdefault(path, []).extend(note for note in notes if note.labelled and not note.name)

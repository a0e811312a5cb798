"""The queue of operations that have run, whose labels are passed on later, many at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .context import TraceContext
from .labels import NOTHING, Labelled
from .notes import Note, Operation, Step, tensors_among
from .rules.indexing import write_through
from .rules.movement import constant
from .rules.pointwise import pointwise, unknown
from .rules.registry import COUNTED

PENDING_BYTES = 2**25
"""How much the results of pending steps may hold; they are kept until their labels have been looked at."""


class Pending:
    """A queue of steps, and how labels are passed through one."""

    def __init__(self, context: TraceContext) -> None:
        self.context = context
        self.steps: list[Step] = []
        self.bytes = 0  # of their results

    def add(self, step: Step, results: Iterable[Tensor]) -> None:
        """Queue a step; if the queue holds too much memory, process it."""
        self.steps.append(step)
        self.bytes += sum(x.nbytes for x in results if x.layout == torch.strided)
        if self.bytes > PENDING_BYTES:
            self.catch_up()

    def clear(self) -> None:
        """Drop the queue after a run that failed."""
        self.steps, self.bytes = [], 0

    def catch_up(self) -> None:
        """Pass the labels through all pending steps.

        Many at a time, not each after its operation: a convolution evicts the tracer from the processor's caches, which
        makes it several times as slow.
        """
        steps, self.steps, self.bytes = self.steps, [], 0
        for step in steps:
            self.label(step)

    def label(self, step: Step) -> None:
        """Pass the labels through one operation."""
        handler = step.operation.handler
        self.context.used(step.notes)
        if handler not in COUNTED and not any(note.labelled for note in step.notes):
            for used in step.notes:  # such as a parameter of one number a row and column
                used.used = True
            return
        self.context.op = f"{step.func.namespace}.{step.operation.name}"
        self.context.module, self.context.line, self.context.fresh = step.module, step.line, step.fresh
        target = step.args[0] if step.operation.mutable and step.args else None
        mutated = target if isinstance(target, Tensor) and target._is_view() else None
        before = self.context.labelled(mutated) if mutated is not None else []
        named = step.operation.bind(step.args, step.kwargs)
        rule = unknown if handler is None or step.empty else handler
        out = step.out() if handler is constant else step.out  # None, if it has gone
        note = self.context.notes.get(id(target)) if isinstance(target, Tensor) else None
        kept = self.context.labelled(target) if note is not None and note.name else None  # a parameter or buffer
        results = tensors_among((out,))
        self.obey(partial(rule, self.context, step.func, named, out), step.notes, results)
        if isinstance(target, Tensor) and kept is not None:
            self._keep_own(target, kept)
        if mutated is not None and not self._unchanged(before, self.context.labelled(mutated)):
            self.obey(partial(write_through, self.context, mutated), step.notes, [mutated])
        self.context.fresh = None
        self.context.show(
            step.module, [*step.notes, *(self.context.notes[id(x)] for x in results if id(x) in self.context.notes)]
        )

    def obey(self, rule: Callable[[], None], given: Iterable[Tensor | Note], results: Iterable[Tensor]) -> None:
        """Apply a rule; if it raises, freeze what enters, as for an operation without a rule.

        Raises:
            RecursionError: the forward has used up the stack.
        """
        notes = [x if isinstance(x, Note) else self.context.note(x) for x in given]
        entering = [labels for note in notes for labels in note.labelled or ()]
        try:
            rule()
        except RecursionError:
            raise
        except Exception as error:
            text = next(iter(str(error).splitlines()), "")
            reason = f"has a rule that failed ({type(error).__name__}: {text}), so what enters it is kept"
            for note in notes:
                note.used = True
            said = [labels for note in map(self.context.note, results) for labels in note.labelled or ()]
            self.context.freeze_symbols(
                torch.cat([NOTHING, *(labels.symbols.flatten() for labels in (*entering, *said))]), reason
            )

    def _keep_own(self, target: Tensor, own: Sequence[Labelled]) -> None:
        """What is written into a parameter or buffer has its labels, which it keeps."""
        written = self.context.labelled(target)
        for labels in written:
            mate = next((x for x in own if x.axes == labels.axes), None)
            if mate is None:
                self.context.freeze(labels, "is written to a parameter or buffer that does not vary with it")
            else:
                self.context.unify(mate, labels)
        for labels in own:
            if not any(labels.axes == x.axes for x in written):
                self.context.freeze(labels, "is overwritten with values that cannot be removed")
        self.context.set_labelled(target, own)

    def _unchanged(self, before: list[Labelled], after: list[Labelled]) -> bool:
        """Whether an operation in place has left the labels of its target as they were."""
        return len(before) == len(after) and all(
            torch.equal(a.symbols, b.symbols) and torch.equal(a.zero, b.zero)
            for a, b in zip(map(self.context.classes.canonical, before), after, strict=True)
            if a is not None
        )

    def harmless(self, operation: Operation, target: Any) -> bool:
        """Whether all pending steps would give the same if this in-place operation ran before them.

        Rules read values of nothing that depends on the inputs.
        """
        if operation.handler is not pointwise or not isinstance(target, Tensor):
            return False
        base = target if target._base is None else target._base
        return self.context.note(target).from_input and not self.context.note(base).filled

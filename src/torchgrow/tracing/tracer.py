"""Label replay: run the frame, carry labels beside every tensor, derive the space.

A copy of the model runs as it is, on real tensors, under a `TorchDispatchMode`: data-dependent Python, helper functions
and raw parameters need no special care. What cannot be understood is frozen with its operation, module and line.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..adapters.registry import adapted
from ..errors import TraceError
from ..renamed import frames_to_user
from ..structure.space import Block, Place, Space
from . import carried_states
from .carried_states import Entering, States
from .context import Failed, TraceContext
from .dispatch import Dispatch, Readers, ValuesRead
from .labels import FIXED, Array, Labelled
from .model_call import Carries, call, carried_outputs, check_model, examples_of, fresh
from .module_hooks import ModuleHooks
from .nested import mapped, put_out, tensors
from .passes import HIGH, Pass, Steady, fingerprint, passes, running, storages, too_small, twin
from .pending import Pending
from .requests import Couples, coupled, frozen_by_name
from .rules import (  # noqa: F401 (importing them registers their rules)
    contractions,
    indexing,
    movement,
    parts,
    pointwise,
    reductions,
    sampling,
    sequences,
)

UNSEEN = (
    "could be read by {name}, which no example used: add one that does, example_inputs=[..., ...], or take that "
    "parameter out of the model or out of training (requires_grad_(False))"
)
"""Reason of what is frozen for the sake of a parameter that took part in no run."""


class Unsettled(BaseException):
    """The forward writes into parameters, at its first call or at every one. Not an `Exception`, as `ValuesRead`."""


class Tracer:
    """Runs a frame on all examples in both modes, and joins what the runs have found; see `replay` and `Dispatch`."""

    def __init__(
        self, model: nn.Module, blocks: Sequence[Block] = (), *, values: bool = True, failed: Failed | None = None
    ) -> None:
        self.model, self.context = model, TraceContext(model, failed)
        self.pending = Pending(self.context)
        self.hooks = ModuleHooks(model, self.context, self.pending, blocks)
        self.dispatch = Dispatch(self.context, self.pending, self.hooks, values=values)
        self.pristine = model  # what a copy is made of where one is needed
        self.settled: bool | None = None  # False: a forward that writes into parameters is to be reported
        self.finished: list[Array] = []  # what each run has found of the symbols: their roots
        self.made: list[Any] = []  # keeps the examples alive

    def run(self, example_inputs: Any, carries: Carries | None = None, *, counting: bool = False) -> None:
        """Run the frame on every example in both modes; afterwards freeze what the runs left open.

        With `counting`, run it on the first in evaluation mode only.

        Raises:
            TraceError: the first example fails in evaluation mode, or one of the others in both modes.
        """
        examples = examples_of(example_inputs)
        if self.context.meta:
            examples = [self._on_meta(example) for example in examples]
        given = [carried_states.given(self.context, example, carries or {}) for example in examples]
        self.context.ends = *self.context.ends[:2], self.context.classes.count
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
                self.hooks.clear()
                failed[one] = error
                if one == Pass() or (one.training and replace(one, training=False) in failed):
                    raise self._failure(examples[one.example], replace(one, training=False), failed) from error
                continue
            finally:
                self.finished.append(self.context.classes.set_aside())
            if decides and one.draw == HIGH and not counting:
                waiting += one.drawn_anew()
            self.context.first = False
        untrained = [error for one, error in failed.items() if one.training and one.draw == HIGH]
        if not counting and len(untrained) == len(examples):
            warnings.warn(
                f"in training mode the forward failed on all of example_inputs ({type(untrained[0]).__name__}: "
                f"{untrained[0]}), so that what it does only there is neither followed nor proven; add an example that "
                "it takes in training: example_inputs=[for_evaluation, for_training]",
                stacklevel=frames_to_user(),
            )
        self.context.line = None
        self._join()
        if not counting:
            self.freeze_unused()
        for _, labels in self.context.found.views:
            self._make_box(labels)
        self.context.notes.clear()

    def _on_meta(self, example: Any) -> Any:
        """An example on the meta device; positions and masks keep their values beside it."""
        real = iter(tensors(example))
        example = mapped(example, lambda x: x.to("meta"))
        for x in tensors(example):
            value = next(real)
            if not value.is_floating_point():
                self.context.note(x).shadow = value
        self.made.append(example)
        return example

    def _own(self, example: Any) -> Any:
        """A copy of an example for one call, with what is known of it."""
        own = fresh(example)
        for x, old in zip(tensors(own), tensors(example), strict=True):
            self.context.note(x).from_input, self.context.note(x).shadow = True, self.context.note(old).shadow
        self.made.append(own)
        return own

    def _run_pass(self, example: Any, one: Pass, entering: Entering, states: States) -> bool:
        """One run; returns whether random numbers may have decided its control flow."""
        for still_norms in (False, True):
            own = self._own(example)
            given = tensors(own)
            self.context.classes.set_aside()  # a run that failed half way begins again
            self.context.label_anew()
            for i, symbols in states.items():
                carried_states.label_state(self.context, given[i], symbols)
            with self.hooks.on(), adapted(self.model), running(self.model, one, still_norms=still_norms) as chance:
                before = fingerprint(self.model)
                try:
                    with Steady(), Readers(self.dispatch.read_values), self.dispatch, chance:
                        outputs = call(self.model, own)
                except ValueError as error:
                    if still_norms or not one.training or not too_small(error):
                        raise
                    self.pending.clear()
                    self.hooks.clear()
                    continue
                self.pending.catch_up()
                if self.settled is False and fingerprint(self.model) != before:
                    raise Unsettled
                break
        self.context.op, self.context.module, self.context.line = "output", "", None
        leaving = carried_outputs(outputs, given, entering)
        for i, leaf in enumerate(put_out(outputs)):
            x = leaf.value
            self.context.used([self.context.notes.get(id(x))])
            self.context.op = "output" if "." not in leaf.path and leaf.path.count("[") < 2 else leaf.path
            if i in leaving:
                carried_states.close_state(self.context, x, states[leaving[i]])
                if self.context.first:
                    self.context.found.carried.append((leaving[i], i, states[leaving[i]]))
                continue
            for labels in self.context.labelled(x):
                self.context.freeze(labels, "is an output of the model")
        if entering and not self.context.first:
            carried_states.same_states(self.context, leaving, states)
        return chance.decides

    def _failure(self, example: Any, one: Pass, failed: Mapping[Pass, Exception]) -> TraceError:
        """The error for a failed run: either the model cannot be run, or only the tracer cannot follow it."""
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
            where = f"{self.context.op} in {self.context.module or 'the model'}"
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

    def _join(self) -> None:
        """Join the findings of all runs: symbols are equal if one run ties them, and FIXED if one run freezes them.

        Every run has its own labels, since rules treat FIXED as opaque: a run that met what another one has frozen
        would freeze more than either of them has to.
        """
        self.context.classes.join(self.finished)
        for freezing in self.context.found.freezings:  # known by the places of its class too, as another run sees it
            freezing.symbols = torch.cat([freezing.symbols, self.context.classes.find(freezing.symbols)]).unique()
        for roots in self.finished:
            self.context.classes.freeze(torch.from_numpy(np.flatnonzero(roots == FIXED)))
        self.context.label_anew()

    def freeze_unused(self) -> None:
        """Freeze tensors that no run used, and everything that parameters among them might read in another run.

        The forward of a module can give a parameter what it was given, what its submodules return, and what it computes
        itself, but not what is computed inside of them. Lengths do not tell what meets: by slices and concatenations
        any length can meet any other, and only a single number meets all positions alike.
        """
        parameters = dict(self.model.named_parameters())
        unused = [name for name, tensor in self.context.found.tensors.items() if not self.context.note(tensor).used]
        for name in unused:
            self.context.op, self.context.module = "unused", name.rpartition(".")[0]
            for labels in self.context.labelled(self.context.found.tensors[name]):
                self.context.freeze(labels, "is not used by the forward")
        for name in unused:
            tensor = parameters.get(name)
            if tensor is None or not tensor.requires_grad or (tensor.dim() < 2 and tensor.numel() < 2):
                continue
            above = name.split(".")[:-1]
            for path in (".".join(above[:n]) for n in range(len(above), -1, -1)):
                self.context.op, self.context.module = "unused", path
                for note in self.context.visible.get(path, ()):
                    for labels in filter(None, map(self.context.classes.canonical, note.labelled or ())):
                        self.context.freeze(labels, UNSEEN.format(name=name))

    def _make_box(self, labels: Labelled) -> None:
        """Live positions of a view over several axes must form a box: keep freedom along one axis only."""
        current = self.context.classes.canonical(labels)
        if current is None or len(current.axes) < 2:
            return

        symbols = current.symbols

        def distinct(axis: int) -> int:
            return int(symbols.movedim(axis, 0).flatten(1).unique(dim=0).shape[0])

        free = max(current.axes, key=lambda axis: (distinct(axis), symbols.shape[axis]))
        for axis in current.axes:
            if axis != free and current is not None:
                current = self.context.classes.merge_along(current, axis)


def _on_a_copy(model: nn.Module, blocks: Sequence[Block], failed: Failed | None, *, values: bool) -> Tracer:
    """A tracer of a copy of the model, which the forward may write to."""
    tracer = Tracer(twin(model), blocks, values=values, failed=failed)
    tracer.pristine, tracer.context.original = model, storages(model)
    return tracer


def settle(model: nn.Module, example_inputs: Any) -> None:
    """Run a copy once as the user's loop would, since some forwards do more at their first call."""
    for one in passes(len(examples := examples_of(example_inputs))):
        with suppress(Exception), running(model, one), Steady():
            call(model, fresh(examples[one.example]))


def replay(
    model: nn.Module,
    example_inputs: Any,
    *,
    protect: Sequence[str | Place] = (),
    couple: Couples = (),
    blocks: Sequence[Block] = (),
    carried: Carries | None = None,
    failed: Failed | None = None,
    counting: bool = False,
) -> Space:
    """Trace the frame by label replay, without proof; the first axis of the first tensor is taken for the batch.

    Arguments are as for `trace`. `blocks` may hand their input on instead; `blocks.with_layers` makes them units. With
    `counting`, the first example is run in evaluation mode only: enough for parameters and FLOPs, not for cutting.

    Raises:
        TraceError: the model or the inputs cannot be traced; the message says what would work.
    """
    check_model(model, example_inputs)
    failed, settled, values = dict(failed or {}), False, False
    tracer = _on_a_copy(model, blocks, failed, values=values)
    wanted = frozen_by_name(tracer.context.found.symbols, protect), coupled(tracer.context.found.symbols, couple)
    while True:
        tracer.settled = settled
        try:
            tracer.run(example_inputs, carried, counting=counting)
            if counting or failed.items() >= (vain := tracer.context.in_vain()).items():
                break
            failed |= vain
        except ValuesRead:
            values = True
        except Unsettled:
            settled = True
        tracer = _on_a_copy(model, blocks, failed, values=values)
        if settled:
            settle(tracer.model, example_inputs)
    tracer.context.op = "the user"
    for a, b in wanted[1]:
        tracer.context.tie(tracer.context.found.symbols[a], tracer.context.found.symbols[b])
    for place in wanted[0]:
        tracer.context.freeze_symbols(tracer.context.found.symbols[place], "was named to stay as it is")
    first = tensors(examples_of(example_inputs)[0])[0]
    return tracer.context.found.space(batch=max(1, first.shape[0]) if first.dim() else 1)

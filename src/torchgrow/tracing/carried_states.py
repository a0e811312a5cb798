"""Carried states: a state that the model returns has the units of the argument it becomes in the next call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import TraceError
from .context import TraceContext
from .labels import Labelled
from .model_call import Carries, carried_inputs
from .nested import tensors
from .rules.labelled import placed

Entering = dict[tuple[int | str, int | str], list[int]]
"""For every (argument, output) that is carried, the indices of the argument's tensors in an example."""

States = dict[int, dict[int, Tensor]]
"""For every carried tensor of an example, by index, its symbols per axis."""


def given(ctx: TraceContext, example: Any, carries: Carries) -> tuple[Entering, States]:
    """Which tensors of an example are carried states, and fresh symbols for them."""
    entering, found = carried_inputs(example, carries), tensors(example)
    for x in found:
        ctx.note(x).from_input = True
    new = ctx.classes.new
    carried = (i for indices in entering.values() for i in indices)
    return entering, {i: {k: new(n) for k, n in enumerate(found[i].shape) if n > 1} for i in carried}


def label_state(ctx: TraceContext, state: Tensor, symbols: Mapping[int, Tensor]) -> None:
    """Give a carried input its symbols."""
    labelled = [placed(Labelled(s << 1), state.dim(), axis) for axis, s in symbols.items()]
    ctx.set_labelled(state, labelled)


def close_state(ctx: TraceContext, out: Tensor, symbols: dict[int, Tensor]) -> None:
    """A carried output is the input of the next call: the same units at the same positions."""
    labelled = ctx.labelled(out)
    for labels in labelled:
        if len(labels.axes) != 1:
            ctx.freeze(labels, "is carried on, but not along one axis")
    for axis, own in symbols.items():
        ends = [labels for labels in labelled if labels.axes == (axis,)]
        for end in ends:
            ctx.tie(own, end.symbols.flatten())
        if not ends:
            ctx.freeze_symbols(own, "is carried over from positions that cannot be removed")


def same_states(ctx: TraceContext, leaving: dict[int, int], states: States) -> None:
    """Carried tensors of a further run have the units of those of the first."""
    known = {i: (o, symbols) for i, o, symbols in ctx.found.carried}
    for o, i in leaving.items():
        if i not in known or known[i][0] != o:
            raise TraceError(
                f"carried output {o} of {len(leaving)} is at another place among the tensors put out than in the "
                "first run (another example, or training mode); put what comes in training only behind the state"
            )
        for axis, own in states[i].items():
            other = known[i][1].get(axis)
            if other is not None and other.numel() == own.numel():
                ctx.tie(own, other)
            else:
                ctx.freeze_symbols(own, "")

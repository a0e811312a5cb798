"""Rules for operations entry by entry, and for those without a rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..labels import Layer
from .layers import PROBES, aligned, first_tensor, harmonize
from .registry import RANDOM, RULES, Context, rule


@dataclass(frozen=True)
class StandIn:
    """A tensor among the arguments of an operation whose values are not looked at.

    Attributes:
        index: which of the labelled operands it is; None for another tensor computed from the inputs.
        rank: number of its axes.
        dtype: its type.
    """

    index: int | None
    rank: int
    dtype: torch.dtype


def silencers(ctx: Context, func: Any, named: dict[str, Any], labelled: Sequence[Tensor]) -> tuple[set[int], bool]:
    """Which labelled operands alone make the result zero when they are zero, and whether all together do."""
    if func._schema.is_mutable:
        packet = getattr(torch.ops.aten, func._overloadpacket.__name__.rstrip("_"), None)
        func = getattr(packet, func._overloadname, None) if packet is not None else None
        if func is None:
            return set(), False
    values = False

    def described(value: Any) -> Any:
        """Stand-ins in place of tensors; constants and plain arguments as they are."""
        nonlocal values
        if isinstance(value, (list, tuple)):
            return tuple(described(v) for v in value)
        if not isinstance(value, Tensor):
            return value
        index = next((i for i, t in enumerate(labelled) if t is value), None)
        if index is None and not ctx.depends_on_input(value):
            values = True
            return ctx.before(value)
        return StandIn(index, value.dim(), value.dtype)

    call = tuple((key, described(value)) for key, value in named.items())
    return (probed if values else probed_once)(func, call, len(labelled))


def probed(func: Any, call: tuple[tuple[str, Any], ...], labelled: int) -> tuple[set[int], bool]:
    """`silencers`, by running the operation on zeros."""

    def result_is_zero(zeroed: set[int]) -> bool:
        """Whether zeros for these operands, and anything for the others, give zero."""
        for probe in PROBES:

            def stand_in(value: Any, probe: float = probe) -> Any:
                """One number in place of a tensor."""
                if isinstance(value, tuple):
                    return [stand_in(v) for v in value]
                if not isinstance(value, StandIn):
                    return value
                fill = 0.0 if value.index in zeroed else probe
                return torch.full((1,) * value.rank, fill, dtype=torch.float64).to(value.dtype)

            try:
                out = func(**{key: stand_in(value) for key, value in call})
            except Exception:
                return False
            out = out[0] if isinstance(out, tuple) else out
            if not isinstance(out, Tensor) or out.is_meta or bool(out.any()):
                return False
        return True

    alone = {i for i in range(labelled) if result_is_zero({i})}
    return alone, result_is_zero(set(range(labelled)))


probed_once = lru_cache(maxsize=1024)(probed)
"""`probed` for calls in which no values count: a network has few kinds of them."""


def pointwise(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Operands meet position by position, with broadcasting: tie their labels."""
    out = first_tensor(out)
    tensors: list[Tensor] = []
    for value in named.values():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, Tensor) and not any(item is t for t in tensors):
                tensors.append(item)
    operands = [(tensor, aligned(ctx.layers(tensor), out.dim())) for tensor in tensors]
    harmonize(ctx, operands, range(out.dim()), out.dim(), "operands with different or no labels meet here")
    labelled = [tensor for tensor, layers in operands if layers]
    alone, together = silencers(ctx, func, named, labelled) if labelled else (set(), False)
    groups: dict[tuple[int, ...], list[tuple[int, Layer]]] = {}
    for tensor, layers in operands:
        for layer in layers:
            index = next(i for i, t in enumerate(labelled) if t is tensor)
            groups.setdefault(layer.axes, []).append((index, layer))
    result: list[Layer | None] = []
    for members in groups.values():
        head = members[0][1]
        for _, other in members[1:]:
            ctx.unify(head, other)
        result.append(combined(head, members, alone, together, len(labelled)))
    ctx.set_layers(out, result)


POINTWISE = (
    "hardswish", "hardsigmoid", "hardtanh", "relu6", "leaky_relu", "elu", "selu", "celu", "silu", "mish", "gelu",
    "relu", "threshold", "softplus", "logsigmoid", "prelu", "_prelu_kernel", "glu_jvp", "add", "mul", "sub", "div",
    "where", "log_sigmoid_forward", "rsub", "rrelu_with_noise", "complex", "polar", "normal", "bernoulli", "poisson",
    "fake_quantize_per_tensor_affine_cachemask",
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams", "_fake_quantize_learnable_per_tensor_affine",
)  # fmt: skip
"""Pointwise operations that some releases of torch do not tag as such."""
RULES.update(dict.fromkeys(POINTWISE, pointwise))


def combined(
    head: Layer, members: Sequence[tuple[int, Layer]], alone: set[int], together: bool, operands: int
) -> Layer:
    """What is known of the silence of a pointwise result, from that of the operands sharing its labels."""
    enough = [layer for index, layer in members if index in alone]
    if enough:
        whole = next((layer for layer in enough if layer.all_silent), None)
        if whole is not None:
            return head if whole is head else head.with_silence(True, whole.sources)
        silent = enough[0].silent
        for layer in enough[1:]:
            silent = silent | layer.silent
        return head.with_silence(silent, frozenset().union(*(layer.sources for layer in enough)))
    if together and len({index for index, _ in members}) == operands:
        sources = frozenset().union(*(layer.sources for _, layer in members))
        if all(layer.all_silent for _, layer in members):
            return head.with_silence(True, sources)
        silent = members[0][1].silent
        for _, layer in members[1:]:
            silent = silent & layer.silent
        return head.with_silence(silent, sources)
    return head.with_silence(False, frozenset())


def either(ctx: Context, one: Tensor, other: Tensor) -> None:
    """Whatever reads `other` may get `one` instead: both carry the same labels, silent where both are."""
    operands = [(tensor, list(ctx.layers(tensor))) for tensor in (one, other)]
    harmonize(ctx, operands, range(other.dim()), other.dim(), "meets no such labels where the layer is left out")
    result: list[Layer | None] = []
    for layer in operands[1][1]:
        mate = next(x for x in operands[0][1] if x.axes == layer.axes)
        ctx.unify(layer, mate)
        result.append(combined(layer, [(0, mate), (1, layer)], set(), True, 2))
    ctx.set_layers(other, result)


@rule(
    "alias", "detach", "clone", "_to_copy", "lift_fresh", "contiguous", "dropout", "dropout_", "feature_dropout",
    "native_dropout", "_fused_dropout",
    "_conj", "_conj_physical", "conj_physical", "_neg_view", "resolve_conj", "resolve_neg",
)  # fmt: skip
def same(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Every element stays where it is."""
    source = next(value for value in named.values() if isinstance(value, Tensor))
    ctx.set_layers(first_tensor(out), ctx.layers(source))


@rule(*RANDOM)
def noise(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """Random values for as many positions: those of a unit go with it, though others are then drawn for the rest."""
    ctx.set_layers(out, [layer.with_silence(False, frozenset()) for layer in ctx.layers(named["self"])])


def unknown(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """No rule: freeze whatever enters. Never guess."""
    for value in named.values():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, Tensor):
                for layer in ctx.layers(item):
                    ctx.freeze(layer, "has no rule, so what enters it is kept")

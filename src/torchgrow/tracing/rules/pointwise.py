"""Rules for pointwise operations, and for operations without a rule."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import and_, or_
from typing import Any

import torch
from torch import Tensor

from ..labels import Labelled
from .labelled import PROBES, aligned, first_tensor, freeze_all, harmonize
from .registry import RANDOM, RULES, Context, rule


@dataclass(frozen=True)
class StandIn:
    """An argument tensor whose values are not used."""

    index: int | None  # which of the labelled operands it is; None for another tensor computed from the inputs
    rank: int  # number of its axes
    dtype: torch.dtype  # its type


def zero_if(ctx: Context, func: Any, named: dict[str, Any], carriers: Sequence[Tensor]) -> tuple[set[int], bool]:
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
        index = next((i for i, t in enumerate(carriers) if t is value), None)
        if index is None and not ctx.depends_on_input(value):
            values = True
            return ctx.before(value)
        return StandIn(index, value.dim(), value.dtype)

    call = tuple((key, described(value)) for key, value in named.items())
    return (probed if values else probed_once)(func, call, len(carriers))


def probed(func: Any, call: tuple[tuple[str, Any], ...], carriers: int) -> tuple[set[int], bool]:
    """`zero_if`, by running the operation on zeros."""

    def result_is_zero(zeroed: set[int]) -> bool:
        """Whether zeros for these operands and any values for the others give zero."""
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

    alone = {i for i in range(carriers) if result_is_zero({i})}
    return alone, result_is_zero(set(range(carriers)))


probed_once = lru_cache(maxsize=1024)(probed)
"""`probed`, cached, for calls that do not depend on values: a network has few kinds of them."""


def pointwise(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Operands meet position by position, with broadcasting: tie their labels."""
    out = first_tensor(out)
    tensors: list[Tensor] = []
    for value in named.values():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, Tensor) and not any(item is t for t in tensors):
                tensors.append(item)
    operands = [(tensor, aligned(ctx.labelled(tensor), out.dim())) for tensor in tensors]
    harmonize(ctx, operands, range(out.dim()), out.dim(), "operands with different or no labels meet here")
    carriers = [tensor for tensor, labelled in operands if labelled]
    alone, together = zero_if(ctx, func, named, carriers) if carriers else (set(), False)
    ctx.set_labelled(out, joined(ctx, [labelled for _, labelled in operands if labelled], alone, together))


POINTWISE = (
    "hardswish", "hardsigmoid", "hardtanh", "relu6", "leaky_relu", "elu", "selu", "celu", "silu", "mish", "gelu",
    "relu", "threshold", "softplus", "logsigmoid", "prelu", "_prelu_kernel", "glu_jvp", "add", "mul", "sub", "div",
    "where", "log_sigmoid_forward", "rsub", "rrelu_with_noise", "complex", "polar", "normal", "bernoulli", "poisson",
    "fake_quantize_per_tensor_affine_cachemask",
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams", "_fake_quantize_learnable_per_tensor_affine",
)  # fmt: skip
"""Pointwise operations that some releases of torch do not tag as such."""
RULES.update(dict.fromkeys(POINTWISE, pointwise))


def joined(
    ctx: Context, operands: Sequence[Sequence[Labelled]], alone: AbstractSet[int] = frozenset(), together: bool = True
) -> list[Labelled]:
    """Tie the labels of operands that meet position by position; those of the result, one for every set of axes."""
    groups: dict[tuple[int, ...], list[tuple[int, Labelled]]] = {}
    for index, labelled in enumerate(operands):
        for labels in labelled:
            groups.setdefault(labels.axes, []).append((index, labels))
    for members in groups.values():
        for _, other in members[1:]:
            ctx.unify(members[0][1], other)
    return [combined(members[0][1], members, len(operands), alone, together) for members in groups.values()]


def combined(
    head: Labelled,
    members: Sequence[tuple[int, Labelled]],
    operands: int,
    alone: AbstractSet[int] = frozenset(),
    together: bool = True,
) -> Labelled:
    """Where a pointwise result is zero with its sources, from the operands that share its labels."""
    enough = [labels for index, labels in members if index in alone]
    if enough:
        whole = next((labels for labels in enough if labels.all_zero), None)
        if whole is not None:
            return head if whole is head else head.with_zeros(True, whole.sources)
        zero = reduce(or_, (labels.zero for labels in enough))
        return head.with_zeros(zero, frozenset().union(*(labels.sources for labels in enough)))
    if together and len({index for index, _ in members}) == operands:
        sources = frozenset().union(*(labels.sources for _, labels in members))
        if all(labels.all_zero for _, labels in members):
            return head.with_zeros(True, sources)
        return head.with_zeros(reduce(and_, (labels.zero for _, labels in members)), sources)
    return head.with_zeros(False)


def either(ctx: Context, one: Tensor, other: Tensor) -> None:
    """Whatever reads `other` may get `one` instead: both carry the same labels, zero where both are."""
    operands = [(tensor, list(ctx.labelled(tensor))) for tensor in (one, other)]
    harmonize(ctx, operands, range(other.dim()), other.dim(), "meets no such labels where the layer is left out")
    result: list[Labelled | None] = []
    for labels in operands[1][1]:
        mate = next(x for x in operands[0][1] if x.axes == labels.axes)
        ctx.unify(labels, mate)
        result.append(combined(labels, [(0, mate), (1, labels)], 2))
    ctx.set_labelled(other, result)


@rule(
    "alias", "detach", "clone", "_to_copy", "lift_fresh", "contiguous", "dropout", "dropout_", "feature_dropout",
    "native_dropout", "_fused_dropout",
    "_conj", "_conj_physical", "conj_physical", "_neg_view", "resolve_conj", "resolve_neg",
)  # fmt: skip
def same(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """Every element stays where it is."""
    source = next(value for value in named.values() if isinstance(value, Tensor))
    ctx.set_labelled(first_tensor(out), ctx.labelled(source))


@rule(*RANDOM)
def noise(ctx: Context, func: Any, named: dict[str, Any], out: Tensor) -> None:
    """Random values of the same shape: a unit's values go with it, though the rest is then drawn differently."""
    ctx.set_labelled(out, [labels.with_zeros(False) for labels in ctx.labelled(named["self"])])


def unknown(ctx: Context, func: Any, named: dict[str, Any], out: Any) -> None:
    """No rule: freeze whatever enters. Never guess."""
    for value in named.values():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, Tensor):
                freeze_all(ctx, ctx.labelled(item), "has no rule, so what enters it is kept")

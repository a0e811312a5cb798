"""Shapes of the results of costly operations, so that tracing need not compute them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


def _convolved(
    x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, *rest: Any
) -> tuple[int, ...] | None:
    """Shape of a convolution's result, if it is laid out in memory as it is named and the shapes fit."""
    fits = x.dim() == weight.dim() and x.shape[1] == weight.shape[1] * rest[1]
    if transposed or not fits or not x.is_contiguous() or not weight.is_contiguous():
        return None
    sides = [
        (size + 2 * pad - step * (kernel - 1) - 1) // by + 1
        for size, kernel, by, pad, step in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
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

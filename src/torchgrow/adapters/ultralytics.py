"""Adapters for ultralytics: YOLO's attention for any number of heads, from its own forward (see `inferred_sizes`)."""

from __future__ import annotations

from ultralytics.nn.modules.block import Attention as AttentionBase

from .inferred_sizes import inferring
from .registry import adapter


@adapter(AttentionBase)
class Attention(AttentionBase):  # type: ignore[misc]
    """Attention of C2PSA and PSA, whose own forward takes the width of all heads from the width of its input."""

    forward = inferring(AttentionBase.forward)

"""Training losses that a run is told, for policies that judge by them."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor

from ..distributed import Ranks
from ..errors import TorchgrowError
from ..policies import Policy
from .run_state import RunState

DIVERGED = 1e30
"""Stands for a loss that is not finite: worse than any other, and it can be stored and averaged."""


def observe(policy: Policy, state: RunState, loss: Any) -> None:
    """Note the training loss of a step, if the policy asks for it.

    Raises:
        TorchgrowError: it is no single number.
    """
    wrong = loss.numel() != 1 if isinstance(loss, Tensor) else isinstance(loss, bool) or not isinstance(loss, Real)
    if wrong:
        found = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TorchgrowError(
            f"observe takes the training loss of a step, one number, got {found}; call grower.observe(loss) with "
            "what loss.backward() was called on"
        )
    if policy.observes and not state.finished:
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        state.losses.append(value if math.isfinite(value) else DIVERGED)


def observed(policy: Policy, state: RunState, ranks: Ranks) -> tuple[float, ...]:
    """Training losses since the last update, means over all ranks, which call it; none where the policy asks for none.

    Raises:
        TorchgrowError: it asks, and none was observed, or not equally many on all ranks.
    """
    if not policy.observes:
        return ()
    found = ranks.gather(state.losses)
    numbers = [len(losses) for losses in found]
    if len({*numbers}) > 1:
        raise TorchgrowError(
            f"the ranks observed different numbers of losses since the last update, {numbers}; call "
            "grower.observe(loss) on every rank after every optimizer step. Nothing was changed"
        )
    if not found[0]:
        raise TorchgrowError(
            f"{type(policy).__name__} judges by training losses, and none was observed since the last update; call "
            "grower.observe(loss) after every optimizer.step(), before update(). In the Trainer of transformers set "
            "logging_steps=1; in Lightning return the loss from training_step. Nothing was changed"
        )
    return tuple(sum(losses) / len(found) for losses in zip(*found, strict=True))

"""A learning rate that suits growing and searching: warm up, stay, decay."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import TorchgrowError


def warmup_stable_decay(steps: int, *, warmup: float = 0.0, decay: float = 0.3) -> Callable[[int], float]:
    """What the learning rate is multiplied by at each step: up from 0 in a line, constant, down to 0 in a line.

    For any optimizer: `torch.optim.lr_scheduler.LambdaLR(optimizer, torchgrow.warmup_stable_decay(1000))`, stepped
    after every optimizer step. In the constant phase a network may grow, and shapes be compared by their training loss.
    Source: MiniCPM (arXiv 2404.06395), section 4, with a linear decay.

    Args:
        steps: optimizer steps of the whole training.
        warmup: share of them in which it rises, in [0, 1).
        decay: share of them in which it falls, above 0 and at most 1 - warmup.

    Raises:
        TorchgrowError: a number lies outside.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise TorchgrowError(f"steps={steps!r} must be a whole number >= 1: the optimizer steps of the whole training")
    if not 0 <= warmup < 1 or not decay > 0 or warmup + decay > 1 + 1e-9:  # 0.9 and 0.1 are 1 and a little
        raise TorchgrowError(
            f"warmup={warmup!r} must lie in [0, 1) and decay={decay!r} above 0 and at most at 1 - warmup: shares of "
            "the training"
        )
    rising = min(round(warmup * steps), steps - 1)
    falling = max(1, min(round(decay * steps), steps - rising))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return max(0.0, min(1.0, (steps - step) / falling))

    return factor

"""The paper's schedule in fewer steps. Its constants belong to 160 epochs of 390 steps, with an update per epoch.

In units of progress (0 to 1 over a run of T updates with S steps each) the schedule stays the same:

- s: an update stands for an epoch, so a step moves the indicators as far as k = 390 / S of the paper's do: as k steps
  of SGD with the gradient recomputed in each, since it is far from constant while a gate opens. The rate of s is what
  scales, lambda stays as it is: it weighs the penalty against the task, and both act k times as long. Not further where
  updates are fewer: between two of them lambda cannot see what it has done.
- beta is multiplied by gamma = h^(1/T) in an update, h = `final_inverse_temperature`, so by h over any run.
- draws: one stands for d = 160 / T of the paper's, so that at the start a unit comes with probability 1 - (1 - m)^d.

With 160 updates the schedule is the same in any number of steps; with fewer it is approximate.
Longer runs keep the constants (k = d = 1), as the paper's own of 200 epochs do. Its runs on ImageNet, of 90 updates,
have the same constants too: for these take `paced=False`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .kit import places, pools, within
from .policy import View

UPDATES, STEPS = 160, 390
"""Of the paper's shortest runs: epochs, and steps in each."""

LIVING = 0.99
"""Probability of a unit that a run begins with."""


def pace(steps: int) -> float:
    """For how many of the paper's one step stands where an update has so many of them; at least 1."""
    return max(1.0, STEPS / max(1, steps))


def starts(view: View, power: float, paced: bool) -> Tensor:
    """Indicators to begin with, float64 [n]: sigma(s) = size^-power in a group (of layers: stage) of that size.

    Args:
        view: the run.
        power: 1 for one unit expected in every group, 0 for half of each; no probability is above a half.
        paced: whether a draw stands for several of the paper's in a short run. It does so only as far as the budget
            holds: within a draw no penalty could stop the growth.
    """
    first = torch.zeros(view.space.n_units, dtype=torch.float64)
    for pool in pools(view.space):
        first[pool] = min(0.5, pool.numel() ** -power)
    if not paced or view.updates >= UPDATES:
        return _living(view, torch.logit(first))
    after = torch.log1p(-places(view.space)) / torch.log1p(-first)  # the draw in which a unit is expected to enter
    full = within(view, after, view.limits)[1]
    draws = min(UPDATES / view.updates, max(1.0, full))
    return _living(view, torch.logit(-torch.expm1(draws * torch.log1p(-first))))


def _living(view: View, indicators: Tensor) -> Tensor:
    """Indicators for a given start: each of its units is drawn with probability `LIVING`."""
    return indicators if view.start is None else torch.where(view.start, math.log(LIVING / (1 - LIVING)), indicators)

"""Search among shapes inside one run, top to bottom: they take turns, the worse half leaves, the best one stays.

The live network has one candidate's structure after the other. All are exactly at the budget and share their weights,
which wait in the bank while another candidate trains. Judged is by the mean training loss (successive halving:
Jamieson and Talwalkar, AISTATS 2016; shared weights: Pham et al., *ENAS*, ICML 2018).
"""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import TorchgrowError
from .policy import Policy, View
from .shapes import structures


class Span(NamedTuple):
    """What lives from one update to the next.

    Attributes:
        rung: counted from 0; -1 while nothing is judged.
        turn: of the rung, counted from 0; a turn lasts one span or more.
        place: among the candidates that are left.
    """

    rung: int
    turn: int
    place: int


@dataclass(eq=False)
class Search(Policy):
    """Shapes in turns, judged by the training losses that `Grower.observe` is told.

    In every rung each candidate that is left has the same share of the updates, in turns there, back, back and there
    (A B C  C B A  C B A  A B C), so that a loss that falls in a line treats all alike, and one that falls in a curve
    nearly so. Then the worse half goes. The winner trains on from its weights in the bank. Keep the learning rate
    constant until then.

    Attributes:
        until: share of the updates after which the search ends.
        candidates: how many shapes are tried; fewer where the model has no more, or the updates are too few.
        warmup: share of the updates in which they take turns before any is judged: at first the loss falls too fast.
        passes: turns of each candidate in a rung, an even number; 2 where the updates are too few.
        skip: share of the losses of each turn, the first ones, that do not count: a shape that has just come back
            has to find its way in weights that others have trained.
        left: numbers of the candidates that are still in the race.
        losses: by the name of a candidate, its mean loss in every rung it was in.
    """

    until: float = 0.5
    candidates: int = 6
    warmup: float = 0.1
    passes: int = 4
    skip: float = 0.25

    def __post_init__(self) -> None:
        self.check(until=(0, 1), candidates=(2, 1000), warmup=(0, 1), skip=(0, 0.9))
        if self.passes not in (2, 4, 8, 16):
            raise TorchgrowError(f"Search(passes={self.passes!r}): passes must be 2, 4, 8 or 16")

    @property
    def observes(self) -> bool:  # type: ignore[override]
        """Until the search is over."""
        return len(self.left) > 1

    def seed(self, view: View) -> Tensor:
        """The first candidate.

        Raises:
            TorchgrowError: the run has a start, the model one shape only, or the updates are too few for two.
        """
        if view.start is not None:
            raise TorchgrowError(
                "Search begins with shapes of its own; with start= give policy=torchgrow.policies.Shrink(), Late() or "
                "Default(), or search without it"
            )
        found = list(itertools.islice(structures(view), self.candidates))
        if len(found) < 2:
            raise TorchgrowError(
                "this model has one shape at this budget, so that there is nothing to search: give it layers that may "
                'be left out (depth=True) or several groups, or use preset="default"'
            )
        count, self._spans = self._fitting(len(found), view.updates)
        self._names, self._keeps = [name for name, _ in found[:count]], [keep for _, keep in found[:count]]
        self.left, self.losses = list(range(count)), {name: list[float]() for name in self._names}
        self.heard, self.sums = list[float](), torch.zeros(count, dtype=torch.float64)
        return self._live(0)

    def update(self, view: View) -> tuple[Tensor, bool]:
        """The next candidate; after the last turn the best one."""
        if view.update <= len(self._spans):
            self._listen(view.update - 1, view.losses)
        return self._live(view.update), True

    def planned(self, view: View) -> Tensor:
        """The budget, all the time."""
        return view.limits

    def final(self, updates: int) -> int:
        """The update at which the best one stays."""
        return len(self._spans)

    def check_state(self, state: dict[str, Any], events: int) -> str:
        """Candidates that are none."""
        left, losses = state["left"], state["losses"]
        fine = all(type(one) is int and 0 <= one < len(self._keeps) for one in left) and left == sorted({*left})
        fine = fine and len(left) == self._left_after(events - 1) and losses.keys() == self.losses.keys()
        return "" if fine else f"left must be {self._left_after(events - 1)} of {len(self._keeps)} candidates, rising"

    # --- how it is done ---

    def _live(self, span: int) -> Tensor:
        """The structure that lives in a span."""
        place = self._spans[span].place if span < len(self._spans) else 0
        return self._keeps[self.left[place]]

    def _listen(self, number: int, losses: tuple[float, ...]) -> None:
        """Count the losses of a span; at the end of a rung the worse half leaves."""
        span, after = self._spans[number], self._spans[number + 1] if number + 1 < len(self._spans) else None
        self.heard += losses
        if after is None or after[:2] != span[:2]:  # its turn is over
            judged = self.heard[int(self.skip * len(self.heard)) :]
            self.sums[self.left[span.place]] += sum(judged) / len(judged)
            self.heard = []
        if after is None or after.rung != span.rung:
            turns = (span.turn + 1) // len(self.left)
            for one in self.left if span.rung >= 0 else ():
                self.losses[self._names[one]].append(float(self.sums[one]) / turns)
            order = sorted(self.left, key=lambda one: (float(self.sums[one]), one))
            self.left = sorted(order[: (len(order) + 1) // 2]) if span.rung >= 0 else self.left
            self.sums = torch.zeros_like(self.sums)

    def _left_after(self, updates: int) -> int:
        """How many candidates are left after so many updates."""
        over = len({span.rung for span in self._spans[:updates]} - {-1})
        over -= 0 < updates < len(self._spans) and self._spans[updates].rung == self._spans[updates - 1].rung >= 0
        return _sizes(len(self._keeps))[over]

    def _fitting(self, most: int, updates: int) -> tuple[int, list[Span]]:
        """As many candidates as the updates are enough for, at most `most`, and what lives when.

        Warns:
            UserWarning: not all fit.
        """
        for count in range(most, 1, -1):
            spans = self._planned(count, updates)
            if spans and count < most:
                warnings.warn(
                    f"Search tries {count} of {most} shapes, as updates={updates} leaves no turn there and back for "
                    f"more; for all call update() more often, as after every few steps: Grower(..., updates="
                    f"{self._enough(most)})",
                    stacklevel=2,
                )
            if spans:
                return count, spans
        raise TorchgrowError(
            f"updates={updates} is too few for Search to try two shapes; call update() more often, as after every few "
            f"steps: Grower(..., updates={self._enough(most)}) has room for {most}"
        )

    def _enough(self, count: int) -> int:
        """The fewest updates that so many candidates need."""
        return next((updates for updates in itertools.count(2) if self._planned(count, updates)), 0)

    def _planned(self, count: int, updates: int) -> list[Span]:
        """What lives from update to update until the search is over; empty where there is no room for it."""
        first, end = int(self.warmup * updates), min(updates - 1, int(self.until * updates))
        spans = [Span(-1, number * count // first, number * count // first) for number in range(first)]
        sizes = _sizes(count)[:-1]
        for rung, size in enumerate(sizes):
            room = first + (end - first) * (rung + 1) // len(sizes) - len(spans)
            order = _turns(size, self.passes if room >= self.passes * size else 2)
            each = room // len(order)
            if each < 1:
                return []
            spans += [Span(rung, turn, place) for turn, place in enumerate(order) for _ in range(each)]
        return spans


def _turns(count: int, passes: int) -> list[int]:
    """Places in the order of their turns: there or back as the sequence of Thue and Morse says, + - - + - + + -."""
    there = list(range(count))
    return [place for number in range(passes) for place in (there[::-1] if number.bit_count() % 2 else there)]


def _sizes(count: int) -> list[int]:
    """How many candidates are left after 0, 1, 2 ... rungs."""
    halvings = math.ceil(math.log2(count))
    return [math.ceil(count / 2**rung) for rung in range(halvings + 1)]

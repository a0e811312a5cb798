"""What a network is judged by on data it was not trained on: accuracy of images, mIoU of masks, perplexity of text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

VOID = -100
"""A label that is neither learned nor judged, as PyTorch's losses have it (`ignore_index`)."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that says how good a network is.

    Attributes:
        name: the field that holds it in records and results.
        on: what it is measured on after every epoch.
        unit: what to write behind it.
        lower_is_better: which way is good.
    """

    name: str
    on: str
    unit: str
    lower_is_better: bool

    def show(self, value: float) -> str:
        """A value with two digits and its unit."""
        return f"{value:.2f}{self.unit}"


ACCURACY = Metric(name="accuracy", on="test", unit=" %", lower_is_better=False)
MIOU = Metric(name="miou", on="validation", unit=" %", lower_is_better=False)
PERPLEXITY = Metric(name="perplexity", on="validation", unit="", lower_is_better=True)


def metric_of(record: Mapping[str, Any]) -> Metric:
    """The metric that a record of an epoch, or a result, holds."""
    return next((metric for metric in (PERPLEXITY, MIOU) if record.get(metric.name) is not None), ACCURACY)


def scores_of(model: nn.Module, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """Scores of shape ``[predictions, classes]``, and the state to go on with, detached."""
    out = model(x) if state is None else model(x, state)
    out = getattr(out, "logits", out)  # of transformers, and of networks with classifiers on the way
    scores, state = out if isinstance(out, tuple) else (out, None)
    if scores.dim() == 4:  # [N, classes, H, W], as masks are predicted
        scores = scores.movedim(1, -1)
    return scores.flatten(0, -2), None if state is None else tree_map(Tensor.detach, state)


def confusion(guesses: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How many pixels of every class (rows) were taken for which (columns), int64 ``[classes, classes]``.

    Args:
        guesses: classes, int64, any shape.
        labels: of the same shape; what is `VOID` is not counted.
        classes: how many there are.
    """
    known = labels != VOID
    pairs = classes * labels[known] + guesses[known]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def miou(counts: Tensor) -> float:
    """Mean intersection over union, in percent (Everingham et al., 2010).

    The mean is over the classes that occur in the labels; what is wrongly taken for another one counts against the
    class that it is of.

    Args:
        counts: of the whole set, as `confusion` gives them.
    """
    right, there = counts.diag(), counts.sum(1)
    union = there + counts.sum(0) - right
    return 100 * float((right.double() / union)[there > 0].mean())

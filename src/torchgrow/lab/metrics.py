"""What a network is judged by on data it was not trained on: accuracy of images, perplexity of text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
PERPLEXITY = Metric(name="perplexity", on="validation", unit="", lower_is_better=True)


def metric_of(record: Mapping[str, Any]) -> Metric:
    """The metric that a record of an epoch, or a result, holds."""
    return PERPLEXITY if record.get("perplexity") is not None else ACCURACY

"""Policies decide which units live. The grower applies the decision and keeps the budget."""

from . import importance, kit
from .default import Default
from .late import Late
from .method import policy_of
from .named import named
from .paper import Paper
from .policy import Policy, View
from .random import Random
from .shapes import Shape
from .shrink import Shrink

__all__ = [
    "Default",
    "Late",
    "Paper",
    "Policy",
    "Random",
    "Shape",
    "Shrink",
    "View",
    "importance",
    "kit",
    "named",
    "policy_of",
]

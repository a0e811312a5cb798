"""Policies decide which units live. The grower applies the decision and keeps the budget."""

from ..renamed import rename_settings
from . import importance, kit
from .combined import policy_of
from .default import Default
from .late import Late
from .named import named
from .paper import Paper
from .policy import Policy, View
from .random import Random
from .search import Search
from .shapes import Shape
from .shrink import Shrink

rename_settings(Paper, heat="final_inverse_temperature")

__all__ = [
    "Default",
    "Late",
    "Paper",
    "Policy",
    "Random",
    "Search",
    "Shape",
    "Shrink",
    "View",
    "importance",
    "kit",
    "named",
    "policy_of",
]

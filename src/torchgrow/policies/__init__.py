"""Policies: what decides which units live. The grower makes it so, and keeps the budget."""

from . import importance, kit
from .combined import policy_of
from .default import Default
from .named import named
from .paper import Paper
from .policy import Policy, View
from .random import Random
from .shrink import Shrink

__all__ = [
    "Default",
    "Paper",
    "Policy",
    "Random",
    "Shrink",
    "View",
    "importance",
    "kit",
    "named",
    "policy_of",
]

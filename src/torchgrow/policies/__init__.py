"""Policies: what decides which units live. The grower makes it so, and keeps the budget."""

from . import kit
from .combined import policy_of
from .default import Default
from .paper import Paper
from .policy import Policy, View
from .random import Random

__all__ = ["Default", "Paper", "Policy", "Random", "View", "kit", "policy_of"]

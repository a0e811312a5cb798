"""The table of rules: how labels pass through every kind of operation, and what a rule may use (`Context`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from ..labels import Labelled


class Context(Protocol):
    """What a rule may do; implemented by the tracer."""

    def labelled(self, tensor: Tensor | None) -> list[Labelled]:
        """Labels of a tensor, every symbol by its root ([] for None, inputs and constants)."""

    def set_labelled(self, tensor: Tensor, labelled: Sequence[Labelled | None]) -> None:
        """Give an output its labels."""

    def unify(self, a: Labelled, b: Labelled) -> None:
        """Tie labels to labels, position by position (shapes broadcast)."""

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Tie two tensors of symbols entry by entry."""

    def freeze(self, labels: Labelled, reason: str) -> None:
        """Never remove anything of these labels; an empty reason goes unrecorded."""

    def without_axis(self, labels: Labelled, axis: int, reason: str) -> Labelled | None:
        """The labels made constant along `axis`: merged if they vary elsewhere too, else frozen (None)."""

    def freeze_if_used(self, out: Tensor, labels: Labelled, reason: str) -> None:
        """Freeze as soon as anything reads `out`; an unused result freezes nothing."""

    def read(self, produced: Labelled | None, weight: Labelled) -> None:
        """Note that a contraction reads `produced` through the columns `weight`."""

    def flop(self, constant: int, *counted: Labelled | int) -> None:
        """Count FLOPs: a constant times the live positions of all labels given (or a plain size)."""

    def count(self, owner: Tensor, attribute: str, symbols: Tensor) -> None:
        """Note that an int attribute of the module owning a parameter counts `symbols`."""

    def owned(self, labels: Labelled) -> bool:
        """Whether any of their symbols belongs to a parameter or a carried state."""

    def follows(self, labels: Labelled) -> bool:
        """Whether they have met only followers so far."""

    def follower(self, size: int, *, zeros: bool = False) -> Labelled:
        """New labels along one axis of no fixed size: as many positions as those they are tied to.

        Those of `zeros` must meet units that something else than these produces.
        """

    def constant_along(self, tensor: Tensor, axis: int) -> bool:
        """Whether an unlabelled tensor has the same values all along an axis, whatever the inputs are."""

    def before(self, tensor: Tensor) -> Tensor:
        """A tensor as it was before an operation wrote to it in place, if it was unlabelled and the same everywhere."""

    def zero(self, tensor: Tensor) -> bool:
        """Whether an unlabelled tensor holds (held, if it is written to in place) only zeros, whatever the inputs."""

    def filled(self, tensor: Tensor) -> bool:
        """Whether a tensor was made with one value everywhere, and since then written to by `copy_` at most."""

    def depends_on_input(self, tensor: Tensor) -> bool:
        """Whether a tensor was computed from the model's inputs."""

    def held(self) -> tuple[list[tuple[int, ...]], bool]:
        """Sizes that attributes of the running modules hold: single ones, and those of lists and tuples.

        Also whether to be careful, since the proof has failed on an earlier cut at this place.
        """

    def part(self, pieces: Sequence[Tensor]) -> None:
        """Note symbols of the pieces into which an axis is cut at places that attributes may hold."""

    def turned(self) -> bool:
        """Whether an operation keeps its second choice of labels: nothing could go of what it `disputed` before."""

    def disputed(self, kept: Sequence[Labelled]) -> None:
        """Note labels that an operation keeps at the cost of others."""

    def split_view(self, labels: Labelled) -> None:
        """Note labels that vary along several axes of a view: their live positions must form a box."""


Rule = Callable[[Context, Any, dict[str, Any], Any], None]

RULES: dict[str, Rule] = {}

MODULE_RULES: dict[type, Rule] = {}
"""Modules that are traced as one operation."""

COUNTED: set[Rule] = set()
"""Rules that count FLOPs or make labels, and so must run even without any."""


def rule(*names: str, counted: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operations by name."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        if counted:
            COUNTED.add(function)
        return function

    return register


def module_rule(*kinds: type) -> Callable[[Rule], Rule]:
    """Register a rule for whole modules of these classes (not of their subclasses).

    The rule is called as `rule(context, module, named, output)`, `named` being the arguments of `forward`.
    """

    def register(function: Rule) -> Rule:
        MODULE_RULES.update(dict.fromkeys(kinds, function))
        return function

    return register


RANDOM = (
    "rand_like", "randn_like", "randint_like", "normal_", "uniform_", "exponential_", "random_", "bernoulli_",
    "cauchy_", "geometric_", "log_normal_", "normal_functional",
)  # fmt: skip

CONSTANT = frozenset(
    {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"}
)
"""New tensors that do not depend on the values of the tensor they are made from."""

FILLED = CONSTANT | {"zeros", "ones", "full", "empty"}
"""Operations that make tensors of one value (or uninitialised ones)."""

"""The interface of policies, and the view of a run that they get."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import TorchgrowError
from ..persistence.plain_data import no_data, simple
from ..structure.cost import CostModel
from ..structure.space import Space

RECORDED = {"final_inverse_temperature": "heat"}
"""Settings that states and results rows store under an earlier name."""

NEWBORNS = ("fresh", "silent")
"""How units may enter; see `Policy.newborns`."""


@dataclass(frozen=True)
class View:
    """A read-only view of a run for policies; a new one for every call.

    Attributes:
        space: the units of the frame, n of them.
        costs: what structures cost; `cost` is the short way.
        limits: the budget, int64 [2]: parameters and FLOPs; what is not limited is the largest int64.
        update: number of the present update, or of the last one; 0 is the seed.
        updates: how many there will be.
        keep: the live units, bool [n].
        rate: present over full learning rate of the weights; above 1 only in steps of larger batches.
        generator: the only source of random numbers that ranks share and checkpoints keep.
        start: bool [n], the structure that the run begins with, where the user said so; None: `seed` chooses it.
        weights: gives the parameters at their live size, by name, without the gates folded into them; only to read.
    """

    space: Space
    costs: CostModel
    limits: Tensor
    update: int
    updates: int
    keep: Tensor
    rate: float
    generator: torch.Generator
    start: Tensor | None = None
    weights: Callable[[], Mapping[str, Tensor]] = dict

    def cost(self, keep: Tensor) -> Tensor:
        """Parameters and FLOPs of a structure (bool [n]), int64 [2]."""
        return self.costs.both(self.costs.live(keep))


class Policy(ABC):
    """Decides which units live; a base class whose defaults suit most policies.

    Of your own you need `seed` and `update`. Settings are dataclass fields; they must be the same when a run is
    resumed. What changes in the run goes into further attributes, set first in `seed`: tensors, numbers, text, and
    lists or dicts of them. Checkpoints keep those, ranks compare them, and an update that fails takes them back.
    A policy touches neither model nor optimizer: the grower applies its structure and keeps the budget.

    Attributes:
        gate: what present units are scaled by (m of Eq 1), float64 [n] in (0, 1]; None: they count in full, and
            nothing is folded into the weights.
        sensitive: whether `step` is given the sensitivity, which costs a little in every optimizer step.
        newborns: how units enter that were never live: "fresh", with their initial weights; "silent", with weights of 0
            where they are read (a layer: with its last ones), so that outputs stay, if they learn so: `Space.columns`.
        multiples: multiples at which widths are held when the grower trims or fills up, int64 [groups]; None: any.
        pressure: a number for the history: lambda of Eq 4.
        temperature: numbers for the history, float64 [n]: beta of Eq 7; None where there is none.
    """

    gate: Tensor | None = None
    sensitive: ClassVar[bool] = False
    newborns: str = "fresh"
    multiples: Tensor | None = None
    pressure: float = 0.0
    temperature: Tensor | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse (`TorchgrowError`) settings that hide a method, such as `settings`."""
        super().__init_subclass__(**kwargs)
        for name in inspect.get_annotations(cls):
            if callable(getattr(Policy, name, None)):
                raise TorchgrowError(f"{cls.__name__}.{name} hides Policy.{name}(); give that setting another name")

    @abstractmethod
    def seed(self, view: View) -> Tensor:
        """The structure to begin with, bool [n]; called once, at the start.

        Where `view.start` is given, the run begins with that one, whatever is returned.
        """

    @abstractmethod
    def update(self, view: View) -> tuple[Tensor, bool]:
        """The structure wanted now (bool [n]), and whether the grower shall bring it exactly to the budget.

        What cannot be removed and one unit of every group stay in any case, and from update T-1 on the structure is
        exactly at the budget, whatever is returned.
        """

    def applied(self, view: View) -> None:  # noqa: B027 - for those that need it
        """Called after `seed` and every `update`; `view.keep` is the new structure."""

    def step(self, view: View, sensitivity: Tensor) -> None:  # noqa: B027 - for those that need it
        """Called after every optimizer step if the policy is `sensitive`.

        Args:
            view: the run.
            sensitivity: m dL/dm of every unit, float64 [n]; 0 for absent ones.
        """

    def score(self, view: View) -> Tensor:
        """Priority of units when the grower trims or fills up to the budget, float [n]; by default the live ones."""
        return view.keep.double()

    def target(self, view: View) -> Tensor | None:
        """A structure of about the widths that the run will end with, bool [n]: fresh weights are scaled for it.

        Asked once, after `seed`. None: the same share of every group and stage, at the budget.
        """
        return None

    def planned(self, view: View) -> Tensor | None:
        """Cost planned for `view.update`, int64 [2]; None where nothing is planned. For summaries only."""
        return None

    def final(self, updates: int) -> int:
        """The last update that changes the structure."""
        return max(1, updates - 1)

    def check(self, **allowed: tuple[Any, ...]) -> None:
        """Refuse settings: of numbers the least and the most are given, of text and flags the choices.

        A scalar of NumPy becomes a number; None passes where it is the default.

        Raises:
            TorchgrowError: one lies outside; the message names it.
        """
        for name, given in allowed.items():
            value, choices = getattr(self, name), isinstance(given[0], (str, bool))
            if isinstance(value, np.generic):
                value = value.item()
                setattr(self, name, value)
            if value is None and getattr(type(self), name, given) is None:
                continue
            alike = isinstance(value, type(given[0]) if choices else (int, float))
            fits = alike and (value in given if choices else given[0] <= value <= given[1])
            if not fits:
                wanted = f"be one of {given}" if choices else f"lie in [{given[0]}, {given[1]}]"
                raise TorchgrowError(f"{type(self).__name__}({name}={value!r}): {name} must {wanted}")

    # --- called by the grower ---

    def settings(self) -> dict[str, Any]:
        """Its dataclass fields by name, as plain data: what a run that is resumed is compared by.

        Raises:
            TorchgrowError: one is no plain data.
        """
        found = dict[str, Any]()
        names: list[str] = [field.name for field in fields(self)] if is_dataclass(self) else []
        for name, value in ((name, getattr(self, name, None)) for name in names):
            try:
                found[name] = simple(value)
            except ValueError:
                raise TorchgrowError(
                    f"{type(self).__name__}.{name} is a setting, {str(value)[:60]} ({type(value).__name__}), that no "
                    "checkpoint could be compared by; settings are numbers (not NaN), text, None, and lists and dicts "
                    "of them: write a tensor as a list, an enum or a function as its name, and what is made in the run "
                    f"into another attribute, first set in seed. Nothing was changed"
                ) from None
        return found

    def state_dict(self) -> dict[str, Any]:
        """What changes in a run, as copies: all attributes but the settings and those that begin with "_".

        Raises:
            TorchgrowError: an attribute is no data.
        """
        own = self.settings()
        state = {key: _copy(v) for key, v in vars(self).items() if key not in own and not key.startswith("_")}
        for key, value in state.items():
            if odd := no_data(value, f"{type(self).__name__}.{key}"):
                raise TorchgrowError(
                    f"{odd}, which a checkpoint could not keep; hold tensors, numbers of Python (x.item()), text, and "
                    f"lists and dicts by text of them there, or name it _{key} if it is made anew in seed and never "
                    "changes"
                )
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a `state_dict`, which has been checked to have the same kinds and shapes."""
        vars(self).update({key: _copy(value) for key, value in state.items()})

    def check_state(self, state: dict[str, Any], events: int) -> str:
        """The error text for a state after so many events; "" if it is valid."""
        return ""

    def copied(self) -> Policy:
        """A policy that may change while this one stays."""
        other = copy.copy(self)
        vars(other).update({key: _copy(value) for key, value in vars(self).items()})
        return other


def _copy(value: Any) -> Any:
    """A copy of data, a number of NumPy as one of Python; other objects are returned unchanged."""
    if isinstance(value, (Tensor, np.generic)):
        return value.clone() if isinstance(value, Tensor) else value.item()
    return copy.deepcopy(value) if isinstance(value, (list, dict)) else value

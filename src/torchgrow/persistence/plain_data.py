"""Plain data of saved states, and its checks: every field is checked before anything changes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from ..errors import SavedModelError

LARGEST = 2**62
"""Larger numbers are refused: no count, rate or time of a run reaches it."""


class Field:
    """A value in a state and its path, in words; raises `SavedModelError` if the value is not as expected."""

    def __init__(self, value: Any, path: str = "state") -> None:
        self.value, self.path = value, path

    def refuse(self, wanted: str) -> NoReturn:
        """The error: what was found and what was expected."""
        raise SavedModelError(f"{self.path} is {self.told}, it must be {wanted}; nothing was changed")

    @property
    def told(self) -> str:
        """The value in an error text."""
        value, kind = self.value, type(self.value).__name__
        return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{str(value)[:60]} ({kind})"

    def fields(self, names: Iterable[str] | None = None, later: Iterable[str] = ()) -> dict[str, Field]:
        """The fields of a dict with text for keys; with `names`, with just these keys and those in `later`.

        The latter may be missing, as they are in states of older versions, and are None then.
        """
        if not isinstance(self.value, dict) or not all(type(key) is str for key in self.value):
            self.refuse("a dict with text for keys")
        names = None if names is None else {*names, *later}
        values = {**dict.fromkeys(later), **self.value}
        if names is not None and values.keys() != names:
            missing, foreign = sorted(names - values.keys()), sorted(values.keys() - names)
            raise SavedModelError(
                f"{self.path} lacks {missing[:3]} and has the foreign {foreign[:3]}; nothing was changed"
            )
        return {key: Field(value, f"{self.path}[{key!r}]") for key, value in values.items()}

    def items(self, count: int | None = None) -> list[Field]:
        """The items of a list, of just so many if `count` is given."""
        if not isinstance(self.value, list):
            self.refuse("a list")
        if count not in (None, len(self.value)):
            raise SavedModelError(
                f"{self.path} is a list of {len(self.value)}, it must be a list of {count}, one for every optimizer; "
                "give Grower as many as in the saved run. Nothing was changed"
            )
        return [Field(value, f"{self.path}[{i}]") for i, value in enumerate(self.value)]

    def tensor(self, shape: Iterable[int], dtype: torch.dtype, finite: bool = False) -> Tensor:
        """A dense tensor of this shape and dtype; with `finite`, without NaN and infinity."""
        value, shape = self.value, tuple(shape)
        fits = isinstance(value, Tensor) and value.shape == shape and value.dtype == dtype
        if not fits or value.layout != torch.strided or value.is_meta:
            self.refuse(f"{dtype} {shape}")
        if finite and not bool(value.isfinite().all()):
            self.refuse(f"{dtype} {shape} without NaN and infinity")
        return value.detach()

    def number(self, low: float = -math.inf) -> float:
        """A finite number of at least `low`."""
        if type(self.value) not in (int, float) or not max(low, -LARGEST) <= self.value <= LARGEST:
            self.refuse(f"a finite number, at least {low}")
        return float(self.value)

    def whole(self, low: int = 0, high: int = LARGEST) -> int:
        """A whole number in [low, high]."""
        if type(self.value) is not int or not low <= self.value <= high:
            self.refuse(f"a whole number in [{low}, {high}]")
        return self.value

    def flag(self) -> bool:
        """True or False."""
        if type(self.value) is not bool:
            self.refuse("True or False")
        return self.value

    def like(self, present: Any) -> Any:
        """A value of the kind of `present`: same type and names, finite numbers; what is inside may fill up."""
        if not alike(self.value, present):
            self.refuse(f"of the kind of {str(present)[:60]}")
        return self.value

    def generator(self) -> Tensor:
        """The state of a `torch.Generator` on the CPU."""
        fresh = torch.Generator()
        state = self.tensor(fresh.get_state().shape, torch.uint8).cpu()
        try:
            fresh.set_state(state)
        except RuntimeError:
            self.refuse("the state of a torch.Generator")
        return state


def alike(value: Any, present: Any, inside: bool = False) -> bool:
    """As for `Field.like`: None may be any plain value, `inside` of another a tensor too; lists and dicts may grow."""
    if present is None or isinstance(present, bool):
        filled = present is None and (plain(value) or (inside and isinstance(value, Tensor)))
        return value is None or isinstance(value, bool) or filled
    if isinstance(present, (int, float)):
        wild = isinstance(present, float) and not math.isfinite(present)
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        return (fits and abs(value) <= LARGEST) or (wild and fits and not math.isnan(value))
    if isinstance(present, Tensor):
        return isinstance(value, Tensor) and (value.shape, value.dtype) == (present.shape, present.dtype)
    if type(value) is type(present) and ((inside and plain(present) and type(present) is not tuple) or not present):
        return plain(value)
    if isinstance(present, (list, tuple)):
        fits = type(value) is type(present) and len(value) == len(present)
        return fits and all(map(partial(alike, inside=True), value, present))
    if isinstance(present, dict):
        fits = isinstance(value, dict) and value.keys() == present.keys()
        return fits and all(alike(value[key], item, inside=True) for key, item in present.items())
    return type(value) is type(present)


def plain(value: Any) -> bool:
    """Whether it is a number, text, or a list or dict of them: what may stand where nothing stood before."""
    if isinstance(value, (list, tuple, dict)):
        return all(map(plain, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) or (isinstance(value, (int, float)) and abs(value) <= LARGEST)


def same(one: Any, other: Any) -> bool:
    """Whether two plain values are equal; 1 is 1.0, but not True, and a list is a tuple."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    kinds = {type(one), type(other)}
    return (len(kinds) == 1 or kinds == {int, float}) and not isinstance(one, Tensor) and bool(one == other)


def simple(value: Any) -> Any:
    """A setting as plain data, with NumPy's numbers as Python's.

    Raises:
        ValueError: it is none, or holds NaN, which equals nothing.
    """
    value = value.item() if isinstance(value, np.generic) else value
    if type(value) in (list, tuple):
        return type(value)(map(simple, value))
    if isinstance(value, Mapping):
        return {simple(key): simple(item) for key, item in value.items()}
    if value is None or (type(value) in (bool, int, float, str) and value == value):
        return value
    raise ValueError(value)


def no_data(value: Any, path: str) -> str:
    """What in a value is no data, as "path['a'][3] is of class tuple"; "" where all is."""
    if isinstance(value, dict):
        odd = [f"{path} has a key of class {type(key).__name__}" for key in value if type(key) is not str]
        return odd[0] if odd else next(filter(None, (no_data(one, f"{path}[{k!r}]") for k, one in value.items())), "")
    if isinstance(value, list):
        return next(filter(None, (no_data(one, f"{path}[{i}]") for i, one in enumerate(value))), "")
    fine = value is None or isinstance(value, Tensor) or type(value) in (bool, int, float, str)
    return "" if fine else f"{path} is of class {type(value).__name__}"

"""Old names of arguments and attributes: they work for one version more, with a warning."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def renamed_arguments(**names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Let a function take keyword arguments by their old names too, as in `@renamed_arguments(freeze="protect")`.

    The function raises a TypeError where it is given an argument by both names.
    """

    def wrap(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            for old in names.keys() & kwargs.keys():
                new = names[old]
                if new in kwargs:
                    raise TypeError(f"{old!r} is the old name of the argument {new!r}; give {new}= alone")
                _warn(old, new)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return wrap


def renamed_attribute(old: str, new: str) -> Any:
    """A property that reads the attribute `new` by its old name."""

    def get(self: Any) -> Any:
        _warn(old, new)
        return getattr(self, new)

    return property(get)


def _warn(old: str, new: str) -> None:
    warnings.warn(
        f"the name {old!r} is deprecated and goes with the next version; write {new!r}",
        DeprecationWarning,
        stacklevel=frames_to_user(),
    )


def frames_to_user() -> int:
    """How far up the first frame outside of PyTorch and torchgrow is, as `stacklevel` of a warning of the caller."""
    frame, level, ours = sys._getframe(1), 1, ("torch", "torchgrow", "contextlib", "functools")
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ours:
        frame, level = frame.f_back, level + 1
    return level

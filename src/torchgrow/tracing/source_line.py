"""The line of the user's model that runs, for reasons and errors."""

from __future__ import annotations

import sys
from functools import cache

from .model_call import call


def user_line() -> tuple[str, int] | None:
    """File and line of the innermost frame of the model itself; None where all its modules are torch's or ours.

    Frames outside the call of the model, such as a command line or a test runner, do not count.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != call.__module__:
        if not _inner(frame.f_globals.get("__name__", "")):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return None


TOOLS = (__name__.partition(".")[0], "torch", "contextlib", "functools", "einops", "opt_einsum")
"""Packages that run operations on behalf of a model."""


@cache
def _inner(module: str) -> bool:
    """Whether a module is torch's or ours or a tool; the lab's models are models like others."""
    return module.partition(".")[0] in TOOLS and not module.startswith(f"{TOOLS[0]}.lab.")

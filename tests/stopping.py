"""A run that is stopped at a moment of the test's choice, by what no code expects."""

from typing import Any

import pytest


class Stop(BaseException):
    """What no code expects."""


def stopping(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Let a function raise at one of its calls."""
    original, count = getattr(owner, name), 0

    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            raise Stop
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, wrapper)

"""The policy of docs/policies.md, as a user writes it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchgrow.policies import Policy

PAGE = Path(__file__).parents[1] / "docs" / "policies.md"


def source() -> str:
    """Its text, with imports, without the network that it is tried on."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return next(block for block in blocks if "class Cubic" in block).partition("\nmodel = ")[0]


def cubic() -> Callable[[], Policy]:
    """The class."""
    names: dict[str, Any] = {"__name__": "page"}
    exec(source(), names)
    made: Callable[[], Policy] = names["Cubic"]
    return made

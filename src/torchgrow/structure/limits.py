"""What the final network may cost: shares or numbers as users write them. Needs no PyTorch, so reading one is quick."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

from ..errors import BudgetError

if TYPE_CHECKING:
    from torch import Tensor

    from .cost import Cost

Amount = str | int | float | None

UNLIMITED = 2**63 - 1
"""The limit of what is not limited, where limits are a tensor: the largest int64."""

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_NUMBER = re.compile(r"((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(%|[kmgt]?)")


@dataclass(frozen=True)
class Limits:
    """A budget in absolute numbers for one frame; None where there is no limit."""

    params: int | None
    flops: int | None

    def tensor(self) -> Tensor:
        """int64 [2]: parameters and FLOPs, `UNLIMITED` where there is no limit."""
        import torch

        return torch.tensor([UNLIMITED if x is None else x for x in (self.params, self.flops)])


@dataclass(frozen=True)
class Budget:
    """What the final network may cost at most.

    Args:
        params: parameters: a share of the frame such as "36%" or 0.36, or a number such as 100_000, "100k" or "1.5M"
            (k, M, G and T stand for 10^3, 10^6, 10^9 and 10^12).
        flops: FLOPs (2 x multiply-accumulates) for one sample, likewise.

    Raises:
        BudgetError: neither is given, or one is not a share above 0 and at most 100 % or a positive whole number.
    """

    params: Amount = None
    flops: Amount = None

    def __post_init__(self) -> None:
        """Bring every amount to one form, "36%" or a whole number, or name the bad field."""
        if self.params is None and self.flops is None:
            raise BudgetError('a budget needs params or flops, e.g. Budget(params="36%") or Budget(flops=20_000_000)')
        for name, amount in self._amounts().items():
            object.__setattr__(self, name, str(amount) if amount.share is not None else amount.count)

    def _amounts(self) -> dict[str, _Read]:
        return {name: _read(name, x) for name, x in (("params", self.params), ("flops", self.flops)) if x is not None}

    @classmethod
    def read(cls, text: str) -> Budget:
        """Read a budget as typed: ``36%``, ``0.36``, ``100k``, ``flops=50%``, ``params=100k,flops=40%``.

        Args:
            text: one or two parts with a comma between. A part is ``params=`` or ``flops=`` (left out: parameters)
                and an amount as in `Budget`.

        Raises:
            BudgetError: it cannot be read; the message shows what can.
        """
        found: dict[str, str] = {}
        for part in text.split(","):
            field, given, value = part.partition("=")
            field, value = (field.strip().lower(), value.strip()) if given else ("params", part.strip())
            if field not in ("params", "flops") or field in found or not value:
                raise BudgetError(
                    f"cannot read the budget {text!r}; write it like 36%, params=36%, flops=50%, "
                    "params=36%,flops=40% or params=100k"
                )
            found[field] = value
        try:
            return cls(**found)
        except BudgetError as error:
            raise BudgetError(f"cannot read the budget {text!r}: {error}") from None

    def __str__(self) -> str:
        return " and ".join(f"{name} <= {amount}" for name, amount in self._amounts().items())

    def limits(self, frame: Cost) -> Limits:
        """The budget in absolute numbers for a frame of the given cost."""
        absolute = {name: amount.of(getattr(frame, name)) for name, amount in self._amounts().items()}
        return Limits(absolute.get("params"), absolute.get("flops"))


@dataclass(frozen=True)
class _Read:
    """An amount as read: a share of the frame in (0, 1], or a count."""

    share: Decimal | None = None
    count: int = 0

    def __str__(self) -> str:
        return str(self.count) if self.share is None else f"{(self.share * 100).normalize():f}%"

    def of(self, full: int) -> int:
        """In absolute numbers, rounded down."""
        return self.count if self.share is None else int(self.share * full)


def _read(name: str, value: Amount) -> _Read:
    works = f'use a share such as {name}="36%" or {name}=0.36, or a number such as {name}=100_000 or {name}="100k"'
    readable = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    text = value if isinstance(value, str) else repr(float(value) if isinstance(value, float) else value)
    match = _NUMBER.fullmatch(text.strip().lower().replace("_", "")) if readable else None
    if match is None:
        raise BudgetError(f"{name}={value!r} is neither a share nor a positive number; {works}")
    number, unit = Decimal(match[1]), match[2]  # exact, where a float would round a share up or down
    if unit == "%" or (not unit and 0 < number < 1):
        share = number / 100 if unit else number
        if not 0 < share <= 1:
            raise BudgetError(f"{name}={value!r} must lie above 0% and at most at 100%; {works}")
        return _Read(share=share)
    if not unit and number == 1 and "." in match[1]:
        raise BudgetError(f"{name}={value!r} may mean all or a single one; {works}")
    count = number * _FACTORS[unit]
    if count < 1 or (not unit and count % 1):
        raise BudgetError(f"{name}={value!r} is neither a share below 1 nor a positive whole number; {works}")
    return _Read(count=int(count))

"""Policies by name, as presets are typed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

from ..errors import TorchgrowError
from .default import Default
from .late import Late
from .paper import Paper
from .policy import Policy
from .random import Random
from .shrink import Shrink

PRESETS: dict[str, Callable[..., Policy]] = {
    "default": Default,
    "paper": Paper,
    "global": partial(Paper, lambda_base=0.5, temperature_rises="global"),
    "nas": partial(Paper, lambda_base=2.0),
    "random": Random,
    "shrink": Shrink,
    "late": Late,
}
"""What a name stands for: a function that returns the policy.

"global" has one temperature for all units, which rises with the epochs; the paper compares itself with that. "nas" has
the paper's settings where architectures are searched (4.3): lambda_1^base 2.0 and lambda_2^base 0.1.
"""

EARLIER = {"heat": "final_inverse_temperature", "temperature": "temperature_rises"}
"""Settings that may still be typed by the name that they had."""


def named(text: str, *, layers: bool = False, rises: Mapping[str, float] | None = None) -> Policy:
    """A policy by its name, with other settings behind a colon: "default", "shrink:until=0.3,importance=l1".

    Args:
        text: a name in `PRESETS`, and what differs from it.
        layers: whether layers grow too: lambda_1^base of "paper" is 1.0 then, else 0.5.
        rises: what `torchgrow.measure_rises` gave, for "shrink:allocation=measured"; the others do without.

    Raises:
        TorchgrowError: an unknown name, setting or value.
    """
    name, _, edits = text.partition(":")
    if name not in PRESETS:
        raise TorchgrowError(
            f"preset {name!r} is unknown; use one of {sorted(PRESETS)}, or give policy= an object of torchgrow.policies"
            f"{'; shapes are searched for by torchgrow.search(factory, budget, ...)' if name == 'search' else ''}"
        )
    plain: Any = PRESETS[name](**({"lambda_base": 1.0 if layers else 0.5} if name == "paper" else {}))
    try:
        changed = _read(plain, edits)
    except ValueError as edit:
        typed = {key: value for key, value in plain.settings().items() if value is not None}
        some = ",".join(f"{key}={value}" for key, value in list(typed.items())[:2])
        raise TorchgrowError(
            f"{str(edit)!r} in preset {text!r} is not a setting of torchgrow.policies.{type(plain).__name__} with its "
            f"value, or there by its other name too; write it like {name}:{some} (settings: {', '.join(typed)})"
        ) from None
    if changed.get("allocation") == "measured":
        changed["rises"] = rises
    return replace(plain, **changed)


def _read(plain: Any, edits: str) -> dict[str, Any]:
    """Settings as typed, "peak=1,align=8", each of the type that it has in `plain`.

    Raises:
        ValueError: no such setting, not a value of it, or one that stands there by another name; its text is the edit.
    """
    kinds = {field.name: type(getattr(plain, field.name)) for field in fields(plain)}
    changed, names = dict[str, Any](), dict[str, str]()
    for edit in filter(None, edits.split(",")):
        typed, _, value = (part.strip() for part in edit.partition("="))
        key = typed if typed in kinds else EARLIER.get(typed, typed)
        try:
            if names.setdefault(key, typed) != typed:  # by two names: which value is meant?
                raise ValueError
            kind = kinds[key]
            changed[key] = {"True": True, "False": False}[value] if kind is bool else kind(value)
        except (KeyError, ValueError, TypeError):  # the last of what cannot be typed
            raise ValueError(edit) from None
    return changed

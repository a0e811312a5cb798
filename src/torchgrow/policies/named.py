"""Policies by name, as presets are typed."""

from __future__ import annotations

from typing import Any

from ..errors import TorchgrowError
from .combined import policy_of
from .indicators import PRESETS, Method, read_edits
from .late import Late
from .policy import Policy
from .shrink import Shrink

BY_CLASS: dict[str, type[Policy]] = {"shrink": Shrink, "late": Late}
"""Names whose settings are the fields of a class; those of the others are the fields of `Method`."""

NAMES = (*PRESETS, *BY_CLASS)


def named(text: str, *, layers: bool = False) -> Policy:
    """A policy by its name, with other settings behind a colon: "default", "shrink:until=0.3,importance=l1".

    Args:
        text: a name in `NAMES`, and what differs from it.
        layers: whether layers grow too, which "paper" depends on.

    Raises:
        TorchgrowError: an unknown name, setting or value.
    """
    name, _, edits = text.partition(":")
    if name not in NAMES:
        raise TorchgrowError(
            f"preset {name!r} is unknown; use one of {sorted(NAMES)}, or give policy= an object of torchgrow.policies"
        )
    if name not in BY_CLASS:
        return policy_of(Method.named(text, layers=layers))
    plain: Any = BY_CLASS[name]()
    try:
        changed = read_edits(plain, edits)
    except ValueError as edit:
        raise TorchgrowError(
            f"{str(edit)!r} in preset {text!r} is not a setting of torchgrow.policies.{type(plain).__name__} with its "
            f"value; write it like {name}:until=0.3,importance=l1 (settings: {', '.join(plain.settings())})"
        ) from None
    return BY_CLASS[name](**changed)

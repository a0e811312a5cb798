"""Policies by name, as presets are typed."""

from __future__ import annotations

from collections.abc import Mapping
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


def named(text: str, *, layers: bool = False, rises: Mapping[str, float] | None = None) -> Policy:
    """A policy by its name, with other settings behind a colon: "default", "shrink:until=0.3,importance=l1".

    Args:
        text: a name in `NAMES`, and what differs from it.
        layers: whether layers grow too, which "paper" depends on.
        rises: what `torchgrow.measure_rises` gave, for "shrink:allocation=measured"; the others do without.

    Raises:
        TorchgrowError: an unknown name, setting or value.
    """
    name, _, edits = text.partition(":")
    if name not in NAMES:
        raise TorchgrowError(
            f"preset {name!r} is unknown; use one of {sorted(NAMES)}, or give policy= an object of torchgrow.policies"
        )
    if name not in BY_CLASS:
        return _of_method(name, edits, layers)
    plain: Any = BY_CLASS[name]()
    try:
        changed = read_edits(plain, edits)
    except ValueError as edit:
        typed = {key: value for key, value in plain.settings().items() if value is not None}
        some = ",".join(f"{key}={value}" for key, value in list(typed.items())[:2])
        raise TorchgrowError(
            f"{str(edit)!r} in preset {text!r} is not a setting of torchgrow.policies.{type(plain).__name__} with its "
            f"value; write it like {name}:{some} (settings: {', '.join(typed)})"
        ) from None
    if changed.get("allocation") == "measured":
        changed["rises"] = rises
    return BY_CLASS[name](**changed)


def _of_method(name: str, edits: str, layers: bool) -> Policy:
    """The policy of a preset that `Method` says.

    Raises:
        TorchgrowError: as `named`; or a setting that the policy does not have, which would change nothing.
    """
    method = Method.named(f"{name}:{edits}", layers=layers)
    policy, given = policy_of(method), edits.split(",")
    for edit in filter(None, given):
        without = Method.named(f"{name}:{','.join(other for other in given if other != edit)}", layers=layers)
        same = policy_of(without)
        if without != method and type(same) is type(policy) and same.settings() == policy.settings():
            raise TorchgrowError(
                f"{edit!r} in preset {f'{name}:{edits}'!r} changes nothing: it grows by torchgrow.policies."
                f"{type(policy).__name__}, whose settings are {', '.join(policy.settings())}; leave it out"
            )
    return policy

"""The state dict of a run: its fields, and the check that it fits this run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..errors import SavedModelError
from ..persistence.checkpoint import Resumable
from ..persistence.plain_data import Field, same
from .start import SEED
from .state import check_frame

FORMAT = 2
"""Of `Grower.state_dict()`."""

FIELDS = (
    *("format", "frame", "settings", "history", "finished", "policy", "generator", "initial_lr", "keep", "before"),
    *("ever", "trained", "network", "gradients", "raw", "steps", "bank", "bank_slots", "optimizers"),
    "followers",
)
"""Fields of a state of format `FORMAT`."""

LATER = ("extra_states", "early", "buffers")
"""Fields that states of older versions lack."""

ONCE = {"policy.penalised": "all", "policy.start": 1.0, "policy.paced": False}
"""Settings that states of older versions lack, with the only value there was."""


def examine(state: Any, frame: dict[str, Any], settings: Mapping[str, Any], unborn: bool) -> dict[str, Field]:
    """The fields of a state, once it is known to fit this run, its settings, and the `fingerprint` of its frame.

    `unborn`: whether weights are initialised only when their unit first enters (a frame on the meta device).

    Raises:
        SavedModelError: it is no state, or of another run; the message names what differs.
    """
    if not isinstance(state, dict) or "format" not in state:
        raise SavedModelError(_no_state(state))
    form = Field(state).fields()["format"].value
    if type(form) is not int or form != FORMAT:
        raise SavedModelError(f"the state has format {form!r}, this version of torchgrow reads {FORMAT}")
    saved = Field(state).fields(FIELDS, LATER)
    check_frame(saved["frame"], frame)
    unset = {key for key, value in settings.items() if value is None and key.startswith("policy.")}
    later = ("start", "rescale", *unset, *(key for key in ONCE if key in settings))
    for key, field in saved["settings"].fields(settings.keys() - {*later}, later).items():
        found = ONCE.get(key) if field.value is None else field.value
        if found is None and key in unset:
            continue  # not there in older versions, and not made use of here
        if found is None and ((key == "rescale" and not unborn) or (key == "start" and settings[key] == SEED)):
            continue  # older versions had no other, and the weights are in the state
        if found is None and key == "rescale":
            if not settings[key]:
                continue
            raise SavedModelError(
                "the state is of a version in which fresh weights had the frame's scale, and units not yet "
                "initialised would start at another one here; construct Grower(..., rescale=False). Nothing was changed"
            )
        if not same(found, settings[key]):
            raise SavedModelError(
                f"the state is of a run with {key}={str(found)[:60]}, this Grower has {settings[key]}; "
                "construct it with the budget, updates, preset, start and seed of the saved run. Nothing was changed"
            )
    return saved


def _no_state(given: Any) -> str:
    """The error text for something that is no state of a grower."""
    advice = "weights alone go into model.load_state_dict(...)"
    if isinstance(given, (str, os.PathLike)):
        advice = "of a folder, torchgrow.load_checkpoint(folder, grower)"
    elif isinstance(given, Resumable):
        advice = "of another grower, grower.load_state_dict(other.state_dict())"
    elif isinstance(given, dict):
        inside = [key for key, value in given.items() if isinstance(value, dict) and value.keys() >= {*FIELDS}]
        advice = f"which is in it as state[{inside[0]!r}]" if inside else advice
    found = f"a dict with {sorted(map(str, given))[:3]}" if isinstance(given, dict) else f"a {type(given).__name__}"
    return f"load_state_dict takes what grower.state_dict() returned, got {found}; {advice}. Nothing was changed"

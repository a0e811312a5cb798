"""The random numbers of this process, outside of the grower: dropout, shuffling, augmentation."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..default_device import gpus_in_use
from ..errors import SavedModelError
from .folder import pack
from .plain_data import Field


def random_state() -> dict[str, Any]:
    """Random states of PyTorch (host, and all CUDA devices once one is in use), NumPy and Python as plain data."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = sys.modules["numpy"].random.get_state()  # safetensors has imported it
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(index) for index in gpus_in_use()],
        "numpy": [kind, torch.from_numpy(keys.astype("int64")), position, has_gauss, cached],
        "python": [version, torch.tensor(words), gauss],
    }


def read_random(field: Field) -> Callable[[], None]:
    """Check saved random states on throw-away generators; the function returned sets them."""
    saved = field.fields(("torch", "cuda", "numpy", "python"))
    host = saved["torch"].generator()
    devices = [entry.value for entry in saved["cuda"].items()]
    numpy = sys.modules["numpy"].random
    try:
        version, words, gauss = saved["python"].value
        python = (version, tuple(words.tolist()), gauss)
        random.Random().setstate(python)
        kind, keys, position, has_gauss, cached = saved["numpy"].value
        legacy = (kind, keys.numpy().astype("uint32"), position, has_gauss, cached)
        numpy.RandomState().set_state(legacy)
        present = devices[: torch.cuda.device_count()] if torch.cuda.is_available() else []
        for index, state in enumerate(present):
            torch.Generator(f"cuda:{index}").set_state(state)
    except (TypeError, ValueError, AttributeError, OverflowError, RuntimeError, IndexError) as error:
        raise SavedModelError(f"{field.path} is damaged: {error}; nothing was changed") from error

    def restore() -> None:
        torch.set_rng_state(host)
        random.setstate(python)
        numpy.set_state(legacy)
        for index, state in enumerate(present):
            torch.cuda.set_rng_state(state, index)

    return restore


def same_random(one: Any, other: Any) -> bool:
    """Whether two random states are the same, so that nothing was drawn in between."""
    here: dict[str, Tensor] = {}
    there: dict[str, Tensor] = {}
    same = pack(one, here) == pack(other, there) and here.keys() == there.keys()
    return same and all(torch.equal(here[name], there[name]) for name in here)

"""Our own tensors are on the CPU, whatever the user made the default; the user's code keeps its default.

`torch.set_default_device("cuda")` decides where every tensor is made that does not say. Units, labels and the bank are
on the host. A forward that creates tensors without a device needs them on the device of its weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_users: ContextVar[torch.device | None] = ContextVar("default device of the user", default=None)


@contextmanager
def on_host() -> Iterator[None]:
    """Around code of ours: what is made without a device is on the CPU."""
    default = torch.get_default_device()
    if default.type == "cpu":
        yield
        return
    token = _users.set(default)
    try:
        with torch.device("cpu"):
            yield
    finally:
        _users.reset(token)


@contextmanager
def on_default() -> Iterator[None]:
    """Around code of the user's that ours calls: what is made without a device is where the user wants it."""
    default = _users.get()
    if default is None:
        yield
        return
    with torch.device(default):
        yield


def gpus_in_use() -> list[int]:
    """Numbers of the GPUs whose random numbers somebody may have drawn from; asking for them initialises none."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []

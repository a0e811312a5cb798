"""Where to compute, and with which random numbers."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from torchgrow import TorchgrowError
from torchgrow.lab import names


def chosen(name: str) -> torch.device:
    """The device of that name; under torchrun, each process has a GPU of its own.

    Args:
        name: one of `torchgrow.lab.names.DEVICES`; "auto" is a GPU where there is one, else the CPU.

    Raises:
        TorchgrowError: it is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, found in there.items() if found)
    if not there.get(name):
        known = [kind for kind, found in there.items() if found]
        raise TorchgrowError(
            f"there is no device {name!r} here; --device takes {', '.join(names.DEVICES)}, and PyTorch finds "
            f"{', '.join(known)}"
        )
    if name == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    return torch.device(name)


def moved(value: Any, device: torch.device) -> Any:
    """Tensors and modules in a nest, on the device; modules are moved in place."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, (Tensor, nn.Module)) else leaf, value)


def described(device: torch.device) -> str:
    """What the device is called, for records."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def random_state() -> tuple[Tensor, list[Tensor]]:
    """That of the CPU, and of every GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all()


def set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    """Let random numbers go on from there."""
    torch.set_rng_state(state[0])
    torch.cuda.set_rng_state_all(state[1])

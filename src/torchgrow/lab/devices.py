"""Where to compute, and with which random numbers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from torchgrow import TorchgrowError
from torchgrow.lab import names


def chosen(name: str) -> torch.device:
    """The device of that name; under torchrun, each process has a GPU of its own.

    Args:
        name: one of `torchgrow.lab.names.DEVICES`; "auto" is a GPU of CUDA where there is one, else the CPU.

    Raises:
        TorchgrowError: it is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "cpu": True}
    if name == "mps":
        raise TorchgrowError(
            "MPS has no float64, in which a network is proven and its gates are kept; take --device cpu (a grown "
            'network is a plain module, and runs on "mps" afterwards)'
        )
    if name == "auto":
        name = next(kind for kind, found in there.items() if found)
    if not there.get(name):
        known = [kind for kind, found in there.items() if found]
        raise TorchgrowError(
            f"there is no device {name!r} here; --device takes {', '.join(names.DEVICES)}, and PyTorch finds "
            f"{', '.join(known)}"
        )
    if name == "cuda":
        mine, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if mine >= count:
            raise TorchgrowError(
                f"this is process {mine + 1} of this node, which has {count} GPU{'s' * (count > 1)}, and two processes "
                f"cannot share one; start torchrun with --nproc-per-node={count}, or take --device cpu"
            )
        device = torch.device("cuda", mine)
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
    """That of the CPU, and of every GPU once one is in use."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    """Let random numbers go on from there."""
    torch.set_rng_state(state[0])
    torch.cuda.set_rng_state_all(state[1])


@contextmanager
def random_kept() -> Iterator[None]:
    """Random numbers go on afterwards as if nothing had been drawn."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


def out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory, of the host or of a device: no fault of a program."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "allocate memory" in str(error))

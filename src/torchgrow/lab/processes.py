"""What a run does differently under torchrun: every process trains on its share, the first one speaks and writes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from torchgrow import TorchgrowError

T = TypeVar("T")

GONE = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")
"""What gloo and NCCL say where a process has ended that another one waits for."""


@contextmanager
def joined() -> Iterator[None]:
    """The process group that torchrun asks for, as long as it lasts; nothing without torchrun.

    Tensors on the CPU travel by gloo, those on GPUs by NCCL. The addresses of processes that died are still in the
    store when torchrun starts them anew, and connecting to those never ends: every start has a prefix of its own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    store, rank, size = next(rendezvous("env://"))
    prefix = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=PrefixStore(prefix, store), rank=rank, world_size=size)
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in GONE):
            raise
        raise TorchgrowError("another rank has ended, which this one waited for; its own message says why") from None
    finally:
        dist.destroy_process_group()


def restarted() -> bool:
    """Whether torchrun has started these processes anew, since one of them had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def rank() -> int:
    """Number of this process; the one with 0 evaluates, prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def first_alone() -> Iterator[None]:
    """Process 0 goes through the block before the others may enter: it downloads, they find what it has.

    If one fails in it, all do: none is left waiting. In the block they must not wait for each other.

    Raises:
        TorchgrowError: another process has failed; the message has that of its error.
    """
    if rank():
        _all_well()  # the first one is through
    try:
        yield
    except Exception as failed:
        told = isinstance(failed, (TorchgrowError, OSError))
        _all_well(str(failed) if told else f"{type(failed).__name__}: {failed}")
        raise
    if not rank():
        _all_well()
    _all_well()  # so are the others


def _all_well(error: str = "") -> None:
    """Tell the other processes whether this one has failed, and hear of them; all call it.

    Raises:
        TorchgrowError: another one has failed, and this one has not.
    """
    found = [""] * size()
    if size() > 1:
        dist.all_gather_object(found, error)
    failed = next((number for number, one in enumerate(found) if one), None)
    if failed is not None and not error:
        raise TorchgrowError(f"rank {failed} failed: {found[failed]}")


def told(value: T) -> T:
    """The value that process 0 has, on all."""
    if size() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


def share(batch: int) -> slice:
    """Which samples of a batch of that size are this process's; together the processes have them all.

    Raises:
        TorchgrowError: a batch cannot be shared out evenly, so that the mean of shares would not be its mean.
    """
    if batch % size():
        raise TorchgrowError(
            f"a batch of {batch} cannot be shared out evenly among {size()} processes; "
            f"choose a --nproc-per-node that divides {batch}"
        )
    return slice(rank(), None, size())


def shares(batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of every batch; together they are the batches that one process would train on."""
    for x, labels in batches:
        yield x[share(len(x))], labels[share(len(x))]


def mean(value: float) -> float:
    """Mean over all processes."""
    if size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / size()


def wrap(model: nn.Module) -> nn.Module:
    """A network of fixed structure for training with all processes."""
    return nn.parallel.DistributedDataParallel(model) if size() > 1 else model

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
    """Process 0 goes through the block before the others may enter: it downloads, they find what it has."""
    if rank() and size() > 1:
        dist.barrier()
    yield
    if not rank() and size() > 1:
        dist.barrier()


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

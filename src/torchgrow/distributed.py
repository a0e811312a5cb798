"""Several processes that grow one network: checks that all ranks compute the same.

Ranks share reduced gradients, a seeded generator and the same code, so they take the same decisions. Once per update
each sends one hash per part of its state to all. If a hash differs, all ranks stop before anything changes, with the
same message. Without `torch.distributed` (or with one rank) nothing here has an effect.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import TorchgrowError
from .exchange import Exchange

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits in an update for the others; rank 0 may be evaluating meanwhile."""

_APART = (
    "the ranks trained on different gradients or wrote into weights by themselves: run the forward pass through what "
    "grower.wrap() returns, not through the bare model, with the same optimizer settings on every rank"
)

PARTS = {
    "calls": "call update() and finish() on every rank, equally often",
    "settings": "give Grower the same model, budget, updates and preset on every rank",
    "draws": "give Grower the same seed on every rank",
    "policy": _APART,
    "weights": _APART,
    "structure": "the ranks computed different structures from the same numbers, which differing machines may do: "
    "use the same torch version and kind of CPU",
}
"""Parts of the state that ranks compare, and what to do if one differs; the first one that differs is the cause."""


class Ranks:
    """The processes that hold one copy of the network each; made on all of them at the same time."""

    def __init__(self) -> None:
        self.rank, self.size = here()  # of this process, and how many there are
        # A separate group: messages must never mix with those of a user's DDP. It is not kept alive
        # beyond destroy_process_group(): its threads must not outlive the interpreter.
        self._held: weakref.ref[dist.ProcessGroup] | None = None
        if self.size > 1:
            self._held = weakref.ref(cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=TIMEOUT)))
        self._agreed = False
        self.random: list[Any] = []  # states by rank when the last update began, which draws none of these numbers
        self._wrappers: weakref.WeakSet[Wrapper] = weakref.WeakSet()

    @property
    def _group(self) -> dist.ProcessGroup | None:
        group = self._held() if self._held else None
        if self._held and group is None:
            raise TorchgrowError(
                "the process group in which this Grower was made has been destroyed; "
                "call update() and finish() before torch.distributed.destroy_process_group()"
            )
        return group

    @contextmanager
    def together(self, tensors: Iterable[Tensor], random: Callable[[], Any]) -> Iterator[None]:
        """A context for work that ends in `agree`: if one rank fails before, the others do not wait for it.

        Args:
            tensors: made equal to rank 0's first; such as running statistics, which every rank has its own of.
            random: returns the random state of this rank, which goes into `random`; called only if there are several.
        """
        self._agreed = False
        self.share(tensors)
        if self.size > 1:
            self.random = self.gather(random())
        try:
            yield
        except BaseException:
            if self._group is not None and not self._agreed:
                self._compare(torch.zeros(1 + len(PARTS), dtype=torch.int64))
            raise

    def agree(self, parts: Callable[[], Mapping[str, Iterable[Tensor | str]]]) -> None:
        """Return if all ranks are equal in every part of `PARTS`.

        Args:
            parts: returns what this rank holds; called only if there are several.

        Raises:
            TorchgrowError: on all ranks alike, naming those that differ from rank 0, in what, and what to do.
        """
        if self._group is None:
            return
        held = parts()
        mine = torch.tensor([1, *(hash_of(held[part]) for part in PARTS)], dtype=torch.int64)
        self._agreed = True
        found = self._compare(mine)
        failed = [str(rank) for rank, (fine, *_) in enumerate(found) if not fine]
        if failed:
            raise TorchgrowError(
                f"rank {', '.join(failed)} failed in this update, for the reason given there; nothing was changed on "
                "any rank"
            )
        differing = {
            part: [rank for rank in range(self.size) if found[rank][i] != found[0][i]]
            for i, part in enumerate(PARTS, start=1)
        }
        differing = {part: ranks for part, ranks in differing.items() if ranks}
        if differing:
            seen = "; ".join(f"{part} of rank {', '.join(map(str, ranks))}" for part, ranks in differing.items())
            raise TorchgrowError(
                f"the ranks do not agree, so nothing was changed on any of them. Different from rank 0: {seen}. "
                f"To put it right: {PARTS[next(iter(differing))]}"
            )

    def _compare(self, mine: Tensor) -> list[list[int]]:
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with self._waiting():
            dist.all_gather(found, mine, group=self._group)
        return [one.tolist() for one in found]

    def gather(self, value: Any) -> list[Any]:
        """What every rank has, by rank; all call it."""
        if self.size == 1:
            return [value]
        with self._waiting():
            return gathered(value, self._group)

    def exchanged(self, value: Any) -> list[Any]:
        """As `gather`, within `together`: raises on all ranks if one has failed before."""
        self.agree(lambda: dict.fromkeys(PARTS, ()))
        self._agreed = False
        return self.gather(value)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise TorchgrowError(
                f"rank {self.rank} timed out waiting for other ranks during an update ({error}). Call update(), "
                "finish() and save_checkpoint(..., together=True) on every rank, not on some alone; or else another "
                "rank has died"
            ) from error

    @torch.no_grad()
    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give every rank the contents that rank 0's tensors have, as DDP does with buffers before a forward pass."""
        tensors = list(tensors)
        if self._group is None or not tensors:
            return
        data = torch.cat([_bytes(tensor) for tensor in tensors])
        with self._waiting():
            dist.broadcast(data, src=0, group=self._group)
        if self.rank:
            for tensor, part in zip(tensors, data.split([_bytes(tensor).numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.clone().view(tensor.dtype).reshape(tensor.shape))

    def wrap(self, model: nn.Module, settings: dict[str, Any]) -> nn.Module:
        """A new DistributedDataParallel over the model; the model itself where no process group was started.

        Raises:
            TorchgrowError: torchrun started several processes, but there is no process group.
        """
        if not (dist.is_available() and dist.is_initialized()):
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise TorchgrowError(
                    f"torchrun started {os.environ['WORLD_SIZE']} processes that do not know each other; call "
                    'torch.distributed.init_process_group("gloo") (CPU) or ("nccl") (CUDA) before Grower(...)'
                )
            return model
        if dist.get_world_size() != self.size:
            raise TorchgrowError("init_process_group was called after Grower(...); call it before")
        # What lies in layers left out is empty and gets no gradient, which DDP would wait for.
        empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if not tensor.numel()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, empty)
        wrapper = Wrapper(model, **settings)
        self._wrappers.add(wrapper)
        return wrapper

    def invalidate(self, exchange: Exchange) -> None:
        """Have `exchange` invalidate all wrappers made so far, which hold gradients of the old shapes."""
        for wrapper in self._wrappers:
            exchange.fields(wrapper, stale=True)
        exchange.fields(self, _wrappers=weakref.WeakSet())


class Wrapper(DistributedDataParallel):
    """DistributedDataParallel that knows when the network under it has changed."""

    stale = False

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """As DistributedDataParallel's; raises if the network has changed since."""
        if self.stale:
            raise TorchgrowError(
                "the network has changed under this wrapper since it was made; "
                "call it anew after every update: ddp = grower.wrap()"
            )
        return super().forward(*inputs, **kwargs)


def here() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    started = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if started else (0, 1)


def gathered(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What every rank of a group has, by rank; all call it."""
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def _bytes(tensor: Tensor) -> Tensor:
    """Contents as uint8 on the host."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def hash_of(values: Iterable[Tensor | str]) -> int:
    """64 bits of BLAKE2 over contents, types and shapes."""
    state = hashlib.blake2b(digest_size=8)
    for value in values:
        if isinstance(value, Tensor):
            state.update(f"{value.dtype}{tuple(value.shape)}".encode())
            state.update(_bytes(value).numpy().data)
        else:
            state.update(value.encode())
    return int.from_bytes(state.digest(), "little", signed=True)

"""Larger batches while the network is small (section 4.4 of the paper).

As many batches at once as fit where the dense network fits with one, at a learning rate as many times higher (the
linear rule of Goyal et al., 2017). The memory of a training step is counted and not measured, so that every machine
takes the same steps. One part of it grows with the batch: what autograd keeps for the backward pass. The other does
not: parameters, their gradients and the optimizer's slots.
"""

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgrow.lab.data import Data
from torchgrow.lab.devices import random_kept
from torchgrow.lab.from_recipe import check_order, make_network
from torchgrow.lab.metrics import scores_of
from torchgrow.lab.recipes import Recipe

SLOTS = {"sgd": 1, "adamw": 2}
"""Numbers that an optimizer keeps of every parameter."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a training step holds, in bytes.

    Attributes:
        fixed: parameters, their gradients and the optimizer's slots.
        sample: what autograd keeps of one sample, from the input to the loss.
    """

    fixed: int
    sample: int

    @classmethod
    def of(cls, model: nn.Module, x: Tensor, slots: int) -> "Memory":
        """That of a network, which is run in evaluation mode and not changed; masks of dropout are left out.

        Args:
            model: on the device of ``x``.
            x: a small batch.
            slots: numbers that the optimizer keeps of every parameter.
        """
        x = x.clone()  # it may be a view of all of a text
        own = {_storage(tensor).data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        kept: dict[int, Tensor] = {}  # held until the end, so that no address comes twice

        def keep(tensor: Tensor) -> Tensor:
            kept.setdefault(_storage(tensor).data_ptr(), tensor)
            return tensor

        training = model.training
        try:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                scores = scores_of(model.eval(), x)[0]  # of a text, or masks, the loss keeps much: every word's classes
                F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.int64, device=scores.device))
        finally:
            model.train(training)
        sample = sum(_storage(tensor).nbytes() for pointer, tensor in kept.items() if pointer not in own)
        return cls(fixed=(2 + slots) * sum(p.nbytes for p in model.parameters()), sample=sample // len(x))


class LargeBatches:
    """How many batches of a recipe go into a step.

    Args:
        model: the network that trains, which may change its structure.
        data: what it trains on.
        recipe: its `largest_batch` bounds a step, and its network at full width says what memory there is.

    Raises:
        TorchgrowError: the network carries a state from batch to batch, so their order is not free.
    """

    def __init__(self, model: nn.Module, data: Data, recipe: Recipe) -> None:
        self._model, self._x, self._batch = model, data.example(), recipe.batch_size
        self._most, self._slots = (recipe.largest_batch or 0) // recipe.batch_size, SLOTS[recipe.optimizer]
        check_order(recipe, type(model))
        self._room = 0
        self._found: tuple[list[torch.Size], int] | None = None
        if self._most > 1:
            with random_kept():  # it is looked at only
                frame = Memory.of(make_network(recipe.build, 1.0, self._x.device), self._x, self._slots)
            self._room = frame.fixed + self._batch * frame.sample

    def at_once(self) -> int:
        """Batches that fit into a step of the network as it is now, at least one."""
        if self._most <= 1:
            return 1
        shapes = self._shapes()
        if self._found is None or self._found[0] != shapes:
            now = Memory.of(self._model, self._x, self._slots)
            fitting = (self._room - now.fixed) // (self._batch * max(1, now.sample))
            self._found = shapes, max(1, min(self._most, fitting))
        return self._found[1]

    def _shapes(self) -> list[torch.Size]:
        return [parameter.shape for parameter in self._model.parameters()]


def merged(
    batches: Iterator[tuple[Tensor, Tensor]], at_once: Callable[[], int], begin: int, ends: Set[int]
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """The batches of an epoch, several at once.

    Args:
        batches: inputs and labels, of an epoch from its start.
        at_once: how many to put together, asked before each.
        begin: how many to leave out.
        ends: counts of batches that none reaches over, so that a run that goes on there takes the same steps.

    Yields:
        how many batches are done after this step, how many of them it holds, and their inputs and labels.
    """
    batches, done = islice(batches, begin, None), begin
    while True:
        room = min((end - done for end in ends if end > done), default=1)
        part = list(islice(batches, min(at_once(), room)))
        if not part:
            return
        done += len(part)
        x, labels = part[0] if len(part) == 1 else map(torch.cat, zip(*part, strict=True))
        yield done, len(part), x, labels


@contextmanager
def faster(optimizer: torch.optim.Optimizer, times: int) -> Iterator[None]:
    """Within it the optimizer's learning rates are so many times higher."""
    before = [group["lr"] for group in optimizer.param_groups]
    _set_rates(optimizer, [times * rate for rate in before])
    try:
        yield
    finally:
        _set_rates(optimizer, before)


def _set_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()

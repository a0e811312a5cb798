"""A search among the structures of a network by gradients, as DARTS and ProxylessNAS do it.

**What is chosen.** Of every group of units one of some shares (the first so many of its units), and of every block that
may be left out whether it is there or its input is handed on. Sources choose between operations of a cell or kernels
and expansions of a block, which a network that is given does not have. Wider choices hold the narrower ones and share
their weights, and units that a skip connection ties are chosen together.

**How.** A gate scales what a unit puts out: the sum of the weights of all options that hold it. With ReLU and
batch norms this is the weighted sum of the options' outputs. A gate never is 0 but `FLOOR`, since a ReLU hands no
gradient to what is exactly 0.

**The end.** The options of largest weight. What they come to is not on the budget, which a search like this cannot
meet: all widths are multiplied by one factor, as sources choose the width of what they have found by what it may cost.
Then from scratch.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torchgrow import Space, policies
from torchgrow.lab.baselines import initialised
from torchgrow.lab.data import ImageData
from torchgrow.lab.hooks import Hooks
from torchgrow.lab.recipes import Recipe
from torchgrow.lab.systems.structure import Structure, folded
from torchgrow.lab.systems.system import Task, UnfitError

FLOOR = 1e-6
"""Of gates."""


class Choices:
    """What may be chosen in a network.

    Args:
        space: its units, n of them.
        shares: of every group, the shares of its units to choose from, in (0, 1].

    Attributes:
        there: bool [C, O], which of O options a choice has; of a block, the first leaves it out, the second does not.
        of: int64 [n], the choice that a unit belongs to; -1 for none.
        alive: float [n, O], 1 where an option has the unit.

    Raises:
        UnfitError: there is nothing to choose.
    """

    def __init__(self, space: Space, shares: Sequence[float]) -> None:
        self.of = torch.full((space.n_units,), -1, dtype=torch.int64)
        self.alive = torch.zeros(space.n_units, max(2, len(shares)))
        options: list[int] = []
        blocks = [block.unit for block in space.blocks]
        for block in space.blocks:
            if block.residual:
                self.of[block.unit], self.alive[block.unit, 1] = len(options), 1.0
                options.append(2)
        for group, least in enumerate(space.least.tolist()):
            units = torch.nonzero(space.group_of == group).flatten()
            widths = sorted({max(least, round(share * len(units))) for share in shares})
            if len(widths) < 2 or int(units[0]) in blocks:
                continue
            units = units[torch.argsort(space.removable[units].int(), stable=True)]  # those that cannot go come first
            for option, width in enumerate(widths):
                self.alive[units[:width], option] = 1.0
            self.of[units] = len(options)
            options.append(len(widths))
        if not options:
            raise UnfitError("a search chooses among widths and blocks, and nothing may go in this network")
        self.there = torch.arange(self.alive.shape[1]) < torch.tensor(options)[:, None]

    def gates(self, weights: Tensor) -> Tensor:
        """Of every unit, float [n], by the weights of the options, float [C, O]: 1 where there is no choice."""
        of, alive = self.of.to(weights.device), self.alive.to(weights)
        return torch.where(of >= 0, (weights[of.clamp(min=0)] * alive).sum(1), 1.0)


def searched(task: Task) -> Structure:
    """What is searched among: the dense network. It is said where only some of the choices come to the budget.

    Raises:
        UnfitError: none of them does.
    """
    whole, limits = Structure(task.network(), task, depth=True), task.limits()
    whole.check(limits)
    least = narrowest(whole)
    if bool((least > limits.tensor()).any()):
        task.say(
            f"with all blocks, one unit wide, the network has {least[0]:,} parameters and {least[1]:,} FLOPs, so "
            f"{task.recipe.budget} is met only where the search leaves blocks out"
        )
    return whole


def narrowest(structure: Structure) -> Tensor:
    """Parameters and FLOPs of a network with all its blocks, one unit a group, int64 [2]."""
    keep = ~structure.space.removable
    keep[[block.unit for block in structure.space.blocks]] = True
    return structure.cost(policies.kit.one_per_group(structure.space, keep, keep.double()))


class Supernet(nn.Module):
    """A network that is all its choices at once, mixed by a softmax over `alpha`, float [C, O].

    Args:
        whole: the network, at full size, and its units.
        shares: see `Choices`.
    """

    def __init__(self, whole: Structure, shares: Sequence[float]) -> None:
        super().__init__()
        self.model, self.whole, self.choices = whole.model, whole, Choices(whole.space, shares)
        device = next(whole.model.parameters()).device
        self.alpha = nn.Parameter((1e-3 * torch.randn(self.choices.there.shape)).to(device))

    def probabilities(self) -> Tensor:
        """Softmax over the options of every choice, float [C, O]."""
        return self.alpha.masked_fill(~self.choices.there.to(self.alpha.device), -math.inf).softmax(1)

    def path(self) -> Tensor:
        """The weights of options, float [C, O], that the network trains and is judged with."""
        return self.probabilities().detach()

    def at(self, weights: Tensor, x: Tensor) -> Tensor:
        """Its output by the weights of options."""
        gates = FLOOR + (1 - FLOOR) * self.choices.gates(weights)
        scores: Tensor = functional_call(self.model, folded(self.model, self.whole.space, gates), (x,))
        return scores

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.at(self.path(), x)


class Searching(Hooks, ABC):
    """A step of `alpha` after steps of the weights.

    Args:
        supernet: the network.
        images: what `alpha` learns from, a random batch a step.
        recipe: batch size, augmentation, seed.
        adam: of `alpha`.
        warm: epochs without.
        every: steps of the weights.
    """

    def __init__(
        self,
        supernet: Supernet,
        images: ImageData,
        recipe: Recipe,
        adam: torch.optim.Adam,
        warm: int = 0,
        every: int = 1,
    ) -> None:
        self.supernet, self.whole, self.images, self.recipe, self.adam = supernet, supernet.whole, images, recipe, adam
        self.warm, self.every = warm, every
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.steps, self.flops = 0, 0
        self.pass_: Iterator[tuple[Tensor, Tensor]] = iter(())
        self.taken, self.before = 0, self.generator.get_state()

    def batch(self) -> tuple[Tensor, Tensor]:
        """The next batch of a pass over the images; a new pass when it is over."""
        found = next(self.pass_, None)
        if found is None:
            self.before, self.taken = self.generator.get_state(), 0
            self.pass_ = self._drawn()
            found = next(self.pass_)
        self.taken += 1
        return found

    def _drawn(self) -> Iterator[tuple[Tensor, Tensor]]:
        recipe = self.recipe
        return self.images.train_batches(
            batch_size=recipe.batch_size, shift=recipe.shift, mirror=recipe.mirror, generator=self.generator
        )

    @abstractmethod
    def step(self, x: Tensor, labels: Tensor) -> int:
        """A step of `alpha` on a batch; returns the FLOPs for one image, backward too."""

    def stepped(self, done: float) -> None:
        """Such a step, if it is its turn."""
        self.steps += 1
        if done <= self.warm or self.steps % self.every:
            return
        x, labels = self.batch()
        self.flops += self.step(x, labels) * len(x)

    def descend(self, loss: Tensor) -> None:
        """A step of Adam; the gradients of weights are left alone."""
        (self.supernet.alpha.grad,) = torch.autograd.grad(loss, self.supernet.alpha)
        self.adam.step()
        self.supernet.alpha.grad = None  # no part of the norm that those of weights are clipped by

    def state_dict(self) -> dict[str, Any]:
        """Beside the network, which has `alpha`."""
        adam, counts = self.adam.state_dict(), {"steps": self.steps, "flops": self.flops, "taken": self.taken}
        return {"adam": adam, "random": self.before, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.adam.load_state_dict(state["adam"])
        self.steps, self.flops, self.taken = state["steps"], state["flops"], state["taken"]
        self.before = state["random"]
        self.generator.set_state(self.before)
        self.pass_ = islice(self._drawn(), self.taken, None) if self.taken else iter(())


def rate(lr: float, published: int, steps: int) -> float:
    """Learning rate of `alpha` in fewer steps than published: larger by the root of their ratio.

    Adam's steps are of like size whatever the gradient, so noise then carries as far as in the source.
    """
    return lr * math.sqrt(max(1.0, published / max(1, steps)))


def chosen(task: Task, supernet: Supernet) -> nn.Module:
    """The network of the options of largest weight, its widths times one factor to the budget, with new weights.

    Raises:
        UnfitError: its blocks do not come to the budget however narrow they are. To leave out more of them would be
            another search than the sources'.
    """
    best = nn.functional.one_hot(supernet.probabilities().argmax(1), supernet.alpha.shape[1]).float()
    keep, whole = supernet.choices.gates(best).cpu() > 0.5, supernet.whole
    blocks = torch.zeros_like(keep)
    blocks[[block.unit for block in whole.space.blocks]] = True
    model = task.network()
    whole.cut(keep | ~blocks, model)
    rest, limits = Structure(model, task), task.limits()
    least = narrowest(rest)
    if bool((least > limits.tensor()).any()):
        raise UnfitError(
            f"the blocks that the search has chosen have {least[0]:,} parameters and {least[1]:,} FLOPs one unit wide, "
            f"more than {task.recipe.budget} allows, and a search like this knows no budget for them; give a larger "
            "--budget, or another --first-seed"
        )
    alive = rest.space.everything()
    for place, units in rest.space.unit_of.items():
        before = whole.space.unit_of.get(place)
        if before is not None and len(before) == len(units):  # of what is left out nothing is left
            owned = (units >= 0) & (before >= 0)
            alive[units[owned]] = keep[before[owned]]
    rest.cut(rest.widened(alive, alive.double(), limits))
    return initialised(model)

"""What a compared system is: phases of training with changes of structure between them, and what all of it costs.

A system is a frozen dataclass whose fields are the constants of its source, with one method: `phases`, a generator.
It yields a `Phase`, which the lab's loop trains, and goes on when that is done: it may cut the network, look at data,
count what that costs (`Task.spend`), and yield the next one. The network of the last phase is what came out.

**Two sums.** *Everything* is all training. *The paper's rule* has the growing and pruning phases only: not the training
of a dense network that a system begins with, and not that of a structure which is final already and is trained from
scratch or on. Fine-tuning after a cut belongs to pruning. Every row lists its phases, so any other sum can be made.

**How long.** Published epochs are scaled to those of the recipe, all in `scaled`. What a system trains from scratch, it
trains as the recipe says, as the dense network is trained; fine-tuning has the source's share of the learning rate.
What has no source is fine-tuned by one rule of the lab, `fine_tuned`.

**Stopped and resumed.** Every phase leaves checkpoints. A command that is given again runs the generator from its
beginning: phases that are done load what they came to and are not trained again, so that cuts between them come out
the same. What happens between phases is done again; NetAdapt, which does much there, keeps what it chose.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from torchgrow import Cost, Grower, Limits, TorchgrowError, measure
from torchgrow.lab.data import Data, ImageData
from torchgrow.lab.from_recipe import make_network
from torchgrow.lab.hooks import Hooks
from torchgrow.lab.metrics import ACCURACY
from torchgrow.lab.recipes import Recipe


class UnfitError(TorchgrowError):
    """A system cannot serve this network or data; the message says why. The row of the comparison says it too."""


@dataclass(kw_only=True)
class Spent:
    """What one part of a system cost.

    Attributes:
        name: of the phase, or of what was done between two.
        counted: whether the paper's rule counts it.
        epochs: of training.
        flops: training FLOPs, as in `torchgrow.lab.train.Epoch`; of forward passes alone 1 x forward FLOPs x samples.
        seconds: of it.
    """

    name: str
    counted: bool = True
    epochs: int = 0
    flops: int = 0
    seconds: float = 0.0


@dataclass(kw_only=True)
class Phase:
    """A training within a system.

    Attributes:
        name: shown beside the system's name.
        model: trained in place.
        recipe: epochs, learning rate and so on of this phase.
        counted: whether the paper's rule counts it.
        hooks: what else is done in it.
        grower: of the model, where it has one.
        optimizer: of the model; None: the recipe's.
        teacher: as for `torchgrow.lab.train.fit`.
        data: what it trains on, if not on the task's.
    """

    name: str
    model: nn.Module
    recipe: Recipe
    counted: bool = True
    hooks: Hooks = field(default_factory=Hooks)
    optimizer: torch.optim.Optimizer | None = None
    grower: Grower | None = None
    teacher: nn.Module | None = None
    data: Data | None = None


@dataclass(kw_only=True)
class Task:
    """What a system is given.

    Attributes:
        recipe: network, training and budget.
        data: what to train on.
        folder: where it leaves what it goes on from.
        trained: gives the trained dense network of the comparison, a new copy at each call.
        say: shows a line of what is done between phases, where that takes long.
        spent: everything so far, in order; phases enter themselves.
        model: the network of the latest phase.
    """

    recipe: Recipe
    data: Data
    folder: Path
    trained: Callable[[], nn.Module] = field(repr=False)
    say: Callable[[str], None] = field(repr=False, default=lambda line: None)
    spent: list[Spent] = field(default_factory=list)
    model: nn.Module | None = None

    def network(self) -> nn.Module:
        """The dense network, initialised."""
        return make_network(self.recipe.build, 1.0, self.data.device)

    def limits(self) -> Limits:
        """The budget in numbers."""
        return self.recipe.budget.limits(self.cost(self.network()))

    def cost(self, model: nn.Module) -> Cost:
        """What a network costs."""
        return measure(model, self.data.example())

    def images(self, who: str) -> ImageData:
        """The data, of a system that needs images and their classes.

        Raises:
            UnfitError: it is a text, or pixels have classes.
        """
        if not isinstance(self.data, ImageData):
            raise UnfitError(f"{who} is written for images, and recipe {self.recipe.name!r} trains on a text")
        if self.data.metric is not ACCURACY:
            raise UnfitError(f"{who} is written for classes of images, and recipe {self.recipe.name!r} trains on masks")
        return self.data

    def spend(self, name: str, flops: int, seconds: float = 0.0, counted: bool = True) -> None:
        """Count what was done between phases."""
        self.spent.append(Spent(name=name, flops=flops, seconds=seconds, counted=counted))

    def sampled(self, images: int, generator: torch.Generator) -> Tensor:
        """So many training images at most, drawn at random, as networks take them: float32 [N, C, H, W]."""
        data = self.images("sampling")
        index = torch.randperm(len(data.train), generator=generator)[:images]
        return data.normalise(data.train[index].pixels)


def held_out(images: ImageData, seed: int) -> ImageData:
    """The training images, a tenth of them held out in the place of the test images."""
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(seed))
    held = max(1, len(order) // 10)
    return replace(images, train=images.train[order[held:]], test=images.train[order[:held]])


class System(Protocol):
    """See the head of this file."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def phases(self, task: Task) -> Iterator[Phase]:
        """Its phases, to be trained one after the other; the network of the last one is the result.

        Raises:
            UnfitError: it cannot serve this network or data.
        """


def as_dense(recipe: Recipe) -> Recipe:
    """The recipe for a training as long as that of the dense network, in one part."""
    return replace(recipe, epochs=recipe.epochs + recipe.then, then=0)


def scaled(published: float, dense: int, recipe: Recipe) -> int:
    """Epochs of a phase: the source's, times those that the dense network trains here over there; at least 2."""
    return max(2, round(published * as_dense(recipe).epochs / dense))


def tuned(recipe: Recipe, epochs: int, share: float, milestones: tuple[float, ...] = ()) -> Recipe:
    """The recipe for fine-tuning: a share of its rate, divided by 10 at milestones (fractions of the epochs)."""
    calmer = replace(recipe, schedule="milestones", warmup=0.0, lr_milestones=milestones, lr_factor=0.1)
    return replace(calmer, epochs=epochs, then=0, lr=share * recipe.lr)


def fine_tuned(recipe: Recipe) -> Recipe:
    """The recipe for fine-tuning where no source says how: half of all epochs, at least 2, a tenth of its rate."""
    return replace(recipe, epochs=max(2, as_dense(recipe).epochs // 2), then=0, lr=0.1 * recipe.lr)

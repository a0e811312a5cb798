"""DARTS, first order: Liu, Simonyan, Yang: Differentiable Architecture Search, ICLR 2019 (arXiv 1806.09055).

Steps and settings: quark0/darts@f276dd3, read and written anew. What is chosen, and how it differs from the source's
cells of operations: `torchgrow.lab.systems.supernet`. Weights train on one half of the training images as the recipe
says; after each step of theirs, alpha takes one on the next batch of the other half. The source has one alpha for all
normal cells; here every choice has its own. Its search is a training to the end, of 50 epochs, and so it is here, of as
many as the recipe has. Steps of alpha are in float32, whatever the recipe's precision. Its evaluation, 600 epochs of a
larger network with cutout and drop-path, is here a training like that of the dense network.
Cost: in every step of the search a pass for weights and one for alpha at dense size; and training from scratch, of a
structure that is final, so the paper's rule leaves it out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from torchgrow import Cost
from torchgrow.lab.data import ImageData, train_steps
from torchgrow.lab.from_recipe import make_optimizer
from torchgrow.lab.systems.supernet import Searching, Supernet, chosen, rate, searched
from torchgrow.lab.systems.system import Phase, Task, as_dense, scaled


class Mixing(Searching):
    """Alpha by the gradient of the other half's loss at the present weights (the source's Eq 7 with xi = 0)."""

    def step(self, x: Tensor, labels: Tensor) -> int:
        """Through the mixture."""
        self.descend(F.cross_entropy(self.supernet.at(self.supernet.probabilities(), x), labels))
        return 3 * self.cost().flops

    def cost(self) -> Cost:
        """Of the dense size, at which everything is mixed."""
        return self.whole.costs.cost(self.whole.space.everything())


def halves(images: ImageData, seed: int) -> tuple[ImageData, ImageData]:
    """The training images in two halves, drawn at random: for weights, and for alpha."""
    first, second = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(seed)).chunk(2)
    return replace(images, train=images.train[first]), replace(images, train=images.train[second])


@dataclass(frozen=True)
class DARTS:
    """The search, then training from scratch.

    Attributes:
        shares: of the units of a group, to choose from; ours.
        epochs: of the search, where the recipe's training has `dense`.
        dense: see there.
        lr: of alpha, in so many `steps`; larger in fewer, see `torchgrow.lab.systems.supernet.rate`.
        steps: see there.
        betas: of Adam.
        decay: weight decay of alpha.
        clip: largest norm of the weights' gradients.
    """

    shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    epochs: int = 50
    dense: int = 50
    lr: float = 3e-4
    steps: int = 19_500
    betas: tuple[float, float] = (0.5, 0.999)
    decay: float = 1e-3
    clip: float = 5.0

    def phases(self, task: Task) -> Iterator[Phase]:
        """Search, and what was found from scratch."""
        own, other = halves(task.images("DARTS"), task.recipe.seed)
        whole = searched(task)
        supernet = Supernet(whole, self.shares)
        epochs = scaled(self.epochs, self.dense, task.recipe)
        recipe = replace(as_dense(task.recipe), epochs=epochs, clip=self.clip)
        lr = rate(self.lr, self.steps, epochs * train_steps(len(own.train), recipe.batch_size))
        adam = torch.optim.Adam([supernet.alpha], lr=lr, betas=self.betas, weight_decay=self.decay)
        mixing = Mixing(supernet, other, recipe, adam)
        weights = make_optimizer(supernet.model, recipe)
        yield Phase(name="search", model=supernet, recipe=recipe, hooks=mixing, optimizer=weights, data=own)
        yield Phase(name="from scratch", model=chosen(task, supernet), recipe=task.recipe, counted=False)

"""ProxylessNAS: Cai, Zhu, Han, ICLR 2019 (arXiv 1812.00332), by gradients.

Steps and settings: mit-han-lab/proxylessnas@bf58b5c, search, in its mode "two", read and written anew. What is chosen,
and how it differs from the source's kernels and expansions: `torchgrow.lab.systems.supernet`. Weights train on paths
that are sampled one a step; alpha learns from a tenth of the training images, which is held out. The source's expected
latency is here the expected cost that is budgeted, FLOPs or parameters, as its option `flops` has it, and the reference
is the budget. Steps of alpha are in float32, whatever the recipe's precision. The source's warm-up has a learning rate
schedule of its own; here one goes over all of the search.
Cost: of the search that of the paths that are sampled (the mean under the probabilities at the beginning of an epoch
for weights, the sampled ones for alpha, of which the inactive one has a forward pass only); and training from scratch,
of a structure that is final, so the paper's rule leaves it out.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from torchgrow import Cost, Limits
from torchgrow.lab.data import ImageData, train_steps
from torchgrow.lab.from_recipe import make_optimizer
from torchgrow.lab.recipes import Recipe
from torchgrow.lab.systems.supernet import Searching, Supernet, chosen, rate, searched
from torchgrow.lab.systems.system import Phase, Task, as_dense, held_out, scaled


def one_hot(option: Tensor, options: int) -> Tensor:
    """Float [C, options] of int64 [C]."""
    return F.one_hot(option, options).float()


class Sampled(Supernet):
    """One path at a time: drawn by the probabilities in training, the likeliest in evaluation."""

    def path(self) -> Tensor:
        """Binary weights of options, float [C, O]."""
        p = self.probabilities().detach()
        return one_hot(torch.multinomial(p, 1).squeeze(1) if self.training else p.argmax(1), p.shape[1])


def pairs(alpha: Tensor, two: Tensor) -> Tensor:
    """Softmax over the two options of every choice that were sampled (bool [C, O]), 0 for the others; float [C, O]."""
    return alpha.masked_fill(~two, -math.inf).softmax(1)


def binarised(p: Tensor, active: Tensor) -> Tensor:
    """Binary gates, float [C, O], that hand their gradients on: d alpha_i = sum over j of g_j p_j (delta_ij - p_i).

    Args:
        p: probabilities by alpha.
        active: one-hot, the path that is taken.
    """
    return (active - p).detach() + p


class Binarising(Searching):
    """Alpha by two sampled paths, one of them active.

    Args:
        supernet: see `Searching`, as those that follow up to `every`.
        images: see there.
        recipe: see there.
        adam: see there.
        warm: see there.
        every: see there.
        limits: the budget: FLOPs, or parameters where they are all that is budgeted.
        factor: alpha of the source's loss, factor x CE x (log E / log budget)^power, with the expected cost E.
        power: beta of it.
    """

    def __init__(
        self,
        supernet: Supernet,
        images: ImageData,
        recipe: Recipe,
        adam: torch.optim.Adam,
        warm: int,
        every: int,
        limits: Limits,
        factor: float,
        power: float,
    ) -> None:
        super().__init__(supernet, images, recipe, adam, warm, every)
        self.which, self.budget = int(limits.flops is not None), float(limits.flops or limits.params or 0)
        self.factor, self.power = factor, power

    def expected(self, p: Tensor) -> Tensor:
        """Mean parameters and FLOPs of a path by the probabilities of options, float64 [2]."""
        gates, space = self.supernet.choices.gates(p).cpu().double(), self.whole.space
        live = torch.zeros(space.n_groups, dtype=torch.float64).index_add(0, space.group_of, gates)
        return self.whole.costs.expected(live)

    def cost(self) -> Cost:
        """Of a path, the mean."""
        params, flops = self.expected(self.supernet.probabilities().detach()).round().long().tolist()
        return Cost(params, flops)

    def flops_of(self, path: Tensor) -> int:
        """FLOPs of one path."""
        return self.whole.costs.cost(self.supernet.choices.gates(path).cpu() > 0.5).flops

    def step(self, x: Tensor, labels: Tensor) -> int:
        """One step; the two options together keep the probability that they had."""
        alpha, p = self.supernet.alpha, self.supernet.probabilities().detach()
        options, there = p.shape[1], self.supernet.choices.there.to(p.device)
        both = torch.multinomial(p + 1e-12 * there, 2)
        two = torch.zeros_like(there).scatter(1, both, True)
        pair = pairs(alpha, two)
        order = torch.multinomial(pair.detach().gather(1, both), 1)  # 0 or 1
        active, passive = (one_hot(both.gather(1, at).squeeze(1), options) for at in (order, 1 - order))
        loss = F.cross_entropy(self.supernet.at(binarised(pair, active), x), labels)
        excess = self.expected(pair)[self.which].log() / math.log(self.budget)
        before = alpha.detach().clone()
        self.descend(self.factor * loss * (excess**self.power).to(loss))
        with torch.no_grad():
            then, now = (a.masked_fill(~two, -math.inf).logsumexp(1, keepdim=True) for a in (before, alpha))
            alpha.sub_((now - then) * two)
        return 3 * self.flops_of(active) + self.flops_of(passive)


@dataclass(frozen=True)
class ProxylessNAS:
    """The search, then training from scratch.

    Attributes:
        shares: of the units of a group, to choose from; ours.
        epochs: of the search, where the recipe's training has `dense`.
        warm: of these, before alpha learns.
        dense: see `epochs`.
        every: steps of weights for one of alpha.
        lr: of alpha, in so many `steps`; larger in fewer, see `torchgrow.lab.systems.supernet.rate`.
        steps: see there.
        betas: of Adam.
        factor: see `Binarising`.
        power: see there.
    """

    shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    epochs: int = 160
    warm: int = 40
    dense: int = 300
    every: int = 5
    lr: float = 1e-3
    steps: int = 115_000
    betas: tuple[float, float] = (0.0, 0.999)
    factor: float = 0.2
    power: float = 0.3

    def phases(self, task: Task) -> Iterator[Phase]:
        """Search, and what was found from scratch."""
        images, limits = task.images("ProxylessNAS"), task.limits()
        split = held_out(images, task.recipe.seed)
        own, other = replace(images, train=split.train), replace(images, train=split.test)
        whole = searched(task)
        supernet = Sampled(whole, self.shares)
        epochs = scaled(self.epochs, self.dense, task.recipe)
        warm = round(epochs * self.warm / self.epochs)
        recipe = replace(as_dense(task.recipe), epochs=epochs)
        steps = (epochs - warm) * train_steps(len(own.train), recipe.batch_size) // self.every
        adam = torch.optim.Adam([supernet.alpha], lr=rate(self.lr, self.steps, steps), betas=self.betas)
        binarising = Binarising(
            supernet,
            other,
            replace(recipe, shift=0, mirror=False),
            adam,
            warm,
            self.every,
            limits,
            self.factor,
            self.power,
        )
        weights = make_optimizer(supernet.model, recipe)
        yield Phase(name="search", model=supernet, recipe=recipe, hooks=binarising, optimizer=weights, data=own)
        yield Phase(name="from scratch", model=chosen(task, supernet), recipe=task.recipe, counted=False)

"""NetAdapt: Yang, Howard, Chen, Zhang, Go, Sandler, Sze, Adam, ECCV 2018 (arXiv 1804.03230).

Steps: denru01/netadapt@248ae1c, on FLOPs, or on parameters where they are all that is budgeted. The source's
reductions add up to 62.5 % of the network; for a budget below what `most` steps of them reach, the first is made
larger. Widths are multiples of 8, of groups below 64 units of an eighth. Accuracy is judged on a tenth of the training
images, which are held out. The search never goes below the budget: its last step is a cut of filters of the least L2
norm, the same share of every group, that uses the budget exactly. The search is one stretch between two phases: a
command that is stopped in it begins the search again.
Cost: the dense training (which the paper's rule leaves out); for every step and every group a short training and an
evaluation (forward passes, counted); and fine-tuning for as long as the dense training.
"""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgrow import guard_, policies
from torchgrow.lab.data import ImageData
from torchgrow.lab.from_recipe import make_optimizer
from torchgrow.lab.systems.structure import Structure
from torchgrow.lab.systems.system import Phase, Task, held_out, scaled, tuned
from torchgrow.lab.train import evaluate


def targets(first: float, budget: float, ratio: float, decay: float, most: int) -> list[float]:
    """What may be left after every step: target_i = target_{i-1} - ratio x first x decay^(i-1), down to the budget.

    Args:
        first: the cost of the network.
        budget: what may be left in the end.
        ratio: the first reduction as a share; a larger one where so many steps do not reach the budget.
        decay: of the reductions.
        most: steps.
    """
    reach = first * (1 - decay**most) / (1 - decay)
    ratio, found, now = max(ratio, (first - budget) / reach), list[float](), first
    while now > budget * (1 + 1e-12):
        now = max(budget, now - ratio * first * decay ** len(found))
        found.append(now)
    return found


def candidates(
    cost: Callable[[Tensor], float], live: Tensor, least: Tensor, multiples: Tensor, target: float
) -> list[tuple[int, int]]:
    """For every group that alone can meet the target the largest multiple that does: (group, width).

    Args:
        cost: of a network by the widths of its groups.
        live: int64 [G], widths now.
        least: int64 [G], what cannot go.
        multiples: int64 [G].
        target: what the network may cost.
    """
    found = []
    for group, (now, step) in enumerate(zip(live.tolist(), multiples.tolist(), strict=True)):
        for width in range((now - 1) // step * step, max(1, int(least[group])) - 1, -step):
            tried = live.clone()
            tried[group] = width
            if cost(tried) <= target:
                found.append((group, width))
                break
    return found


@dataclass(frozen=True)
class NetAdapt:
    """The search, then fine-tuning.

    Attributes:
        ratio: the first reduction, as a share of the first cost.
        decay: of the reductions, from step to step.
        most: steps that have to do.
        multiple: of widths.
        short: steps of training of every candidate.
        lr: of all training after the dense one, as a share of the recipe's.
        epochs: of fine-tuning, where the dense training has `dense`.
        dense: see there.
    """

    ratio: float = 0.025
    decay: float = 0.96
    most: int = 40
    multiple: int = 8
    short: int = 10
    lr: float = 0.01
    epochs: int = 150
    dense: int = 150

    def phases(self, task: Task) -> Iterator[Phase]:
        """Fine-tuning of what the search has found."""
        images, limits = task.images("NetAdapt"), task.limits()
        split = held_out(images, task.recipe.seed)
        model, start = task.trained(), time.perf_counter()
        which = int(limits.flops is not None)
        whole = Structure(model, task)
        first = float(whole.cost(whole.space.everything())[which])
        budget = float((limits.flops if which else limits.params) or 0)
        flops = 0
        for target in targets(first, budget, self.ratio, self.decay, self.most)[:-1]:
            best, spent = self._step(model, task, split, (budget, target), which)
            flops += spent
            if best is None:
                break
            model = best
        whole = Structure(model, task)
        whole.cut(whole.within(whole.scores(policies.importance.l2), limits))
        task.spend("search", flops, time.perf_counter() - start)
        epochs = scaled(self.epochs, self.dense, task.recipe)
        recipe = tuned(task.recipe, epochs, self.lr, (1 / 3, 2 / 3))
        yield Phase(name="fine-tuning", model=model, recipe=recipe)

    def _step(
        self, model: nn.Module, task: Task, split: ImageData, span: tuple[float, float], which: int
    ) -> tuple[nn.Module | None, int]:
        """The candidate of best accuracy between budget and target, and what all cost; None where there is none."""
        whole = Structure(model, task)
        live = whole.costs.live(whole.space.everything())

        def cost(widths: Tensor) -> float:
            return float(whole.costs.both(widths)[which])

        if cost(live) <= span[1]:
            return model, 0
        multiples = torch.minimum((live // 8).clamp(min=1), torch.full_like(live, self.multiple))
        places = whole.places(whole.scores(policies.importance.l2))
        best, score, flops = None, -1.0, 0
        for group, width in candidates(cost, live, whole.space.least, multiples, span[1]):
            beyond = (whole.space.group_of == group) & (places * int(live[group]) > width + 0.5)
            keep = ~(beyond & whole.space.removable)
            if float(whole.cost(keep)[which]) < span[0]:
                continue
            twin = copy.deepcopy(model)
            whole.cut(keep, twin)
            flops += self._train(twin, task, split)
            accuracy = evaluate(twin, split)[0]
            flops += task.cost(twin).flops * len(split.test)
            if accuracy > score:
                best, score = twin, accuracy
        return best, flops

    def _train(self, model: nn.Module, task: Task, split: ImageData) -> int:
        """Train a candidate for a few steps; returns the training FLOPs."""
        recipe = replace(task.recipe, lr=self.lr * task.recipe.lr)
        guard_(model)
        optimizer, seen = make_optimizer(model.train(), recipe), 0
        generator = torch.Generator().manual_seed(recipe.seed)
        while seen < self.short:
            drawn = split.train_batches(
                batch_size=recipe.batch_size, shift=recipe.shift, mirror=recipe.mirror, generator=generator
            )
            for x, labels in islice(drawn, self.short - seen):
                optimizer.zero_grad()
                F.cross_entropy(model(x), labels).backward()
                optimizer.step()
                seen += 1
        return 3 * task.cost(model).flops * min(recipe.batch_size, len(split.train)) * seen

"""NetAdapt: Yang, Howard, Chen, Zhang, Go, Sandler, Sze, Adam, ECCV 2018 (arXiv 1804.03230).

Steps: denru01/netadapt@248ae1c, on FLOPs, or on parameters where they are all that is budgeted. The source's reductions
add up to 62.5 % of the network; for a budget below what `most` steps of them reach, the first is made larger. Widths
are multiples of 8, of groups that begin below 64 units of an eighth of them. Of the source's two numbers of steps of a
short training, 10 and 500, it is 10, at the rate of its long one. Accuracy is judged on a tenth of the training images,
which are held out. The search never goes below the budget: its last step is a cut of filters of the least L2 norm, the
same share of every group, to within the budget. Units that the search cut do not come back to fill it up, so the
network ends a little below it, further where one unit is a large share of the network. What every step chose is kept
with the run: a command that was stopped in the search trains the chosen candidates again, one a step, and no other.
Short trainings know neither the recipe's limit of gradients (`clip`) nor its precision: they are in float32.
Cost: the dense training (which the paper's rule leaves out); for every step and every group a short training and an
evaluation (forward passes, counted); and fine-tuning for as long as the dense training.
"""

import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgrow import guard_, policies
from torchgrow.lab.checkpoints import write_whole
from torchgrow.lab.data import ImageData
from torchgrow.lab.devices import random_state, set_random_state
from torchgrow.lab.from_recipe import make_optimizer
from torchgrow.lab.systems.structure import Structure
from torchgrow.lab.systems.system import Phase, Task, held_out, scaled, tuned
from torchgrow.lab.train import evaluate

SEARCH = "search.json"
"""The steps of the search so far, beside the checkpoints of the phases."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step of the search came to.

    Attributes:
        group: number of the group that lost units.
        width: what it has left.
        accuracy: of the chosen candidate after its short training, %.
        flops: of all candidates of the step.
        seconds: likewise.
    """

    group: int
    width: int
    accuracy: float
    flops: int
    seconds: float


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
        parts: of what a group begins with, widths are multiples of one where that is less.
        short: steps of training of every candidate.
        lr: of all training after the dense one, as a share of the recipe's.
        epochs: of fine-tuning, where the dense training has `dense`.
        dense: see there.
    """

    ratio: float = 0.025
    decay: float = 0.96
    most: int = 40
    multiple: int = 8
    parts: int = 8
    short: int = 10
    lr: float = 0.01
    epochs: int = 150
    dense: int = 150

    def phases(self, task: Task) -> Iterator[Phase]:
        """Fine-tuning of what the search has found."""
        split, before = held_out(task.images("NetAdapt"), task.recipe.seed), random_state()
        model, steps = self.search(task, split)
        set_random_state(before)  # a search that goes on from its records draws fewer
        whole = Structure(model, task)
        whole.cut(whole.within(whole.scores(policies.importance.l2), task.limits()))
        task.spend("search", sum(step.flops for step in steps), sum(step.seconds for step in steps))
        epochs = scaled(self.epochs, self.dense, task.recipe)
        recipe = tuned(task.recipe, epochs, self.lr, (1 / 3, 2 / 3))
        yield Phase(name="fine-tuning", model=model, recipe=recipe)

    def search(self, task: Task, split: ImageData) -> tuple[nn.Module, list[Step]]:
        """The network before its last cut, and the steps that led to it."""
        limits, path = task.limits(), task.folder / SEARCH
        which = int(limits.flops is not None)
        budget = float((limits.flops if which else limits.params) or 0)
        whole = Structure(task.trained(), task)
        first = float(whole.cost(whole.space.everything())[which])
        widths = whole.widths()
        goals = targets(first, budget, self.ratio, self.decay, self.most)[:-1]
        known = [Step(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []
        steps = list[Step]()
        for number, target in enumerate(goals, 1):
            if float(whole.cost(whole.space.everything())[which]) <= target:
                continue
            tried = self._tried(whole, self._multiples(whole, widths), (budget, target), which)
            if not tried:
                break
            step = known[len(steps)] if len(steps) < len(known) else None
            if step and (step.group, step.width) in tried:
                model = self.trained(whole, tried[step.group, step.width], task, split)[0]
            else:
                known = []  # an earlier version may have taken multiples of another group from here on
                model, step = self._best(whole, tried, task, split)
                write_whole(path, json.dumps([asdict(one) for one in [*steps, step]]))
                task.say(
                    f"step {number} of {len(goals)} of the search: {whole.space.group_names[step.group]} has "
                    f"{step.width} left, {step.accuracy:.2f} % of the images held out, {step.seconds:.0f} s"
                )
            steps.append(step)
            whole = Structure(model, task)
        return whole.model, steps

    def _multiples(self, whole: Structure, first: dict[str, int]) -> Tensor:
        """Of the widths of all groups, int64 [G].

        Args:
            whole: the network as it is now, traced anew: a group that is down to one unit is no group any more.
            first: by the group's name, what it began with.
        """
        now = whole.widths()
        found = [min(self.multiple, max(1, first.get(name, width) // self.parts)) for name, width in now.items()]
        return torch.tensor(found, dtype=torch.int64)

    def _tried(
        self, whole: Structure, multiples: Tensor, span: tuple[float, float], which: int
    ) -> dict[tuple[int, int], Tensor]:
        """The structures (bool [n]) between budget and target that a step tries, by group and width."""

        def cost(widths: Tensor) -> float:
            return float(whole.costs.both(widths)[which])

        live = whole.costs.live(whole.space.everything())
        places, found = whole.places(whole.scores(policies.importance.l2)), dict[tuple[int, int], Tensor]()
        for group, width in candidates(cost, live, whole.space.least, multiples, span[1]):
            beyond = (whole.space.group_of == group) & (places * int(live[group]) > width + 0.5)
            keep = ~(beyond & whole.space.removable)
            if float(whole.cost(keep)[which]) >= span[0]:
                found[group, width] = keep
        return found

    def _best(
        self, whole: Structure, tried: dict[tuple[int, int], Tensor], task: Task, split: ImageData
    ) -> tuple[nn.Module, Step]:
        """The candidate of best accuracy, the first of equals, and what all cost."""
        start, flops, found = time.perf_counter(), 0, list[tuple[float, int, int, nn.Module]]()
        for (group, width), keep in tried.items():
            model, spent = self.trained(whole, keep, task, split)
            accuracy = evaluate(model, split)[0]
            flops += spent + task.cost(model).flops * len(split.test)
            if not found or accuracy > found[0][0]:
                found = [(accuracy, group, width, model)]
        accuracy, group, width, model = found[0]
        seconds = time.perf_counter() - start
        return model, Step(group=group, width=width, accuracy=accuracy, flops=flops, seconds=seconds)

    def trained(self, whole: Structure, keep: Tensor, task: Task, split: ImageData) -> tuple[nn.Module, int]:
        """A candidate after a few steps of training, on the same batches as every other, and the training FLOPs."""
        model, recipe = copy.deepcopy(whole.model), replace(task.recipe, lr=self.lr * task.recipe.lr)
        whole.cut(keep, model)
        guard_(model)
        torch.manual_seed(recipe.seed)
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
        return model, 3 * task.cost(model).flops * min(recipe.batch_size, len(split.train)) * seen

"""AutoGrow: Wen, Yan, Chen, Li, KDD 2020 (arXiv 1906.02909): periodic growth.

Steps: wenwei202/autogrow@4435ee0, read and written anew. Blocks have the frame's width and their number is at most the
frame's; the source grows on, here for as long as the dense training at most. Accuracy is judged on a tenth of the
training images, which are held out. The source knows no budget: what growth leaves above it, one cut takes before the
last training, the same share of every group, filters of the least L1 norm; what lies below it stays below.
Cost: epochs of growth at the sizes that there are, the evaluation after each (forward passes), and the last training
for as long as the dense one. The last training is of a structure that is final, so the paper's rule leaves it out; not
so after a cut.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchgrow import Bank, Cost, policies
from torchgrow.lab.data import ImageData
from torchgrow.lab.from_recipe import make_optimizer
from torchgrow.lab.hooks import Hooks
from torchgrow.lab.systems.structure import Structure
from torchgrow.lab.systems.system import Phase, Task, UnfitError, as_dense, held_out, scaled, tuned
from torchgrow.lab.train import evaluate


class Turns:
    """Which stage grows next, by a list of accuracies.

    Every `period` epochs the next stage that still grows gets a block. A stage stops when the running maximum of
    accuracy rose by less than `rise` since its last block came, or when it has no block left.

    Args:
        spare: blocks that every stage may still get.
        period: epochs between blocks.
        rise: points of accuracy.
    """

    def __init__(self, spare: Sequence[int], period: int, rise: float) -> None:
        self.spare, self.period, self.rise = list(spare), period, rise
        self.stopped = [False] * len(self.spare)
        self.epochs, self.last, self.best, self.before = 0, -1, 0.0, 0.0

    @property
    def over(self) -> bool:
        """Whether no stage grows any more."""
        return all(stopped or not left for stopped, left in zip(self.stopped, self.spare, strict=True))

    def step(self, accuracy: float) -> int | None:
        """After an epoch of this accuracy (%): the stage that gets a block now, if any."""
        self.epochs, self.best = self.epochs + 1, max(self.best, accuracy)
        if self.epochs % self.period:
            return None
        if self.last >= 0 and self.best - self.before < self.rise:
            self.stopped[self.last] = True
        stages = len(self.spare)
        for stage in ((self.last + 1 + k) % stages for k in range(stages)):
            if self.spare[stage] and not self.stopped[stage]:
                self.spare[stage] -= 1
                self.last, self.before = stage, self.best
                return stage
        return None

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain data."""
        return {key: list(value) if isinstance(value, list) else value for key, value in vars(self).items()}


class Growing(Hooks):
    """Blocks that come in while the network trains.

    Args:
        model: the frame, at full size; is cut to one block a stage, or what cannot go.
        optimizer: its optimizer, whose state is kept.
        task: with the data to trace on.
        judge: images to train on, and those held out.
        period: see `Turns`.
        rise: see `Turns`.
        std: of the Gaussian that the last batch norm's weights of a new block are drawn from.

    Raises:
        UnfitError: the network has no block that may be left out.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        task: Task,
        judge: ImageData,
        period: int,
        rise: float,
        std: float,
    ) -> None:
        self.model, self.judge, self.std = model, judge, std
        self.whole = Structure(model, task, depth=True)
        self.generator = torch.Generator().manual_seed(task.recipe.seed)
        self.keep = self.whole.space.everything()
        self.asleep: dict[str, list[int]] = {}
        for block in self.whole.space.blocks:
            self.asleep.setdefault(block.stage, []).append(block.unit)
        if not self.asleep:
            raise UnfitError("AutoGrow adds blocks, and this network has none that may be left out")
        for units in self.asleep.values():
            self.keep[units] = False
        self.flops = 0
        self.bank = Bank(model, self.whole.space, optimizer)
        self.bank.resize_(self.keep)
        self.turns = Turns([len(units) for units in self.asleep.values()], period, rise)

    @property
    def over(self) -> bool:  # type: ignore[override]
        """Whether no stage grows any more."""
        return self.turns.over

    def ended(self, epoch: int) -> None:
        """A block more in the stage whose turn it is."""
        self.flops += self.cost().flops * len(self.judge.test)
        stage = self.turns.step(evaluate(self.model, self.judge)[0])
        if stage is None:
            return
        unit = next(unit for unit in list(self.asleep.values())[stage] if not self.keep[unit])
        self.keep[unit] = True
        self.bank.resize_(self.keep)
        paths = next(block.modules for block in self.whole.space.blocks if block.unit == unit)
        norms = [
            module
            for path in paths
            for module in self.model.get_submodule(path).modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        if norms:
            drawn = torch.randn(norms[-1].weight.shape, generator=self.generator) * self.std
            with torch.no_grad():
                norms[-1].weight.copy_(drawn)

    def cost(self) -> Cost:
        """Of the blocks that are there."""
        return self.whole.costs.cost(self.keep)

    def depths(self) -> dict[str, int]:
        """Blocks of every stage."""
        return self.whole.depths(self.keep)

    def state_dict(self) -> dict[str, Any]:
        """Blocks, turns, random numbers, and what judging has cost."""
        random = self.generator.get_state()
        return {"keep": self.keep, "turns": self.turns.state_dict(), "random": random, "flops": self.flops}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Bring the blocks in before the network is loaded."""
        keep: Tensor = state["keep"]
        self.keep = keep.clone()
        self.bank.resize_(self.keep)
        vars(self.turns).update(state["turns"])
        self.generator.set_state(state["random"])
        self.flops = state["flops"]


class Grown(Hooks):
    """A network that keeps the blocks it has.

    Args:
        depths: of every stage.
    """

    def __init__(self, depths: dict[str, int]) -> None:
        self._depths = depths

    def depths(self) -> dict[str, int]:
        """As they were given."""
        return self._depths


@dataclass(frozen=True)
class AutoGrow:
    """Growth, then the last training.

    Attributes:
        period: epochs between blocks (the source's p-AutoGrow has 3, where its last training has `dense`).
        rise: points of accuracy that a block must bring.
        std: of new blocks' last batch norm weights.
        epochs: of the last training.
        dense: as many epochs stand for the recipe's.
    """

    period: int = 3
    rise: float = 0.05
    std: float = 1.0
    epochs: int = 200
    dense: int = 200

    def phases(self, task: Task) -> Iterator[Phase]:
        """Growth at a constant learning rate, at most as long as the dense training; then the last training."""
        judge, limits = held_out(task.images("AutoGrow"), task.recipe.seed), task.limits()
        model = task.network()
        constant = replace(as_dense(task.recipe), schedule="milestones", lr_milestones=(), warmup=0.0)
        optimizer = make_optimizer(model, constant)
        period = max(1, round(self.period * constant.epochs / self.dense))
        growing = Growing(model, optimizer, task, judge, period, self.rise, self.std)
        inner = replace(task.images("AutoGrow"), train=judge.train)
        yield Phase(name="growth", model=model, recipe=constant, hooks=growing, optimizer=optimizer, data=inner)
        whole = Structure(model, task)
        above = bool((whole.cost(whole.space.everything()) > limits.tensor()).any())
        if above:
            whole.cut(whole.within(whole.scores(policies.importance.l1), limits))
        recipe = tuned(task.recipe, scaled(self.epochs, self.dense, task.recipe), 1.0, (0.5, 0.75))
        last = Grown(growing.depths())
        yield Phase(name="last training", model=model, recipe=recipe, hooks=last, counted=above)

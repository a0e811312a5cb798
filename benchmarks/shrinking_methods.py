"""The ways of shrinking.py to bring a trained network within a budget: what each is given, and what it does when.

A method is text: a name, settings behind a colon, and `+distil` at the end where the trained network teaches.

- `tp-l1`, `tp-taylor`: Torch-Pruning's one-shot pruning by the L1 norm of filters, or by first-order Taylor terms
  (Molchanov et al., 2019) of `batches` batches. `global=True` ranks the units of all layers together.
- `tp-group`: Torch-Pruning's group norms with sparse learning (Fang et al., 2023): for the first `share` of the
  allowance the network has full size and a growing penalty `reg` on groups of small norm, then it is cut.
- `uniform`: the network narrowed uniformly to the budget, from scratch.
- `cubic`: units go by their place in a layer, whatever their weights, along the course of cost that `shrink` has.
- anything else is a preset of `torchgrow.Grower`, which starts with the whole network. `every` steps lie between
  updates; 16 updates an epoch, where that is not said. With `depth=True` layers go too.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgrow import Cost, Grower, Limits, TorchgrowError, guard_, measure, measure_rises, policies
from torchgrow.lab.baselines import twin_width
from torchgrow.lab.data import ImageData, train_steps
from torchgrow.lab.from_recipe import make_optimizer
from torchgrow.lab.recipes import Recipe
from torchgrow.policies import Policy, Shrink, View, kit

OFTEN = 16
"""Updates of a grower in an epoch."""
UNTIL, POWER = Shrink().until, Shrink().power
"""Share of the updates in which a grower's planned cost falls, and how, where the method does not say."""
FEW = 8
"""Batches on which it is measured what the loss rises by."""
UNIFORM_LR = 0.1


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a method is given.

    Attributes:
        data: training images, and those held out in the place of test images.
        recipe: how the trained network was trained, with the learning rate of fine-tuning and the budget.
        base: the trained network, to be copied.
        epochs: of fine-tuning a network that is exactly at the budget.
        base_epochs: of training the base.
    """

    data: ImageData
    recipe: Recipe
    base: nn.Module
    epochs: int
    base_epochs: int

    @property
    def samples(self) -> int:
        """Images of a step."""
        return min(self.recipe.batch_size, len(self.data.train))

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return train_steps(len(self.data.train), self.recipe.batch_size)

    def epoch_flops(self, flops: int) -> int:
        """Training FLOPs of an epoch of a network with this many forward FLOPs: 3 x forward x images."""
        return 3 * flops * self.samples * self.steps

    def cost(self, model: nn.Module) -> Cost:
        """What a network costs."""
        return measure(model, self.data.example())

    @cached_property
    def limits(self) -> Limits:
        """The budget in numbers."""
        return self.recipe.budget.limits(self.cost(self.base))

    def fits(self, cost: Cost) -> bool:
        """Whether a cost is within the budget."""
        limits = self.limits
        return cost.params <= (limits.params or cost.params) and cost.flops <= (limits.flops or cost.flops)

    def narrow(self) -> nn.Module:
        """The network narrowed uniformly to the budget, from scratch."""
        params, flops = self.limits.params or 0, self.limits.flops or 0
        return self.recipe.build(twin_width(self.recipe, self.data, params=params, flops=flops))

    def budget_flops(self) -> int:
        """Forward FLOPs of a network at the budget; those of the uniform one where parameters are what is limited."""
        return self.limits.flops or self.cost(self.narrow()).flops

    def allowance(self) -> int:
        """Training FLOPs that fine-tuning may spend."""
        return self.epochs * self.epoch_flops(self.budget_flops())


class Shrinker:
    """A network on its way to the budget, and its optimizer; this one stays as it is.

    Args:
        task: as the method is given it.
        model: to be trained.
        spent: training FLOPs that making it took, of the allowance.

    `updates` of the structure are planned.
    """

    def __init__(self, task: Task, model: nn.Module, spent: int = 0) -> None:
        self.task, self.spent, self.updates = task, spent, 0
        self.adopt(model)

    def adopt(self, model: nn.Module, recipe: Recipe | None = None) -> None:
        """Go on with this network and a new optimizer."""
        guard_(model)
        self.model, self.optimizer = model, make_optimizer(model, recipe or self.task.recipe)
        self._cost = self.task.cost(model)

    def cost(self) -> Cost:
        """What the network costs now."""
        return self._cost

    def regularise(self) -> None:
        """Change gradients, between the backward pass and the optimizer's step."""

    def update(self, step: int, progress: float) -> None:
        """Change the structure if it is time to, after so many steps and this share of the allowance."""

    def finish(self) -> None:
        """Be within the budget."""


# --- Torch-Pruning ---


def score(task: Task, model: nn.Module, criterion: str, batches: int) -> Any:
    """An importance of Torch-Pruning; Taylor's wants gradients, which the model is given."""
    import torch_pruning

    if criterion == "l1":
        return torch_pruning.importance.MagnitudeImportance(p=1)
    if criterion == "group":
        return torch_pruning.importance.GroupMagnitudeImportance(p=2)
    model.zero_grad()
    model.eval()  # statistics stay as they are
    generator = torch.Generator().manual_seed(task.recipe.seed)
    drawn = task.data.train_batches(
        batch_size=task.recipe.batch_size, shift=task.recipe.shift, mirror=task.recipe.mirror, generator=generator
    )
    for x, labels in islice(drawn, batches):
        F.cross_entropy(model(x), labels).backward()
    return torch_pruning.importance.TaylorImportance()


def with_gradients(model: nn.Module) -> nn.Module:
    """A copy that has the gradients too."""
    twin = copy.deepcopy(model)
    for new, old in zip(twin.parameters(), model.parameters(), strict=True):
        new.grad = None if old.grad is None else old.grad.clone()
    return twin


def classifier(model: nn.Module) -> list[nn.Linear]:
    """The last linear layer, whose outputs stay."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]


def cut(
    model: nn.Module, example: Any, fits: Callable[[Cost], bool], importance: Any, everywhere: bool = False
) -> nn.Module:
    """A copy pruned by Torch-Pruning to the largest network that fits, its ratio found by bisection.

    Raises:
        TorchgrowError: none fits.
    """
    import torch_pruning

    low, high = 0.0, 1.0
    best: nn.Module | None = None
    for _ in range(11):  # finer than one channel of all of them
        middle = (low + high) / 2
        pruned = with_gradients(model)
        torch_pruning.pruner.BasePruner(
            pruned,
            example,
            importance,
            pruning_ratio=middle,
            global_pruning=everywhere,
            ignored_layers=classifier(pruned),
        ).step()
        if fits(measure(pruned, example)):
            best, high = pruned, middle
        else:
            low = middle
    if best is None:
        raise TorchgrowError("no pruning ratio brings the network within the budget")
    best.zero_grad()
    return best


class Sparse(Shrinker):
    """Group norms with sparse learning: full size and a penalty for a share of the allowance, then one cut.

    Weights do not decay while the penalty acts, as in Torch-Pruning's own benchmark.
    """

    def __init__(self, task: Task, share: float, reg: float, everywhere: bool) -> None:
        import torch_pruning

        super().__init__(task, copy.deepcopy(task.base))
        self.adopt(self.model, replace(task.recipe, weight_decay=0.0))
        self.share, self.everywhere, self.sparse = share, everywhere, True
        self.importance = score(task, self.model, "group", 0)
        self.pruner = torch_pruning.pruner.GroupNormPruner(
            self.model, task.data.example(), self.importance, reg=reg, ignored_layers=classifier(self.model)
        )

    def regularise(self) -> None:
        """The penalty's gradient."""
        if self.sparse:
            self.pruner.regularize(self.model)

    def update(self, step: int, progress: float) -> None:
        """Cut once the share is spent."""
        if self.sparse and progress >= self.share:
            self.finish()

    def finish(self) -> None:
        """Cut, if that has not happened; momentum begins anew."""
        if self.sparse:
            self.sparse = False
            self.optimizer.zero_grad()
            task = self.task
            self.adopt(cut(self.model, task.data.example(), task.fits, self.importance, self.everywhere))


# --- ours ---


@dataclass(eq=False)
class Cubic(Policy):
    """The same share of every group goes, by place alone, while the cost falls by the cube of the time left."""

    until: float = UNTIL

    def seed(self, view: View) -> Tensor:
        """The whole network."""
        self.rank = kit.spread(view)
        return view.space.everything()

    def update(self, view: View) -> tuple[Tensor, bool]:
        """As many units as the planned cost allows."""
        frame = view.cost(view.space.everything())
        allowed = view.limits.minimum(frame)
        left = course(view.update, view.updates, self.until)
        allowed = allowed + ((frame - allowed) * left).long()

        def keep_at(share: float) -> Tensor:
            return kit.one_per_group(view.space, self.rank < share, -self.rank)

        return keep_at(kit.largest_share(view, self.rank, keep_at, allowed)), left == 0

    def score(self, view: View) -> Tensor:
        """Who stays first when the grower trims."""
        return -self.rank


def course(update: int, updates: int, until: float, power: float = POWER) -> float:
    """How far the planned cost is from the budget after an update, as a share of where it began."""
    final = max(1, min(updates - 1, math.ceil(until * updates)))
    return float(max(0.0, 1 - update / final) ** power)


def planned_updates(task: Task, every: int, teaching: int, until: float, power: float = POWER) -> int:
    """The number of updates whose steps, at the planned costs, spend the allowance.

    Args:
        task: says the allowance and the costs.
        every: steps between updates.
        teaching: forward FLOPs of a teacher, for one sample.
        until: share of the updates in which the cost falls.
        power: of the time left, that it falls with.
    """
    full, least, allowance = task.cost(task.base).flops, task.budget_flops(), task.allowance()

    def spent(updates: int) -> float:
        costs = (least + (full - least) * course(update, updates, until, power) for update in range(updates))
        return every * task.samples * sum(3 * cost + teaching for cost in costs)

    updates = 2
    while spent(updates + 1) <= allowance:
        updates += 1
    return updates


class Grown(Shrinker):
    """Ours: a grower that starts with the whole trained network, updated every few steps."""

    def __init__(self, task: Task, preset: str, settings: dict[str, str], distilled: bool) -> None:
        model = copy.deepcopy(task.base)
        super().__init__(task, model)
        self.every = int(settings.pop("every", max(1, round(task.steps / OFTEN))))
        depth = settings.pop("depth", "False") == "True"
        measured = settings.get("allocation") == "measured" and bool(settings.pop("allocation"))
        until, power = float(settings.get("until", UNTIL)), float(settings.get("power", POWER))
        self.updates = planned_updates(task, self.every, self._cost.flops if distilled else 0, until, power)
        how: dict[str, Any] = {"policy": Cubic(until=until)}
        if preset != "cubic":
            text = ",".join(f"{name}={value}" for name, value in settings.items())
            how = {"preset": f"{preset}:{text}" if text else preset}
        if measured:
            plain = policies.named(how["preset"])
            assert isinstance(plain, Shrink)
            how = {"policy": replace(plain, allocation="measured", rises=self._rises(depth))}
        self.grower = Grower(
            model,
            self.optimizer,
            example_inputs=task.data.example(),
            budget=task.recipe.budget,
            updates=self.updates,
            start="frame",
            depth=depth,
            seed=task.recipe.seed,
            **how,
        )

    def _rises(self, depth: bool) -> dict[str, float]:
        """How much the loss rises without a tenth of each group, on a few training batches; counted."""
        task = self.task
        generator = torch.Generator().manual_seed(task.recipe.seed)
        drawn = task.data.train_batches(batch_size=task.recipe.batch_size, shift=0, mirror=False, generator=generator)
        batches = list(islice(drawn, FEW))

        def loss(model: nn.Module) -> float:
            return sum(F.cross_entropy(model(x), labels).item() for x, labels in batches) / len(batches)

        rises = measure_rises(self.model, task.data.example(), loss, batches=batches, depth=depth)
        self.spent += 2 * FEW * task.samples * self._cost.flops * (1 + len(rises))
        return rises

    def cost(self) -> Cost:
        """Of the live network."""
        return self.grower.cost()

    def update(self, step: int, progress: float) -> None:
        """The grower's update, every few steps."""
        if step % self.every == 0 and not self.grower.finished:
            self.grower.update()

    def finish(self) -> None:
        """End the grower's run, if its updates have not."""
        if not self.grower.finished:
            self.grower.finish()


# --- by name ---


def read(method: str) -> tuple[str, dict[str, str], bool]:
    """Name, settings, and whether the base teaches, of a method as typed."""
    text, plus, end = method.partition("+")
    if plus and end != "distil":
        raise TorchgrowError(f"cannot read the method {method!r}; what may stand behind + is distil")
    name, _, settings = text.partition(":")
    parts = [part.partition("=") for part in settings.split(",") if part]
    return name, {key: value for key, _, value in parts}, bool(plus)


def make(method: str, task: Task) -> Shrinker:
    """The network of a method, ready to be trained."""
    name, settings, distilled = read(method)
    if name == "uniform":
        return Shrinker(task, task.narrow())
    if not name.startswith("tp-"):
        return Grown(task, name, settings, distilled)
    everywhere = settings.get("global", "False") == "True"
    if name == "tp-group":
        return Sparse(task, float(settings.get("share", 0.3)), float(settings.get("reg", 5e-4)), everywhere)
    base = copy.deepcopy(task.base)
    batches = int(settings.get("batches", 1)) if name == "tp-taylor" else 0
    importance = score(task, base, name.removeprefix("tp-"), batches)
    spent = batches * 3 * task.cost(base).flops * task.samples
    return Shrinker(task, cut(base, task.data.example(), task.fits, importance, everywhere), spent)

"""The training loop: plain epochs over images or text, evaluation, and the grower's updates."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgrow import Cost, Event, Grower, TorchgrowError, TrainingError, distillation_loss, guard_, measure
from torchgrow.lab import processes
from torchgrow.lab.checkpoints import Checkpoints, Progress
from torchgrow.lab.data import Data
from torchgrow.lab.from_recipe import extent, make_schedule, updates_within
from torchgrow.lab.hooks import Hooks
from torchgrow.lab.large_batches import LargeBatches, faster, merged
from torchgrow.lab.metrics import ACCURACY, MIOU, VOID, confusion, miou, scores_of
from torchgrow.lab.recipes import Recipe
from torchgrow.lab.text import TextData

Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What one epoch of one network came to; a line of ``metrics.jsonl``.

    The network is described as it was evaluated at the end of this epoch, before the update that ends it; pressure
    and temperature are of that update, the last three counts of all updates in the epoch. A *sample* is an image, or
    a sequence of words.

    Attributes:
        network: ``"grown"``, ``"shrunk"`` (grown from a trained network down), ``"dense"`` or ``"uniform"``.
        epoch: counted from 1.
        loss: mean training loss, of an image, a pixel or a word; batches of masks without a label have none.
        test_loss: mean loss on the test images, or on the words of the validation text.
        accuracy: share of test images classified correctly, in percent; None for text and masks.
        miou: mean intersection over union of the masks of validation images, in percent; None for all else.
        perplexity: of the validation text, ``exp(test_loss)``; None for images.
        params: parameters, tied ones once.
        flops: FLOPs of one sample forward, 2 x MACs.
        training_flops: 3 x forward FLOPs x samples, summed over all epochs so far, and 1 x those of a teacher.
        seconds: of training and updating, summed over all epochs so far; evaluation is left out.
        lr: learning rate at the beginning of this epoch.
        widths: live units of every group; empty for a network that does not grow.
        depths: live blocks of every stage; empty where layers do not grow.
        pressure: what pushed indicators up or down; None for a network that does not grow.
        temperature: mean temperature of every group; empty for a network that does not grow.
        born: units that came in for the first time.
        regrown: units that came back.
        detached: units that left.
        batch: samples of a step, on average, where several batches go into one (`Recipe.largest_batch`); else None.
        updates: for every update of the epoch, after how many ``epochs`` it came, and the ``params``, ``flops``,
            ``widths`` and ``depths`` it led to; empty for a network that does not grow.
    """

    network: str
    epoch: int
    loss: float
    test_loss: float
    accuracy: float | None = None
    miou: float | None = None
    perplexity: float | None = None
    params: int
    flops: int
    training_flops: int
    seconds: float
    lr: float
    widths: dict[str, int] = field(default_factory=dict)
    depths: dict[str, int] = field(default_factory=dict)
    pressure: float | None = None
    temperature: dict[str, float] = field(default_factory=dict)
    born: int = 0
    regrown: int = 0
    detached: int = 0
    batch: float | None = None
    updates: list[dict[str, Any]] = field(default_factory=list)


def fit(
    network: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data,
    recipe: Recipe,
    *,
    grower: Grower | None = None,
    teacher: nn.Module | None = None,
    hooks: Hooks | None = None,
    spent: tuple[int, float] = (0, 0.0),
    on_step: Callable[[int, int, int], None] = lambda epoch, done, total: None,
    checkpoints: Checkpoints | None = None,
) -> Iterator[Epoch]:
    """Train ``model`` for the recipe's epochs, yielding after each; those done before the latest checkpoint are not.

    With several processes each trains on its share of every batch; process 0 alone evaluates, the others give NaN.

    Args:
        network: name for the records and for errors.
        model: trained in place. If it returns a state beside its scores, the state goes into its next call.
        optimizer: of ``model``'s parameters.
        data: what to train and to evaluate on.
        recipe: epochs, batches, schedule, augmentation and seed.
        grower: updated as often as the recipe says; at an epoch's end after evaluation: newborn units are untrained.
        teacher: what ``model`` also learns from, by the recipe's share; in evaluation mode, with a state of its own.
        hooks: what else is done while it trains.
        spent: training FLOPs and seconds before its first step, which records have in them.
        on_step: called as ``on_step(epoch, done, total)`` after each step of an epoch, which is counted from 1.
        checkpoints: where to go on from, and where to leave them; that of an epoch once the next is asked for.

    Raises:
        TorchgrowError: the loss is not finite (a TrainingError), or the checkpoint does not fit.
    """
    guard_(model)
    (steps, samples), hooks = extent(model, data, recipe), hooks or Hooks()
    schedule = make_schedule(optimizer, recipe, steps)
    progress = _begun(spent, checkpoints, model, optimizer, grower, schedule, hooks)
    run = _Run(
        network=network,
        model=model,
        optimizer=optimizer,
        data=data,
        recipe=recipe,
        grower=grower,
        teacher=teacher,
        hooks=hooks,
        lesson=measure(teacher, data.example()).flops if teacher else 0,
        schedule=schedule,
        large=LargeBatches(model, data, recipe),
        checkpoints=checkpoints,
        steps=steps,
        samples=samples,
        on_step=on_step,
        fixed=None if grower else (processes.wrap(model), measure(model, data.example())),
        generator=torch.Generator().manual_seed(recipe.seed),
    )
    while progress.epoch <= recipe.epochs + recipe.then and not hooks.over:
        yield (record := run.finish(run.train(progress)))
        run.save(progress := run.after(record))


def _begun(spent: tuple[int, float], checkpoints: Checkpoints | None, *held: Any) -> Progress:
    """Where a training stands: at its latest checkpoint, or at its beginning, after what was spent before."""
    progress = checkpoints.load(*held) if checkpoints else Progress()
    return progress if progress.sampler is not None else replace(progress, training_flops=spent[0], seconds=spent[1])


@dataclass(frozen=True, kw_only=True)
class _Run:
    """All that stays the same while a network trains, as `fit` is given it.

    Attributes:
        lesson: FLOPs of the teacher for one sample.
        fixed: of a network that does not grow, what its forward pass goes through, and its cost.
    """

    network: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    data: Data
    recipe: Recipe
    grower: Grower | None
    teacher: nn.Module | None
    hooks: Hooks
    lesson: int
    schedule: torch.optim.lr_scheduler.LRScheduler
    large: LargeBatches
    checkpoints: Checkpoints | None
    steps: int
    samples: int
    on_step: Callable[[int, int, int], None]
    fixed: tuple[nn.Module, Cost] | None
    generator: torch.Generator

    def after(self, record: Epoch) -> Progress:
        """Where the training stands at the end of an epoch."""
        sampler, flops = self.generator.get_state(), record.training_flops
        return Progress(epoch=record.epoch + 1, sampler=sampler, seconds=record.seconds, training_flops=flops)

    def save(self, progress: Progress) -> None:
        """Leave a checkpoint."""
        if self.checkpoints:
            self.checkpoints.save(progress, self.model, self.optimizer, self.grower, self.schedule, self.hooks)

    def at_once(self) -> int:
        """Batches for the next step; one before the first update: its steps set the paper's pace of indicators."""
        begun = self.grower is None or len(self.grower.history) > 1  # the seed has an event too
        return self.large.at_once() if begun else 1

    def net(self) -> nn.Module:
        """What the forward pass goes through, in training mode: of the present structure, shared out or not."""
        if self.fixed:
            return self.fixed[0].train()
        return (self.grower.wrap() if self.grower and processes.size() > 1 else self.model).train()

    def cost(self) -> Cost:
        """What the present structure costs."""
        if self.fixed:
            return self.hooks.cost() or self.fixed[1]
        assert self.grower is not None
        return self.grower.cost()

    def loss(self, scores: Tensor, x: Tensor, labels: Tensor, taught: Any) -> tuple[Tensor, Any]:
        """Cross entropy, with the labels and with a teacher's scores if there is one; and the state of that one.

        Of masks without a label it is 0, or the teacher's part.
        """
        labelled = self.data.metric is not MIOU or bool((labels != VOID).any())
        if self.teacher is None:  # a mean over no pixel is nan; this one has gradients, which other processes wait for
            return (F.cross_entropy(scores, labels) if labelled else 0.0 * scores.sum()), None
        half = self.recipe.precision == "bfloat16"
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            wanted, taught = scores_of(self.teacher, x, taught)
        share = self.recipe.distil
        if not labelled:  # the teacher's part is what is left
            return share * distillation_loss(scores, wanted.float(), labels.clamp(min=0), share=1.0), taught
        return distillation_loss(scores, wanted.float(), labels, share=share), taught

    def silent(self, labels: Tensor) -> bool:
        """Whether nothing says anything about a batch: of masks every pixel is void, and there is no teacher."""
        return self.data.metric is MIOU and self.teacher is None and not bool((labels != VOID).any())

    def train(self, progress: Progress) -> Progress:
        """One pass over the training data, or what is left of it."""
        grower, recipe, steps = self.grower, self.recipe, self.steps
        every = self.checkpoints.every if self.checkpoints else None
        if progress.sampler is not None:
            self.generator.set_state(progress.sampler)
        if not progress.step:
            lr = float(self.optimizer.param_groups[0]["lr"])
            progress = replace(progress, sampler=self.generator.get_state(), lr=lr, changes=(0, 0, 0), updates=[])
        between = updates_within(recipe, steps) if grower and progress.epoch <= recipe.epochs else set()
        net, cost, start = self.net(), self.cost(), time.perf_counter()
        batches = _batches(self.model, self.data, recipe, self.generator)
        ends = between | {steps} | set(range(0, steps, every or steps))
        for step, many, x, labels in merged(batches, self.at_once, progress.step, ends):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
                scores, state = scores_of(net, x, progress.state)
            loss, taught = self.loss(scores.float(), x, labels.flatten(), progress.taught)
            penalty = self.hooks.penalty()
            loss = loss if penalty is None else loss + penalty
            where = f"{self.network}, epoch {progress.epoch}, step {step} of {steps}"
            with faster(self.optimizer, many):
                value = train_step(where, loss, self.model, self.optimizer, recipe)
            self.hooks.stepped(progress.epoch - 1 + step / steps)
            for _ in range(many):
                self.schedule.step()
            flops, changes = many * (3 * cost.flops + self.lesson) * self.samples, progress.changes
            self.on_step(progress.epoch, step, steps)
            if grower and step in between:
                changes = _added(changes, grower.update())
                at = progress.epoch - 1 + step / steps
                progress = replace(progress, updates=[*progress.updates, _structure(grower, at)])
                net, cost = self.net(), self.cost()
                state = grower.carry(state) if state is not None else None
            progress = replace(
                progress,
                step=step,
                state=state,
                taught=taught,
                changes=changes,
                taken=progress.taken + 1,
                loss=progress.loss + many * value,
                void=progress.void + many * self.silent(labels),
                training_flops=progress.training_flops + flops,
                seconds=progress.seconds + time.perf_counter() - start,
            )
            # What a model carries differs between processes, of which one writes what it has.
            due = every is not None and step % every == 0 and step < steps
            if due and (state is None or processes.size() == 1):
                alike = processes.mean(progress.loss), round(processes.mean(progress.void))  # one writes it for all
                progress = replace(progress, loss=alike[0], void=alike[1])
                self.save(progress)
            start = time.perf_counter()
        return progress

    def finish(self, progress: Progress) -> Epoch:
        """Evaluate the network at the end of an epoch, then update its structure; returns what the epoch came to."""
        grower, cost, seconds = self.grower, self.cost(), progress.seconds
        widths = grower.widths() if grower else {}
        depths = grower.depths() if grower and self.recipe.depth else self.hooks.depths()
        score, test_loss = evaluate(self.model, self.data) if processes.rank() == 0 else (math.nan, math.nan)
        fields: dict[str, Any] = {self.data.metric.name: score}
        if grower and progress.epoch <= self.recipe.epochs:
            start = time.perf_counter()
            event = grower.update()
            seconds += time.perf_counter() - start
            fields |= {"pressure": event.pressure, "temperature": event.temperature}
            fields |= dict(zip(("born", "regrown", "detached"), _added(progress.changes, event), strict=True))
            fields["updates"] = [*progress.updates, _structure(grower, float(progress.epoch))]
        start = time.perf_counter()
        self.hooks.ended(progress.epoch)
        seconds += time.perf_counter() - start
        return Epoch(
            network=self.network,
            epoch=progress.epoch,
            loss=processes.mean(progress.loss / max(1, self.steps - progress.void)),
            test_loss=test_loss,
            params=cost.params,
            flops=cost.flops,
            training_flops=progress.training_flops,
            seconds=seconds,
            lr=progress.lr,
            batch=self.samples * self.steps / progress.taken if self.recipe.largest_batch else None,
            widths=widths,
            depths=depths,
            **fields,
        )


def _added(changes: tuple[int, int, int], event: Event) -> tuple[int, int, int]:
    """Units born, regrown and detached, with one more update."""
    return changes[0] + event.born, changes[1] + event.regrown, changes[2] + event.detached


def _structure(grower: Grower, epochs: float) -> dict[str, Any]:
    """The structure after an update, as in `Epoch.updates`."""
    cost = grower.cost()
    depths = grower.depths()
    return {"epochs": epochs, "params": cost.params, "flops": cost.flops, "widths": grower.widths(), "depths": depths}


def _batches(model: nn.Module, data: Data, recipe: Recipe, generator: torch.Generator) -> Batches:
    """This process's share of an epoch's batches; a text goes on from batch to batch for a model with a state."""
    if isinstance(data, TextData):
        shuffle = None if hasattr(model, "carried") else generator
        return processes.shares(data.train_batches(batch_size=recipe.batch_size, shuffle=shuffle))
    share = processes.share(min(recipe.batch_size, len(data.train)))
    return data.train_batches(
        batch_size=recipe.batch_size, shift=recipe.shift, mirror=recipe.mirror, generator=generator, share=share
    )


def train_step(where: str, loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe) -> float:
    """One optimizer step; returns the loss."""
    value = loss.item()
    if not math.isfinite(value):
        raise TrainingError(
            f"{where}: the loss is {value}. Nothing after this step can be trusted; "
            f"a learning rate below {optimizer.param_groups[0]['lr']:g} or other data may help"
        )
    optimizer.zero_grad()
    loss.backward()
    if recipe.clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    return value


@torch.inference_mode()
def evaluate(model: nn.Module, data: Data, split: str | None = None) -> tuple[float, float]:
    """The data's metric and the mean loss, on test images or on a text. Leaves ``model`` in evaluation mode.

    Args:
        model: what to judge.
        data: images, or a text.
        split: of a text, ``"valid"`` (default) or ``"test"``.

    Returns:
        Accuracy or mIoU in percent, or perplexity, and the loss of an image, a pixel or a word.

    Raises:
        TorchgrowError: of masks, no pixel has a label.
    """
    model.eval()
    correct, loss, count, state = 0, 0.0, 0, None
    pairs: Tensor | None = None
    for x, labels in data.test_batches(split or "valid") if isinstance(data, TextData) else data.test_batches():
        scores, state = scores_of(model, x, state)
        labels, guesses = labels.flatten(), scores.argmax(1)
        correct += int((guesses == labels).sum())
        loss += F.cross_entropy(scores, labels, reduction="sum").item()
        count += int((labels != VOID).sum())
        if data.metric is MIOU:
            seen = confusion(guesses, labels, scores.shape[1])
            pairs = seen if pairs is None else pairs + seen
    if not count:
        raise TorchgrowError(
            f"no pixel of the {len(data.test)} images to judge by has a class that is judged; give masks with other "
            "classes, or take a recipe in which theirs are not void (--scale full)"
        )
    mean = loss / count
    if pairs is not None:
        return miou(pairs), mean
    score = 100 * correct / count if data.metric is ACCURACY else math.exp(min(mean, 700.0))  # beyond it exp overflows
    return score, mean


def judged(model: nn.Module, data: Data) -> dict[str, float]:
    """What a network is judged by in the end, by name, the same in all processes: of a text also on its test part."""
    if processes.rank() > 0:
        return processes.told({})
    scores = {data.metric.name: evaluate(model, data)[0]}
    if isinstance(data, TextData):
        scores[f"test_{data.metric.name}"] = evaluate(model, data, "test")[0]
    return processes.told(scores)

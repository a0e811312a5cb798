"""The training loop: plain SGD epochs, evaluation, and the grower's update after it."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgrow import Grower, TorchgrowError, measure
from torchgrow.lab.checkpoints import Checkpoints, Progress
from torchgrow.lab.data import ImageData, train_steps
from torchgrow.lab.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What one epoch of one network came to; a line of ``metrics.jsonl``.

    The network is described as it was trained and evaluated in this epoch, before the update that ends it;
    pressure, temperature and the last three counts are of that update.

    Attributes:
        network: ``"grown"``, ``"dense"`` or ``"uniform"``.
        epoch: counted from 1.
        loss: mean training loss.
        test_loss: mean loss on the test images.
        accuracy: share of test images classified correctly, in percent.
        params: parameters, tied ones once.
        flops: FLOPs of one image forward, 2 x MACs.
        training_flops: 3 x forward FLOPs x images, summed over all epochs so far.
        seconds: of training and updating, summed over all epochs so far; evaluation is left out.
        lr: learning rate of this epoch.
        widths: live units of every group; empty for a network that does not grow.
        pressure: what pushed indicators up or down; None for a network that does not grow.
        temperature: mean temperature of every group; empty for a network that does not grow.
        born: units that came in for the first time.
        regrown: units that came back.
        detached: units that left.
    """

    network: str
    epoch: int
    loss: float
    test_loss: float
    accuracy: float
    params: int
    flops: int
    training_flops: int
    seconds: float
    lr: float
    widths: dict[str, int] = field(default_factory=dict)
    pressure: float | None = None
    temperature: dict[str, float] = field(default_factory=dict)
    born: int = 0
    regrown: int = 0
    detached: int = 0


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """The recipe's SGD over all parameters of ``model``."""
    return torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )


def fit(
    network: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: ImageData,
    recipe: Recipe,
    *,
    grower: Grower | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    checkpoints: Checkpoints | None = None,
) -> Iterator[Epoch]:
    """Train ``model`` for the recipe's epochs, yielding after each; those done before the latest checkpoint are not.

    Args:
        network: name for the records and for errors.
        model: trained in place.
        optimizer: of ``model``'s parameters.
        data: images to train and to evaluate on.
        recipe: epochs, batches, schedule, augmentation and seed.
        grower: updated once an epoch, after evaluation, since units just born are untrained.
        on_step: called as ``on_step(done, total)`` after each step of an epoch.
        checkpoints: where to go on from, and where to leave checkpoints. The one at the end of an epoch is written
            when the next is asked for, so after whatever the caller does with the record of this one.

    Raises:
        TorchgrowError: the loss is not finite, or the checkpoint does not fit.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, recipe.milestones_in_epochs(), gamma=recipe.lr_factor)
    cost = grower.cost() if grower else measure(model, data.normalise(data.train.pixels[:2]))
    steps = train_steps(len(data.train), recipe.batch_size)
    images = steps * min(recipe.batch_size, len(data.train))
    progress = checkpoints.load(model, optimizer, grower, schedule) if checkpoints else Progress()

    def save(progress: Progress) -> None:
        if checkpoints:
            checkpoints.save(progress, model, optimizer, grower, schedule)

    for epoch in range(progress.epoch, recipe.epochs + 1):
        if progress.sampler is not None:
            generator.set_state(progress.sampler)
        progress = replace(progress, sampler=generator.get_state())
        if grower:
            cost = grower.cost()
        widths = grower.widths() if grower else {}
        lr = optimizer.param_groups[0]["lr"]
        where = f"{network}, epoch {epoch}"
        left = _train_epoch(where, model, optimizer, data, recipe, generator, progress, on_step)
        for progress in left:
            if checkpoints and checkpoints.due(progress.step, steps):
                save(progress)
        seconds, loss = progress.seconds, progress.loss / steps
        training_flops = progress.training_flops + 3 * cost.flops * images
        accuracy, test_loss = evaluate(model, data)
        grown = {}
        if grower:
            start = time.perf_counter()
            event = grower.update()
            seconds += time.perf_counter() - start
            grown = {name: getattr(event, name) for name in ("pressure", "temperature", "born", "regrown", "detached")}
        schedule.step()
        yield Epoch(
            network=network,
            epoch=epoch,
            loss=loss,
            test_loss=test_loss,
            accuracy=accuracy,
            params=cost.params,
            flops=cost.flops,
            training_flops=training_flops,
            seconds=seconds,
            lr=lr,
            widths=widths,
            **grown,
        )
        progress = Progress(
            epoch=epoch + 1, sampler=generator.get_state(), seconds=seconds, training_flops=training_flops
        )
        save(progress)


def _train_epoch(
    where: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: ImageData,
    recipe: Recipe,
    generator: torch.Generator,
    progress: Progress,
    on_step: Callable[[int, int], None],
) -> Iterator[Progress]:
    """One pass over the training images, or what is left of it; yields where it stands after each step."""
    model.train()
    steps = train_steps(len(data.train), recipe.batch_size)
    batches = data.train_batches(
        batch_size=recipe.batch_size, shift=recipe.shift, mirror=recipe.mirror, generator=generator
    )
    start = time.perf_counter()
    for step, (images, labels) in islice(enumerate(batches, start=1), progress.step, None):
        loss = F.cross_entropy(model(images), labels)
        value = loss.item()
        if not math.isfinite(value):
            raise TorchgrowError(
                f"{where}, step {step} of {steps}: the loss is {value}. Nothing after this step can be trusted; "
                f"a learning rate below {optimizer.param_groups[0]['lr']:g} or other data may help"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        on_step(step, steps)
        now = time.perf_counter()
        progress = replace(progress, step=step, loss=progress.loss + value, seconds=progress.seconds + now - start)
        yield progress
        start = time.perf_counter()


@torch.inference_mode()
def evaluate(model: nn.Module, data: ImageData) -> tuple[float, float]:
    """Accuracy in percent and mean loss on the test images. Leaves ``model`` in evaluation mode."""
    model.eval()
    correct, loss = 0, 0.0
    for images, labels in data.test_batches():
        scores: Tensor = model(images)
        correct += int((scores.argmax(1) == labels).sum())
        loss += F.cross_entropy(scores, labels, reduction="sum").item()
    return 100 * correct / len(data.test), loss / len(data.test)

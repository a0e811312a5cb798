"""The training loop: plain SGD epochs, evaluation, and the grower's update after it."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgrow import Grower, TorchgrowError, measure
from torchgrow.lab import processes
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
) -> Iterator[Epoch]:
    """Train ``model`` for the recipe's epochs, yielding after each.

    With several processes each trains on its share of every batch, and process 0 alone evaluates: in the others
    test loss and accuracy are NaN.

    Args:
        network: name for the records and for errors.
        model: trained in place.
        optimizer: of ``model``'s parameters.
        data: images to train and to evaluate on.
        recipe: epochs, batches, schedule, augmentation and seed.
        grower: updated once an epoch, after evaluation, since units just born are untrained.
        on_step: called as ``on_step(done, total)`` after each step of an epoch.

    Raises:
        TorchgrowError: the loss is not finite.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, recipe.milestones_in_epochs(), gamma=recipe.lr_factor)
    cost = grower.cost() if grower else measure(model, data.normalise(data.train.pixels[:2]))
    images = train_steps(len(data.train), recipe.batch_size) * min(recipe.batch_size, len(data.train))
    seconds, training_flops = 0.0, 0
    net = model if grower else processes.wrap(model)
    for epoch in range(1, recipe.epochs + 1):
        if grower:
            cost = grower.cost()
        widths = grower.widths() if grower else {}
        lr = optimizer.param_groups[0]["lr"]
        start = time.perf_counter()
        if grower and processes.size() > 1:
            net = grower.wrap()
        loss = _train_epoch(f"{network}, epoch {epoch}", net, optimizer, data, recipe, generator, on_step)
        seconds += time.perf_counter() - start
        training_flops += 3 * cost.flops * images
        accuracy, test_loss = evaluate(model, data) if processes.rank() == 0 else (math.nan, math.nan)
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


def _train_epoch(
    where: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: ImageData,
    recipe: Recipe,
    generator: torch.Generator,
    on_step: Callable[[int, int], None],
) -> float:
    """One pass over the training images; returns the mean loss."""
    model.train()
    steps = train_steps(len(data.train), recipe.batch_size)
    batches = data.train_batches(
        batch_size=recipe.batch_size, shift=recipe.shift, mirror=recipe.mirror, generator=generator
    )
    total = 0.0
    for step, (images, labels) in enumerate(processes.shares(batches), start=1):
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
        total += value
        on_step(step, steps)
    return processes.mean(total / steps)


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

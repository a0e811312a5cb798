"""What a recipe describes, made: its data, networks, optimizer, learning rate schedule and grower."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from torchgrow import Grower, TorchgrowError, policies, warmup_stable_decay
from torchgrow.lab import processes
from torchgrow.lab.data import Data, ImageData, train_steps
from torchgrow.lab.data import load as load_data
from torchgrow.lab.devices import random_kept
from torchgrow.lab.metrics import ACCURACY, MIOU, scores_of
from torchgrow.lab.names import RECIPES
from torchgrow.lab.recipes import Recipe
from torchgrow.lab.text import TextData
from torchgrow.lab.user_files import explained


def with_data(
    recipe: Recipe,
    console: Console,
    folder: Path | None,
    *,
    download: bool = False,
    held_out: bool = False,
    device: torch.device | None = None,
) -> tuple[Recipe, Data]:
    """The data, on the device, and the recipe with networks that fit it.

    Raises:
        TorchgrowError: as `torchgrow.lab.data.load`; or there is too little of it for a batch.
    """
    data = load_data(
        recipe.dataset,
        folder=folder,
        download=download,
        subset=recipe.subset,
        steps=recipe.steps,
        side=recipe.side,
        crop=recipe.crop,
        void=recipe.void,
        held_out=held_out,
    ).to(device or torch.device("cpu"))
    if isinstance(data, TextData):
        console.print(
            f"Text: {data.source}; {len(data.train):,} words to train on, a vocabulary of {len(data.vocabulary):,}",
            soft_wrap=True,
        )
        if recipe.channels_last:
            raise TorchgrowError("a text has no channels; leave --channels-last out")
        recipe = recipe.with_words(len(data.vocabulary))
        return _tried_on_words(recipe, data), data
    _check_batch(recipe, data)
    check_updates(recipe, extent(nn.Module(), data, recipe)[0])
    if recipe.dataset in ("imagefolder", "shapes", "shape-masks") and not recipe.weights:
        most = max(int(images.labels.max()) for images in (data.train, data.test))  # a subset may lack a class
        recipe = recipe.with_classes(1 + most)
    mean, std = recipe.mean or data.mean, recipe.std or data.std
    if not len(mean) == len(std) == len(data.mean):
        raise TorchgrowError(f"images of {recipe.dataset} have {len(data.mean)} colours; give as many to mean and std")
    data = replace(data, mean=mean, std=std, channels_last=recipe.channels_last)
    if recipe.name not in RECIPES and not (recipe.meta or recipe.weights):
        _tried(recipe, data)
    return recipe, data


def _tried_on_words(recipe: Recipe, data: TextData) -> Recipe:
    """Build the network of a text, for whether it carries a state decides how long the text must be, and about its
    order; run one that nobody has trained here yet once, before anything is written.

    Raises:
        TorchgrowError: it fails, it gives something else than a score for every word, or the text is too short.
    """
    x, words = data.example().cpu().clone(), len(data.vocabulary)
    x[-1, -1] = words - 1  # also the last one has to be known
    what = f"recipe {recipe.name!r}: build(1.0), or its network on word numbers {list(x.shape)}, failed"
    fix = (
        f"build takes a width factor, and words={words} if it has a parameter of that name, and returns a module that "
        f"takes numbers below {words} and returns scores, [N, steps, {words}]"
    )
    with explained(what, fix), random_kept(), torch.no_grad():
        model: Any = make_network(recipe.build, 1.0, torch.device("cpu"), meta=recipe.meta)
        check_order(recipe, type(model))
        check_updates(recipe, extent(model, data, recipe)[0])
        if recipe.name in RECIPES or recipe.meta or recipe.weights:
            return recipe
        scores, _ = scores_of(model.eval(), x, model.start(len(x)) if hasattr(model, "carried") else None)
    if scores.shape[0] != x.numel() or scores.shape[-1] < words:
        raise TorchgrowError(
            f"recipe {recipe.name!r}: the network returns {scores.shape[0]} times {scores.shape[-1]} scores for "
            f"{x.numel()} words of a vocabulary of {words}; let it return {[*x.shape, words]}, as with "
            "build(width=1.0, words=100), which is given their number"
        )
    return recipe


def check_order(recipe: Recipe, kind: Any) -> None:
    """Refuse to put batches together whose order is not free.

    Args:
        recipe: what is asked for.
        kind: class of its network, or what makes it.

    Raises:
        TorchgrowError: the network carries a state from batch to batch.
    """
    if recipe.largest_batch and hasattr(kind, "carried"):
        raise TorchgrowError(
            f"recipe {recipe.name!r}: largest_batch={recipe.largest_batch} puts batches together, and "
            f"{kind.__name__} carries a state from one to the next; leave largest_batch (--largest-batch) out"
        )


def check_updates(recipe: Recipe, steps: int) -> None:
    """Refuse a training in which the structure could not change before the last evaluation.

    Args:
        recipe: how often it changes.
        steps: of an epoch.

    Raises:
        TorchgrowError: there is a single update, at the very end.
    """
    if updates_in(recipe, steps) < 2:
        raise TorchgrowError(
            f"recipe {recipe.name!r}: one epoch has {steps} step{'s' * (steps > 1)} here, too few for two updates of "
            "the structure; take --epochs 2, more data (--subset) or a smaller batch"
        )


def _check_batch(recipe: Recipe, data: ImageData) -> None:
    """Networks for masks normalise over the images of a batch alone, where they pool all of an image."""
    images, size = len(data.train), processes.size()
    if data.metric is MIOU and min(recipe.batch_size, images) // size < 2:
        raise TorchgrowError(
            f"masks are trained on with 2 images a step and process at least, got {images} training "
            f"image{'s' * (images > 1)} and a batch of {recipe.batch_size} on {size} process{'es' * (size > 1)}; take "
            f"--subset {2 * size} or more, or fewer processes"
        )


def _tried(recipe: Recipe, data: ImageData) -> None:
    """Build a network that nobody has trained here yet and run it once, before anything is written.

    Raises:
        TorchgrowError: it fails, or gives something else than a score for every class; the message says which.
    """
    x = data.example()
    what = f"recipe {recipe.name!r}: build(1.0), or its network on images {list(x.shape)}, failed"
    fix = (
        "build takes a width factor, and classes where the data says how many if it has a parameter of that name, and "
        "returns a module that takes such images and returns scores, [N, classes]"
    )
    with explained(what, fix), random_kept(), torch.no_grad():
        scores = make_network(recipe.build, 1.0, data.device).eval()(x)
    if not isinstance(scores, Tensor):
        raise TorchgrowError(
            f"recipe {recipe.name!r}: the network returns a {type(scores).__name__}; let it return scores, [N, classes]"
        )
    classes = 1 + max(int(images.labels.max()) for images in (data.train, data.test))
    if data.metric is ACCURACY and (scores.dim() != 2 or scores.shape[1] < classes):
        raise TorchgrowError(
            f"recipe {recipe.name!r}: the network returns {list(scores.shape)} for {len(x)} images of {classes} "
            f"classes; let it return [{len(x)}, {classes}], in folders as with build(width=1.0, classes=10), which is "
            "given their number"
        )


def example(model: nn.Module, data: Data) -> tuple[Any, dict[int | str, int | str] | None]:
    """What to trace ``model`` on, and what it carries from call to call; None for a network without a state."""
    x = data.example()
    carried = getattr(model, "carried", None)
    return ((x, model.start(len(x))) if carried else x), carried  # type: ignore[operator]


def extent(model: nn.Module, data: Data, recipe: Recipe) -> tuple[int, int]:
    """Steps of an epoch, and samples of a step."""
    if isinstance(data, TextData):
        return data.train_steps(recipe.batch_size, shuffled=not hasattr(model, "carried")), recipe.batch_size
    return train_steps(len(data.train), recipe.batch_size), min(recipe.batch_size, len(data.train))


def make_network(
    build: Callable[..., nn.Module], width: float, device: torch.device, *, meta: bool = False
) -> nn.Module:
    """A network on the device, with weights drawn on the CPU, the same for every device.

    Args:
        build: as in `Recipe`.
        width: its argument.
        device: where it is put.
        meta: leave it on the meta device, for a grower to bring to life where its example inputs are.
    """
    with torch.device("meta" if meta else "cpu"):
        model = build(width)
    return model if meta else model.to(device)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over all parameters of ``model``."""
    optimizer = _optimizer(model, recipe)
    if recipe.largest_batch:
        for group in optimizer.param_groups:
            group["max_lr"] = recipe.lr  # of one batch; indicators go as much faster as steps of more go beyond it
    return optimizer


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "adamw":
        embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        groups: dict[float, list[nn.Parameter]] = {recipe.weight_decay: [], 0.0: []}
        for name, parameter in model.named_parameters():
            matrix = parameter.dim() > 1 and id(parameter) not in embedded and name != "positions"
            groups[recipe.weight_decay if matrix else 0.0].append(parameter)
        return torch.optim.AdamW(
            [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()],
            lr=recipe.lr,
            betas=(0.9, 0.99),
        )
    return torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The recipe's learning rate, to be stepped after every optimizer step, of which an epoch has ``steps``."""
    total = steps * recipe.epochs
    if recipe.schedule == "milestones" and not recipe.then:
        milestones = [steps * epochs for epochs in recipe.milestones_in_epochs()]
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=recipe.lr_factor)

    def factor(step: int) -> float:
        late = recipe.then and step >= total
        return (
            _factor(recipe, recipe.then, steps, step - total) if late else _factor(recipe, recipe.epochs, steps, step)
        )

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _factor(recipe: Recipe, epochs: int, steps: int, step: int) -> float:
    """What the learning rate is multiplied by at a step of a training of so many epochs."""
    if recipe.schedule == "milestones":
        return recipe.lr_factor ** sum(step >= steps * epoch for epoch in recipe.milestones_in_epochs(epochs))
    total = steps * epochs
    if recipe.schedule == "wsd":
        return warmup_stable_decay(total, warmup=recipe.warmup, decay=recipe.decay)(step)
    rising = round(recipe.warmup * total)
    if step < rising:
        return (step + 1) / (rising + 1)
    if recipe.schedule == "cosine":
        return (1 + math.cos(math.pi * (step - rising) / max(1, total - rising))) / 2
    return min(1.0, (total - step) / max(1, total - rising))


PAPER_STEPS = 62_400
"""Of the paper's CIFAR-10 runs: 160 epochs of 390 steps, to which its constants belong."""


def far_from_paper(recipe: Recipe, steps: int) -> str:
    """A warning where the paper's constants are taken literally on a schedule far shorter than its own, else "".

    Args:
        recipe: its preset decides.
        steps: of an epoch.
    """
    total = steps * recipe.epochs
    policy = recipe.policy()
    if not isinstance(policy, policies.Paper) or policy.paced or 2 * total >= PAPER_STEPS:
        return ""
    return (
        f"Warning: preset {recipe.preset!r} takes the paper's constants literally; they belong to {PAPER_STEPS:,} "
        f"steps. With the {total:,} of this run it was seen to swing and to end far below other networks "
        "(docs/results.md). "
        "Use preset default or paper, which goes at the paper's pace, or as many steps (--scale full)."
    )


def make_grower(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data,
    recipe: Recipe,
    rises: Mapping[str, float] | None = None,
) -> Grower:
    """The recipe's grower, which cuts ``model`` to a seed at once, or begins with what its weights are.

    Args:
        model: what it is of.
        optimizer: of its parameters.
        data: what it trains on.
        recipe: budget, updates, preset and seed.
        rises: as for `torchgrow.policies.named`.
    """
    inputs, carried = example(model, data)
    return Grower(
        model,
        optimizer,
        example_inputs=inputs,
        budget=recipe.budget,
        updates=updates_in(recipe, extent(model, data, recipe)[0]),
        start="frame" if recipe.weights else "seed",
        policy=policies.named(recipe.preset, layers=bool(recipe.depth), rises=rises),
        seed=recipe.seed,
        protect=recipe.freeze,
        carried=carried,
        depth=recipe.depth,
    )


def updates_within(recipe: Recipe, steps: int) -> set[int]:
    """After which of an epoch's steps the grower updates, the last one left out; fewer if there are fewer steps."""
    often = recipe.updates_an_epoch()
    return {steps * part // often for part in range(1, often)} - {0}


def updates_in(recipe: Recipe, steps: int) -> int:
    """How often the grower updates in a run whose epochs have so many steps."""
    return recipe.epochs * (len(updates_within(recipe, steps)) + 1)

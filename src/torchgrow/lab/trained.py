"""The beginning of a run that shrinks a trained network: that network, its score, and its copy as a teacher."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchgrow import Cost, Grower, TorchgrowError, measure
from torchgrow.lab import weights
from torchgrow.lab.data import Data
from torchgrow.lab.devices import random_kept
from torchgrow.lab.from_recipe import make_grower, make_optimizer
from torchgrow.lab.metrics import ACCURACY
from torchgrow.lab.recipes import Recipe
from torchgrow.lab.rises import Rises, rises_of
from torchgrow.lab.text import TextData
from torchgrow.lab.train import judged


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run begins with.

    Attributes:
        model: on the data's device, all of it alive.
        optimizer: of its parameters.
        grower: which will shrink it.
        teacher: a copy of it as it was, in evaluation mode; None where the recipe has none.
        scores: of the network as it was, by the name of the metric.
        cost: of the network as it was.
        digest: of its weights.
        rises: by which it shrinks; None where the recipe goes by none.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    grower: Grower
    teacher: nn.Module | None
    scores: dict[str, float]
    cost: Cost
    digest: str
    rises: Rises | None

    def check(self, digest: str | None) -> None:
        """Refuse to go on with other weights than those that a run began with (None: it has just begun).

        Raises:
            TorchgrowError: they are others.
        """
        if digest not in (None, self.digest):
            raise TorchgrowError(
                "the weights that this run began with have changed since, so it cannot go on as it was; put the file "
                "back, or start anew with another --out"
            )

    def warning(self, data: Data) -> str:
        """Where the network knows no more of the data than chance does: what may be the cause; else ""."""
        if data.metric is not ACCURACY or isinstance(data, TextData):
            return ""
        classes = 1 + int(data.test.labels.max())
        score = self.scores[data.metric.name]
        if score > 120 / classes:
            return ""
        return (
            f"Warning: the network scores {score:.2f} % before anything is cut, about as much as chance "
            f"({100 / classes:.2f} %). Was it trained on such images, of this --side, with colours of this --mean and "
            "--std, and with the classes in this order?"
        )


def begin(recipe: Recipe, data: Data, rises: Mapping[str, Any]) -> Start:
    """Build the recipe's network with its weights, evaluate it, and attach its grower.

    Args:
        recipe: with weights.
        data: what it is fine-tuned on.
        rises: what the run measured before, as `torchgrow.lab.rises.rises_of` takes it; {} of a new one.

    Raises:
        TorchgrowError: the weights are of another network, it does not fit the data, or the budget is out of reach.
    """
    assert recipe.weights is not None
    torch.manual_seed(recipe.seed)
    model = weights.network(Path(recipe.weights), recipe.build_grown or recipe.build).to(data.device)
    _check(model, recipe, data)
    scores, cost = judged(model, data), measure(model, data.example())
    optimizer, digest = make_optimizer(model, recipe), weights.digest(model)
    found = rises_of(model, data, recipe, rises)
    with warnings.catch_warnings():  # a network that was cut before is shown as it came, and is its own frame here
        warnings.filterwarnings("ignore", "the budget .* is a share of the network as it is")
        grower = make_grower(model.train(), optimizer, data, recipe, found.rises if found else None)
    return Start(
        model=model,
        optimizer=optimizer,
        grower=grower,
        teacher=grower.teacher() if recipe.distil else None,
        scores=scores,
        cost=cost,
        digest=digest,
        rises=found,
    )


@torch.no_grad()
def _check(model: nn.Module, recipe: Recipe, data: Data) -> None:
    """Refuse a network that cannot be trained on the data.

    Raises:
        TorchgrowError: it fails on the images, or it does not tell as many classes as they have.
    """
    if isinstance(data, TextData):
        return
    name, classes = recipe.source or recipe.name, 1 + max(int(part.labels.max()) for part in (data.train, data.test))
    for training in (False, True):  # some give more than scores in training, where only the loss would notice
        scores = _tried(model, data.example(), name, training=training)
        if data.metric is not ACCURACY:
            continue  # pixels have classes, and the network is that of a recipe
        if not isinstance(scores, Tensor) or scores.dim() != 2:
            found = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise TorchgrowError(
                f"{name} is no image classifier: its output is {found}{' in training' * training}, not scores of shape "
                '[images, classes]; for other tasks use torchgrow.Grower(..., start="frame") in your own training loop '
                "(docs/trained.md)"
            )
        if scores.shape[1] != classes:
            raise TorchgrowError(
                f"the network tells {scores.shape[1]} classes and the images have {classes}; shrink it on the classes "
                "it was trained for, or train a new classifier on these first"
            )


def _tried(model: nn.Module, x: Tensor, name: str, *, training: bool) -> Any:
    """What the network gives for some images; its statistics stay.

    Raises:
        TorchgrowError: it fails.
    """
    before = [buffer.clone() for buffer in model.buffers()]
    try:
        with random_kept():
            out = model.train(training)(x)
        for buffer, old in zip(model.buffers(), before, strict=True):
            buffer.copy_(old)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise TorchgrowError(
            f"{name} cannot read images of {' x '.join(map(str, x.shape[1:]))}: {error}; it has to take float32 images "
            "of these colours, in the size that it was trained with, as in --side 224"
        ) from error
    return getattr(out, "logits", out)


def what_it_cost(start: Start) -> str:
    """What the table of a finished run counts, and what not."""
    teacher = " and of its teacher's forward passes" if start.teacher else ""
    measuring = ", and of measuring what the loss rises by" if start.rises else ""
    return (
        "before: the network as it came, measured on the same test data. Training FLOPs and seconds are those of the "
        f"fine-tuning{teacher}{measuring}; the first training, of before, is not in them.\n"
    )


def loading(recipe: Recipe, out: Path) -> str:
    """The Python that loads the network of a finished run."""
    config = recipe.as_json()
    name, arguments = config["model"], config["model_arguments"]
    kind, _, rest = str(arguments.get("model", "")).partition(":")
    classes = f", num_classes={arguments['classes']}" if "classes" in arguments else ""
    if kind == "torchvision":
        imports, factory = "import torchvision", f"lambda: torchvision.models.get_model({_text(rest)}{classes})"
    elif kind == "timm":
        imports, factory = "import timm", f"lambda: timm.create_model({_text(rest)}{classes})"
    elif recipe.source and "model" not in arguments:  # a recipe in a user's file, whose network may be there too
        imports, factory = "from torchgrow.lab import recipes", f"recipes.get({_text(recipe.source)}).build"
    else:
        build = recipe.build
        while isinstance(build, partial):
            build = build.func
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        imports, factory = f"from {build.__module__} import {name}", f"lambda: {name}({given})"
    return f"import torchgrow\n{imports}\nmodel = torchgrow.load({_text(out / 'network')}, {factory})"


def _text(value: object) -> str:
    """A text as Python code has it, whatever is in it."""
    return json.dumps(str(value), ensure_ascii=False)

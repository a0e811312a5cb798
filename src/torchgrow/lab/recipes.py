"""Recipes: each is a function that returns a whole `Recipe` and opens with its claim.

A variant is a function that takes a recipe and returns an edited one (`with_shortcut`, or plain
``dataclasses.replace``), so that the difference between two experiments is exactly what one reads.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from math import ceil
from pathlib import Path
from typing import Any

from torch import nn

from torchgrow import Budget, Method, TorchgrowError
from torchgrow.lab import models
from torchgrow.lab.attention import GPT, ViT
from torchgrow.lab.names import DATASETS, OPTIMIZERS, PRECISIONS, SCALES, SCHEDULES, SIZES
from torchgrow.lab.recurrent import LSTM
from torchgrow.lab.user_files import explained, is_file, made_in

DEEP = "default:layer_lag=16"
"""For frames deeper than one would pick: their layers come late."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a run, apart from where the data is and where the results go.

    Attributes:
        name: what the user types.
        dataset: one of `torchgrow.lab.names.DATASETS`.
        build: ``build(width)`` makes the network with every channel count scaled by ``width``, a factor;
            at 1.0, its default, it is the frame that the grown network may become and the dense twin is.
        build_grown: makes the frame of the grown network if that differs in what is no parameter, such as dropout.
        budget: what the grown network may cost.
        depth: whether layers grow too, as for `torchgrow.Grower`.
        meta: whether the grown network's frame is built on the meta device, where what never grows costs nothing.
        epochs: passes over the training images, or text.
        then: more of them once the structure is final, with the schedule anew (fine-tuning; the train phase after
            the grow phase, where an architecture is searched). Networks that do not grow train on just so.
        updates_per_epoch: how often the grower updates in each, the last time at its end; at most once a step.
            None: 12 times where the preset changes little at a time, 160 times in all where the preset is the paper's
            at its own pace, which is that often; once in an epoch where units are drawn anew otherwise.
        batch_size: images, or sequences of words, a step.
        steps: words a sequence, of a text.
        side: height and width that images of a folder are resized to, in pixels.
        optimizer: one of `torchgrow.lab.names.OPTIMIZERS`.
        lr: learning rate before the first milestone, or after warm-up.
        schedule: one of `torchgrow.lab.names.SCHEDULES`: "milestones", steps at ``lr_milestones``; "cosine" or
            "linear", down to 0 over the whole run; "wsd" (warm up, stay, decay), constant, then linear down to 0 over
            the last ``decay``.
        lr_milestones: fractions of the run after which the learning rate is multiplied by ``lr_factor``.
        lr_factor: see there.
        warmup: share of the run in which the learning rate first rises from 0; not with milestones.
        decay: share of the run in which the learning rate of "wsd" falls to 0.
        momentum: of SGD.
        nesterov: whether SGD's momentum is Nesterov's.
        weight_decay: on all parameters with SGD; with AdamW on matrices, not on biases, norms and positions.
        precision: one of `torchgrow.lab.names.PRECISIONS`. "bfloat16": forward and backward pass under autocast;
            weights and evaluation are in float32 all the same.
        channels_last: whether images lie in memory channel by channel within a pixel, which is faster on some
            processors; results differ by rounding.
        clip: largest norm of all gradients together; None means any.
        freeze: parameters or modules that keep their width, as for `torchgrow.Grower`.
        shift: augmentation, largest shift of a training image in pixels.
        mirror: augmentation, whether half the training images are mirrored.
        subset: training images, or words, to use; None means all.
        preset: how the grower grows, as `torchgrow.Method.named` reads it.
        seed: of initial weights, batch order, augmentation and growth.
        threads: CPU threads to train with; None leaves it to PyTorch. Results repeat only at the same number.
        source: where `get` found it, if it is not one of ours: ``path/to/file.py:function``.

    Raises:
        TorchgrowError: a field out of range; the message names it.
    """

    name: str
    dataset: str
    build: Callable[..., nn.Module]
    build_grown: Callable[..., nn.Module] | None = None
    budget: Budget
    depth: bool = False
    meta: bool = False
    epochs: int
    then: int = 0
    updates_per_epoch: int | None = None
    batch_size: int
    steps: int = 35
    side: int = 64
    optimizer: str = "sgd"
    lr: float
    schedule: str = "milestones"
    lr_milestones: tuple[float, ...] = (0.5, 0.75)
    lr_factor: float = 0.1
    warmup: float = 0.0
    decay: float = 0.3
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    precision: str = "float32"
    channels_last: bool = False
    clip: float | None = None
    freeze: tuple[str, ...] = ()
    shift: int = 0
    mirror: bool = False
    subset: int | None = None
    preset: str = "default"
    seed: int = 0
    threads: int | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        def need(field: str, fine: bool, rule: str) -> None:
            if not fine:
                raise TorchgrowError(f"recipe {self.name!r}: {field} must be {rule}, got {getattr(self, field)!r}")

        need("dataset", self.dataset in DATASETS, f"one of {', '.join(DATASETS)}")
        need("epochs", self.epochs >= 2, "at least 2 (passes over the training images or text)")
        need("then", self.then >= 0, "at least 0 (more passes after growth)")
        need("side", self.side >= 8, "at least 8 (pixels)")
        need("updates_per_epoch", self.updates_per_epoch is None or self.updates_per_epoch >= 1, "at least 1")
        need("batch_size", self.batch_size >= 2, "at least 2 (images, or sequences of words)")
        need("steps", self.steps >= 1, "at least 1 (words)")
        need("optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
        need("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        need("warmup", 0 <= self.warmup < 1, "a share of the run, at least 0 and below 1")
        need("warmup", self.warmup == 0 or self.schedule != "milestones", "0 with milestones, which do not warm up")
        need("decay", 0 < self.decay <= 1 - self.warmup, "a share of the run, above 0 and at most 1 - warmup")
        need("clip", self.clip is None or self.clip > 0, "above 0 (norm of the gradients), or None for any")
        need("lr", self.lr > 0, "above 0")
        milestones = self.lr_milestones
        rising = all(a < b for a, b in zip((0.0, *milestones), (*milestones, 1.0), strict=True))
        need("lr_milestones", rising, "rising fractions of the run, between 0 and 1")
        need("lr_factor", 0 < self.lr_factor <= 1, "above 0 and at most 1")
        need("momentum", 0 <= self.momentum < 1, "at least 0 and below 1")
        need("weight_decay", self.weight_decay >= 0, "at least 0")
        need("shift", self.shift >= 0, "at least 0 (pixels)")
        need("subset", self.subset is None or self.subset >= 1, "at least 1 (images, or words), or None for all")
        try:
            Method.named(self.preset)
        except TorchgrowError as error:
            raise TorchgrowError(f"recipe {self.name!r}: {error}") from None
        need("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        need("seed", self.seed >= 0, "at least 0")
        need("threads", self.threads is None or self.threads >= 1, "at least 1, or None")

    def updates_an_epoch(self) -> int:
        """How often the grower updates in each epoch."""
        method = Method.named(self.preset)
        often = 12 if method.draws == "ranked" else ceil((method.updates or 1) / self.epochs)
        return self.updates_per_epoch or often

    def milestones_in_epochs(self) -> list[int]:
        """The epochs after which the learning rate drops; the one place where fractions become epochs."""
        return [round(fraction * self.epochs) for fraction in self.lr_milestones]

    def with_words(self, words: int) -> "Recipe":
        """The recipe with networks for a vocabulary of so many words."""
        grown = self.build_grown and partial(self.build_grown, words=words)
        return replace(self, build=partial(self.build, words=words), build_grown=grown)

    def with_classes(self, classes: int) -> "Recipe":
        """The recipe with networks of so many outputs."""
        return replace(self, build=partial(self.build, classes=classes))

    def as_json(self) -> dict[str, Any]:
        """All fields as JSON can hold them; ``build`` and ``build_grown`` by their class and arguments."""
        fields = dict(vars(self))
        model, fields["model_arguments"] = _described(fields.pop("build"))
        grown = fields.pop("build_grown")
        if grown is not None:
            fields["grown_arguments"] = _described(grown)[1]
        return {**fields, "model": model, "budget": str(self.budget)}

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> "Recipe":
        """The inverse of `as_json`, for recipes that `get` knows and variants of them; other fields are left alone.

        Raises:
            TorchgrowError: a field is missing or not what `as_json` writes.
        """
        try:
            config = {"channels_last": False, "decay": 0.3, "source": None, **config}  # of runs before there were such
            base = get(config["source"] or config["name"])
            build = base.build.func if isinstance(base.build, partial) else base.build
            if config["model"] != build.__name__:
                raise TorchgrowError(f"the network of recipe {base.name!r} is {build.__name__}, not {config['model']}")
            changed = {name: config[name] for name in vars(base) if name not in ("build", "build_grown", "budget")}
            changed = {name: tuple(v) if isinstance(v, list) else v for name, v in changed.items()}
            grown = partial(build, **_arguments(config["grown_arguments"])) if "grown_arguments" in config else None
            limits = dict(part.split(" <= ") for part in config["budget"].split(" and "))
            budget = Budget(**limits)
            own = partial(build, **_arguments(config["model_arguments"]))
            return replace(base, build=own, build_grown=grown, budget=budget, **changed)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TorchgrowError(f"this is not the record of a recipe: {error!r}") from error


def _described(build: Callable[..., nn.Module]) -> tuple[str, dict[str, Any]]:
    """The name of a network's class, and the arguments it is built with."""
    arguments: dict[str, Any] = {}
    while isinstance(build, partial):
        arguments = {**build.keywords, **arguments}
        build = build.func
    return build.__name__, arguments


def _arguments(recorded: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a network as they were before JSON made lists of tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in recorded.items()}


def digits() -> Recipe:
    """A small residual network for scikit-learn's 8x8 digits, grown to 8 % of its parameters, layers too.

    Command: ``torchgrow run digits`` (or ``./demo``, which installs what it needs first).
    Hardware: one CPU core, no download. With 360 test images, one of them is 0.28 points. Learning rate and schedule
    were chosen on held-out images for the dense and the uniform network (docs/log.md); what ten seeds came to is in
    docs/results.md.
    """
    return Recipe(
        name="digits",
        dataset="digits",
        build=partial(models.ResNet, depth=14, widths=(32, 64, 128), in_channels=1),
        budget=Budget(params="8%"),
        depth=True,
        preset="default:ramp=0.15",  # slow enough to be watched
        epochs=8,
        batch_size=64,
        lr=0.1,
        schedule="linear",
        warmup=0.1,
        weight_decay=5e-4,
        shift=1,  # mirrored digits are other characters
        threads=1,  # nearly as fast as two on layers this small, and not slowed down by a busy neighbour
    )


def _cifar10(name: str, scale: str, build: Callable[..., nn.Module], budget: Budget, epochs: int = 160) -> Recipe:
    """CIFAR-10 as the paper trains on it; small: 10,000 images and 20 epochs, which fits two CPU cores."""
    if scale not in SCALES:
        raise TorchgrowError(f"scale is one of {', '.join(SCALES)}, got {scale!r}")
    small = scale == "small"
    return Recipe(
        name=name,
        dataset="cifar10",
        build=build,
        budget=budget,
        epochs=20 if small else epochs,
        subset=10_000 if small else None,
        batch_size=128,
        lr=0.1,
        shift=4,
        mirror=True,
    )


def resnet20_cifar10(scale: str = "small") -> Recipe:
    """The paper's ResNet-20 on CIFAR-10, grown to 36 % of its parameters; small: layers grow too.

    Command: ``torchgrow run resnet20-cifar10 --data FOLDER``, with ``--scale full --preset paper`` for the paper's
    160 epochs on all images, to the letter.
    Hardware: 2 CPU cores. What it gives, with seeds, spread and hardware: docs/results.md.
    """
    build = partial(models.ResNet, depth=20, widths=(16, 32, 64), shortcut="A")
    recipe = _cifar10("resnet20-cifar10", scale, build, Budget(params="36%"))
    return recipe if scale == "full" else replace(recipe, depth=True, preset="default:ramp=0.01,peak=1")


def vgg16_cifar10(scale: str = "small") -> Recipe:
    """The paper's VGG-16 on CIFAR-10, grown to 5 % of its parameters; small: a quarter of its width, to 20 %.

    Command: ``torchgrow run vgg16-cifar10 --data FOLDER``, with ``--scale full --preset paper`` for the paper's.
    Hardware: 2 CPU cores for small; a GPU for full.
    """
    build = partial(models.VGG16, widen=0.25 if scale == "small" else 1.0)
    return _cifar10("vgg16-cifar10", scale, build, Budget(params="20%" if scale == "small" else "5%"))


def wrn28_10_cifar10(scale: str = "small") -> Recipe:
    """The paper's WRN-28-10 on CIFAR-10, grown to 9.4 % of its parameters; small: WRN-16-2, to 30 %.

    Command: ``torchgrow run wrn28-10-cifar10 --data FOLDER``, with ``--scale full --preset paper`` for the paper's.
    Hardware: 2 CPU cores for small; a GPU for full.
    """
    depth, widen, share = (16, 2, "30%") if scale == "small" else (28, 10, "9.4%")
    build = partial(models.WideResNet, depth=depth, widen=widen)
    recipe = _cifar10("wrn28-10-cifar10", scale, build, Budget(params=share), epochs=200)
    return replace(recipe, lr_milestones=(0.3, 0.6, 0.8), lr_factor=0.2, weight_decay=5e-4)


def basic3resnet_cifar10(scale: str = "small") -> Recipe:
    """AutoGrow's Basic3ResNet: layers and channels grow from one block of one channel a stage, in a 42-42-42 frame.

    Small: a 9-9-9 frame, to the parameters of ResNet-20, which is 3-3-3.
    Command: ``torchgrow run basic3resnet-cifar10 --data FOLDER``, with ``--scale full --preset paper`` for the
    paper's, whose nets are then fine-tuned for 40 epochs.
    Hardware: 2 CPU cores for small; a GPU for full.
    """
    small = scale == "small"
    build = partial(models.ResNet, depth=6 * (9 if small else 42) + 2, shortcut="B")
    recipe = _cifar10("basic3resnet-cifar10", scale, build, Budget(params=275_572 if small else "50%"))
    return replace(recipe, depth=True, meta=True, preset=DEEP, then=0 if small else 40)


def plain3net_cifar10(scale: str = "small") -> Recipe:
    """AutoGrow's Plain3Net: the same without shortcuts, in a 23-23-23 frame; small: 5-5-5, to half its parameters.

    Command: ``torchgrow run plain3net-cifar10 --data FOLDER``, with ``--scale full --preset paper`` for the paper's,
    whose nets are then fine-tuned for 40 epochs.
    Hardware: 2 CPU cores for small; a GPU for full.
    """
    small = scale == "small"
    build = partial(models.Staged, unit="plain", units=(5, 5, 5) if small else (23, 23, 23), widths=(16, 32, 64))
    recipe = _cifar10("plain3net-cifar10", scale, build, Budget(params="50%"))
    return replace(recipe, depth=True, meta=True, preset=DEEP, then=0 if small else 40)


def _imagenet(name: str, scale: str, build: Callable[..., nn.Module]) -> Recipe:
    """Folders of images, as ImageNet's; small: 64 pixels and 20 epochs, for ten classes or so."""
    if scale not in SCALES:
        raise TorchgrowError(f"scale is one of {', '.join(SCALES)}, got {scale!r}")
    small = scale == "small"
    return Recipe(
        name=name,
        dataset="imagefolder",
        build=build,
        budget=Budget(params="50%"),
        depth=True,
        meta=True,
        epochs=20 if small else 90,
        then=0 if small else 20,
        batch_size=128 if small else 256,
        side=64 if small else 224,
        lr=0.1,
        lr_milestones=(1 / 3, 2 / 3),
        shift=4 if small else 16,
        mirror=True,
    )


def bottleneck4resnet_imagenet(scale: str = "small") -> Recipe:
    """AutoGrow's Bottleneck4ResNet for ImageNet, from one unit a stage; small: a quarter of the width, 3-4-6-3.

    Command: ``torchgrow run bottleneck4resnet-imagenet --data FOLDER``, the folder holding ``train/CLASS/*`` and
    ``val/CLASS/*``; with ``--scale full --preset paper`` for the paper's.
    Hardware: 2 CPU cores for small (Imagenette, say); several GPUs for full.
    """
    small = scale == "small"
    widths, units = ((64, 128, 256, 512), (3, 4, 6, 3)) if small else ((256, 512, 1024, 2048), (6, 8, 12, 10))
    build = partial(models.Staged, unit="bottleneck", units=units, widths=widths, stem="large")
    return _imagenet("bottleneck4resnet-imagenet", scale, build)


def plain4net_imagenet(scale: str = "small") -> Recipe:
    """AutoGrow's Plain4Net for ImageNet, from one unit a stage; small: a quarter of the width, 2-2-2-2.

    Command: ``torchgrow run plain4net-imagenet --data FOLDER``, the folder holding ``train/CLASS/*`` and
    ``val/CLASS/*``; with ``--scale full --preset paper`` for the paper's.
    Hardware: 2 CPU cores for small (Imagenette, say); several GPUs for full.
    """
    small = scale == "small"
    widths, units = ((16, 32, 64, 128), (2, 2, 2, 2)) if small else ((64, 128, 256, 512), (6, 6, 6, 6))
    build = partial(models.Staged, unit="plain", units=units, widths=widths, stem="large")
    return _imagenet("plain4net-imagenet", scale, build)


def resnet18_imagenette() -> Recipe:
    """ResNet-18 on small pictures in folders, such as Imagenette, grown to 36 % of its parameters, layers too.

    Command: ``torchgrow run resnet18-imagenette --data FOLDER``, the folder holding ``train/CLASS/*`` and
    ``val/CLASS/*``.
    Hardware: 2 CPU cores.
    """
    return Recipe(
        name="resnet18-imagenette",
        dataset="imagefolder",
        build=partial(models.Staged, unit="basic", units=(2, 2, 2, 2), widths=(64, 128, 256, 512), stem="large"),
        budget=Budget(params="36%"),
        depth=True,
        preset="default:ramp=0.01,peak=1",
        epochs=20,
        batch_size=128,
        side=64,
        lr=0.1,
        weight_decay=5e-4,
        shift=4,
        mirror=True,
    )


def vit_cifar10() -> Recipe:
    """A small vision transformer on CIFAR-10: heads and hidden neurons grow to half the FLOPs.

    Command: ``torchgrow run vit-cifar10 --data FOLDER``.
    Hardware: 2 CPU cores; for a try there, add ``--subset 10000 --epochs 10``.
    """
    return Recipe(
        name="vit-cifar10",
        dataset="cifar10",
        build=partial(ViT, features=128, layers=6, heads=4, head=32, neurons=512),
        budget=Budget(flops="50%"),
        epochs=100,
        batch_size=128,
        optimizer="adamw",
        lr=1e-3,
        schedule="cosine",
        warmup=0.05,
        weight_decay=0.05,
        clip=1.0,
        shift=4,
        mirror=True,
    )


def gpt_ptb() -> Recipe:
    """A small GPT on words: heads, hidden neurons and layers grow to 60 % of the FLOPs, the residual stream stays.

    Command: ``torchgrow run gpt-ptb --data FOLDER``, with the Penn Treebank or any other text in three files;
    without ``--data``, the manual that comes with Python.
    Hardware: 2 CPU cores; for a try there, leave ``--data`` out and add ``--epochs 2``.
    """
    return Recipe(
        name="gpt-ptb",
        dataset="text",
        build=partial(GPT, features=256, layers=6, heads=8, head=32, neurons=1024, context=64, dropout=0.2),
        budget=Budget(flops="60%"),
        depth=True,
        preset="default:ramp=0.01,peak=1,layer_lag=1",
        epochs=20,
        updates_per_epoch=39,  # it is grown before the warm-up is over
        batch_size=16,
        steps=64,
        optimizer="adamw",
        lr=1e-3,
        schedule="cosine",
        warmup=0.05,
        weight_decay=0.1,
        clip=1.0,
    )


def lstm_ptb(size: str = "small") -> Recipe:
    """Zaremba's LSTM on words: hidden units grow to half the FLOPs of LSTM and decoder, the embedding stays.

    Command: ``torchgrow run lstm-ptb --data FOLDER``, with the Penn Treebank or any other text in three files;
    without ``--data``, the manual that comes with Python. ``--size`` takes small (200 hidden units a layer, 13
    epochs), medium (650, 39 epochs) and large (1500, 55 epochs; the network of the paper that grows it, with its
    two rates of dropout). Sizes and schedules are those of Zaremba et al. (2014, arXiv 1409.2329) and their code,
    whose loss is a sum over the words of a sample: the mean over them, as here, needs a learning rate as many
    times larger, and gradients clipped at a norm as many times smaller.
    Hardware: 2 CPU cores for small; for a try there, leave ``--data`` out and add ``--epochs 2``.

    Raises:
        TorchgrowError: another size.
    """
    if size not in SIZES:
        raise TorchgrowError(f"size is one of {', '.join(SIZES)}, got {size!r}")
    hidden = {"small": 200, "medium": 650, "large": 1500}[size]
    epochs, constant = {"small": (13, 4), "medium": (39, 6), "large": (55, 14)}[size]
    steps = 20 if size == "small" else 35
    build = partial(
        LSTM,
        embedding=hidden,
        hidden=(hidden, hidden),
        dropout={"small": 0.0, "medium": 0.5, "large": 0.65}[size],
        init={"small": 0.1, "medium": 0.05, "large": 0.04}[size],
    )
    return Recipe(
        name="lstm-ptb",
        dataset="text",
        build=build,
        build_grown=partial(build, dropout=0.35) if size == "large" else None,
        budget=Budget(flops="50%"),
        # The learning rate falls from the fifth epoch on: full-grown in the first, pruned where it falls.
        preset="default:ramp=0.04,peak=2.2,hold=0.3,settle=0.5",
        epochs=epochs,
        updates_per_epoch=4,
        batch_size=20,
        steps=steps,
        lr=1.0 * steps,
        lr_milestones=tuple(epoch / epochs for epoch in range(constant, epochs)),
        lr_factor={"small": 1 / 2, "medium": 0.8, "large": 1 / 1.15}[size],
        momentum=0.0,
        weight_decay=0.0,
        clip=(10.0 if size == "large" else 5.0) / steps,
        freeze=("embedding",),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "digits": digits,
    "resnet20-cifar10": resnet20_cifar10,
    "vgg16-cifar10": vgg16_cifar10,
    "wrn28-10-cifar10": wrn28_10_cifar10,
    "basic3resnet-cifar10": basic3resnet_cifar10,
    "plain3net-cifar10": plain3net_cifar10,
    "bottleneck4resnet-imagenet": bottleneck4resnet_imagenet,
    "plain4net-imagenet": plain4net_imagenet,
    "resnet18-imagenette": resnet18_imagenette,
    "vit-cifar10": vit_cifar10,
    "lstm-ptb": lstm_ptb,
    "gpt-ptb": gpt_ptb,
}


def get(name: str) -> Recipe:
    """The recipe of that name.

    Args:
        name: one of `torchgrow.lab.names.RECIPES`, or ``path/to/file.py:function`` for a function that takes no
            arguments and returns a `Recipe`; the file is executed.

    Raises:
        TorchgrowError: there is none; the message lists those there are.
    """
    if is_file(name):
        return _from_file(name)
    if name not in RECIPES:
        raise TorchgrowError(
            f"there is no recipe {name!r}; there are {', '.join(RECIPES)}, and path/to/file.py:function"
        )
    return RECIPES[name]()


def _from_file(name: str) -> Recipe:
    made = made_in(name, "a torchgrow.lab.recipes.Recipe")
    if callable(made):
        path = str(Path(name.rpartition(":")[0]).resolve())
        with explained(f"{name} failed", "it is called without arguments and must return a Recipe", path):
            made = made()
    if not isinstance(made, Recipe):
        raise TorchgrowError(
            f"{name} returned {type(made).__name__}; return a torchgrow.lab.recipes.Recipe, such as "
            'dataclasses.replace(torchgrow.lab.recipes.get("digits"), name="mine", build=MyModel, depth=False)'
        )
    if not re.fullmatch(r"[\w.-]+", made.name) or made.name in RECIPES:
        raise TorchgrowError(
            f"the recipe of {name} is called {made.name!r}; results are filed by that name, so choose one of its own "
            "of letters, digits, - and _"
        )
    return replace(made, source=name)


def with_shortcut(recipe: Recipe, kind: str) -> Recipe:
    """``recipe`` with shortcuts of kind ``"A"`` (padding) or ``"B"`` (1x1 convolution) in its network.

    Raises:
        TorchgrowError: its network has no choice of shortcuts.
    """
    if not (isinstance(recipe.build, partial) and recipe.build.func is models.ResNet):
        raise TorchgrowError(f"recipe {recipe.name!r} has no choice of shortcuts; leave --shortcut out")
    if kind not in ("A", "B"):
        raise TorchgrowError(f'shortcut is "A" (padding) or "B" (1x1 convolution), got {kind!r}')
    return replace(recipe, build=partial(recipe.build, shortcut=kind))


def with_scale(recipe: Recipe, scale: str) -> Recipe:
    """``recipe`` at one of the `torchgrow.lab.names.SCALES`: small enough for two CPU cores, or as published.

    Raises:
        TorchgrowError: it has no choice of scales, or not this one.
    """
    make: Callable[..., Recipe] = RECIPES.get(recipe.name, lambda: recipe)
    if "scale" not in signature(make).parameters:
        raise TorchgrowError(f"recipe {recipe.name!r} has no choice of scales; leave --scale out")
    return make(scale)


def with_size(recipe: Recipe, size: str) -> Recipe:
    """``recipe`` for one of the `torchgrow.lab.names.SIZES` of its network, schedule included.

    Raises:
        TorchgrowError: its network has no choice of sizes, or not this one.
    """
    if recipe.name != "lstm-ptb":
        raise TorchgrowError(f"recipe {recipe.name!r} has no choice of sizes; leave --size out")
    return lstm_ptb(size)

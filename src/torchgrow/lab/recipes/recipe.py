"""The settings of a training run, checked when they are made, and as JSON."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from inspect import Parameter, signature
from math import ceil, inf, isfinite
from typing import Any

from torch import nn

from torchgrow import Budget, TorchgrowError, policies
from torchgrow.lab.names import DATASETS, OPTIMIZERS, PRECISIONS, SCALES, SCHEDULES, SMOKE

STREAMED = ("imagefolder", "voc")
"""Data sets in folders, which need not be kept in memory."""


PAPER_UPDATES = 160
"""Of the paper's runs: one after each epoch."""

MOST_SEED = 2**63 - 1
"""PyTorch takes up to twice as many, but JSON readers and tensors of seeds do not."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a run, apart from where the data is and where the results go.

    Attributes:
        name: what the user types.
        dataset: one of `torchgrow.lab.names.DATASETS`.
        build: ``build(width)`` makes the network with every channel count scaled by ``width``, a factor;
            at 1.0, its default, it is the frame that the grown network may become and the dense twin is. A class or a
            function, or a `functools.partial` of one with keywords that JSON can hold, since runs record it by name.
            It gets ``classes=`` (of images in folders) or ``words=`` (of a text) as the data has, if it takes that.
        build_grown: makes the frame of the grown network if that differs in what is no parameter, such as dropout.
        budget: what the grown network may cost.
        depth: whether layers grow too, as for `torchgrow.Grower`.
        meta: whether the grown network's frame is built on the meta device, where what never grows costs nothing.
        epochs: passes over the training images, or text; one is enough where the grower updates twice in it, but for a
            schedule of milestones, which lie between epochs.
        then: more of them once the structure is final, with the schedule anew (fine-tuning; the train phase after
            the grow phase, where an architecture is searched). Networks that do not grow train on just so.
        updates_per_epoch: how often the grower updates in each, the last time at its end; at most once a step.
            None: 12 times where the preset changes little at a time, 160 times in all where the preset is the paper's
            at its own pace, which is that often; once in an epoch where units are drawn anew otherwise.
        batch_size: images, or sequences of words, a step.
        largest_batch: images, or sequences, that a step may grow to while the network is small: whole batches, as many
            as fit where the full network fits with one (`torchgrow.lab.large_batches`). None: one always.
        steps: words a sequence, of a text.
        side: height and width that images of a folder are resized to, in pixels.
        crop: augmentation of images in folders: whether they are streamed from disk, a random part of each, as
            `torchgrow.lab.streamed` has it, and not kept in memory; in place of ``shift``.
        void: classes of masks that are neither learned nor judged.
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
        freeze: parameters or modules that keep their width: `protect` of `torchgrow.Grower`.
        shift: augmentation, largest shift of a training image in pixels.
        mirror: augmentation, whether half the training images are mirrored.
        mean: of the colours of pixels in [0, 1], which is subtracted; None: the data set's own.
        std: standard deviation of these colours, by which is divided; None: the data set's own.
        subset: training images, or words, to use; None means all.
        preset: how the grower grows, as `torchgrow.policies.named` reads it. Rises are measured where it needs them.
        weights: what the run begins with, as `torchgrow.lab.weights.network` reads it: all of that network, which is
            then shrunk. None: with a seed of the frame.
        distil: share of a teacher in the loss, in [0, 1]: the network that the run begins with, as it was.
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
    largest_batch: int | None = None
    steps: int = 35
    side: int = 64
    crop: bool = False
    void: tuple[int, ...] = ()
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
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    subset: int | None = None
    preset: str = "default"
    weights: str | None = None
    distil: float = 0.0
    seed: int = 0
    threads: int | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        def need(field: str, fine: bool, rule: str) -> None:
            if not fine:
                raise TorchgrowError(f"recipe {self.name!r}: {field} must be {rule}, got {getattr(self, field)!r}")

        need("dataset", self.dataset in DATASETS, f"one of {', '.join(DATASETS)}")
        need("epochs", self.epochs >= 1, "at least 1 (passes over the training images or text)")
        need("then", self.then >= 0, "at least 0 (more passes after growth)")
        need("side", self.side >= 8, "at least 8 (pixels)")
        need("updates_per_epoch", self.updates_per_epoch is None or self.updates_per_epoch >= 1, "at least 1")
        need("batch_size", self.batch_size >= 2, "at least 2 (images, or sequences of words)")
        large = self.largest_batch is None or self.largest_batch >= 2 * self.batch_size
        need("largest_batch", large, f"at least {2 * self.batch_size}, since whole batches go together, or None")
        need("steps", self.steps >= 1, "at least 1 (words)")
        need("optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
        need("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        whole = self.epochs >= 2 or self.schedule != "milestones" or not self.lr_milestones
        need("schedule", whole, "another one where there is one epoch, since milestones lie between whole epochs")
        need("warmup", 0 <= self.warmup < 1, "a share of the run, at least 0 and below 1")
        need("warmup", self.warmup == 0 or self.schedule != "milestones", "0 with milestones, which do not warm up")
        need("decay", 0 < self.decay <= 1 - self.warmup, "a share of the run, above 0 and at most 1 - warmup")
        need("clip", self.clip is None or self.clip > 0, "above 0 (norm of the gradients), or None for any")
        need("lr", 0 < self.lr < inf, "above 0, and finite")
        milestones = self.lr_milestones
        rising = all(a < b for a, b in zip((0.0, *milestones), (*milestones, 1.0), strict=True))
        need("lr_milestones", rising, "rising fractions of the run, between 0 and 1")
        need("lr_factor", 0 < self.lr_factor <= 1, "above 0 and at most 1")
        need("momentum", 0 <= self.momentum < 1, "at least 0 and below 1")
        need("weight_decay", self.weight_decay >= 0, "at least 0")
        need("shift", self.shift >= 0, "at least 0 (pixels)")
        need("shift", not self.shift or not self.crop, "0 with crop, which takes its place")
        need("void", not self.void or self.dataset == "voc", "empty but for voc, which has masks")
        need("crop", not self.crop or self.dataset in STREAMED, f"False but for {' and '.join(STREAMED)}")
        need("subset", self.subset is None or self.subset >= 1, "at least 1 (images, or words), or None for all")
        need("mean", self.mean is None or all(map(isfinite, self.mean)), "a number for every colour")
        need("std", self.std is None or all(0 < one < inf for one in self.std), "above 0, and finite, for every colour")
        need("distil", 0 <= self.distil <= 1, "a share of the loss, at least 0 and at most 1")
        need("distil", not self.distil or bool(self.weights), "0 without weights, which the teacher has")
        try:
            policy = self.policy()
        except TorchgrowError as error:
            raise TorchgrowError(f"recipe {self.name!r}: {error}") from None
        often = self.epochs * self.updates_an_epoch() >= 2
        need("epochs", often, f"at least 2 with {self.preset!r}, whose structure changes once in an epoch")
        measured = isinstance(policy, policies.Shrink) and policy.rises is not None
        trained = f"without allocation=measured where nothing is trained (torchgrow shrink {self.name} --from WEIGHTS)"
        need("preset", not measured or bool(self.weights), trained)
        blind = isinstance(policy, policies.Late) and bool(self.weights)
        need("preset", not blind, "one that sees which trained units matter, such as shrink: late takes them by place")
        need("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        need("seed", 0 <= self.seed <= MOST_SEED, f"at least 0 and at most {MOST_SEED}")
        need("threads", self.threads is None or self.threads >= 1, "at least 1, or None")
        for field in ("build", "build_grown"):
            self._check_network(field)
        for field, value in self.as_json().items():
            need(field, field == "model" or _is_json(value), "what JSON can hold, since runs record it")

    def _check_network(self, field: str) -> None:
        """Refuse a network that could not be told from the record of a run, before there is one to go on with."""
        build = getattr(self, field)
        while isinstance(build, partial):
            if build.args:
                names = [p.name for p in _parameters(build.func) if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
                given = [*names, *["NAME"] * len(build.args)][: len(build.args)]
                what = getattr(build.func, "__name__", "build")
                fix = ", ".join(f"{name}={value!r}" for name, value in zip(given, build.args, strict=True))
                raise TorchgrowError(
                    f"recipe {self.name!r}: {field} is given {len(build.args)} arguments by position, which the record "
                    f"of a run does not hold; give them by keyword: partial({what}, {fix})"
                )
            for name, value in build.keywords.items():
                if not _is_json(value):
                    what = getattr(build.func, "__name__", "Net")
                    raise TorchgrowError(
                        f"recipe {self.name!r}: {field} is given {name}={value!r}, which JSON cannot hold, so the "
                        "record of a run does not; let a function of your file give it: "
                        f"def build(width=1.0): return {what}(width=width, {name}=...)"
                    )
            build = build.func
        if build is not None and not hasattr(build, "__name__"):
            raise TorchgrowError(
                f"recipe {self.name!r}: {field} is an object of {type(build).__name__}, and runs record a network by "
                "the name of its class or function; let a function of your file call it: "
                "def build(width=1.0): return maker(width)"
            )

    def updates_an_epoch(self) -> int:
        """How often the grower updates in each epoch."""
        policy, often = self.policy(), 12
        if isinstance(policy, policies.Paper):
            often = ceil(PAPER_UPDATES / self.epochs) if policy.paced else 1
        elif isinstance(policy, policies.Random):
            often = 1
        return self.updates_per_epoch or often

    def policy(self) -> policies.Policy:
        """What its preset names."""
        return policies.named(self.preset, layers=bool(self.depth), rises={})

    def milestones_in_epochs(self, epochs: int | None = None) -> list[int]:
        """The epochs, of so many, after which the learning rate drops; the one place where fractions become epochs."""
        return [round(fraction * (epochs or self.epochs)) for fraction in self.lr_milestones]

    def with_words(self, words: int) -> "Recipe":
        """The recipe with networks for a vocabulary of so many words, as far as what builds them takes ``words``."""
        grown = self.build_grown and _given(self.build_grown, "words", words)
        return replace(self, build=_given(self.build, "words", words), build_grown=grown)

    def with_classes(self, classes: int) -> "Recipe":
        """The recipe with networks of so many outputs, as far as what builds them takes ``classes``."""
        grown = self.build_grown and _given(self.build_grown, "classes", classes)
        return replace(self, build=_given(self.build, "classes", classes), build_grown=grown)

    def as_json(self) -> dict[str, Any]:
        """All fields as JSON can hold them; ``build`` and ``build_grown`` by their class and arguments."""
        fields = dict(vars(self))
        model, fields["model_arguments"] = _described(fields.pop("build"))
        grown = fields.pop("build_grown")
        if grown is not None:
            fields["grown_arguments"] = _described(grown)[1]
        return {**fields, "model": model, "budget": str(self.budget)}


def is_small(scale: str) -> bool:
    """Whether a recipe is made to fit two CPU cores; else as published.

    Raises:
        TorchgrowError: another scale.
    """
    if scale not in SCALES:
        raise TorchgrowError(f"scale is one of {', '.join(SCALES)} or {SMOKE}, got {scale!r}")
    return scale == "small"


def takes(build: Callable[..., nn.Module], name: str) -> bool:
    """Whether what builds a network takes a keyword of that name."""
    return any(p.name == name or p.kind is Parameter.VAR_KEYWORD for p in _parameters(build))


def _given(build: Callable[..., nn.Module], name: str, value: int) -> Callable[..., nn.Module]:
    return partial(build, **{name: value}) if takes(build, name) else build


def _parameters(build: Callable[..., nn.Module]) -> list[Parameter]:
    try:
        return list(signature(build).parameters.values())
    except (TypeError, ValueError):  # compiled, without a signature
        return []


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _described(build: Callable[..., nn.Module]) -> tuple[str, dict[str, Any]]:
    """The name of a network's class, and the arguments it is built with."""
    arguments: dict[str, Any] = {}
    while isinstance(build, partial):
        arguments = {**build.keywords, **arguments}
        build = build.func
    return build.__name__, arguments

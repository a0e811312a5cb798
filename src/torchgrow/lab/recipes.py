"""Recipes: each is a function that returns a whole `Recipe` and opens with its claim.

A variant is a function that takes a recipe and returns an edited one (`with_shortcut`, or plain
``dataclasses.replace``), so that the difference between two experiments is exactly what one reads.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from torchgrow import Budget, TorchgrowError
from torchgrow.lab import data, models

PRESETS = ("default", "paper")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a run, apart from where the data is and where the results go.

    Attributes:
        name: what the user types.
        dataset: one of `torchgrow.lab.data.DATASETS`.
        build: ``build(width)`` makes the network with every channel count scaled by ``width``, a factor;
            at 1.0, its default, it is the frame that the grown network may become and the dense twin is.
        budget: what the grown network may cost.
        epochs: passes over the training images; the grower updates after each.
        batch_size: images a step.
        lr: learning rate before the first milestone.
        lr_milestones: fractions of the run after which the learning rate is multiplied by ``lr_factor``.
        lr_factor: see there.
        momentum: of SGD.
        nesterov: whether SGD's momentum is Nesterov's.
        weight_decay: of SGD, on all parameters.
        shift: augmentation, largest shift of a training image in pixels.
        mirror: augmentation, whether half the training images are mirrored.
        subset: training images to use; None means all.
        preset: how the grower grows, one of `PRESETS`.
        seed: of initial weights, batch order, augmentation and growth.
        threads: CPU threads to train with; None leaves it to PyTorch. Results repeat only at the same number.

    Raises:
        TorchgrowError: a field out of range; the message names it.
    """

    name: str
    dataset: str
    build: Callable[..., nn.Module]
    budget: Budget
    epochs: int
    batch_size: int
    lr: float
    lr_milestones: tuple[float, ...] = (0.5, 0.75)
    lr_factor: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    shift: int = 0
    mirror: bool = False
    subset: int | None = None
    preset: str = "default"
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        def need(field: str, fine: bool, rule: str) -> None:
            if not fine:
                raise TorchgrowError(f"recipe {self.name!r}: {field} must be {rule}, got {getattr(self, field)!r}")

        need("dataset", self.dataset in data.DATASETS, f"one of {', '.join(data.DATASETS)}")
        need("epochs", self.epochs >= 2, "at least 2 (passes over the training images)")
        need("batch_size", self.batch_size >= 2, "at least 2 (images)")
        need("lr", self.lr > 0, "above 0")
        milestones = self.lr_milestones
        rising = all(a < b for a, b in zip((0.0, *milestones), (*milestones, 1.0), strict=True))
        need("lr_milestones", rising, "rising fractions of the run, between 0 and 1")
        need("lr_factor", 0 < self.lr_factor <= 1, "above 0 and at most 1")
        need("momentum", 0 <= self.momentum < 1, "at least 0 and below 1")
        need("weight_decay", self.weight_decay >= 0, "at least 0")
        need("shift", self.shift >= 0, "at least 0 (pixels)")
        need("subset", self.subset is None or self.subset >= 1, "at least 1 (training images), or None for all")
        need("preset", self.preset in PRESETS, f"one of {', '.join(PRESETS)}")
        need("seed", self.seed >= 0, "at least 0")
        need("threads", self.threads is None or self.threads >= 1, "at least 1, or None")

    def milestones_in_epochs(self) -> list[int]:
        """The epochs after which the learning rate drops; the one place where fractions become epochs."""
        return [round(fraction * self.epochs) for fraction in self.lr_milestones]

    def as_json(self) -> dict[str, Any]:
        """All fields as JSON can hold them; ``build`` by its class and arguments."""
        fields = dict(vars(self))
        build = fields.pop("build")
        while isinstance(build, partial):
            fields["model_arguments"] = {**build.keywords, **fields.get("model_arguments", {})}
            build = build.func
        return {**fields, "model": build.__name__, "budget": str(self.budget)}

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> "Recipe":
        """The inverse of `as_json`, for recipes that `get` knows and variants of them; other fields are left alone.

        Raises:
            TorchgrowError: a field is missing or not what `as_json` writes.
        """
        try:
            base = get(config["name"])
            build = base.build.func if isinstance(base.build, partial) else base.build
            if config["model"] != build.__name__:
                raise TorchgrowError(f"the network of recipe {base.name!r} is {build.__name__}, not {config['model']}")
            changed = {name: config[name] for name in vars(base) if name not in ("build", "budget")}
            changed = {name: tuple(v) if isinstance(v, list) else v for name, v in changed.items()}
            arguments = {
                k: tuple(v) if isinstance(v, list) else v for k, v in config.get("model_arguments", {}).items()
            }
            limits = dict(part.split(" <= ") for part in config["budget"].split(" and "))
            budget = Budget(**{name: x if x.endswith("%") else int(float(x)) for name, x in limits.items()})
            return replace(base, build=partial(build, **arguments), budget=budget, **changed)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TorchgrowError(f"this is not the record of a recipe: {error!r}") from error


def digits() -> Recipe:
    """A small residual network for scikit-learn's 8x8 digits, grown to a fifth of its parameters.

    Command: ``torchgrow run digits`` (or ``./demo``, which installs what it needs first).
    Hardware: one CPU core, no download. With 360 test images, one of them is 0.28 points.
    """
    return Recipe(
        name="digits",
        dataset="digits",
        build=partial(models.ResNet, depth=14, widths=(32, 64, 128), in_channels=1),
        budget=Budget(params="20%"),
        epochs=30,
        batch_size=64,
        lr=0.1,
        weight_decay=5e-4,
        shift=1,  # mirrored digits are other characters
        threads=1,  # nearly as fast as two on layers this small, and not slowed down by a busy neighbour
    )


def resnet20_cifar10() -> Recipe:
    """The paper's ResNet-20 on CIFAR-10, grown to 36 % of its parameters in 160 epochs.

    Command: ``torchgrow run resnet20-cifar10 --data FOLDER``.
    Hardware: 2 CPU cores; for a try there, add ``--subset 10000 --epochs 20``. What that gives, with seeds,
    spread and hardware: the first table of docs/results.md.
    """
    return Recipe(
        name="resnet20-cifar10",
        dataset="cifar10",
        build=partial(models.ResNet, depth=20, widths=(16, 32, 64), shortcut="A"),
        budget=Budget(params="36%"),
        epochs=160,
        batch_size=128,
        lr=0.1,
        shift=4,
        mirror=True,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"digits": digits, "resnet20-cifar10": resnet20_cifar10}


def get(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        TorchgrowError: there is none; the message lists those there are.
    """
    if name not in RECIPES:
        raise TorchgrowError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]()


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

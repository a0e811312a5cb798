"""Options of more than one command of the command line, what their help says, and the recipe that they make."""

from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchgrow import Budget, TorchgrowError
from torchgrow.lab import names
from torchgrow.lab.user_files import is_file

if TYPE_CHECKING:
    from torchgrow.lab.recipes import Recipe

BUDGET_HELP = (
    "What the grown network may cost: '36%' or 0.36 (of the parameters), 'params=36%', 'flops=50%', both with a comma "
    "between, or absolute, as in 'params=100k'. Default: the recipe's."
)
PRECISION_HELP = f"Of the forward and backward pass: {', '.join(names.PRECISIONS)}. Default: the recipe's."
LAYOUT_HELP = "Layout of images in memory, which decides seconds. Default: the recipe's."
RECIPE_HELP = "One of those that `torchgrow list` shows, or path/to/file.py:function that returns a Recipe."
DATA_HELP = "Folder with the data. Default: data/cifar10, data/images or data/voc; for text, Python's manual."
RESUME_HELP = "Continue this run folder where it was stopped; takes --data and --device, nothing else."

Subset = Annotated[int | None, typer.Option(help="Train on this many images, or words, only.")]
Epochs = Annotated[
    int | None,
    typer.Option(help="Passes over the training images, or text; 2 or more with --preset random or milestones."),
]
Scale = Annotated[
    str | None, typer.Option(help="small (fits two CPU cores), full (as published) or smoke (seconds, no data).")
]
Depth = Annotated[bool | None, typer.Option(help="Grow layers too. Default: the recipe's.")]
Then = Annotated[int | None, typer.Option(help="Epochs after growth, with the schedule anew.")]
Shortcut = Annotated[str | None, typer.Option(help="Shortcuts of a ResNet: A (padding) or B (1x1).")]
Size = Annotated[str | None, typer.Option(help="Size of the LSTM: small, medium or large.")]
Lr = Annotated[float | None, typer.Option(help="Learning rate. Default: the recipe's.")]
Schedule = Annotated[
    str | None, typer.Option(help=f"Of the learning rate: {', '.join(names.SCHEDULES)}. Default: the recipe's.")
]
LargestBatch = Annotated[
    int | None, typer.Option(min=2, help="Samples a step while the network is small and they fit. Default: one batch.")
]
Precision = Annotated[str | None, typer.Option(help=PRECISION_HELP)]
Layout = Annotated[bool | None, typer.Option("--channels-last/--contiguous", help=LAYOUT_HELP)]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: the recipe's.")]
Out = Annotated[Path | None, typer.Option(help="Run folder to write. Default: a new one in runs/.")]
Download = Annotated[bool, typer.Option("--download", help="Fetch CIFAR-10 if it is not there.")]
Seed = Annotated[int | None, typer.Option(help="Of weights, batches and growth. Default: 0.")]
CheckpointEvery = Annotated[
    int | None, typer.Option(min=1, help="Steps between checkpoints within an epoch. Default: one at its end.")
]
Resume = Annotated[Path | None, typer.Option(help=RESUME_HELP)]
Device = Annotated[str, typer.Option(help=f"Where to compute: {', '.join(names.DEVICES)} (the first that is there).")]


def one_budget(given: list[str] | None) -> Budget | None:
    """The budget of a command that has one; None where none is given.

    Raises:
        TorchgrowError: there are several, or it is none.
    """
    if given and len(given) > 1:
        raise TorchgrowError(
            f"--budget is given {len(given)} times, and here there is one; for limits of both kinds write "
            "--budget params=36%,flops=50%, and for a network at each of several torchgrow compare"
        )
    return Budget.read(given[0]) if given else None


def check_alone(run: Path, command: str, *, alone: bool, device: str) -> None:
    """What goes on takes no other options."""
    if not alone:
        raise TorchgrowError(
            f"a resumed run takes everything from its folder: torchgrow {command} --resume {quote(str(run))}"
        )
    check_device(device)


def check_device(device: str) -> None:
    """Refuse a device that there is no name for."""
    if device not in names.DEVICES:
        raise TorchgrowError(f"there is no device {device!r}; --device takes {', '.join(names.DEVICES)}")


def variant(
    name: str, edits: dict[str, Any], *, size: str | None, scale: str | None, shortcut: str | None, device: str
) -> "Recipe":
    """The recipe of that name with what the user wants otherwise."""
    check_device(device)
    if name not in names.RECIPES and not is_file(name):
        raise TorchgrowError(
            f"there is no recipe {name!r}; there are {', '.join(names.RECIPES)}, and path/to/file.py:function"
        )
    from torchgrow.lab import recipes

    if edits["schedule"] == "milestones":
        edits["warmup"] = 0.0  # which is theirs
    return edited(sized(recipes.get(name), size, scale, shortcut), edits)


def sized(recipe: "Recipe", size: str | None, scale: str | None, shortcut: str | None) -> "Recipe":
    """The recipe with another network of its kind."""
    from torchgrow.lab import recipes

    if size:
        recipe = recipes.with_size(recipe, size)
    if scale:
        recipe = recipes.with_scale(recipe, scale)
    return recipes.with_shortcut(recipe, shortcut) if shortcut else recipe


def edited(recipe: "Recipe", edits: dict[str, Any]) -> "Recipe":
    """The recipe with the fields that were given."""
    return replace(recipe, **{field: value for field, value in edits.items() if value is not None})


def shares(text: str) -> list[float]:
    """Shares with spaces between: ``0.2 0.3 0.5``.

    Raises:
        TorchgrowError: they cannot be read.
    """
    try:
        return [float(part) for part in text.split()]
    except ValueError:
        raise TorchgrowError(
            f"cannot read the rungs {text!r}; write shares of the epochs, like '0.2 0.3 0.5'"
        ) from None


def colours(text: str | None) -> tuple[float, ...] | None:
    """One number for every colour: ``0.5,0.5,0.5``.

    Raises:
        TorchgrowError: it cannot be read.
    """
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise TorchgrowError(f"cannot read the colours {text!r}; write a number for each, like 0.5,0.5,0.5") from None

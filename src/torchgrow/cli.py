"""The ``torchgrow`` command: ``run RECIPE``, ``compare RECIPE``, ``list`` and ``inspect MODEL``."""

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from torchgrow import PRESETS, Budget, TorchgrowError
from torchgrow.lab import inspect, recipes, sources
from torchgrow.lab.compare import FIXED
from torchgrow.lab.compare import compare as compare_methods
from torchgrow.lab.run import resume as resume_run
from torchgrow.lab.run import run as run_recipe

app = typer.Typer(
    help="Grow small, dense PyTorch networks to a budget while they train.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_BUDGET_HELP = (
    "What the grown network may cost: '36%' (of the parameters), 'params=36%', 'flops=50%', "
    "'params=36%,flops=40%', or absolute, as in 'params=100k'. Default: the recipe's."
)
_PRECISION_HELP = f"Of the forward and backward pass: {', '.join(recipes.PRECISIONS)}. Default: the recipe's."
_LAYOUT_HELP = "Layout of images in memory, which decides seconds. Default: the recipe's."
_PRESET_HELP = (
    f"How to grow: {', '.join(PRESETS)}; with other values behind a colon, as in default:peak=1,ramp=0.2. "
    "Default: the recipe's."
)

# Options of more than one command.
Subset = Annotated[int | None, typer.Option(help="Train on this many images, or words, only.")]
Epochs = Annotated[int | None, typer.Option(help="Passes over the training images, or text.")]
Scale = Annotated[str | None, typer.Option(help="small (fits two CPU cores) or full (as published).")]
Depth = Annotated[bool | None, typer.Option(help="Grow layers too. Default: the recipe's.")]
Then = Annotated[int | None, typer.Option(help="Epochs after growth, with the schedule anew.")]
Shortcut = Annotated[str | None, typer.Option(help="Shortcuts of a ResNet: A (padding) or B (1x1).")]
Size = Annotated[str | None, typer.Option(help="Size of the LSTM: small, medium or large.")]
Precision = Annotated[str | None, typer.Option(help=_PRECISION_HELP)]
Layout = Annotated[bool | None, typer.Option("--channels-last/--contiguous", help=_LAYOUT_HELP)]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: the recipe's.")]


def parse_budget(text: str) -> Budget:
    """Read a budget as typed: ``36%``, ``flops=50%``, ``params=100k,flops=40%``.

    Args:
        text: one or two parts with a comma between. A part is ``params=`` or ``flops=`` (left out: parameters)
            and a share such as ``36%`` or a number with k, M or G for 10^3, 10^6 or 10^9.

    Raises:
        TorchgrowError: it cannot be read; the message shows what can.
    """
    limits: dict[str, Any] = {}
    for part in text.split(","):
        match = re.fullmatch(r"(?:(params|flops)=)?(\d+(?:\.\d+)?)(%|[kmg]?)", part.strip(), re.IGNORECASE)
        field = (match[1] or "params").lower() if match else ""
        if not match or field in limits:
            raise TorchgrowError(
                f"cannot read the budget {text!r}; write it like 36%, params=36%, flops=50%, "
                "params=36%,flops=40% or params=100k"
            )
        number, unit = match[2], match[3].lower()
        limits[field] = f"{number}%" if unit == "%" else round(float(number) * _FACTORS[unit])
    return Budget(**limits)


@contextmanager
def _clean_exit(console: Console) -> Iterator[None]:
    """Errors that torchgrow means to raise are for the user to read, without a traceback."""
    try:
        yield
    except TorchgrowError as error:
        where = f" (rank {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""  # torchrun's
        console.print(Text.assemble((f"error{where}: ", "bold red"), str(error)), soft_wrap=True)
        raise typer.Exit(1) from None
    except (OSError, MemoryError, RuntimeError) as error:
        short = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
        if isinstance(error, RuntimeError) and not short:
            raise  # a fault of ours
        what = f"out of memory; a smaller batch or network may fit ({error})" if short else str(error)
        console.print(Text.assemble(("error: ", "bold red"), what), soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("stopped")
        raise typer.Exit(130) from None


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="One of those that `torchgrow list` shows.")] = "digits",
    out: Annotated[Path | None, typer.Option(help="Run folder to write. Default: a new one in runs/.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with the data. Default: data/cifar10; for text, Python's manual."),
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the data if it is not there.")] = False,
    subset: Subset = None,
    epochs: Epochs = None,
    budget: Annotated[str | None, typer.Option(help=_BUDGET_HELP)] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, batches and growth. Default: 0.")] = None,
    preset: Annotated[str | None, typer.Option(help=_PRESET_HELP)] = None,
    scale: Scale = None,
    depth: Depth = None,
    then: Then = None,
    shortcut: Shortcut = None,
    size: Size = None,
    precision: Precision = None,
    channels_last: Layout = None,
    twins: Annotated[bool, typer.Option(help="Train the dense and the uniform twin too.")] = True,
    threads: Threads = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints within an epoch. Default: one at its end.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with this run folder where it was stopped; takes --data, nothing else.")
    ] = None,
) -> None:
    """Grow a network by a recipe and compare it with its dense and its uniformly thinned twin."""
    console = Console()
    with _clean_exit(Console(stderr=True)):
        if resume is not None:
            given = [
                out,
                subset,
                epochs,
                budget,
                seed,
                preset,
                shortcut,
                size,
                scale,
                depth,
                then,
                precision,
                channels_last,
                threads,
                checkpoint_every,
            ]
            if any(value is not None for value in given) or download or not twins or recipe != "digits":
                raise TorchgrowError(f"a resumed run takes everything from its folder: torchgrow run --resume {resume}")
            resume_run(resume, console=console, folder=data)
            return
        edits: dict[str, Any] = {"subset": subset, "epochs": epochs, "seed": seed, "preset": preset, "threads": threads}
        edits |= {"depth": depth, "then": then, "precision": precision, "channels_last": channels_last}
        edits["budget"] = parse_budget(budget) if budget else None
        chosen = _variant(recipe, edits, size=size, scale=scale, shortcut=shortcut)
        run_recipe(
            chosen, console=console, out=out, folder=data, download=download, twins=twins, every=checkpoint_every
        )


def _variant(
    name: str, edits: dict[str, Any], *, size: str | None, scale: str | None, shortcut: str | None
) -> recipes.Recipe:
    """The recipe of that name with what the user wants otherwise."""
    chosen = recipes.get(name)
    if size:
        chosen = recipes.with_size(chosen, size)
    if scale:
        chosen = recipes.with_scale(chosen, scale)
    chosen = replace(chosen, **{field: value for field, value in edits.items() if value is not None})
    return recipes.with_shortcut(chosen, shortcut) if shortcut else chosen


@app.command()
def compare(
    recipe: Annotated[str, typer.Argument(help="One of those that `torchgrow list` shows.")] = "digits",
    methods: Annotated[
        str,
        typer.Option(
            help=f"Names with spaces between: {', '.join(FIXED)}, or ways to grow: {', '.join(PRESETS)}, "
            "default:peak=1,gates=True and the like."
        ),
    ] = "dense uniform default",
    seeds: Annotated[int, typer.Option(min=1, help="How many; they are counted from 0.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="Count seeds from here.")] = 0,
    budget: Annotated[list[str] | None, typer.Option(help=f"{_BUDGET_HELP} Repeat for several.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of results, which grow by a line a network.")] = Path(
        "results/compare"
    ),
    data: Annotated[Path | None, typer.Option(help="Folder with the data, as for `torchgrow run`.")] = None,
    subset: Subset = None,
    epochs: Epochs = None,
    scale: Scale = None,
    depth: Depth = None,
    then: Then = None,
    shortcut: Shortcut = None,
    size: Size = None,
    precision: Precision = None,
    channels_last: Layout = None,
    threads: Threads = None,
    validate: Annotated[
        bool, typer.Option("--validate", help="Judge by training images outside the subset, or by a fifth of it.")
    ] = False,
) -> None:
    """Compare methods on a recipe over several seeds; what is in the results file already is not trained again.

    Stopped at any moment, the same command goes on where it was.
    """
    with _clean_exit(Console(stderr=True)):
        edits: dict[str, Any] = {"subset": subset, "epochs": epochs, "threads": threads, "depth": depth, "then": then}
        edits |= {"precision": precision, "channels_last": channels_last}
        chosen = _variant(recipe, edits, size=size, scale=scale, shortcut=shortcut)
        compare_methods(
            chosen,
            methods=methods.split(),
            seeds=range(first_seed, first_seed + seeds),
            budgets=[parse_budget(text) for text in budget or []],
            console=Console(),
            folder=data,
            out=out,
            validate=validate,
        )


@app.command("list")
def list_recipes() -> None:
    """Show the recipes."""
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("recipe", "data", "budget", "epochs", "what it does"):
        grid.add_column(column)
    for name, make in recipes.RECIPES.items():
        recipe = make()
        claim = (make.__doc__ or "").partition("\n")[0]
        grid.add_row(name, recipe.dataset, str(recipe.budget), str(recipe.epochs), claim)
    Console().print(grid)


@app.command("inspect")
def inspect_model(
    model: Annotated[str, typer.Argument(help=f"One of {sources.FORMS}. A file is executed as Python.")],
    budget: Annotated[str | None, typer.Option(help="A budget to ask about, as for `torchgrow run`.")] = None,
    shapes: Annotated[
        list[str] | None, typer.Option("--input", help="Shape of an input, such as 1x3x224x224; repeat for several.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    svg: Annotated[Path | None, typer.Option(help="Draw the groups into this SVG file.")] = None,
    proof: Annotated[bool, typer.Option(help="Prove exactness a second time, on other random weights.")] = True,
    depth: Annotated[bool, typer.Option("--depth", help="Ask about layers too, which may be left out.")] = False,
) -> None:
    """Show what torchgrow can do on a model, and why it cannot do more.

    Exit code 0: it can grow. 1: an error, a proof that failed, or a budget out of reach. 3: nothing can change.
    """
    errors = Console(stderr=True)
    with _clean_exit(errors):
        asked = parse_budget(budget) if budget else None
        sizes = [sources.parse_shape(text) for text in shapes or ()]
        # What a file prints while it runs must not end up in the JSON.
        with errors.status("building the model") as status, redirect_stdout(sys.stderr):
            network, inputs = sources.load(model, sizes)
            seen = inspect.inspect(
                network, inputs, name=model, budget=asked, proof=proof, depth=depth, tell=status.update
            )
        if svg:
            inspect.draw(seen, svg)
    if as_json:
        typer.echo(json.dumps(seen.as_json(), indent=2))
    else:
        console = Console()
        if not console.is_terminal:
            console.width = 120  # what goes into a file need not fit a window
        console.print(inspect.render(seen))
    if seen.nothing_can_change:
        raise typer.Exit(3)
    if seen.exact is False or seen.feasible is False:
        raise typer.Exit(1)

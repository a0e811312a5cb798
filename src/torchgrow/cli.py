"""The ``torchgrow`` command: ``run``, ``search`` and ``compare RECIPE``, ``shrink`` and ``inspect MODEL``, ``list``.

``report`` and ``table``, which train nothing, are in `torchgrow.evidence_commands`.

PyTorch takes seconds to import, so a command imports what it needs once its arguments have been read.
"""

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.metadata import version as installed
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from torchgrow import Budget, TorchgrowError, evidence_commands
from torchgrow.lab import names
from torchgrow.lab.user_files import is_file, is_library
from torchgrow.options import (
    BUDGET_HELP,
    DATA_HELP,
    RECIPE_HELP,
    CheckpointEvery,
    Depth,
    Device,
    Download,
    Epochs,
    LargestBatch,
    Layout,
    Lr,
    Out,
    Precision,
    Resume,
    Scale,
    Schedule,
    Seed,
    Shortcut,
    Size,
    Subset,
    Then,
    Threads,
    check_alone,
    check_device,
    colours,
    edited,
    one_budget,
    shares,
    sized,
    variant,
)
from torchgrow.terminal import clean_exit as _clean_exit
from torchgrow.terminal import console as _console

if TYPE_CHECKING:
    from torchgrow.lab.recipes import Recipe

app = typer.Typer(
    help="Grow small, dense PyTorch networks to a budget while they train.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

GROWN = ("default", "paper", "global", "nas", "random")
PRESETS = (*GROWN, "shrink", "late")
"""Names of `torchgrow.PRESETS`, which would import PyTorch."""

_PRESET_HELP = (
    f"How to grow: {', '.join(PRESETS)}; with other values behind a colon, as in default:ramp=0.2, "
    "and commas between several. Default: the recipe's."
)
_BESIDE_HELP = (
    "Networks to train beside the grown one, with spaces between: dense, uniform (the grown one's size), "
    "uniform=50% (of the dense one's parameters), direct (the grown one's structure from scratch), "
    "direct=flops (the same for as many training FLOPs)."
)

_SHRINK_HELP = f"One of {names.SHRINKABLE}. A file is executed as Python."
_FROM_HELP = "Trained weights: a .pt, .pth or .safetensors file, or a folder of torchgrow.save. hf:FOLDER has its own."
_SMALL_HELP = "What the network may cost, as for `torchgrow run`: flops=50% and the like, of the network in --from."
_IMAGES_HELP = (
    "Folder of CIFAR-10, or with train/CLASS/* and val/CLASS/*; of a recipe, as for `torchgrow run`. Digits need none."
)
_HOW_HELP = (
    "How to shrink: shrink, with other values behind a colon, as in shrink:until=0.3, and commas between several."
)
_CANDIDATES_HELP = "How many shapes to try. Default: as many as, trained and all, cost less than one dense training."
_RUNGS_HELP = "Shares of the epochs after each of which the worse half goes. Default: '0.2 0.3 0.5'."
_ANEW_HELP = "Train the winner from new weights, those of the next seed; else it goes on from what it has."
_VALIDATE_HELP = "Judge by training images outside the subset, or by a fifth of it."
_COLOURS_HELP = "Of the colours of the images it was trained on, as in 0.5,0.5,0.5. Default: the data set's."


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"torchgrow {installed('torchgrow')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Grow small, dense PyTorch networks to a budget while they train."""


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help=RECIPE_HELP)] = "digits",
    out: Out = None,
    data: Annotated[Path | None, typer.Option(help=DATA_HELP)] = None,
    download: Download = False,
    subset: Subset = None,
    epochs: Epochs = None,
    budget: Annotated[list[str] | None, typer.Option(help=BUDGET_HELP)] = None,
    seed: Seed = None,
    preset: Annotated[str | None, typer.Option(help=_PRESET_HELP)] = None,
    scale: Scale = None,
    depth: Depth = None,
    then: Then = None,
    shortcut: Shortcut = None,
    size: Size = None,
    lr: Lr = None,
    schedule: Schedule = None,
    largest_batch: LargestBatch = None,
    precision: Precision = None,
    channels_last: Layout = None,
    beside: Annotated[str | None, typer.Option(help=f"{_BESIDE_HELP} Default: dense uniform.")] = None,
    twins: Annotated[bool, typer.Option(help="Train other networks beside the grown one.")] = True,
    device: Device = "auto",
    threads: Threads = None,
    checkpoint_every: CheckpointEvery = None,
    resume: Resume = None,
) -> None:
    """Grow a network by a recipe and compare it with dense and uniformly narrowed ones."""
    with _clean_exit(Console(stderr=True)):
        edits: dict[str, Any] = {"subset": subset, "epochs": epochs, "seed": seed, "preset": preset, "threads": threads}
        edits |= {"depth": depth, "then": then, "precision": precision, "channels_last": channels_last}
        edits |= {"lr": lr, "schedule": schedule, "largest_batch": largest_batch}
        if resume is not None:
            given = [*edits.values(), out, budget, shortcut, size, scale, checkpoint_every, beside]
            other = download or not twins or recipe != "digits"
            _resume(resume, data, device, alone=not other and all(value is None for value in given))
            return
        others = _others(beside, twins)
        edits["budget"] = one_budget(budget)
        chosen = variant(recipe, edits, size=size, scale=scale, shortcut=shortcut, device=device)
        from torchgrow.lab import run as lab_run

        lab_run.run(
            chosen,
            console=_console(),
            out=out,
            folder=data,
            download=download,
            beside=others,
            every=checkpoint_every,
            device=device,
        )


def _others(beside: str | None, twins: bool) -> Sequence[str]:
    """The networks to train beside the grown one."""
    if beside is not None and not twins:
        raise TorchgrowError("--beside names networks to train and --no-twins wants none; leave one of them out")
    return ("dense uniform" if beside is None else beside).split() if twins else ()


def _resume(run: Path, data: Path | None, device: str, *, alone: bool) -> None:
    """Go on with a run, if no other options were given."""
    check_alone(run, "run", alone=alone, device=device)
    from torchgrow.lab import run as lab_run

    lab_run.resume(run, console=_console(), folder=data, device=device)


@app.command()
def shrink(
    model: Annotated[str | None, typer.Argument(help=_SHRINK_HELP, metavar="MODEL")] = None,
    weights: Annotated[Path | None, typer.Option("--from", help=_FROM_HELP)] = None,
    budget: Annotated[list[str] | None, typer.Option(help=_SMALL_HELP)] = None,
    data: Annotated[Path | None, typer.Option(help=_IMAGES_HELP)] = None,
    download: Download = False,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training data; 1 is a rough cut. Default: 10.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate. Default: a tenth of the recipe's; 0.01 without one.")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help=f"Of the learning rate: {', '.join(names.SCHEDULES)}. Default: linear, to 0.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Default: the recipe's; 64 without one.")] = None,
    distil: Annotated[bool, typer.Option(help="Learn from the network before, too: 0.9 of the loss.")] = False,
    depth: Annotated[bool, typer.Option(help="Give up layers too.")] = False,
    preset: Annotated[str | None, typer.Option(help=_HOW_HELP)] = None,
    side: Annotated[int | None, typer.Option(help="Pixels that images of folders are resized to. Default: 64.")] = None,
    mean: Annotated[str | None, typer.Option(help=_COLOURS_HELP)] = None,
    std: Annotated[str | None, typer.Option(help="Standard deviation of the colours, likewise.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of batches and augmentation. Default: 0.")] = None,
    subset: Subset = None,
    scale: Scale = None,
    shortcut: Shortcut = None,
    size: Size = None,
    precision: Precision = None,
    channels_last: Layout = None,
    device: Device = "auto",
    threads: Threads = None,
    out: Out = None,
    checkpoint_every: CheckpointEvery = None,
    resume: Resume = None,
) -> None:
    """Shrink a trained network to a budget while fine-tuning it, from all of it down.

    For example: torchgrow shrink torchvision:resnet18 --from weights.pt --budget flops=50% --data FOLDER

    Layer by layer, by what the loss rises: the same with --preset shrink:allocation=measured
    """
    with _clean_exit(Console(stderr=True)):
        edits: dict[str, Any] = {"epochs": epochs, "lr": lr, "schedule": schedule, "batch_size": batch_size}
        edits |= {"preset": preset, "side": side, "seed": seed, "subset": subset, "threads": threads}
        edits |= {"precision": precision, "channels_last": channels_last}
        edits |= {"mean": colours(mean), "std": colours(std), "distil": 0.9 if distil else None}
        if resume is not None:
            given = [*edits.values(), model, weights, budget, scale, shortcut, size, out, checkpoint_every]
            other = download or depth
            _resume(resume, data, device, alone=not other and all(value is None for value in given))
            return
        edits |= {"depth": depth, "budget": one_budget(budget)}
        chosen = _shrinking(model, weights, data, edits, network=(size, scale, shortcut), device=device)
        from torchgrow.lab import run as lab_run

        places: dict[str, Any] = {"out": out, "folder": data, "download": download, "device": device}
        lab_run.run(chosen, console=_console(), beside=(), every=checkpoint_every, **places)


def _shrinking(
    model: str | None,
    weights: Path | None,
    data: Path | None,
    edits: dict[str, Any],
    *,
    network: tuple[str | None, str | None, str | None],
    device: str,
) -> "Recipe":
    """The recipe that shrinks the model of that name, with what the user wants otherwise."""
    check_device(device)
    if model is None:
        raise TorchgrowError(f"name the network to shrink: {names.SHRINKABLE}")
    if weights is None and model.startswith("hf:"):
        weights = Path(model.removeprefix("hf:"))
    if weights is None or edits["budget"] is None:
        raise TorchgrowError(
            "say where the trained weights are and what the network may cost, as in torchgrow shrink "
            f"{quote(model)} --from {quote(str(weights or 'weights.pt'))} --budget flops=50%"
        )
    if model not in names.RECIPES and not is_file(model) and not is_library(model):
        raise TorchgrowError(f"there is no model {model!r}; what works: {names.SHRINKABLE}")
    from torchgrow.lab import recipes

    chosen = recipes.to_shrink(sized(recipes.trainable(model, data), *network), weights)
    if edits["side"] is not None and chosen.dataset != "imagefolder":
        raise TorchgrowError(f"only images in folders are resized, and this is {chosen.dataset}; leave --side out")
    return edited(chosen, edits)


@app.command()
def search(
    recipe: Annotated[str, typer.Argument(help=RECIPE_HELP)] = "digits",
    out: Out = None,
    data: Annotated[Path | None, typer.Option(help=DATA_HELP)] = None,
    download: Download = False,
    subset: Subset = None,
    epochs: Epochs = None,
    budget: Annotated[list[str] | None, typer.Option(help=BUDGET_HELP)] = None,
    candidates: Annotated[int | None, typer.Option(min=1, help=_CANDIDATES_HELP)] = None,
    rungs: Annotated[str | None, typer.Option(help=_RUNGS_HELP)] = None,
    anew: Annotated[bool, typer.Option("--anew", help=_ANEW_HELP)] = False,
    beside: Annotated[
        str, typer.Option(help="Networks to train beside the winner, as for `torchgrow run`.")
    ] = "uniform",
    seed: Seed = None,
    scale: Scale = None,
    depth: Depth = None,
    then: Then = None,
    shortcut: Shortcut = None,
    size: Size = None,
    lr: Lr = None,
    schedule: Schedule = None,
    largest_batch: LargestBatch = None,
    precision: Precision = None,
    channels_last: Layout = None,
    validate: Annotated[bool, typer.Option("--validate", help=_VALIDATE_HELP)] = False,
    device: Device = "auto",
    threads: Threads = None,
    resume: Resume = None,
) -> None:
    """Find the shape of a network on a budget by trying, then train the winner; the search is in the costs."""
    with _clean_exit(Console(stderr=True)):
        edits: dict[str, Any] = {"subset": subset, "epochs": epochs, "seed": seed, "threads": threads, "depth": depth}
        edits |= {"then": then, "precision": precision, "channels_last": channels_last, "lr": lr, "schedule": schedule}
        edits |= {"largest_batch": largest_batch}
        if resume is not None:
            given = [*edits.values(), out, budget, candidates, rungs, shortcut, size, scale]
            other = download or anew or validate or recipe != "digits" or beside != "uniform"
            check_alone(resume, "search", alone=not other and all(value is None for value in given), device=device)
            from torchgrow.lab import search as lab_search

            lab_search.resume(resume, console=_console(), folder=data, device=device)
            return
        edits["budget"] = one_budget(budget)
        chosen = variant(recipe, edits, size=size, scale=scale, shortcut=shortcut, device=device)
        from torchgrow.lab import search as lab_search

        places: dict[str, Any] = {"out": out, "folder": data, "download": download, "device": device}
        how: dict[str, Any] = {"candidates": candidates, "rungs": shares(rungs or ""), "anew": anew}
        lab_search.search(chosen, console=_console(), beside=beside.split(), validate=validate, **how, **places)


@app.command()
def compare(
    recipe: Annotated[str, typer.Argument(help=RECIPE_HELP)] = "digits",
    methods: Annotated[
        str,
        typer.Option(
            help=f"Names with spaces between: {', '.join(names.FIXED)}; systems of other papers: "
            f"{', '.join(name for name in names.SYSTEMS if name != 'shrink')}; shrink, the trained dense one made "
            f"smaller, shrink:until=0.3 and so on; or ways to grow: {', '.join(GROWN)}, "
            "default:ramp=0.2 and so on."
        ),
    ] = "dense uniform default",
    seeds: Annotated[int, typer.Option(min=1, help="How many; they are counted from 0.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="Count seeds from here.")] = 0,
    budget: Annotated[list[str] | None, typer.Option(help=f"{BUDGET_HELP} Repeat for several.")] = None,
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
    lr: Lr = None,
    schedule: Schedule = None,
    largest_batch: LargestBatch = None,
    precision: Precision = None,
    channels_last: Layout = None,
    device: Device = "auto",
    threads: Threads = None,
    validate: Annotated[bool, typer.Option("--validate", help=_VALIDATE_HELP)] = False,
) -> None:
    """Compare methods on a recipe over several seeds; what is in the results file already is not trained again.

    Stopped at any moment, the same command continues where it was.
    """
    with _clean_exit(Console(stderr=True)):
        budgets = [Budget.read(text) for text in budget or []]
        edits: dict[str, Any] = {"subset": subset, "epochs": epochs, "threads": threads, "depth": depth, "then": then}
        edits |= {"precision": precision, "channels_last": channels_last, "lr": lr, "schedule": schedule}
        edits |= {"largest_batch": largest_batch}
        chosen = variant(recipe, edits, size=size, scale=scale, shortcut=shortcut, device=device)
        from torchgrow.lab import compare as lab_compare

        lab_compare.compare(
            chosen,
            methods=methods.split(),
            seeds=range(first_seed, first_seed + seeds),
            budgets=budgets,
            console=_console(),
            folder=data,
            out=out,
            validate=validate,
            device=device,
        )


@app.command("list")
def list_recipes() -> None:
    """Show the recipes."""
    from torchgrow.lab import recipes
    from torchgrow.lab.fitted import Fitted

    grid = Fitted()
    for column in ("recipe", "data", "budget", "epochs", "what it does"):
        grid.add_column(column, no_wrap=column == "recipe")  # a name is for copying
    for name, make in recipes.RECIPES.items():
        recipe = make()
        claim = (make.__doc__ or "").partition("\n")[0]
        grid.add_row(name, recipe.dataset, str(recipe.budget), str(recipe.epochs), claim)
    _console().print(grid)


@app.command("inspect")
def inspect_model(
    model: Annotated[str, typer.Argument(help=f"One of {names.MODELS}. A file is executed as Python.")],
    budget: Annotated[list[str] | None, typer.Option(help="A budget to ask about, as for `torchgrow run`.")] = None,
    shapes: Annotated[
        list[str] | None, typer.Option("--input", help="Shape of an input, such as 1x3x224x224; repeat for several.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    svg: Annotated[Path | None, typer.Option(help="Draw the groups into this SVG file.")] = None,
    proof: Annotated[bool, typer.Option(help="Prove exactness a second time, on other random weights.")] = True,
    depth: Annotated[
        bool | None, typer.Option(help="Ask about layers too. Default: as the recipe says; else no.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Show what torchgrow can do on a model, and why it cannot do more.

    Exit code 0: it can grow. 1: an error, a proof that failed, or a budget out of reach. 3: nothing can change.
    """
    errors = Console(stderr=True)
    with _clean_exit(errors):
        asked = one_budget(budget)
        check_device(device)
        from torchgrow.lab import inspect, sources
        from torchgrow.lab.devices import chosen, moved

        sizes = [sources.parse_shape(text) for text in shapes or ()]
        # What a file prints while it runs must not end up in the JSON.
        with errors.status("building the model") as status, redirect_stdout(sys.stderr):
            network, inputs, layers = sources.load_with_depth(model, sizes)
            network, inputs = moved((network, inputs), chosen(device))
            layers = layers if depth is None else depth
            seen = inspect.inspect(
                network, inputs, name=model, budget=asked, proof=proof, depth=layers, tell=status.update
            )
    if as_json:
        typer.echo(json.dumps(seen.as_json(), indent=2))
    else:
        _console().print(inspect.render(seen))
    with _clean_exit(errors):
        if svg:  # last: what was found is shown whatever becomes of the file
            inspect.draw(seen, svg)
    if seen.nothing_can_change:
        raise typer.Exit(3)
    if seen.exact is False or seen.feasible is False:
        raise typer.Exit(1)


app.command()(evidence_commands.report)
app.command()(evidence_commands.table)

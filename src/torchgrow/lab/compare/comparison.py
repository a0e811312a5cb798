"""The comparison: which jobs lack a row, and training these in turns."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from torchgrow import Budget, TorchgrowError, policies
from torchgrow.lab.compare import pruning
from torchgrow.lab.compare.job import AFTER, Job
from torchgrow.lab.compare.progress_bars import Bars
from torchgrow.lab.compare.results_file import Rows
from torchgrow.lab.compare.training import NETWORK, Bench, train
from torchgrow.lab.data import Data, sizes
from torchgrow.lab.devices import chosen as chosen_device
from torchgrow.lab.devices import random_state, set_random_state
from torchgrow.lab.environment import environment
from torchgrow.lab.from_recipe import with_data
from torchgrow.lab.names import FIXED, SYSTEMS
from torchgrow.lab.recipes import Recipe
from torchgrow.lab.results import draw, tables
from torchgrow.lab.run_folder import lock

RESULTS = Path("results/compare")
"""Where results files are, unless said otherwise."""


def compare(
    recipe: Recipe,
    *,
    methods: Sequence[str],
    seeds: Sequence[int],
    budgets: Sequence[Budget] = (),
    console: Console,
    folder: Path | None = None,
    out: Path = RESULTS,
    validate: bool = False,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Train what the results file does not hold yet, append it, and print the table.

    All methods of one seed and budget train in turns, epoch by epoch, in this process, so that their seconds can be
    compared on a machine that is now faster, now slower; those that need what another one came to follow after.
    A command that was stopped goes on from the last epoch when it is given again.

    Args:
        recipe: what to train; its seed and budget matter only where none are given.
        methods: of `FIXED` or `SYSTEMS`, or ways to grow: "default" (the recipe's own), "paper",
            "default:gates=True,peak=1".
        seeds: of weights, batches and growth; every method is trained with each.
        budgets: one after another; default: the recipe's.
        console: where to show it.
        folder: where the data is; see `torchgrow.lab.data.load`.
        out: folder of results files, one a recipe, and of what a stopped command goes on from.
        validate: judge by training images that are not trained on instead of the test images.
        device: where to train, one of `torchgrow.lab.names.DEVICES`.

    Returns:
        The rows of this comparison, old and new.

    Raises:
        TorchgrowError: an unknown method, bad data, a loss that is not finite, another process at the same file.
    """
    _check(methods, recipe)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    recipe, data = with_data(recipe, console, folder, held_out=validate, device=chosen_device(device))
    rows, work = Rows(out / f"{recipe.name}.jsonl"), out / f".{recipe.name}"
    work.mkdir(exist_ok=True)
    held, jobs = lock(work), list[Job]()
    # Versions now: the commit that runs, whatever is committed meanwhile.
    bench = Bench(data, rows, work, console, {**environment(data.device), "torch-pruning": pruning.installed()})
    try:
        for seed in seeds:
            for budget in budgets or [recipe.budget]:
                chosen = replace(recipe, seed=seed, budget=budget)
                now = [Job(method=m, recipe=chosen, data=sizes(data), validate=validate) for m in _ordered(methods)]
                jobs += [job for job in now if job not in jobs]
                missing = _missing(now, bench)
                _together([job for job in missing if job.method not in AFTER], bench)
                _together([job for job in missing if job.method in AFTER], bench)
    finally:
        os.close(held)
    wanted = {job.key() for job in jobs}
    found = [row for row in rows.read() if row["config_hash"] in wanted]
    _show(found, rows.path, console)
    return found


def _show(found: list[dict[str, Any]], path: Path, console: Console) -> None:
    """Print the tables of some rows, and draw them beside their results file."""
    if found:
        draw(found, path.with_suffix(".png"))
        console.print(*tables(found), sep="\n")
        for row in found:
            if "error" in row:
                console.print(f"{row['method']}, seed {row['seed']}, failed: {row['error']}", soft_wrap=True)
    console.print(f"Results: {path}", soft_wrap=True)


def recorded(recipe: Recipe, data: Data, methods: Sequence[str], out: Path = RESULTS) -> list[dict[str, Any]]:
    """Rows of a results file that differ from this recipe in method and seed only; none if there is no file.

    Args:
        recipe: the recipe, with networks that fit the data.
        data: what it trains on.
        methods: which rows are wanted.
        out: the folder of results files.
    """
    path = out / f"{recipe.name}.jsonl"
    if not path.is_file():
        return []
    found = []
    for row in Rows(path).read():
        if row["method"] in methods and "error" not in row:
            job = Job(method=row["method"], recipe=replace(recipe, seed=row["seed"]), data=sizes(data))
            found += [row] if job.key() == row["config_hash"] else []
    return found


def _check(methods: Sequence[str], recipe: Recipe) -> None:
    """Every method is one of `FIXED`, one of `SYSTEMS` or a way to grow, from scratch."""
    if recipe.weights:
        raise TorchgrowError(
            f"recipe {recipe.name!r} begins with weights, and networks are compared from scratch; leave weights out, "
            "or run it alone: torchgrow run"
        )
    for method in methods:
        if method not in {*FIXED, *SYSTEMS}:
            try:
                policies.named(method)
            except TorchgrowError as error:
                raise TorchgrowError(f"{error}; or compare with {', '.join([*FIXED, *SYSTEMS])}") from None


def _ordered(methods: Sequence[str]) -> list[str]:
    """Without repetitions, and the dense network first, whose seconds the others are compared with."""
    once = dict.fromkeys([*methods, *(AFTER[method] for method in methods if method in AFTER)])
    return sorted(once, key=lambda method: method != "dense")


def _missing(jobs: Sequence[Job], bench: Bench) -> list[Job]:
    """Jobs to train: those without a row, and those whose network another one without a row begins with."""
    done = {row["config_hash"] for row in bench.rows.read()}
    missing = [job for job in jobs if job.key() not in done]
    if any(job.method == "l1" for job in missing) and not pruning.installed():
        bench.console.print("l1 is left out: Torch-Pruning is not installed (pip install torch-pruning==1.6.1)")
        missing = [job for job in missing if job.method != "l1"]
    needed = [replace(job, method=AFTER[job.method]) for job in missing if job.method in AFTER]
    gone = [base for base in needed if not (bench.folder(base) / NETWORK).exists()]
    return [job for job in jobs if job in missing or job in gone]


def _together(jobs: Sequence[Job], bench: Bench) -> None:
    """Train the missing ones of some jobs in turns, each with random numbers of its own."""
    if not jobs:
        return
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # Where there is no terminal, bars would be printed once, at the end.
    with Progress(*columns, console=bench.console, disable=not bench.console.is_terminal) as progress:
        bars = Bars(progress, jobs)
        trainings = {job.key(): train(job, jobs, bench, bars) for job in jobs}
        states = {job.key(): random_state() for job in jobs}
        while trainings:
            for key, training in list(trainings.items()):
                with torch.random.fork_rng():
                    set_random_state(states[key])
                    if next(training, None) is None:
                        del trainings[key]
                    states[key] = random_state()

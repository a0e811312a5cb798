"""The comparison: which jobs lack a row, and training these in turns."""

import os
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from torchgrow import Budget, TorchgrowError
from torchgrow.lab.compare import pruning
from torchgrow.lab.compare.job import Job, after, growing
from torchgrow.lab.compare.progress_bars import Bars
from torchgrow.lab.compare.results_file import Rows
from torchgrow.lab.compare.training import NETWORK, Bench, refused, train
from torchgrow.lab.data import Data, fingerprint, sizes
from torchgrow.lab.devices import chosen as chosen_device
from torchgrow.lab.devices import out_of_memory, random_kept, random_state, set_random_state
from torchgrow.lab.environment import environment
from torchgrow.lab.from_recipe import with_data
from torchgrow.lab.names import FIXED, SYSTEMS, is_system
from torchgrow.lab.recipes import Recipe
from torchgrow.lab.results import draw, tables
from torchgrow.lab.run_folder import lock
from torchgrow.lab.systems import system

RESULTS = Path("results/compare")
"""Where results files are, unless said otherwise."""

ERROR = "error.txt"
"""The traceback of a method that failed, beside its checkpoints."""


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
        methods: of `FIXED` or `SYSTEMS`, "shrink:until=0.3" and the like, or ways to grow: "default" (the recipe's
            own), "paper", "default:ramp=0.2,peak=1".
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
        TorchgrowError: an unknown method, bad data, another process at the same file, or, when all others are trained,
            whatever one of them failed with; only files and memory that are out of reach end all of them at once.
    """
    _check(methods, recipe)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    recipe, data = with_data(recipe, console, folder, held_out=validate, device=chosen_device(device))
    rows, work = Rows(out / f"{recipe.name}.jsonl"), out / f".{recipe.name}"
    known = _refuse_other_data(rows, Job(method="dense", recipe=recipe, data=sizes(data), validate=validate), data)
    work.mkdir(exist_ok=True)
    held, jobs, failed = lock(work), list[Job](), dict[str, str]()
    # Versions now: the commit that runs, whatever is committed meanwhile.
    bench = Bench(data, rows, work, console, {**environment(data.device), "torch-pruning": pruning.installed()}, known)
    try:
        for seed in seeds:
            for budget in budgets or [recipe.budget]:
                chosen = replace(recipe, seed=seed, budget=budget)
                now = [Job(method=m, recipe=chosen, data=sizes(data), validate=validate) for m in _ordered(methods)]
                jobs += [job for job in now if job not in jobs]
                failed |= _all(_missing(_within_reach(now, methods, bench), bench), bench)
    finally:
        os.close(held)
    found = _rows_of(jobs, rows)
    _show(found, rows.path, console)
    _raise(failed, len(jobs))
    return found


def _rows_of(jobs: Sequence[Job], rows: Rows) -> list[dict[str, Any]]:
    wanted = {job.key() for job in jobs}
    return [row for row in rows.read() if row["config_hash"] in wanted]


def _refuse_other_data(rows: Rows, job: Job, data: Data) -> str:
    """The fingerprint of the data; raise where rows that count as many images or words were measured on others."""
    known = fingerprint(data)
    of_these = ("dataset", "samples", "validate", "side")
    now = job.config()
    for row in rows.read():
        alike = all(row["config"].get(name) == now.get(name) for name in of_these)
        if alike and row.get("data", known) != known:
            raise TorchgrowError(
                f"{rows.path} holds rows of other data with as many samples ({row['method']}, seed {row['seed']}), and "
                "these would be taken for them; give --out another folder"
            )
    return known


def _raise(failed: dict[str, str], jobs: int) -> None:
    """Say in the end what could not be trained, if there is something."""
    if failed:
        raise TorchgrowError(f"{len(failed)} of {jobs} could not be trained: {'; '.join(failed.values())}")


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
    found, known = [], fingerprint(data)
    for row in Rows(path).read():
        if row["method"] in methods and "error" not in row and row.get("data", known) == known:
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
    if not methods:
        raise TorchgrowError('no method is named; name some with spaces between: --methods "dense uniform default"')
    for method in methods:
        if is_system(method):
            system(method)
        elif is_system(method.partition(":")[0]):
            raise TorchgrowError(f"{method.partition(':')[0]} takes no settings, so not {method!r}; only shrink does")
        elif "," in method.partition(":")[0]:
            raise TorchgrowError(f'{method!r}: put spaces between methods: --methods "{method.replace(",", " ")}"')
        elif method not in FIXED:
            try:
                growing(method)
            except TorchgrowError as error:
                raise TorchgrowError(f"{error}; or compare with {', '.join([*FIXED, *SYSTEMS])}") from None


def _ordered(methods: Sequence[str]) -> list[str]:
    """Without repetitions, and the dense network first, whose seconds the others are compared with."""
    methods = [method.removesuffix(":") for method in methods]  # "shrink:" is "shrink"
    once = dict.fromkeys([*methods, *(base for method in methods if (base := after(method)))])
    return sorted(once, key=lambda method: method != "dense")


def _within_reach(jobs: Sequence[Job], methods: Sequence[str], bench: Bench) -> list[Job]:
    """Jobs of these methods but for systems whose budget is out of reach, and for what only these begin with."""
    out = refused(jobs, bench)
    left = _ordered([method for method in methods if method.removesuffix(":") not in out])
    return [job for job in jobs if job.method in left]


def _missing(jobs: Sequence[Job], bench: Bench) -> list[Job]:
    """Jobs to train: those without a row, and those whose network another one without a row begins with."""
    done = {row["config_hash"] for row in bench.rows.read()}
    missing = [job for job in jobs if job.key() not in done]
    if any(job.method == "l1" for job in missing) and not pruning.installed():
        bench.console.print("l1 is left out: Torch-Pruning is not installed (pip install torch-pruning==1.6.1)")
        missing = [job for job in missing if job.method != "l1"]
    needed = [replace(job, method=base) for job in missing if (base := after(job.method))]
    gone = [base for base in needed if not (bench.folder(base) / NETWORK).exists()]
    return [job for job in jobs if job in missing or job in gone]


def _all(jobs: Sequence[Job], bench: Bench) -> dict[str, str]:
    """Train missing jobs, those last that begin with the network of another; returns as `_together`."""
    failed = _together([job for job in jobs if not after(job.method)], bench)
    rest = [job for job in jobs if after(job.method) and replace(job, method=after(job.method)).key() not in failed]
    return failed | _together(rest, bench)


def _together(jobs: Sequence[Job], bench: Bench) -> dict[str, str]:
    """Train the missing ones of some jobs in turns, each with random numbers of its own.

    Returns:
        why one could not be trained, by its key: the others are trained all the same.
    """
    failed: dict[str, str] = {}
    if not jobs:
        return failed
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # Where there is no terminal, bars would be printed once, at the end.
    with Progress(*columns, console=bench.console, disable=not bench.console.is_terminal) as progress:
        bars = Bars(progress, jobs)
        named = {job.key(): f"{job.method}, seed {job.recipe.seed}, {job.recipe.budget}" for job in jobs}
        trainings = {job.key(): train(job, jobs, bench, bars) for job in jobs}
        states = {job.key(): random_state() for job in jobs}
        errors = {job.key(): bench.folder(job) / ERROR for job in jobs}
        for file in errors.values():  # of an earlier try
            file.unlink(missing_ok=True)
        while trainings:
            for key, training in list(trainings.items()):
                with random_kept():
                    set_random_state(states[key])
                    try:
                        over = next(training, None) is None
                    except Exception as error:
                        failed[key], over = f"{named[key]}: {_why(error, errors[key])}", True
                        bars.say(failed[key])
                    if over:
                        del trainings[key]
                    states[key] = random_state()
    return failed


def _why(error: Exception, file: Path) -> str:
    """An error in one line; of one that torchgrow does not mean to raise, the traceback goes into the file.

    What is short for all methods, memory and what files need, is raised on.
    """
    if isinstance(error, TorchgrowError):
        return str(error)
    if isinstance(error, OSError) or out_of_memory(error):
        raise error
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}{first and ': '}{first} (the whole traceback is in {file})"

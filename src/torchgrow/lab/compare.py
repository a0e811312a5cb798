"""Methods side by side on one recipe: grown, thinned, pruned and dense networks, for several seeds and budgets.

Every finished (method, seed, budget) is one line of a results file, written once it is finished and never again.
"""

import copy
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

import torchgrow
from torchgrow import Budget, Grower, Method, TorchgrowError, measure
from torchgrow.lab.baselines import initialised, twin_width, uniform_width
from torchgrow.lab.checkpoints import Checkpoints
from torchgrow.lab.data import Data
from torchgrow.lab.devices import chosen as chosen_device
from torchgrow.lab.display import epoch_line
from torchgrow.lab.environment import environment
from torchgrow.lab.names import FIXED
from torchgrow.lab.recipes import Recipe
from torchgrow.lab.results import draw, tables
from torchgrow.lab.run_folder import lock
from torchgrow.lab.text import TextData
from torchgrow.lab.train import (
    Epoch,
    evaluate,
    extent,
    far_from_paper,
    fit,
    make_grower,
    make_network,
    make_optimizer,
    with_data,
)

AFTER = {"uniform-flops": "default", "direct": "default", "l1": "dense"}
"""Methods that need what another one has come to."""

RESULTS = Path("results/compare")
"""Where results files are, unless said otherwise."""

NETWORK, EPOCHS = "network", "epochs.json"
"""What is left of a network, beside its checkpoints."""

FINE_TUNING = 0.1
"""Learning rate of fine-tuning a pruned network, as a share of the recipe's."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One network to train: a method and everything that decides what comes out.

    Attributes:
        method: a name in `FIXED`, or what `torchgrow.Method.named` reads.
        recipe: with seed and budget.
        data: what tells one data set from another.
        validate: whether it is judged by training images that were held out.
    """

    method: str
    recipe: Recipe
    data: tuple[int, ...]
    validate: bool = False

    def config(self) -> dict[str, Any]:
        """All that decides what comes out, as JSON holds it.

        A dense network has no budget, and one of fixed structure no way of growing, so its row serves them all.
        """
        config = {**self.recipe.as_json(), "method": self.method, "samples": list(self.data), "validate": self.validate}
        if self.method == "dense":
            del config["budget"]
        base = replace(self, method=AFTER.get(self.method, self.method))
        if base.method not in FIXED:
            growing = asdict(Method.named(base.preset(), layers=bool(self.recipe.depth)))
            if not self.recipe.depth:
                del growing["layer_lag"]  # decides nothing; rows from before there was such a thing stay good
            method = Method.named(base.preset())
            if not method.literal:
                del growing["penalised"], growing["start"], growing["paced"]
            config["growing"] = growing
            if growing["draws"] == "ranked" or method.updates:
                config["updates_per_epoch"] = replace(self.recipe, preset=base.preset()).updates_an_epoch()
        else:
            config |= {"depth": False, "meta": False}
        # Fields that decide nothing go: rows from before there were such things stay good.
        if not self.recipe.channels_last:
            del config["channels_last"]
        if self.recipe.schedule != "wsd":
            del config["decay"]
        if not self.recipe.source:
            del config["source"]
        del config["preset"]
        return json.loads(json.dumps(config))

    def preset(self) -> str:
        """How it grows: "default" is the recipe's own way, and "default:..." what differs from that."""
        name, _, edits = self.method.partition(":")
        if name != "default":
            return self.method
        own = self.recipe.preset
        return own + (":" if ":" not in own else ",") * bool(edits) + edits

    def key(self) -> str:
        """The same for the same settings only."""
        return hashlib.sha256(json.dumps(self.config(), sort_keys=True).encode()).hexdigest()[:16]


class Rows:
    """The results file: whole lines only, one per finished job.

    Args:
        path: the file, made if it is not there.

    Raises:
        TorchgrowError: a whole line is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def read(self) -> list[dict[str, Any]]:
        """All rows; a line that was cut short by a kill is none."""
        lines = self.path.read_text().splitlines(keepends=True)
        rows = []
        for number, line in enumerate(lines, start=1):
            if not line.endswith("\n"):
                continue
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise TorchgrowError(f"{self.path}, line {number} is damaged: {error}; take it out") from error
        return rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; it is on disk when this returns."""
        with self.path.open("r+b") as file:
            file.seek(0, os.SEEK_END)
            whole = self.path.read_bytes().rfind(b"\n") + 1
            file.truncate(whole)  # what a kill left of a line goes
            file.seek(whole)
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


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
        methods: of `FIXED`, or ways to grow: "default" (the recipe's own), "paper", "default:gates=True,peak=1".
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
    for method in methods:
        if method not in FIXED:
            _named(method)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    recipe, data = with_data(recipe, console, folder, held_out=validate, device=chosen_device(device))
    rows, work = Rows(out / f"{recipe.name}.jsonl"), out / f".{recipe.name}"
    work.mkdir(exist_ok=True)
    held, jobs = lock(work), list[Job]()
    # Versions now: the commit that runs, whatever is committed meanwhile.
    bench = _Bench(data, rows, work, console, {**environment(data.device), "torch-pruning": _peer()})
    try:
        for seed in seeds:
            for budget in budgets or [recipe.budget]:
                chosen = replace(recipe, seed=seed, budget=budget)
                now = [Job(method=m, recipe=chosen, data=_samples(data), validate=validate) for m in _ordered(methods)]
                jobs += [job for job in now if job not in jobs]
                missing = _missing(now, bench)
                _together([job for job in missing if job.method not in AFTER], bench)
                _together([job for job in missing if job.method in AFTER], bench)
    finally:
        os.close(held)
    wanted = {job.key() for job in jobs}
    found = [row for row in rows.read() if row["config_hash"] in wanted]
    if found:
        draw(found, rows.path.with_suffix(".png"))
        console.print(*tables(found), sep="\n")
        for row in found:
            if "error" in row:
                console.print(f"{row['method']}, seed {row['seed']}, failed: {row['error']}", soft_wrap=True)
    console.print(f"Results: {rows.path}", soft_wrap=True)
    return found


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
            job = Job(method=row["method"], recipe=replace(recipe, seed=row["seed"]), data=_samples(data))
            found += [row] if job.key() == row["config_hash"] else []
    return found


def _named(method: str) -> Method:
    try:
        return Method.named(method)
    except TorchgrowError as error:
        raise TorchgrowError(f"{error}; or compare with {', '.join(FIXED)}") from None


def _ordered(methods: Sequence[str]) -> list[str]:
    """Without repetitions, and the dense network first, whose seconds the others are compared with."""
    once = dict.fromkeys([*methods, *(AFTER[method] for method in methods if method in AFTER)])
    return sorted(once, key=lambda method: method != "dense")


def _samples(data: Data) -> tuple[int, ...]:
    parts = [data.train, data.valid, data.test] if isinstance(data, TextData) else [data.train, data.test]
    return tuple(len(part) for part in parts)


@dataclass(frozen=True)
class _Bench:
    """What all jobs of a comparison share."""

    data: Data
    rows: Rows
    work: Path
    console: Console
    versions: dict[str, Any]

    def folder(self, job: Job) -> Path:
        """Where a job leaves what it goes on from."""
        return self.work / job.key()


def _together(jobs: Sequence[Job], bench: _Bench) -> None:
    """Train the missing ones of some jobs in turns, each with random numbers of its own."""
    if not jobs:
        return
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # Where there is no terminal, bars would be printed once, at the end.
    with Progress(*columns, console=bench.console, disable=not bench.console.is_terminal) as progress:
        tell = _Bars(progress, jobs)
        trainings = {job.key(): _train(job, jobs, bench, tell) for job in jobs}
        states = {job.key(): _random_state() for job in jobs}
        while trainings:
            for key, training in list(trainings.items()):
                with torch.random.fork_rng():
                    _set_random_state(states[key])
                    if next(training, None) is None:
                        del trainings[key]
                    states[key] = _random_state()


def _random_state() -> tuple[Tensor, list[Tensor]]:
    """That of the CPU, and of every GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all()


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    torch.cuda.set_rng_state_all(state[1])


def _missing(jobs: Sequence[Job], bench: _Bench) -> list[Job]:
    """Jobs to train: those without a row, and those whose network another one without a row begins with."""
    done = {row["config_hash"] for row in bench.rows.read()}
    missing = [job for job in jobs if job.key() not in done]
    if any(job.method == "l1" for job in missing) and not _peer():
        bench.console.print("l1 is left out: Torch-Pruning is not installed (pip install torch-pruning==1.6.1)")
        missing = [job for job in missing if job.method != "l1"]
    needed = [replace(job, method=AFTER[job.method]) for job in missing if job.method in AFTER]
    gone = [base for base in needed if not (bench.folder(base) / NETWORK).exists()]
    return [job for job in jobs if job in missing or job in gone]


class _Bars:
    """One bar a network in a terminal, a line an epoch anywhere else."""

    def __init__(self, progress: Progress, jobs: Sequence[Job]) -> None:
        self._names = {job.key(): f"seed {job.recipe.seed}, {job.recipe.budget}: {job.method}" for job in jobs}
        self._bars = {key: progress.add_task(name, total=None) for key, name in self._names.items()}
        self._progress, self._begun, self._start = progress, dict[str, float](), time.perf_counter()
        self._epochs = {job.key(): (0.0, float(job.recipe.epochs + job.recipe.then)) for job in jobs}

    def __call__(self, job: Job, done: float, total: int) -> None:
        """Note the progress of a network, in epochs."""
        self._begun.setdefault(job.key(), done)
        self._epochs[job.key()] = (done, total)
        self._progress.update(self._bars[job.key()], completed=done, total=total)

    def epoch(self, job: Job, record: Epoch) -> None:
        """Note a finished epoch."""
        if not self._progress.console.is_terminal:
            total = int(self._epochs[job.key()][1])
            left = 0.0 if record.epoch == total and len(self._names) == 1 else self._left()
            self._progress.console.print(f"{self._names[job.key()]}  {epoch_line(record, total, left)}", soft_wrap=True)

    def _left(self) -> float:
        """Seconds until all of these networks are trained, if an epoch of one takes as long as that of another."""
        done = sum(self._epochs[key][0] - begun for key, begun in self._begun.items())
        missing = sum(total - done for done, total in self._epochs.values())
        return (time.perf_counter() - self._start) / done * missing if done else 0.0

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._progress.console.print(text, soft_wrap=True)


def _train(job: Job, beside: Sequence[Job], bench: _Bench, tell: _Bars) -> Iterator[Epoch]:
    """The epochs of one job; at the end its row is written."""
    recipe, folder, data, rows = job.recipe, bench.folder(job), bench.data, bench.rows
    frame = measure(make_network(recipe.build, 1.0, data.device), data.example())
    before = _Spent()
    torch.manual_seed(recipe.seed)
    try:
        model, recipe, before = _network(job, bench)
    except _PeerError as failed:
        rows.append({**_head(job, bench), "error": str(failed)})
        return
    optimizer = make_optimizer(model, recipe)
    grower: Grower | None = None
    if job.method not in FIXED:
        warning = far_from_paper(recipe, extent(model, data, recipe)[0])
        if warning:
            tell.say(warning)
        grower = make_grower(model, optimizer, data, recipe)
    checkpoints, records = Checkpoints(folder=folder / "checkpoints"), folder / EPOCHS
    epochs = [Epoch(**fields) for fields in json.loads(records.read_text())] if records.exists() else []
    if not any(checkpoints.folder.glob("checkpoint-*")):
        epochs = []

    def on_step(step: int, steps: int) -> None:
        tell(job, len(epochs) + step / steps, recipe.epochs + recipe.then)

    for epoch in fit(
        job.method, model, optimizer, data, recipe, grower=grower, on_step=on_step, checkpoints=checkpoints
    ):
        epochs = [*epochs[: epoch.epoch - 1], epoch]
        _write(records, json.dumps([asdict(one) for one in epochs]))
        tell.epoch(job, epoch)
        yield epoch
    last, cost = epochs[-1], measure(model, data.example())
    if job.method in AFTER.values():
        shutil.rmtree(folder / NETWORK, ignore_errors=True)
        torchgrow.save(model, folder / NETWORK)
    if any(row["config_hash"] == job.key() for row in rows.read()):
        return  # trained once more for the sake of another
    steps, samples = extent(model, data, job.recipe)
    score = last.perplexity if isinstance(data, TextData) else evaluate(model, data)[0]
    # Seconds compare on one machine and with one code only.
    measured = {(row["config_hash"], json.dumps(row["versions"])): row.get("seconds") for row in rows.read()}
    dense_seconds = measured.get((replace(job, method="dense").key(), json.dumps(bench.versions)))
    row = {
        **_head(job, bench),
        data.metric.name: score,
        **({"test_perplexity": evaluate(model, data, "test")[0]} if isinstance(data, TextData) else {}),
        "params": cost.params,
        "flops": cost.flops,
        "dense_params": frame.params,
        "dense_flops": frame.flops,
        "train_flops": before.flops + last.training_flops,
        "train_flops_paper_rule": last.training_flops,
        "dense_train_flops": 3 * frame.flops * steps * samples * (job.recipe.epochs + job.recipe.then),
        "seconds": before.seconds + last.seconds,
        "dense_seconds": last.seconds if job.method == "dense" else dense_seconds,
        "together": [other.method for other in beside],
        "epochs": [
            {key: value for key, value in asdict(epoch).items() if key not in ("network", "temperature", "updates")}
            for epoch in epochs
        ],
    }
    rows.append(row)
    tell.say(f"seed {recipe.seed}, {recipe.budget}: {job.method}: {data.metric.show(score or math.nan)}")


@dataclass(frozen=True)
class _Spent:
    """Training that went before."""

    flops: int = 0
    seconds: float = 0.0


class _PeerError(Exception):
    """Torch-Pruning cannot serve this model; the message says how it failed."""


def _head(job: Job, bench: _Bench) -> dict[str, Any]:
    budget = None if job.method == "dense" else str(job.recipe.budget)
    return {
        "recipe": job.recipe.name,
        "method": job.method,
        "seed": job.recipe.seed,
        "budget": budget,
        "config_hash": job.key(),
        "config": job.config(),
        "versions": bench.versions,
    }


def _peer() -> str | None:
    """The version of Torch-Pruning, if it is there."""
    try:
        return version("torch-pruning")
    except PackageNotFoundError:
        return None


def _network(job: Job, bench: _Bench) -> tuple[nn.Module, Recipe, _Spent]:
    """What a job begins with, how it is trained, and what that had cost before."""
    recipe, method, data = job.recipe, job.method, bench.data
    if method not in FIXED:
        build = recipe.build_grown or recipe.build
        model = make_network(build, 1.0, data.device, meta=recipe.meta)
        return model, replace(recipe, preset=job.preset()), _Spent()
    if method == "dense":
        return make_network(recipe.build, 1.0, data.device), recipe, _Spent()
    if method == "uniform":
        frame = measure(make_network(recipe.build, 1.0, data.device), data.example())
        limits = recipe.budget.limits(frame)
        params, flops = limits.params or frame.params, limits.flops or frame.flops
        width = twin_width(recipe, data, params=params, flops=flops)
        return make_network(recipe.build, width, data.device), recipe, _Spent()
    base = bench.folder(replace(job, method=AFTER[method]))
    if method == "l1":
        model = torchgrow.load(base / NETWORK, recipe.build).to(data.device)
        last = Epoch(**json.loads((base / EPOCHS).read_text())[-1])
        tuned = replace(recipe, epochs=max(2, recipe.epochs // 2), lr=FINE_TUNING * recipe.lr)
        return _pruned(model, recipe, data), tuned, _Spent(last.training_flops, last.seconds)
    found = torchgrow.load(base / NETWORK, partial(recipe.build_grown or recipe.build, 1.0))
    if method == "direct":
        return initialised(found).to(data.device), recipe, _Spent()
    found = found.to(data.device)
    flops = measure(found, data.example()).flops
    width = uniform_width(recipe.build, flops, lambda model: measure(model, data.example()).flops)
    return make_network(recipe.build, width, data.device), recipe, _Spent()


def _pruned(model: nn.Module, recipe: Recipe, data: Data) -> nn.Module:
    """The dense model pruned by Torch-Pruning to the budget: filters of the smallest L1 norm, of all layers alike."""
    frame = measure(model, data.example())
    limits = recipe.budget.limits(frame)

    def at(ratio: float) -> nn.Module:
        import torch_pruning

        pruned = copy.deepcopy(model)
        last = [module for module in pruned.modules() if isinstance(module, nn.Linear)][-1:]
        importance = torch_pruning.importance.MagnitudeImportance(p=1)
        torch_pruning.pruner.BasePruner(
            pruned, data.example(), importance, pruning_ratio=ratio, ignored_layers=last
        ).step()
        return pruned

    def fits(pruned: nn.Module) -> bool:
        cost = measure(pruned, data.example())
        return cost.params <= (limits.params or cost.params) and cost.flops <= (limits.flops or cost.flops)

    low, high = 0.0, 1.0
    best: nn.Module | None = None
    try:
        for _ in range(8):  # finer than one channel of most layers
            middle = (low + high) / 2
            pruned = at(middle)
            if fits(pruned):
                best, high = pruned, middle
            else:
                low = middle
    except Exception as error:
        raise _PeerError(f"{type(error).__name__}: {error}".splitlines()[0][:300]) from error
    if best is None:
        raise _PeerError(f"no pruning ratio brings the network to {recipe.budget}")
    return best


def _write(path: Path, text: str) -> None:
    """The file holds it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}")
    half.write_text(text)
    half.replace(path)

"""The training of one job, from its initial network to its row."""

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import torchgrow
from torchgrow import Cost, Grower, measure
from torchgrow.lab.baselines import initialised, twin_width, uniform_width
from torchgrow.lab.checkpoints import Checkpoints, write_whole
from torchgrow.lab.compare.job import AFTER, Job, after
from torchgrow.lab.compare.progress_bars import Bars
from torchgrow.lab.compare.pruning import PruningError, l1_pruned
from torchgrow.lab.compare.published import published_network
from torchgrow.lab.compare.results_file import Rows
from torchgrow.lab.data import Data
from torchgrow.lab.devices import random_kept
from torchgrow.lab.from_recipe import extent, far_from_paper, make_grower, make_network, make_optimizer
from torchgrow.lab.names import FIXED, PUBLISHED, UNBUDGETED, is_system
from torchgrow.lab.recipes import Recipe
from torchgrow.lab.systems import (
    LEAVE_LAYERS_OUT,
    PHASES,
    Spent,
    Structure,
    Task,
    UnfitError,
    estimate_anew,
    fine_tuned,
    run,
    system,
)
from torchgrow.lab.text import TextData
from torchgrow.lab.train import Epoch, evaluate, fit

NETWORK, EPOCHS = "network", "epochs.json"
"""What is left of a network, beside its checkpoints."""

NOTHING = Spent(name="nothing")


@dataclass(frozen=True)
class Bench:
    """What all jobs of a comparison share."""

    data: Data
    rows: Rows
    work: Path
    console: Console
    versions: dict[str, Any]
    fingerprint: str

    def folder(self, job: Job) -> Path:
        """Where a job leaves what it goes on from."""
        return self.work / f"{job.key()}-{self.fingerprint}"


def train(job: Job, beside: Sequence[Job], bench: Bench, bars: Bars) -> Iterator[Epoch]:
    """The epochs of one job; at the end its row is written.

    Args:
        job: what to train.
        beside: all jobs that train in turns with it, itself among them.
        bench: where it finds the data and leaves its network and its row.
        bars: told of every step and epoch.
    """
    if is_system(job.method):
        yield from _train_system(job, beside, bench, bars)
        return
    recipe, folder, data, rows = job.recipe, bench.folder(job), bench.data, bench.rows
    frame = measure(make_network(recipe.build, 1.0, data.device), data.example())
    torch.manual_seed(recipe.seed)
    try:
        model, recipe, before = _network(job, bench)
    except (PruningError, UnfitError) as failed:
        rows.append({**_head(job, bench), "error": str(failed)})
        return
    optimizer = make_optimizer(model, recipe)
    grower: Grower | None = None
    if job.method not in FIXED:
        warning = far_from_paper(recipe, extent(model, data, recipe)[0])
        if warning:
            bars.say(warning)
        grower = make_grower(model, optimizer, data, recipe)
    checkpoints, records = Checkpoints(folder=folder / "checkpoints"), folder / EPOCHS
    epochs = [Epoch(**fields) for fields in json.loads(records.read_text(encoding="utf-8"))] if records.exists() else []
    if not any(checkpoints.folder.glob("checkpoint-*")):
        epochs = []

    def on_step(epoch: int, step: int, steps: int) -> None:
        bars(job, epoch - 1 + step / steps, recipe.epochs + recipe.then)

    for epoch in fit(
        job.method, model, optimizer, data, recipe, grower=grower, on_step=on_step, checkpoints=checkpoints
    ):
        epochs = [*epochs[: epoch.epoch - 1], epoch]
        write_whole(records, json.dumps([asdict(one) for one in epochs]))
        bars.epoch(job, epoch)
        yield epoch
    if job.method in AFTER.values():
        shutil.rmtree(folder / NETWORK, ignore_errors=True)
        torchgrow.save(model, folder / NETWORK)
    if any(row["config_hash"] == job.key() for row in rows.read()):
        return  # trained once more for the sake of another
    spent = [before, *_parts(job, epochs)]
    if job.method in PUBLISHED:  # MnasNet's averages move by 3e-4 a step: far too slow for a short run
        spent.append(estimate_anew(model, data, recipe))
    row = _row(job, bench, model, frame, spent)
    if grower:
        row["full_widths"] = grower.full_widths()
    _finish(job, beside, bench, bars, row, epochs)


def _parts(job: Job, epochs: Sequence[Epoch]) -> list[Spent]:
    """What a training has cost; of a network that was grown, what came after its structure was final by itself."""
    last, grown = epochs[-1], epochs[: job.recipe.epochs][-1]
    training = Spent(name="training", flops=last.training_flops, seconds=last.seconds)
    if job.method in FIXED or grown is last:
        return [training]
    flops, seconds = last.training_flops - grown.training_flops, last.seconds - grown.seconds
    growth = Spent(name="growth", flops=grown.training_flops, seconds=grown.seconds)
    return [growth, Spent(name="after growth", counted=False, flops=flops, seconds=seconds)]


def refused(jobs: Sequence[Job], bench: Bench) -> set[str]:
    """Methods whose budget is below the smallest network that they can come to; their rows say so from now on.

    Args:
        jobs: of one seed and budget; only systems without a row are looked at.
        bench: as for `train`.
    """
    done, found = {row["config_hash"] for row in bench.rows.read()}, set[str]()
    structures: dict[bool, Structure] = {}
    for job in jobs:
        if not is_system(job.method) or job.key() in done:
            continue
        deep = job.method in LEAVE_LAYERS_OUT
        task = Task(recipe=job.recipe, data=bench.data, folder=bench.folder(job), trained=partial(_dense, job, bench))
        try:
            with random_kept():
                if deep not in structures:
                    structures[deep] = Structure(task.network(), task, depth=deep)
                structures[deep].check(task.limits())
        except UnfitError as failed:
            bench.rows.append({**_head(job, bench), "error": str(failed)})
            found.add(job.method)
        except Exception:  # the system says so itself when its turn comes
            pass
    return found


def _train_system(job: Job, beside: Sequence[Job], bench: Bench, bars: Bars) -> Iterator[Epoch]:
    """The epochs of one system of `SYSTEMS`, as `train`."""
    recipe, folder, data = job.recipe, bench.folder(job), bench.data
    frame = measure(make_network(recipe.build, 1.0, data.device), data.example())
    torch.manual_seed(recipe.seed)
    task = Task(
        recipe=recipe, data=data, folder=folder, trained=lambda: _dense(job, bench), say=partial(bars.note, job)
    )
    records = folder / EPOCHS
    if after(job.method):
        task.spent.append(_before(job, bench))
    epochs = [Epoch(**fields) for fields in json.loads(records.read_text(encoding="utf-8"))] if records.exists() else []
    if not (folder / PHASES).exists():
        epochs = []

    def on_step(before: int, done: float, total: int) -> None:
        bars(job, before + done, before + total)

    try:
        for epoch in run(job.method, system(job.method), task, on_step):
            epochs = [*epochs[: epoch.epoch - 1], epoch]
            write_whole(records, json.dumps([asdict(one) for one in epochs]))
            bars.epoch(job, epoch)
            yield epoch
    except UnfitError as failed:
        bench.rows.append({**_head(job, bench), "error": str(failed)})
        return
    assert task.model is not None
    row = _row(job, bench, task.model, frame, task.spent)
    row |= {"phases": [asdict(one) for one in task.spent], "widths": Structure(task.model, task).widths()}
    _finish(job, beside, bench, bars, row, epochs)


def _finish(
    job: Job, beside: Sequence[Job], bench: Bench, bars: Bars, row: dict[str, Any], epochs: Sequence[Epoch]
) -> None:
    """Write the row of a finished network, and say what it came to."""
    metric, together = bench.data.metric, [other.method for other in beside]
    bench.rows.append({**row, "together": together, "epochs": [_brief(one) for one in epochs]})
    recipe, score = job.recipe, row[metric.name]
    bars.say(f"seed {recipe.seed}, {recipe.budget}: {job.method}: {metric.show(score or math.nan)}")


def _row(job: Job, bench: Bench, model: nn.Module, frame: Cost, spent: Sequence[Spent]) -> dict[str, Any]:
    """Score and costs of a trained network.

    Args:
        job: as for `train`.
        bench: as for `train`.
        model: the network, trained.
        frame: cost of the dense network.
        spent: all training that led to it.
    """
    data, seconds = bench.data, sum(one.seconds for one in spent)
    cost = measure(model, data.example())
    steps, samples = extent(model, data, job.recipe)
    score = evaluate(model, data)[0]
    # Seconds compare on one machine and with one code only.
    measured = {(row["config_hash"], json.dumps(row["versions"])): row.get("seconds") for row in bench.rows.read()}
    dense_seconds = measured.get((replace(job, method="dense").key(), json.dumps(bench.versions)))
    return {
        **_head(job, bench),
        data.metric.name: score,
        **({"test_perplexity": evaluate(model, data, "test")[0]} if isinstance(data, TextData) else {}),
        "params": cost.params,
        "flops": cost.flops,
        "dense_params": frame.params,
        "dense_flops": frame.flops,
        "train_flops": sum(one.flops for one in spent),
        "train_flops_paper_rule": sum(one.flops for one in spent if one.counted),
        "dense_train_flops": 3 * frame.flops * steps * samples * (job.recipe.epochs + job.recipe.then),
        "seconds": seconds,
        "dense_seconds": seconds if job.method == "dense" else dense_seconds,
    }


def _brief(epoch: Epoch) -> dict[str, Any]:
    """An epoch as it stands in a row: without what the row says already, and what no table reads."""
    without = {"network", "updates", *(name for name in ("temperature", "batch") if not getattr(epoch, name))}
    return {key: value for key, value in asdict(epoch).items() if key not in without}


def _head(job: Job, bench: Bench) -> dict[str, Any]:
    budget = None if job.method in UNBUDGETED else str(job.recipe.budget)
    return {
        "recipe": job.recipe.name,
        "method": job.method,
        "seed": job.recipe.seed,
        "budget": budget,
        "config_hash": job.key(),
        "config": job.config(),
        "versions": bench.versions,
        "data": bench.fingerprint,
    }


def _network(job: Job, bench: Bench) -> tuple[nn.Module, Recipe, Spent]:
    """What a job begins with, how it is trained, and what that had cost before."""
    recipe, method, data = job.recipe, job.method, bench.data
    if method not in FIXED:
        build = recipe.build_grown or recipe.build
        model = make_network(build, 1.0, data.device, meta=recipe.meta)
        return model, replace(recipe, preset=job.preset()), NOTHING
    if method == "dense":
        return make_network(recipe.build, 1.0, data.device), recipe, NOTHING
    if method in PUBLISHED:
        return published_network(method, recipe, data), recipe, NOTHING
    if method == "uniform":
        frame = measure(make_network(recipe.build, 1.0, data.device), data.example())
        limits = recipe.budget.limits(frame)
        params, flops = limits.params or frame.params, limits.flops or frame.flops
        width = twin_width(recipe, data, params=params, flops=flops)
        model = make_network(recipe.build, width, data.device)
        least = measure(model, data.example())
        if least.params > (limits.params or least.params) or least.flops > (limits.flops or least.flops):
            raise UnfitError(
                f"the narrowest network that one factor gives has {least.params:,} parameters and {least.flops:,} "
                f"FLOPs, more than {recipe.budget} allows; give a larger --budget"
            )
        return model, recipe, NOTHING
    base = bench.folder(replace(job, method=after(method)))
    if method == "l1":
        model = _dense(job, bench)
        return l1_pruned(model, recipe, data), fine_tuned(recipe), _before(job, bench)
    found = torchgrow.load(base / NETWORK, partial(recipe.build_grown or recipe.build, 1.0))
    if method == "direct":
        return initialised(found).to(data.device), recipe, NOTHING
    found = found.to(data.device)
    flops = measure(found, data.example()).flops
    width = uniform_width(recipe.build, flops, lambda model: measure(model, data.example()).flops)
    return make_network(recipe.build, width, data.device), recipe, NOTHING


def _dense(job: Job, bench: Bench) -> nn.Module:
    """The trained dense network that a job begins with."""
    base = bench.folder(replace(job, method=after(job.method)))
    return torchgrow.load(base / NETWORK, job.recipe.build).to(bench.data.device)


def _before(job: Job, bench: Bench) -> Spent:
    """What its training cost."""
    base = bench.folder(replace(job, method=after(job.method)))
    last = Epoch(**json.loads((base / EPOCHS).read_text(encoding="utf-8"))[-1])
    return Spent(name="dense", counted=False, epochs=last.epoch, flops=last.training_flops, seconds=last.seconds)

"""One run: grow a network, train others beside it, and leave a run folder behind."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import torchgrow
from torchgrow import Budget, Grower, TorchgrowError, measure, policies
from torchgrow.lab import processes, report
from torchgrow.lab.baselines import initialised, twin_width, uniform_width
from torchgrow.lab.checkpoints import Checkpoints
from torchgrow.lab.compare import RESULTS, recorded
from torchgrow.lab.data import Data, sizes
from torchgrow.lab.devices import chosen
from torchgrow.lab.display import Display, short
from torchgrow.lab.environment import environment
from torchgrow.lab.fitted import Fitted
from torchgrow.lab.from_recipe import (
    extent,
    far_from_paper,
    make_grower,
    make_network,
    make_optimizer,
    with_data,
)
from torchgrow.lab.metrics import metric_of
from torchgrow.lab.own_networks import told_apart
from torchgrow.lab.recipes import Recipe, from_json, with_own_classes
from torchgrow.lab.report import label
from torchgrow.lab.results import verdict
from torchgrow.lab.run_folder import Onlooker, RunFolder, check_new, default_out, resuming, where_it_stopped
from torchgrow.lab.text import TextData
from torchgrow.lab.train import Epoch, fit, judged
from torchgrow.lab.trained import Start, begin, loading, what_it_cost

TWINS = ("dense", "uniform")
AS_DEAR = "direct=flops"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a network came to, after its last epoch. Units as in `torchgrow.lab.train.Epoch`.

    ``test_perplexity`` is that of the test text, which is not looked at before. ``training_flops`` and ``seconds`` are
    None of the network that a run begins with: nobody counted them.
    """

    accuracy: float | None = None
    miou: float | None = None
    perplexity: float | None = None
    test_perplexity: float | None = None
    params: int
    flops: int
    training_flops: int | None
    seconds: float | None


def run(
    recipe: Recipe,
    *,
    console: Console,
    out: Path | None = None,
    folder: Path | None = None,
    download: bool = False,
    beside: Sequence[str] = TWINS,
    every: int | None = None,
    device: str = "auto",
) -> Path:
    """Grow the recipe's network, train others beside it, write the run folder and print the table.

    A recipe with weights begins with those, and the network is shrunk; in the records it is called "shrunk".

    Under torchrun all processes train each network together; the first one writes and prints.

    Args:
        recipe: what to run.
        console: where to show it.
        out: the run folder to write; default: a free name under ``runs/``.
        folder: where the data is; see `torchgrow.lab.data.load`.
        download: whether the data may be downloaded.
        beside: what else to train: "dense", the whole frame; "uniform", every width narrowed by one factor to the grown
            network's parameters (or FLOPs, if those are all that is budgeted); "uniform=50%", to this share of the
            dense network's parameters; "direct", the structure that was grown, from scratch; "direct=flops", the same
            for so many epochs that it costs as many training FLOPs as the grown one, or up to an epoch more.
        every: steps after which to write a checkpoint in the middle of an epoch; there is one at the end of each.
        device: where to train, one of `torchgrow.lab.names.DEVICES`.

    Returns:
        the run folder: ``config.json``, ``environment.json``, ``frame.json`` (cost and widths
        of the frame, and the budget), ``metrics.jsonl`` (one `Epoch` a line),
        ``network/`` (the grown network, for `torchgrow.load`), ``results.json`` and pictures.

    Raises:
        TorchgrowError: bad data, an infeasible budget, an ``out`` that exists, a loss that is not finite.
    """
    if every is not None and every < 1:
        raise TorchgrowError(f"a checkpoint can be written every 1 or more steps, not every {every}")
    beside = checked(beside)
    with processes.joined():
        begun = _begun(filed_as(recipe), out) if processes.restarted() else None
        if begun:
            return _resume(begun, console, folder, device)
        return _run(recipe, console, out, folder, download, device, {"beside": beside, "checkpoint_every": every})


def checked(beside: Sequence[str]) -> list[str]:
    """Networks to train beside the grown one, each once, those first whose size is known first."""
    for name in beside:
        kind, _, share = name.partition("=")
        if name in (*TWINS, "direct", AS_DEAR):
            continue
        if not (kind == "uniform" and re.fullmatch(r"[\d.]+%", share)):
            raise TorchgrowError(
                f"{name!r} is no network to train beside the grown one; there are dense, uniform, uniform=50% (of the "
                "dense one's parameters), direct and direct=flops (for as many training FLOPs)"
            )
        Budget(params=share)
    return sorted(dict.fromkeys(beside), key=lambda name: ("dense", "uniform", "direct").index(name.partition("=")[0]))


def _begun(name: str, out: Path | None) -> Path | None:
    """The run that these processes were at before torchrun started them anew."""
    candidates = [out] if out else [Path("runs") / f.name for f in Path("runs").glob(f"{name}*.partial")]
    partial = [path.with_name(f"{path.name.removesuffix('.partial')}.partial") for path in candidates]
    begun = [path for path in partial if (path / "config.json").exists()]
    return max(begun, key=lambda path: (path / "config.json").stat().st_mtime, default=None)


def filed_as(recipe: Recipe) -> str:
    """What a run folder is called where nothing is said."""
    return f"shrunk-{recipe.name}" if recipe.weights else recipe.name


def _run(
    recipe: Recipe,
    console: Console,
    out: Path | None,
    folder: Path | None,
    download: bool,
    device: str,
    how: dict[str, Any],
) -> Path:
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    if recipe.weights:
        recipe = with_own_classes(recipe)
    with processes.first_alone():
        if out and processes.rank() == 0:
            check_new(out)  # before it costs data, tracing and measuring
        recipe, data = with_data(recipe, console, folder, download=download, device=chosen(device))
    start = begin(recipe, data, {}) if recipe.weights else None  # what is wrong with it leaves no folder
    record = {**recipe.as_json(), **told_apart(recipe)}
    run_folder = None
    with processes.first_alone():
        run_folder = RunFolder(out or default_out(filed_as(recipe))) if processes.rank() == 0 else None
    if run_folder:
        how = {"data": folder and str(folder.absolute()), "samples": list(sizes(data)), **how}
        text = {"text": data.source} if isinstance(data, TextData) else {}
        run_folder.write_json("environment.json", environment(data.device))
        run_folder.write_json("config.json", {**record, **text, "run": how})
    out = processes.told(run_folder.out if run_folder else Path())
    return _go(recipe, data, run_folder or Onlooker(out), console, start)


def resume(run: Path, *, console: Console, folder: Path | None = None, device: str = "auto") -> Path:
    """Resume a run that was stopped, by whatever, from its last checkpoint: it ends as if it had not been stopped.

    Weights, structures and records come out bit for bit as in the unbroken run, but for the seconds: with the same
    versions and on the same kind of CPU; the number of threads is set to that of the run.

    Args:
        run: the folder that the run was to end up with, or its ``.partial``.
        console: where to show it.
        folder: where the data is; default: where it was.
        device: where to train, as for `run`.

    Returns:
        the run folder, as `run` does.

    Raises:
        TorchgrowError: it is finished, not a run, damaged, or another process is at it.
    """
    with processes.joined():
        return _resume(run, console, folder, device)


def _resume(run: Path, console: Console, folder: Path | None, device: str) -> Path:
    run, first = run if run.name else run.resolve(), processes.rank() == 0  # "." has no name
    target = run.with_name(run.name.removesuffix(".partial"))
    with processes.first_alone():
        run_folder = RunFolder(target, resume=True) if first else Onlooker(target)
    config = run_folder.read_json("config.json")
    if "search" in config:
        raise TorchgrowError(f"{run} is a search that was stopped; go on with it by: {resuming(run, config)}")
    recipe, how = from_json(config), config.get("run")
    if not isinstance(how, dict) or how.keys() - {"samples"} != {"data", "beside", "checkpoint_every"}:
        raise TorchgrowError(f"{run_folder.path / 'config.json'} does not say how the run was started; start it anew")
    as_before(run_folder, recipe, device, console)
    folder = folder or (Path(how["data"]) if how["data"] else None)
    with processes.first_alone():
        recipe, data = with_data(recipe, console, folder, device=chosen(device))
    start = begin(recipe, data, run_folder.read_json("rises.json")) if recipe.weights else None
    if start:
        start.check(run_folder.read_json("weights.json").get("sha256"))
    return _go(recipe, data, run_folder, console, start)


def as_before(run_folder: RunFolder, recipe: Recipe, device: str, console: Console) -> None:
    """Take the number of threads that a run had, and tell what else differs here from where it began."""
    before, here = run_folder.read_json("environment.json"), environment(chosen(device))
    if type(before.get("threads")) is int and before["threads"] > 0:
        torch.set_num_threads(before["threads"])
    for name in ("torch", "cpu", "device", "commit", "processes"):
        if before.get(name) != here.get(name):
            console.print(
                f"Note: {name} is {here.get(name)} and was {before.get(name)}; results may differ in the last bits",
                soft_wrap=True,
            )
    if run_folder.read_json("config.json").get("network") not in (None, told_apart(recipe).get("network")):
        console.print(
            f"Note: the code of the network in {recipe.source} is not what the run began with; what is left is trained "
            "with the code of now. To train all with it, start anew under another --out",
            soft_wrap=True,
        )


def _go(recipe: Recipe, data: Data, run_folder: RunFolder, console: Console, start: Start | None) -> Path:
    """Train what is not trained yet, and finish the run folder."""
    first = processes.rank() == 0
    console = console if first else Console(quiet=True)
    try:
        with run_folder:
            if start:
                run_folder.write_json("weights.json", {"sha256": start.digest})
                if start.rises:
                    run_folder.write_json("rises.json", asdict(start.rises))
            results = _train_all(recipe, data, run_folder, console, start)
            pictures = report.draw(run_folder.path) if first else []
    except BaseException as error:
        again = f"Go on from the last checkpoint with: {resuming(run_folder.out, {})}"
        if told := where_it_stopped(error, run_folder, again):
            console.print(told, soft_wrap=True)
        raise
    console.print(table(results))
    if any(name.startswith("uniform") for name in results):
        console.print("uniform: every width narrowed by one factor; direct: the grown structure, from scratch.\n")
    if start:
        console.print(
            what_it_cost(start), f"To load it:\n{loading(recipe, run_folder.out)}\n", sep="\n", soft_wrap=True
        )
    elif first and isinstance(recipe.policy(), (policies.Default, policies.Paper, policies.Random)):
        methods = ["dense", "uniform", "direct", "default"]
        for line in verdict(recorded(recipe, data, methods), data.metric, f"{RESULTS / recipe.name}.jsonl"):
            console.print(line, soft_wrap=True)
    console.print("Pictures:", *(f"  {run_folder.out / picture}" for picture in pictures), sep="\n", soft_wrap=True)
    console.print(f"Everything about this run: {run_folder.out}", soft_wrap=True)
    console.print(f"As one page: torchgrow report {quote(str(run_folder.out))}", soft_wrap=True)
    return run_folder.out


def _train_all(
    recipe: Recipe, data: Data, run_folder: RunFolder, console: Console, start: Start | None
) -> dict[str, Result]:
    """Train the networks, the grown one first since others take their size from it."""
    grown = "shrunk" if start else "grown"
    names = (grown, *run_folder.read_json("config.json")["run"]["beside"])
    done = {name: Result(**fields) for name, fields in run_folder.read_json("results.json").items()}
    if start:
        names, done["before"] = (grown, "before", *names[1:]), _before(start)
    with Display(console) as display:
        if start:
            before = done["before"]
            size = f"{short(before.params)} parameters, {short(before.flops)} FLOPs, as it came"
            display.say(f"{label('before'):<12} {score_of(before):<10} {size}")
            if warning := start.warning(data):
                display.say(warning)
        for name in names:
            if name not in done:
                done[name] = train_network(name, recipe, data, run_folder, display, done, start)
                ordered = {name: asdict(done[name]) for name in (*names[1:], grown) if name in done}
                run_folder.write_json("results.json", ordered)
    return {name: done[name] for name in (*names[1:], grown)}


def _before(start: Start) -> Result:
    """The network that a run begins with."""
    cost = start.cost
    return Result(**start.scores, params=cost.params, flops=cost.flops, training_flops=None, seconds=None)


def _built(name: str, recipe: Recipe, data: Data, run_folder: RunFolder, done: dict[str, Result]) -> nn.Module:
    """The network of that name, as it begins."""
    build = recipe.build_grown or recipe.build
    if name == "grown":
        torch.manual_seed(recipe.seed)
        return make_network(build, 1.0, data.device, meta=recipe.meta)
    if name in ("direct", AS_DEAR):
        found = torchgrow.load(run_folder.path / "network", partial(build, 1.0))
        torch.manual_seed(recipe.seed)
        return initialised(found).to(data.device)
    width, (_, _, share) = 1.0, name.partition("=")
    if share:
        frame = measure(make_network(recipe.build, 1.0, data.device), data.example())
        limit = Budget(params=share).limits(frame).params
        assert limit is not None
        width = uniform_width(recipe.build, limit)
    elif name == "uniform":
        grown = _own(done)
        width = twin_width(recipe, data, params=grown.params, flops=grown.flops)
    torch.manual_seed(recipe.seed)
    return make_network(recipe.build, width, data.device)


def _own(done: dict[str, Result]) -> Result:
    """Of the network that the run is about, which the others take their size from."""
    return next(done[own] for own in ("grown", "shrunk", "searched") if own in done)


def _as_dear(model: nn.Module, recipe: Recipe, data: Data, flops: int) -> Recipe:
    """The recipe with so many epochs that training the network takes these FLOPs, or up to an epoch more."""
    steps, samples = extent(model, data, recipe)
    each = 3 * measure(model, data.example()).flops * steps * samples
    return replace(recipe, epochs=max(2, math.ceil(flops / each) - recipe.then))


def train_network(
    name: str,
    recipe: Recipe,
    data: Data,
    run_folder: RunFolder,
    display: Display,
    done: dict[str, Result],
    start: Start | None,
) -> Result:
    """Train one network from its beginning or its last checkpoint; "grown" or "shrunk" has a grower, and is saved."""
    frame = start.cost if start else measure(make_network(recipe.build, 1.0, data.device), data.example())
    grower: Grower | None = None
    teacher: nn.Module | None = None
    spent = (0, 0.0)
    if start and name == "shrunk":
        spent = (start.rises.flops, start.rises.seconds) if start.rises else spent
        model, optimizer, grower, teacher = start.model, start.optimizer, start.grower, start.teacher
    else:
        model = _built(name, recipe, data, run_folder, done)
        if name == AS_DEAR:
            recipe = _as_dear(model, recipe, data, _own(done).training_flops or 0)
        optimizer = make_optimizer(model, recipe)
    limits: dict[str, int | None] = {}
    full: dict[str, int] = {}
    if name == "grown":
        warning = far_from_paper(recipe, extent(model, data, recipe)[0])
        if warning:
            display.say(warning)
        grower = make_grower(model, optimizer, data, recipe)
    if grower:
        display.say(f"{type(model).__name__} goes {grower.course()}")
        limits, full = asdict(grower.limits), grower.full_widths()
        run_folder.write_json(
            "frame.json", {**asdict(frame), "limits": limits, "widths": full, "blocks": grower.full_depths()}
        )
    display.start(name, epochs=recipe.epochs + recipe.then, frame=frame, limits=limits, full=full)
    every = run_folder.read_json("config.json")["run"]["checkpoint_every"]
    checkpoints = Checkpoints(folder=run_folder.path / "checkpoints" / name, every=every)
    last = next(iter(run_folder.epochs(name)[::-1]), None)
    if last:
        display.epoch(last)
    watched = partial(fit, on_step=display.step, checkpoints=checkpoints)
    for last in watched(name, model, optimizer, data, recipe, grower=grower, teacher=teacher, spent=spent):
        run_folder.append(last)
        display.epoch(last)
    assert last is not None
    result = processes.told(result_of(model, data, last))  # seconds differ
    size = short(result.params)
    display.say(f"{label(name):<12} {score_of(result):<10} {size:>6} parameters, {result.seconds:.1f} s of training")
    if grower:
        with processes.first_alone():  # the others may load what the first one saves
            if processes.rank() == 0:
                torchgrow.save(model, run_folder.path / "network")
    return result


def result_of(model: nn.Module, data: Data, last: Epoch) -> Result:
    """Measured again on the network as it is delivered, after the grower's last update."""
    cost = measure(model, data.example())
    return Result(
        **judged(model, data),
        params=cost.params,
        flops=cost.flops,
        training_flops=last.training_flops,
        seconds=last.seconds,
    )


def score_of(result: Result) -> str:
    """What a network came to, with the name of the metric if that has no unit."""
    metric = metric_of(vars(result))
    return metric.show(getattr(result, metric.name)) + ("" if metric.unit else f" {metric.name}")


def table(results: dict[str, Result]) -> Table:
    """The networks side by side, with shares of the one that the run began with, or of the dense one."""
    grid = Fitted()  # fits 80 columns
    metric = metric_of(vars(next(iter(results.values()))))
    head = metric.name if metric.unit else f"{metric.name}\nvalid, test"
    for column in ("network", head, "parameters", "inference\nFLOPs", "training\nFLOPs", "training\nseconds"):
        grid.add_column(column, justify="left" if column == "network" else "right", no_wrap=True)
    whole = results.get("before", results.get("dense"))
    for name, result in results.items():
        scores = [getattr(result, metric.name), result.test_perplexity]
        cells = [label(name), ", ".join(metric.show(score) for score in scores if score is not None)]
        for field in ("params", "flops", "training_flops", "seconds"):
            value, of = getattr(result, field), getattr(whole, field, None)
            if value is None:
                cells.append("not counted")
                continue
            text = (f"{value:.1f}" if value < 1000 else f"{value:.0f}") if field == "seconds" else short(value)
            cells.append(f"{text} ({100 * value / of:.0f}%)" if of else text)
        grid.add_row(*cells)
    return grid

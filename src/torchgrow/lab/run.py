"""One run: grow, train the twins, and leave a run folder behind."""

import errno
import json
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

import torchgrow
from torchgrow import Grower, TorchgrowError, measure
from torchgrow.lab import data as lab_data
from torchgrow.lab import processes, report
from torchgrow.lab.checkpoints import Checkpoints
from torchgrow.lab.data import Data
from torchgrow.lab.display import Display, short
from torchgrow.lab.metrics import metric_of
from torchgrow.lab.recipes import Recipe
from torchgrow.lab.text import TextData
from torchgrow.lab.train import Epoch, evaluate, fit, make_grower, make_optimizer

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

NETWORKS = {"dense": "dense twin", "uniform": "uniform twin", "grown": "grown"}  # in the table's order


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a network came to, after its last epoch. Units as in `torchgrow.lab.train.Epoch`.

    ``test_perplexity`` is that of the test text, which is not looked at before.
    """

    accuracy: float | None = None
    perplexity: float | None = None
    test_perplexity: float | None = None
    params: int
    flops: int
    training_flops: int
    seconds: float


class RunFolder:
    """A folder that has its name only once it is whole; until then it is called ``<name>.partial``.

    As a context manager it renames the folder at the end, unless an exception passed through: then what was
    written so far stays in the partial folder, readable, with the reason in ``stopped.txt``.

    Args:
        out: the folder to end up with.
        resume: go on in the partial folder that is there, instead of making one.

    Raises:
        TorchgrowError: it exists already, finished or partial; or with ``resume``, there is nothing to go on with, or
            another process is at it.
    """

    def __init__(self, out: Path, resume: bool = False) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".partial")
        if out.exists():
            raise TorchgrowError(
                f"{out} is finished; there is nothing to go on with"
                if resume
                else f"{out} exists already and is not overwritten; choose another --out, or move it away first"
            )
        if resume and not (self.path / "config.json").exists():
            raise TorchgrowError(f"{self.path} is not a run that was stopped: it has no config.json")
        try:
            self.path.mkdir(parents=True, exist_ok=resume)
        except FileExistsError:
            raise TorchgrowError(
                f"{self.path} is what an earlier run left when it was stopped, or a run that still goes on; "
                f"go on with it (torchgrow run --resume {out}), look through it and delete it, or choose another --out"
            ) from None
        except OSError as error:
            raise TorchgrowError(f"{self.path} cannot be made: {error.strerror}; choose another --out") from error
        self._lock = lock(self.path)
        if resume:
            (self.path / "stopped.txt").unlink(missing_ok=True)
            for left in self.path.glob(".*"):  # half of a file or folder that was being written
                shutil.rmtree(left) if left.is_dir() else left.unlink()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.path.rename(self.out)
            shutil.rmtree(self.out / "checkpoints", ignore_errors=True)  # the network has been saved
        else:
            (self.path / "stopped.txt").write_text(f"{type(error).__name__}: {error}\n")
        os.close(self._lock)

    def write_json(self, name: str, value: object) -> None:
        """Write ``value`` to the file ``name``, which holds it whole or not at all."""
        half = self.path / f".{name}"
        with half.open("w") as file:
            file.write(json.dumps(value, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        half.replace(self.path / name)

    def read_json(self, name: str) -> dict[str, Any]:
        """What `write_json` wrote to the file ``name``; empty if it is not there."""
        try:
            value = json.loads((self.path / name).read_text()) if (self.path / name).exists() else {}
            if isinstance(value, dict):
                return value
        except (OSError, ValueError, RecursionError):
            pass
        raise TorchgrowError(f"{self.path / name} is damaged; the run cannot go on, start it anew")

    def epochs(self, network: str | None = None) -> list[Epoch]:
        """Whole lines of ``metrics.jsonl``: of all networks, or of one."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        try:
            records = [Epoch(**json.loads(line)) for line in lines if line.endswith("\n")]
        except (ValueError, TypeError) as error:
            raise TorchgrowError(f"{path} is damaged: {error}; the run cannot go on, start it anew") from error
        return [record for record in records if network in (None, record.network)]

    def append(self, record: Epoch) -> None:
        """Add a line to ``metrics.jsonl``; it is on disk when this returns.

        Lines of this or a later epoch of the same network go: a run that was stopped has written them after the
        checkpoint from which it goes on.
        """
        path, before = self.path / "metrics.jsonl", self.epochs()
        kept = [r for r in before if r.network != record.network or r.epoch < record.epoch]
        half = self.path / ".metrics.jsonl"
        with half.open("w") as file:
            file.writelines(json.dumps(asdict(r)) + "\n" for r in (*kept, record))
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)


def lock(path: Path) -> int:
    """Keep other processes off a folder until the handle is closed or this process ends, however it ends."""
    handle = os.open(path, os.O_RDONLY)
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise TorchgrowError(f"another process is running in {path}; wait for it, or stop it first") from None
            return os.open(path, os.O_RDONLY)  # a file system without locks
    return handle


class Onlooker(RunFolder):
    """The run folder as processes other than the first have it: they write nothing."""

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out.with_name(out.name + ".partial")

    def __exit__(self, *_: object) -> None:
        """Nothing to put in order."""

    def write_json(self, name: str, value: object) -> None:
        """Process 0 does."""

    def append(self, record: Epoch) -> None:
        """Process 0 does."""


def default_out(name: str) -> Path:
    """``runs/<name>``, or the first of ``runs/<name>-2``, ``-3`` and so on that no run has taken."""
    for number in range(1, 10_000):
        out = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if not out.exists() and not out.with_name(out.name + ".partial").exists():
            return out
    raise TorchgrowError("runs/ is full; choose a folder with --out")


def environment() -> dict[str, Any]:
    """Versions, cores, threads, CPU and commit, as far as they can be found out."""
    packages = ("torch", "torchvision", "numpy", "safetensors", "torchgrow")
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": processes.size(),
        "commit": _commit(),
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor()


def _commit() -> str | None:
    """The commit torchgrow runs from, with ``+changes`` if files differ; None if not from a checkout."""
    package = Path(torchgrow.__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # An installed package may lie inside somebody else's repository; that one's commit says nothing.
        if Path(git("rev-parse", "--show-toplevel")) / "src" / "torchgrow" != package:
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def uniform_width(
    build: Callable[[float], nn.Module],
    limit: int,
    count: Callable[[nn.Module], int] | None = None,
) -> float:
    """The largest width factor at which ``build(factor)`` costs at most ``limit``.

    Args:
        build: makes a network with every width scaled by a factor in (0, 1].
        limit: cost not to exceed.
        count: what a network on the meta device costs. Default: its parameters.

    Returns:
        the factor; if even one channel everywhere is too many, the factor of that smallest network.
    """
    costs: dict[tuple[torch.Size, ...], int] = {}  # most of the widths tried give a network that was seen before

    def fits(width: float) -> bool:
        with torch.device("meta"):  # counts need shapes only
            model = build(width)
        shapes = tuple(p.shape for p in model.parameters())
        if shapes not in costs:
            costs[shapes] = count(model) if count else sum(shape.numel() for shape in shapes)
        return costs[shapes] <= limit

    if fits(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(30):  # far finer than one channel of any layer
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def twin_width(recipe: Recipe, data: Data, *, params: int, flops: int) -> float:
    """The width factor of the uniform twin: at most these FLOPs if they are all that is budgeted, else parameters."""
    if recipe.budget.params is None:
        return uniform_width(recipe.build, flops, lambda model: measure(model, data.example()).flops)
    return uniform_width(recipe.build, params)


def run(
    recipe: Recipe,
    *,
    console: Console,
    out: Path | None = None,
    folder: Path | None = None,
    download: bool = False,
    twins: bool = True,
    every: int | None = None,
) -> Path:
    """Grow the recipe's network, train its twins if asked, write the run folder and print the table.

    Under torchrun all processes train each network together; the first one writes and prints.

    Args:
        recipe: what to run.
        console: where to show it.
        out: the run folder to write; default: a free name under ``runs/``.
        folder: where the data is; see `torchgrow.lab.data.load`.
        download: whether the data may be downloaded.
        twins: whether to train the dense and the uniform twin as well.
        every: steps after which to write a checkpoint in the middle of an epoch; there is one at the end of each.

    Returns:
        the run folder: ``config.json``, ``environment.json``, ``frame.json`` (cost and widths
        of the frame, and the budget), ``metrics.jsonl`` (one `Epoch` a line),
        ``network/`` (the grown network, for `torchgrow.load`), ``results.json`` and three pictures.

    Raises:
        TorchgrowError: bad data, an infeasible budget, an ``out`` that exists, a loss that is not finite.
    """
    if every is not None and every < 1:
        raise TorchgrowError(f"a checkpoint can be written every 1 or more steps, not every {every}")
    with processes.joined():
        begun = _begun(recipe.name, out) if processes.restarted() else None
        if begun:
            return _resume(begun, console, folder)
        return _run(recipe, console, out, folder, download, twins, every)


def _begun(name: str, out: Path | None) -> Path | None:
    """The run that these processes were at before torchrun started them anew."""
    candidates = [out] if out else [Path("runs") / f.name for f in Path("runs").glob(f"{name}*.partial")]
    partial = [path.with_name(f"{path.name.removesuffix('.partial')}.partial") for path in candidates]
    begun = [path for path in partial if (path / "config.json").exists()]
    return max(begun, key=lambda path: (path / "config.json").stat().st_mtime, default=None)


def _run(
    recipe: Recipe,
    console: Console,
    out: Path | None,
    folder: Path | None,
    download: bool,
    twins: bool,
    every: int | None,
) -> Path:
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    with processes.first_alone():
        recipe, data = with_data(recipe, console, folder, download=download)
    run_folder = None
    if processes.rank() == 0:
        run_folder = RunFolder(out or default_out(recipe.name))
        how = {"data": folder and str(folder.absolute()), "twins": twins, "checkpoint_every": every}
        text = {"text": data.source} if isinstance(data, TextData) else {}
        run_folder.write_json("environment.json", environment())
        run_folder.write_json("config.json", {**recipe.as_json(), **text, "run": how})
    out = processes.told(run_folder.out if run_folder else Path())
    return _go(recipe, data, run_folder or Onlooker(out), console)


def with_data(
    recipe: Recipe, console: Console, folder: Path | None, *, download: bool = False, held_out: bool = False
) -> tuple[Recipe, Data]:
    """The data, and the recipe with networks that fit it."""
    data = lab_data.load(
        recipe.dataset,
        folder=folder,
        download=download,
        subset=recipe.subset,
        steps=recipe.steps,
        side=recipe.side,
        held_out=held_out,
    )
    if isinstance(data, TextData):
        console.print(
            f"Text: {data.source}; {len(data.train):,} words to train on, a vocabulary of {len(data.vocabulary):,}",
            soft_wrap=True,
        )
        if recipe.channels_last:
            raise TorchgrowError("a text has no channels; leave --channels-last out")
        return recipe.with_words(len(data.vocabulary)), data
    if recipe.dataset == "imagefolder":
        most = max(int(images.labels.max()) for images in (data.train, data.test))  # a subset may lack a class
        recipe = recipe.with_classes(1 + most)
    return recipe, replace(data, channels_last=recipe.channels_last)


def resume(run: Path, *, console: Console, folder: Path | None = None) -> Path:
    """Go on with a run that was stopped, by whatever, from its last checkpoint: it ends as if it never had been.

    Weights, structures and records come out bit for bit as in the unbroken run, but for the seconds: with the same
    versions and on the same kind of CPU; the number of threads is set to that of the run.

    Args:
        run: the folder that the run was to end up with, or its ``.partial``.
        console: where to show it.
        folder: where the data is; default: where it was.

    Returns:
        the run folder, as `run` does.

    Raises:
        TorchgrowError: it is finished, not a run, damaged, or another process is at it.
    """
    with processes.joined():
        return _resume(run, console, folder)


def _resume(run: Path, console: Console, folder: Path | None) -> Path:
    target, first = run.with_name(run.name.removesuffix(".partial")), processes.rank() == 0
    run_folder = RunFolder(target, resume=True) if first else Onlooker(target)
    config, before, here = run_folder.read_json("config.json"), run_folder.read_json("environment.json"), environment()
    recipe, how = Recipe.from_json(config), config.get("run")
    if not isinstance(how, dict) or how.keys() != {"data", "twins", "checkpoint_every"}:
        raise TorchgrowError(f"{run_folder.path / 'config.json'} does not say how the run was started; start it anew")
    if type(before.get("threads")) is int and before["threads"] > 0:
        torch.set_num_threads(before["threads"])
    for name in ("torch", "cpu", "commit", "processes"):
        if before.get(name) != here[name]:
            console.print(
                f"Note: {name} is {here[name]} and was {before.get(name)}; results may differ in the last bits",
                soft_wrap=True,
            )
    folder = folder or (Path(how["data"]) if how["data"] else None)
    recipe, data = with_data(recipe, console, folder)
    return _go(recipe, data, run_folder, console)


def _go(recipe: Recipe, data: Data, run_folder: RunFolder, console: Console) -> Path:
    """Train what is not trained yet, and finish the run folder."""
    first = processes.rank() == 0
    console = console if first else Console(quiet=True)
    try:
        with run_folder:
            results = _train_all(recipe, data, run_folder, console)
            pictures = report.draw(run_folder.path) if first else []
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, TorchgrowError, OSError, MemoryError)):
            console.print(
                f"What was measured before the stop is in {run_folder.path}\n"
                f"Go on from the last checkpoint with: torchgrow run --resume {run_folder.out}",
                soft_wrap=True,
            )
        raise
    console.print(table(results))
    console.print("Pictures:", *(f"  {run_folder.out / picture}" for picture in pictures), sep="\n", soft_wrap=True)
    console.print(f"Everything about this run: {run_folder.out}", soft_wrap=True)
    return run_folder.out


def _train_all(recipe: Recipe, data: Data, run_folder: RunFolder, console: Console) -> dict[str, Result]:
    """Train the networks, the grown one first since the uniform twin takes its size from it."""
    twins = run_folder.read_json("config.json")["run"]["twins"]
    done = {name: Result(**fields) for name, fields in run_folder.read_json("results.json").items()}
    with Display(console) as display:
        for name in ("grown", "dense", "uniform") if twins else ("grown",):
            if name not in done:
                width = 1.0
                if name == "uniform":
                    width = twin_width(recipe, data, params=done["grown"].params, flops=done["grown"].flops)
                done[name] = _train(name, width, recipe, data, run_folder, display)
                ordered = {name: asdict(done[name]) for name in NETWORKS if name in done}
                run_folder.write_json("results.json", ordered)
    return {name: done[name] for name in NETWORKS if name in done}


def _train(name: str, width: float, recipe: Recipe, data: Data, run_folder: RunFolder, display: Display) -> Result:
    """Train one network from the recipe's seed or its last checkpoint; the one named "grown" grows and is saved."""
    frame = measure(recipe.build(1.0), data.example())
    torch.manual_seed(recipe.seed)
    build = recipe.build_grown or recipe.build if name == "grown" else recipe.build
    with torch.device("meta" if name == "grown" and recipe.meta else "cpu"):
        model = build(width)
    optimizer = make_optimizer(model, recipe)
    grower: Grower | None = None
    limits: dict[str, int | None] = {}
    full: dict[str, int] = {}
    if name == "grown":
        grower = make_grower(model, optimizer, data, recipe)
        limits, full = asdict(grower.limits), grower.full_widths()
        run_folder.write_json("frame.json", {**asdict(frame), "limits": limits, "widths": full})
    display.start(name, epochs=recipe.epochs + recipe.then, frame=frame, limits=limits, full=full)
    every = run_folder.read_json("config.json")["run"]["checkpoint_every"]
    checkpoints = Checkpoints(folder=run_folder.path / "checkpoints" / name, every=every)
    last = next(iter(run_folder.epochs(name)[::-1]), None)
    if last:
        display.epoch(last)
    for last in fit(name, model, optimizer, data, recipe, grower=grower, on_step=display.step, checkpoints=checkpoints):
        run_folder.append(last)
        display.epoch(last)
    assert last is not None
    result = processes.told(_result(model, data, last))
    display.say(f"{NETWORKS[name]}: {_score(result)} in {result.seconds:.1f} s of training")
    if grower and processes.rank() == 0:
        torchgrow.save(model, run_folder.path / "network")
    return result


def _result(model: nn.Module, data: Data, last: Epoch) -> Result:
    """Measured again on the network as it is delivered, after the grower's last update."""
    cost = measure(model, data.example())
    scores: dict[str, float] = {}
    if processes.rank() == 0:  # the others are told
        scores[data.metric.name] = evaluate(model, data)[0]
        if isinstance(data, TextData):
            scores["test_perplexity"] = evaluate(model, data, "test")[0]
    return Result(
        **scores,
        params=cost.params,
        flops=cost.flops,
        training_flops=last.training_flops,
        seconds=last.seconds,
    )


def _score(result: Result) -> str:
    metric = metric_of(vars(result))
    return metric.show(getattr(result, metric.name)) + ("" if metric.unit else f" {metric.name}")


def table(results: dict[str, Result]) -> Table:
    """The networks side by side, with shares of the dense twin if it is among them."""
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)  # fits 80 columns
    metric = metric_of(vars(next(iter(results.values()))))
    head = metric.name if metric.unit else f"{metric.name}\nvalid, test"
    for column in ("network", head, "parameters", "inference\nFLOPs", "training\nFLOPs", "training\nseconds"):
        grid.add_column(column, justify="left" if column == "network" else "right", no_wrap=True)
    dense = results.get("dense")
    for name, result in results.items():
        scores = [getattr(result, metric.name), result.test_perplexity]
        cells = [NETWORKS[name], ", ".join(metric.show(score) for score in scores if score is not None)]
        for field in ("params", "flops", "training_flops", "seconds"):
            value = getattr(result, field)
            text = (f"{value:.1f}" if value < 1000 else f"{value:.0f}") if field == "seconds" else short(value)
            cells.append(f"{text} ({100 * value / getattr(dense, field):.0f}%)" if dense else text)
        grid.add_row(*cells)
    return grid

"""One run: grow, train the twins, and leave a run folder behind."""

import json
import logging
import math
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
from torchgrow.lab.data import ImageData
from torchgrow.lab.display import Display, short
from torchgrow.lab.recipes import Recipe
from torchgrow.lab.train import Epoch, evaluate, fit, make_optimizer

log = logging.getLogger(__name__)

NETWORKS = {"dense": "dense twin", "uniform": "uniform twin", "grown": "grown"}  # in the table's order


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a network came to, after its last epoch. Units as in `torchgrow.lab.train.Epoch`."""

    accuracy: float
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

    Raises:
        TorchgrowError: it exists already, finished or partial.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".partial")
        if out.exists():
            raise TorchgrowError(
                f"{out} exists already and is not overwritten; choose another --out, or move it away first"
            )
        try:
            self.path.mkdir(parents=True)
        except FileExistsError:
            raise TorchgrowError(
                f"{self.path} is what an earlier run left when it was stopped, or a run that still goes on; "
                "look through it and delete it, or choose another --out"
            ) from None
        except OSError as error:
            raise TorchgrowError(f"{self.path} cannot be made: {error.strerror}; choose another --out") from error

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.path.rename(self.out)
        else:
            (self.path / "stopped.txt").write_text(f"{type(error).__name__}: {error}\n")

    def write_json(self, name: str, value: object) -> None:
        """Write ``value`` to the file ``name``."""
        (self.path / name).write_text(json.dumps(value, indent=2) + "\n")

    def append(self, record: Epoch) -> None:
        """Add a line to ``metrics.jsonl``; it is on disk when this returns."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(asdict(record)) + "\n")


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


def uniform_width(build: Callable[[float], nn.Module], params: int) -> float:
    """The largest width factor at which ``build(factor)`` has at most ``params`` parameters.

    Args:
        build: makes a network with every width scaled by a factor in (0, 1].
        params: parameters not to exceed.

    Returns:
        the factor; if even one channel everywhere is too many, the factor of that smallest network.
    """

    def fits(width: float) -> bool:
        with torch.device("meta"):  # counts need shapes only
            return sum(p.numel() for p in build(width).parameters()) <= params

    if fits(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(30):  # far finer than one channel of any layer
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def run(
    recipe: Recipe,
    *,
    console: Console,
    out: Path | None = None,
    folder: Path | None = None,
    download: bool = False,
    twins: bool = True,
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

    Returns:
        the run folder: ``config.json``, ``environment.json``, ``frame.json`` (cost and widths
        of the frame, and the budget), ``metrics.jsonl`` (one `Epoch` a line),
        ``network/`` (the grown network, for `torchgrow.load`), ``results.json`` and three pictures.

    Raises:
        TorchgrowError: bad data, an infeasible budget, an ``out`` that exists, a loss that is not finite.
    """
    with processes.joined():
        return _run(recipe, console, out, folder, download, twins)


def _run(recipe: Recipe, console: Console, out: Path | None, folder: Path | None, download: bool, twins: bool) -> Path:
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    with processes.first_alone():
        data = lab_data.load(recipe.dataset, folder=folder, download=download, subset=recipe.subset)
    first = processes.rank() == 0
    run_folder = RunFolder(out or default_out(recipe.name)) if first else None
    out = processes.told(run_folder.out if run_folder else Path())
    run_folder, console = (run_folder, console) if run_folder else (Onlooker(out), Console(quiet=True))
    try:
        with run_folder:
            run_folder.write_json("config.json", recipe.as_json())
            run_folder.write_json("environment.json", environment())
            results = _train_all(recipe, data, run_folder, console, twins)
            run_folder.write_json("results.json", {name: asdict(result) for name, result in results.items()})
            pictures = report.draw(run_folder.path) if first else []
    except (KeyboardInterrupt, TorchgrowError):
        console.print(f"What was measured before the stop is in {run_folder.path}", soft_wrap=True)
        raise
    console.print(table(results))
    console.print("Pictures:", *(f"  {run_folder.out / picture}" for picture in pictures), sep="\n", soft_wrap=True)
    console.print(f"Everything about this run: {run_folder.out}", soft_wrap=True)
    return run_folder.out


def _train_all(
    recipe: Recipe, data: ImageData, run_folder: RunFolder, console: Console, twins: bool
) -> dict[str, Result]:
    """Train the networks, the grown one first since the uniform twin takes its size from it."""
    results = {}
    with Display(console) as display:
        results["grown"] = _train("grown", 1.0, recipe, data, run_folder, display)
        if twins:
            results["dense"] = _train("dense", 1.0, recipe, data, run_folder, display)
            width = uniform_width(recipe.build, results["grown"].params)
            results["uniform"] = _train("uniform", width, recipe, data, run_folder, display)
    return {name: results[name] for name in NETWORKS if name in results}


def _train(name: str, width: float, recipe: Recipe, data: ImageData, run_folder: RunFolder, display: Display) -> Result:
    """Train one network from the recipe's seed; the one named "grown" grows and is saved."""
    example = data.normalise(data.train.pixels[:2])
    frame = measure(recipe.build(1.0), example)
    torch.manual_seed(recipe.seed)
    model = recipe.build(width)
    optimizer = make_optimizer(model, recipe)
    grower: Grower | None = None
    limits: dict[str, int | None] = {}
    full: dict[str, int] = {}
    if name == "grown":
        grower = Grower(
            model,
            optimizer,
            example_inputs=example,
            budget=recipe.budget,
            updates=recipe.epochs,
            preset=recipe.preset,
            seed=recipe.seed,
        )
        limits, full = asdict(grower.limits), grower.full_widths()
        run_folder.write_json("frame.json", {**asdict(frame), "limits": limits, "widths": full})
    display.start(name, epochs=recipe.epochs, frame=frame, limits=limits, full=full)
    for epoch in fit(name, model, optimizer, data, recipe, grower=grower, on_step=display.step):
        run_folder.append(epoch)
        display.epoch(epoch)
    result = _result(model, data, epoch)
    display.say(f"{NETWORKS[name]}: {result.accuracy:.2f} % in {result.seconds:.1f} s of training")
    if grower and processes.rank() == 0:
        torchgrow.save(model, run_folder.path / "network")
    return result


def _result(model: nn.Module, data: ImageData, last: Epoch) -> Result:
    """Measured again on the network as it is delivered, after the grower's last update."""
    cost = measure(model, data.normalise(data.train.pixels[:2]))
    accuracy = evaluate(model, data)[0] if processes.rank() == 0 else math.nan
    return Result(
        accuracy=accuracy,
        params=cost.params,
        flops=cost.flops,
        training_flops=last.training_flops,
        seconds=last.seconds,
    )


def table(results: dict[str, Result]) -> Table:
    """The networks side by side, with shares of the dense twin if it is among them."""
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)  # fits 80 columns
    for column in ("network", "accuracy", "parameters", "inference\nFLOPs", "training\nFLOPs", "training\nseconds"):
        grid.add_column(column, justify="left" if column == "network" else "right", no_wrap=True)
    dense = results.get("dense")
    for name, result in results.items():
        cells = [NETWORKS[name], f"{result.accuracy:.2f} %"]
        for field in ("params", "flops", "training_flops", "seconds"):
            value = getattr(result, field)
            text = (f"{value:.1f}" if value < 1000 else f"{value:.0f}") if field == "seconds" else short(value)
            cells.append(f"{text} ({100 * value / getattr(dense, field):.0f}%)" if dense else text)
        grid.add_row(*cells)
    return grid

"""Law 4 the hard way: runs killed (SIGKILL) at random moments end bit for bit as the unbroken run.

    OMP_NUM_THREADS=1 python benchmarks/killed.py [--kills 50]

A run of the digits recipe (a ResNet-8, 8 epochs, a checkpoint every 4 steps) is made once without a break. Then runs
are started, killed and gone on with, over and over: most kills come at a random time after training began; every
fourth is aimed into the swap of an update and every fourth into the writing of a checkpoint, at a random tensor or
system call. After every `--per-run` kills the run may end, and the grower's whole state (weights, bank, indicators,
history, optimizer, random draws), the records and the saved network are compared with the unbroken one's, seconds
left out. Every broken run is a line of results/killed.jsonl; what is there already is not run again.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

import torchgrow
import torchgrow.exchange
import torchgrow.persistence.folder
from torchgrow import Grower
from torchgrow.lab import from_recipe, run, train
from torchgrow.lab.checkpoints import Checkpoints
from torchgrow.lab.environment import environment
from torchgrow.lab.models import ResNet
from torchgrow.lab.recipes import get
from torchgrow.persistence.folder import pack

RESULTS = Path(__file__).parent.parent / "results" / "killed.jsonl"
BUILD = partial(ResNet, depth=8, widths=(8, 16, 32), in_channels=1)
RECIPE = replace(get("digits"), build=BUILD, depth=False, epochs=8, subset=640)  # 10 steps an epoch
EVERY = 4


# --- the process that is killed ---


class Course:
    """What a run is doing, written down as it goes; it kills itself at a call of what is aimed at.

    Args:
        file: in which the parent reads what the run is doing.
        aim: "update", "checkpoint", "evaluation" or "training".
        call: at which call, counted from 1, of a function that is `deadly`.
    """

    def __init__(self, file: Path, aim: str, call: int) -> None:
        self.aim, self.call, self.now, self.file = aim, call, "training", file.open("wb", buffering=0)

    def note(self, name: str) -> None:
        """The run is in this part from now on."""
        self.now = name
        self.file.write(f"{name}\n".encode())

    def within(self, name: str, owner: Any, function: str) -> None:
        """A call of this function is this part of the run."""
        original = getattr(owner, function)

        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            self.note(name)
            try:
                return original(*arguments, **keywords)
            finally:
                self.note("training")

        setattr(owner, function, wrapper)

    def deadly(self, owner: Any, function: str) -> None:
        """Calls of this function are counted, while the run is in the part that is aimed at."""
        original, count = getattr(owner, function), 0

        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            nonlocal count
            count += self.now == self.aim
            if count == self.call and self.now == self.aim:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **keywords)

        setattr(owner, function, wrapper)


def child(out: Path, state: Path, aim: str, call: int) -> None:
    """Start or go on with the run; kill itself at a call of what is aimed at; leave the state's checksum at the end."""
    growers: list[Grower] = []
    course = Course(state.with_suffix(".phase"), aim, call)

    class Recorded(Grower):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            growers.append(self)

    of_grower, save = state.with_suffix(".grower"), torchgrow.save

    def save_both(model: Any, folder: Any) -> None:
        of_grower.with_suffix(".half").write_text(of_state(growers[0]))
        of_grower.with_suffix(".half").replace(of_grower)  # the run may be killed after this
        save(model, folder)

    torchgrow.save = save_both
    vars(from_recipe)["Grower"] = Recorded
    course.within("update", Recorded, "update")
    course.within("checkpoint", Checkpoints, "save")
    course.within("evaluation", train, "evaluate")
    if aim == "update":
        course.deadly(torchgrow.exchange, "writes")
    if aim == "checkpoint":
        for owner, function in (
            (os, "fsync"),
            (os, "close"),
            (torchgrow.persistence.folder, "rename"),
            (torchgrow.persistence.folder, "save_file"),
        ):
            course.deadly(owner, function)
    console = Console(quiet=True)
    real = train.fit

    def fit(*arguments: Any, **keywords: Any) -> Any:
        course.note("training")  # from here on the parent may kill
        yield from real(*arguments, **keywords)

    vars(run)["fit"] = fit
    if out.with_name(out.name + ".partial").exists():
        run.resume(out, console=console)
    elif not out.exists():  # it may have been killed right after its very end
        run.run(RECIPE, console=console, out=out, beside=(), every=EVERY)
    state.write_text(of_grower.read_text() + of_folder(out))


def of_state(grower: Grower) -> str:
    """Checksum of the grower's whole state, but for the seconds."""
    state = grower.state_dict()
    for event in state["history"]:
        del event["seconds"]
    tensors: dict[str, torch.Tensor] = {}
    total = hashlib.sha256(json.dumps(pack(state, tensors), sort_keys=True).encode())
    for name in sorted(tensors):
        total.update(name.encode() + tensors[name].numpy().tobytes())
    return total.hexdigest()


def of_folder(out: Path) -> str:
    """Checksum of the records and of the saved network, but for the seconds."""
    total = hashlib.sha256()
    for line in (out / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        del record["seconds"]
        total.update(json.dumps(record).encode())
    for path in sorted((out / "network").iterdir()):
        total.update(path.read_bytes())
    return total.hexdigest()


# --- the process that kills ---


def launch(out: Path, state: Path, aim: str = "", call: int = 0) -> subprocess.Popen[bytes]:
    """Start the other process."""
    command = [sys.executable, __file__, "--child", str(out), str(state), aim, str(call)]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def last_phase(state: Path) -> str:
    """What the other process was doing when it was last heard of."""
    path = state.with_suffix(".phase")
    return (path.read_text().splitlines() or [""])[-1] if path.exists() else ""


def kill(out: Path, state: Path, aim: str, draw: random.Random, span: float) -> str:
    """Start or go on with the run and kill it; returns where it was: training, update, checkpoint or evaluation."""
    state.with_suffix(".phase").unlink(missing_ok=True)
    process = launch(out, state, aim, draw.randint(1, 60))
    while process.poll() is None and not last_phase(state):
        time.sleep(0.01)
    if not aim:
        time.sleep(draw.uniform(0, span))
        process.send_signal(signal.SIGKILL)
    error = process.communicate()[1]
    if process.returncode == 0:
        return "ended"
    if process.returncode != -signal.SIGKILL:
        raise RuntimeError(error.decode())
    return aim or last_phase(state)


def broken_run(seed: int, kills: int, expected: str, span: float, tell: Any) -> dict[str, Any]:
    """One run, killed so many times, and whether it ended as the unbroken one."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        out, state = Path(folder) / "out", Path(folder) / "state"
        phases: list[str] = []
        while len(phases) < kills:
            aim = ("", "update", "", "checkpoint")[len(phases) % 4]
            phase = kill(out, state, aim, draw, span)
            if phase == "ended":  # too late; this one counts for nothing
                return {"seed": seed, "kills": phases, "same": state.read_text() == expected}
            phases.append(phase)
            tell()
        if launch(out, state).wait():
            raise RuntimeError("the run does not go on")
        return {"seed": seed, "kills": phases, "same": state.read_text() == expected}


def main() -> None:
    """Make the runs that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--per-run", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        out, state, aim, call = arguments.child
        child(Path(out), Path(state), aim, int(call))
        return
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.touch()
    rows = [json.loads(line) for line in arguments.results.read_text().splitlines()]
    done = sum(len(row["kills"]) for row in rows)
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("kills", total=arguments.kills, completed=done)
        if done < arguments.kills:
            out, state = Path(folder) / "out", Path(folder) / "state"
            process = launch(out, state)
            while process.poll() is None and not last_phase(state):
                time.sleep(0.01)
            start = time.perf_counter()
            if process.wait():
                raise RuntimeError("the unbroken run failed")
            expected, span = state.read_text(), time.perf_counter() - start
        while done < arguments.kills:
            kills = min(arguments.per_run, arguments.kills - done)
            row = broken_run(len(rows), kills, expected, span / 2, lambda: progress.advance(task))
            row |= {"epochs": RECIPE.epochs, "checkpoint_every": EVERY, "environment": environment()}
            rows.append(row)
            with arguments.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            done += len(row["kills"])
    phases = Counter(phase for row in rows for phase in row["kills"])
    same = sum(row["same"] for row in rows)
    Console().print(f"{sum(phases.values())} kills ({dict(phases)}) in {len(rows)} runs, {same} of them ended the same")
    if same < len(rows):
        sys.exit(1)


if __name__ == "__main__":
    main()

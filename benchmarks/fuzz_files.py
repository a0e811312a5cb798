"""Damaged files: 10,000 mutated saved models and checkpoints, each a TorchgrowError or a load that works.

    OMP_NUM_THREADS=1 python benchmarks/fuzz_files.py [--count 10000]

Every seed takes a saved model (of format 1, or as it is now) or a checkpoint, damages one of two files
(tests/damage.py: a field of the JSON record or of the safetensors header changed, moved or lost, with checksums that
fit again; bytes flipped, cut off or overwritten, with and without), and loads it. What loads must run, and a resumed
run must train a step and update. Chunks of 250 seeds run in a process of their own that may take 2 GB of address
space more than importing torch and building the models took, within a time limit; an audit hook watches for code:
compile, exec, import, a process, a socket, a file opened for writing. Every chunk is a line of results/fuzz-
files.jsonl; chunks that are there already are not run again.
"""

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track

from torchgrow import Budget, Grower, TorchgrowError, load, load_checkpoint, save, save_checkpoint
from torchgrow.lab.environment import environment
from torchgrow.lab.models import ResNet

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from damage import damage  # noqa: E402

RESULTS = ROOT / "results" / "fuzz-files.jsonl"
CHUNK, WARM, SECONDS, ROOM = 250, 25, 900, 2 * 2**30
MODEL, CHECKPOINT = ("structure.json", "model.safetensors"), ("checkpoint.json", "checkpoint.safetensors")
CODE = {"compile", "exec", "import", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect"}


def frame() -> torch.nn.Module:
    """A small residual network."""
    torch.manual_seed(0)
    return ResNet(depth=8, widths=(4, 8, 8), in_channels=1)


def grower() -> tuple[Grower, Any]:
    """A grower and a schedule for one."""
    model = frame()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    x, budget = torch.randn(2, 1, 8, 8), Budget(params="50%")
    made = Grower(model, optimizer, example_inputs=x, budget=budget, updates=8)
    return made, torch.optim.lr_scheduler.MultiStepLR(optimizer, [4, 6])


def train(made: Grower) -> None:
    """A step and an update."""
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    made.optimizer.zero_grad()
    F.cross_entropy(made.model(x), torch.arange(4)).backward()
    made.optimizer.step()
    if not made.finished:
        made.update()


def sound(folder: Path) -> dict[str, Path]:
    """The folders that will be damaged."""
    made, schedule = grower()
    for _ in range(3):
        train(made)
        schedule.step()
    save(made.model, folder / "model")
    shutil.copytree(folder / "model", folder / "model of format 1")
    old = folder / "model of format 1" / MODEL[0]
    record = json.loads(old.read_text())
    del record["sha256"], record["extra_state"], record["buffers"]
    old.write_text(json.dumps({**record, "format": 1}))
    extra = {"sampler": torch.get_rng_state(), "step": 3, "pair": (1.0, None)}
    checkpoint = save_checkpoint(folder / "run", made, scheduler=schedule, extra=extra)
    return {"model": folder / "model", "model of format 1": old.parent, "checkpoint": checkpoint}


def child(first: int, count: int) -> None:
    """Run seeds and print what became of them, as a line of JSON."""
    verdicts: Counter[str] = Counter()
    wrong: list[dict[str, Any]] = []
    watched: list[str] = []
    watching = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and (event in CODE or (event == "open" and set(str(arguments[1])) & set("wax+"))):
            watched.append(f"{event} {str(arguments)[:200]}")

    with tempfile.TemporaryDirectory() as temporary:
        folders = sound(Path(temporary))
        # Once through, so that everything is imported and the address space is known.
        made, schedule = grower()
        load_checkpoint(folders["checkpoint"], made, scheduler=schedule)
        train(made)
        load(folders["model"], frame)(torch.randn(2, 1, 8, 8))
        str([torch.ones(1)])  # error messages may print tensors
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        sys.addaudithook(hook)
        # The first seeds are for PyTorch's own imports, which come late; they come once more, watched.
        for i, seed in enumerate([*range(first, first + WARM), *range(first, first + count)]):
            draw = random.Random(seed)
            kind = draw.choice(["model", "model of format 1", "checkpoint", "checkpoint"])
            target = Path(temporary) / "checkpoint-000009"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(folders[kind], target)
            how = damage(target, CHECKPOINT if kind == "checkpoint" else MODEL, draw)
            start = time.perf_counter()
            try:
                if kind == "checkpoint":
                    watching = i >= WARM
                    load_checkpoint(target, made, scheduler=schedule)
                    watching = False
                    for group in made.optimizer.param_groups:  # a mutated rate is a rate; two steps shall stay finite
                        group["lr"] = 1e-3
                    train(made)
                else:
                    watching = i >= WARM
                    model = load(target, frame)
                    watching = False
                    model(torch.randn(2, 1, 8, 8))
                verdict = "loaded"
            except TorchgrowError:
                verdict = "refused"
            except BaseException as error:
                verdict = "wrong"
                wrong.append({"seed": seed, "kind": kind, "how": how, "error": repr(error)[:300]})
            watching = False
            seconds = time.perf_counter() - start
            if seconds > 10:
                wrong.append({"seed": seed, "kind": kind, "how": how, "error": f"took {seconds:.0f} s"})
            verdicts[f"{kind}, {how}: {verdict}"] += i >= WARM
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write(json.dumps({"verdicts": verdicts, "wrong": wrong, "code": watched, "most_megabytes": most}) + "\n")


def main() -> None:
    """Run the chunks that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.child:
        child(*arguments.child)
        return
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.touch()
    rows = [json.loads(line) for line in arguments.results.read_text().splitlines()]
    done = {row["first"] for row in rows}
    chunks = [first for first in range(0, arguments.count, CHUNK) if first not in done]
    for first in track(chunks, "damaged files", console=Console(stderr=True)):
        command = [sys.executable, __file__, "--child", str(first), str(CHUNK)]
        try:
            finished = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
            row = json.loads(finished.stdout) if finished.returncode == 0 else {"crash": finished.stderr[-1000:]}
            row["exit"] = finished.returncode
        except subprocess.TimeoutExpired:
            row = {"exit": None, "crash": f"not done after {SECONDS} s"}
        row = {"first": first, "folders": CHUNK, **row, "environment": environment()}
        rows.append(row)
        with arguments.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
    verdicts: Counter[str] = Counter()
    for row in rows:
        for name, count in row.get("verdicts", {}).items():
            verdicts[name.rpartition(": ")[2]] += count
    crashes = [row["first"] for row in rows if row["exit"] != 0]
    wrong = [entry for row in rows for entry in row.get("wrong", [])]
    code = [entry for row in rows for entry in row.get("code", [])]
    Console().print(
        f"{dict(verdicts)}; crashed chunks {crashes}; code run {code[:5]}; wrong {wrong[:5]}", soft_wrap=True
    )
    if wrong or crashes or code:
        sys.exit(1)


if __name__ == "__main__":
    main()

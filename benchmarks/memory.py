"""Does memory grow? 200 updates of a ResNet-50, with SGD with momentum and with AdamW.

    OMP_NUM_THREADS=1 python benchmarks/memory.py [--updates 200]

Units are drawn anew at every update (by the policy `Random`, at half of the parameters), so that thousands come
and go; a training step (2 images of 64 x 64) is taken before each. After every update the resident memory is read and
optimizer state is checked: none but of the model's parameters, every slot of its parameter's shape or a number. After
every tenth all tensors alive are counted. The first quarter is left out; the slope is that of medians over ten updates,
with its 95 % interval. Every optimizer is a line of results/memory.jsonl; what is there already is not run again.
"""

import argparse
import ctypes
import gc
import json
import resource
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torchvision.models import resnet50

from torchgrow import Budget, Grower
from torchgrow.lab.environment import environment
from torchgrow.policies import Random

RESULTS = Path(__file__).parent.parent / "results" / "memory.jsonl"
EVENT = 0.01  # megabytes; an event of the history takes some kilobytes, and is meant to stay
CHURN = Random()
OPTIMIZERS = {
    "SGD with momentum": lambda model: torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), 1e-3),
}


def resident() -> float:
    """Megabytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


class MallInfo2(ctypes.Structure):
    """As in malloc.h."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    )


LIBC = ctypes.CDLL(None)
LIBC.mallinfo2.restype = MallInfo2


def in_use() -> float:
    """Megabytes handed out by malloc, large blocks included."""
    info = LIBC.mallinfo2()
    return (info.uordblks + info.hblkhd) / 1e6


def alive() -> tuple[int, float]:
    """Tensors that exist, and the megabytes of their storages."""
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return len(tensors), sum(storages.values()) / 1e6


def orphans(grower: Grower) -> list[str]:
    """Optimizer state that belongs to no parameter, or not in its shape."""
    shapes = {id(p): p.shape for p in grower.model.parameters()}
    wrong = []
    for parameter, slots in grower.optimizer.state.items():
        if id(parameter) not in shapes:
            wrong.append(f"state of a stranger of shape {tuple(parameter.shape)}")
            continue
        for key, slot in slots.items():
            if isinstance(slot, torch.Tensor) and slot.numel() > 1 and slot.shape != parameter.shape:
                wrong.append(f"{key} of shape {tuple(slot.shape)} for a parameter of shape {tuple(parameter.shape)}")
    return wrong


def measure(name: str, updates: int, console: Console) -> dict[str, Any]:
    """One optimizer."""
    torch.manual_seed(0)
    model = resnet50()
    x, target = torch.randn(2, 3, 64, 64), torch.randint(0, 1000, (2,))
    optimizer = OPTIMIZERS[name](model)
    grower = Grower(model, optimizer, example_inputs=x, budget=Budget(params="50%"), updates=updates + 2, policy=CHURN)
    rss, used, counted, wrong, changed = [], [], [], [], 0
    for update in track(range(updates), name, console=console):
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
        event = grower.update()
        changed += event.born + event.regrown + event.detached
        wrong += orphans(grower)
        gc.collect()
        rss.append(resident())
        used.append(in_use())
        if update % 10 == 9:
            counted.append(alive())
    return {
        "case": name,
        "updates": updates,
        "units_that_came_or_went": changed,
        "in_use": trend(used),
        "resident": trend(rss),
        "orphans": wrong,
        "tensors_alive": [counted[0][0], counted[-1][0]],
        "tensor_megabytes": [counted[0][1], counted[-1][1]],
        "in_use_megabytes": used,
        "resident_megabytes": rss,
    }


def trend(readings: list[float]) -> dict[str, float]:
    """Least-squares slope an update of the medians of ten, and its 95 % interval; the first quarter is left out."""
    values = [statistics.median(readings[i : i + 10]) for i in range(len(readings) // 4, len(readings) - 9, 10)]
    n, middle, mean = len(values), (len(values) - 1) / 2, statistics.mean(values)
    spread = sum((i - middle) ** 2 for i in range(n))
    slope = sum((i - middle) * (y - mean) for i, y in enumerate(values)) / spread
    residual = sum((y - mean - slope * (i - middle)) ** 2 for i, y in enumerate(values)) / max(1, n - 2)
    error = {4: 4.30, 15: 2.16}.get(n, 2.4) * (residual / spread) ** 0.5  # Student's t, n - 2 degrees of freedom
    return {"slope": slope / 10, "low": (slope - error) / 10, "high": (slope + error) / 10}


def main() -> None:
    """Measure what is missing and print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--cases", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.touch()
    rows = [json.loads(line) for line in arguments.results.read_text().splitlines()]
    console, failed = Console(stderr=True), False
    for name in arguments.cases:
        found = [row for row in rows if (row["case"], row["updates"]) == (name, arguments.updates)]
        row = found[-1] if found else {**measure(name, arguments.updates, console), "environment": environment()}
        if not found:
            with arguments.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
        failed |= row["in_use"]["low"] > EVENT or bool(row["orphans"])
        slopes = [
            f"{kind.replace('_', ' ')} {{slope:+.4f}} [{{low:+.4f}}, {{high:+.4f}}]".format(**row[kind])
            for kind in ("in_use", "resident")
        ]
        Console().print(
            f"{name}: MB an update {', '.join(slopes)}; tensors {row['tensors_alive']}, {row['tensor_megabytes']} MB; "
            f"{row['units_that_came_or_went']:,} units came or went, {len(row['orphans'])} orphans",
            highlight=False,
            soft_wrap=True,
        )
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()

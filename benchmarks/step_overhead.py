"""What a live network's training step costs beside the same architecture written by hand.

    OMP_NUM_THREADS=1 python benchmarks/step_overhead.py [--repeats 9] [--steps 3]

A Grower's ResNet-20 is brought to the widths, and a plain ResNet-20 is built with those widths, the same weights,
and an SGD of its own; torchgrow knows nothing of that one. Both train in turns (A B, B A, ...), a few steps each;
a repeat gives one ratio of times. Every case is a line of results/step-overhead.jsonl. Cases that are there
already from the same commit with the same settings are not run again, unless `--again` is given.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from torchgrow import Budget, Grower
from torchgrow.lab.environment import environment
from torchgrow.lab.models import ResNet

RESULTS = Path(__file__).parent.parent / "results" / "step-overhead.jsonl"
FRAME = (16, 32, 64)
CASES = ((16, 32, 64), (8, 16, 32), (5, 11, 23))
TARGET = 1.03  # live over hand-written


def now(x: Tensor) -> float:
    """Seconds, once all that was asked of the tensor's device is done."""
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


class Trainer:
    """A model and its optimizer on fixed data."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor) -> None:
        self.model, self.optimizer, self.x, self.target = model, optimizer, x, target

    def seconds(self, steps: int) -> float:
        """Wall-clock time of one training step, over `steps` of them."""
        start = now(self.x)
        for _ in range(steps):
            F.cross_entropy(self.model(self.x), self.target).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return (now(self.x) - start) / steps


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """The recipe of the paper's CIFAR runs."""
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)


def grown_to(widths: tuple[int, ...]) -> tuple[nn.Module, torch.optim.Optimizer, Grower]:
    """A live ResNet-20 of exactly these widths: the first units of every group."""
    model = ResNet(depth=20, widths=FRAME, shortcut="B")
    optimizer = optimizer_of(model)
    grower = Grower(
        model, optimizer, example_inputs=torch.randn(2, 3, 32, 32), budget=Budget(params="100%"), updates=10
    )
    space = grower.space
    keep = ~space.removable
    for group in range(space.n_groups):
        units = torch.nonzero(space.group_of == group).flatten()
        keep[units[: widths[FRAME.index(units.numel())]]] = True
    grower.run.change_to(keep, grower.policy, grower.run.state.generator, time.perf_counter())
    return model, optimizer, grower


def interval(values: list[float]) -> tuple[float, float]:
    """The tightest pair of order statistics that holds the median with at least 95 % (from 6 values on)."""
    n, below = len(values), 0.0
    for k in range(n // 2):
        below += math.comb(n, k) / 2**n
        if 2 * below > 0.05:
            break
    else:
        k = n // 2
    k = max(k - 1, 0)
    return sorted(values)[k], sorted(values)[n - 1 - k]


def measure_case(widths: tuple[int, ...], batch: int, repeats: int, steps: int) -> dict[str, Any]:
    """Ratios of one architecture."""
    torch.manual_seed(0)
    x, target = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    model, optimizer, grower = grown_to(widths)
    plain = ResNet(depth=20, widths=widths, shortcut="B")
    plain.load_state_dict(model.state_dict())  # refuses other shapes: the architectures are the same
    live, hand = Trainer(model, optimizer, x, target), Trainer(plain, optimizer_of(plain), x, target)
    times: dict[str, list[float]] = {"live": [], "hand": []}
    pair = (("live", live), ("hand", hand))
    for trainer in (live, hand):
        trainer.seconds(2)  # warm up
    for repeat in range(repeats):
        for name, trainer in pair if repeat % 2 == 0 else pair[::-1]:
            times[name].append(trainer.seconds(steps))
    ratios = [a / b for a, b in zip(times["live"], times["hand"], strict=True)]
    low, high = interval(ratios)
    assert grower.cost().params == sum(p.numel() for p in plain.parameters())
    return {
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "seconds_live": statistics.median(times["live"]),
        "seconds_hand": statistics.median(times["hand"]),
        "ratios": ratios,
    }


def main() -> None:
    """Measure what is missing and print everything of this commit and these settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--again", action="store_true", help="measure again what is there already")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.touch()
    console, here = Console(), environment()
    for widths in CASES:
        settings = {
            "widths": list(widths),
            "batch": arguments.batch,
            "repeats": arguments.repeats,
            "steps": arguments.steps,
        }
        rows = [json.loads(line) for line in arguments.results.read_text().splitlines()]
        known = ("commit", "threads", "cpu")
        found = [
            row
            for row in rows
            if all(row[key] == value for key, value in settings.items())
            and all(row["environment"][key] == here[key] for key in known)
        ]
        if found and not arguments.again:
            row = found[-1]
        else:
            case = f"ResNet-20 {'-'.join(map(str, widths))}"
            row = {
                "case": case,
                **settings,
                **measure_case(widths, arguments.batch, arguments.repeats, arguments.steps),
            }
            row = {**row, "target": TARGET, "environment": here}
            with arguments.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
        verdict = "within" if row["ratio"] <= TARGET else "ABOVE"
        console.print(
            f"{row['case']}: live / hand-written {row['ratio']:.4f} [{row['low']:.4f}, {row['high']:.4f}], "
            f"{verdict} {TARGET} ({row['seconds_live']:.3f} s and {row['seconds_hand']:.3f} s a step, "
            f"{row['repeats']} repeats, {here['threads']} thread(s))",
            highlight=False,
            soft_wrap=True,
        )


if __name__ == "__main__":
    main()

"""What an update costs: beside a training step (ResNet-20), beside plain copies of the frame (ResNet-50).

    OMP_NUM_THREADS=1 python benchmarks/update_cost.py [--updates 10] [--cases resnet20 resnet50] [--device cuda]

The planned cost rises over the whole run, so that every measured update changes the structure. ResNet-20: every
update is compared with the training steps of batch 128 around it, on the live network. ResNet-50: with one copy of
all its parameters and momentum buffers at full size, made right before. Every case is a line of
results/update-cost.jsonl; cases that are there already from the same commit with the same settings are not run
again, unless `--again` is given.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from step_overhead import Trainer, interval, now, optimizer_of
from torch import nn
from torchvision.models import resnet50

from torchgrow import Budget, Grower
from torchgrow.lab.environment import environment
from torchgrow.lab.models import ResNet
from torchgrow.policies import Default

RESULTS = Path(__file__).parent.parent / "results" / "update-cost.jsonl"
RISING = Default(ramp=1.0, peak=1.0, settle=0.0)


def timed(work: Callable[[], object]) -> float:
    """Seconds of wall-clock time."""
    here = torch.empty(0)  # on the device that was asked for
    start = now(here)
    work()
    return now(here) - start


def resnet20(updates: int) -> dict[str, Any]:
    """Updates against training steps of the live network, batch 128."""
    torch.manual_seed(0)
    model = ResNet(depth=20, shortcut="A")
    optimizer = optimizer_of(model)
    x, target = torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))
    grower = Grower(
        model, optimizer, example_inputs=x[:2], budget=Budget(params="36%"), updates=updates + 1, policy=RISING
    )
    trainer = Trainer(model, optimizer, x, target)
    ups, steps = [], []
    for _ in range(updates):
        before = trainer.seconds(1)
        ups.append(timed(grower.update))
        steps.append(statistics.mean([before, trainer.seconds(1)]))
    return summary("ResNet-20", "training step of batch 128", ups, steps, target=1.0)


def resnet50_(updates: int) -> dict[str, Any]:
    """Updates against copies of all parameters and momentum buffers of the frame."""
    torch.manual_seed(0)
    model = resnet50()
    optimizer = optimizer_of(model)
    x, target = torch.randn(2, 3, 64, 64), torch.randint(0, 1000, (2,))
    frame = [p.detach().clone() for p in model.parameters()]
    momentum = [torch.zeros_like(p) for p in frame]
    grower = Grower(model, optimizer, example_inputs=x, budget=Budget(params="50%"), updates=updates + 1, policy=RISING)

    def copies() -> object:
        return [t.clone() for t in frame], [t.clone() for t in momentum]

    ups, plain = [], []
    for _ in range(updates):
        step(model, optimizer, x, target)
        plain.append(statistics.median(timed(copies) for _ in range(3)))
        ups.append(timed(grower.update))
    return summary("ResNet-50", "copy of parameters and momentum", ups, plain, target=10.0)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, target: torch.Tensor) -> None:
    """One training step, so that there is optimizer state."""
    optimizer.zero_grad()
    F.cross_entropy(model(x), target).backward()
    optimizer.step()


def summary(model: str, unit: str, updates: list[float], units: list[float], target: float) -> dict[str, Any]:
    """Median ratio and its interval."""
    ratios = [a / b for a, b in zip(updates, units, strict=True)]
    low, high = interval(ratios)
    return {
        "case": f"{model}: one update / one {unit}",
        "repeats": len(ratios),
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "most": max(ratios),
        "seconds_update": statistics.median(updates),
        "seconds_unit": statistics.median(units),
        "ratios": ratios,
        "target": target,
    }


CASES = {"resnet20": resnet20, "resnet50": resnet50_}


def main() -> None:
    """Measure what is missing and print everything of this commit and these settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=sorted(CASES))
    parser.add_argument("--again", action="store_true", help="measure again what is there already")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_default_device(arguments.device)
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.touch()
    console, here = Console(), environment(torch.device(arguments.device))
    for name in arguments.cases:
        rows = [json.loads(line) for line in arguments.results.read_text().splitlines()]
        found = [
            row
            for row in rows
            if (row["model"], row["updates"]) == (name, arguments.updates)
            and all(row["environment"][key] == here[key] for key in ("commit", "threads", "cpu"))
        ]
        if found and not arguments.again:
            row = found[-1]
        else:
            row = {"model": name, "updates": arguments.updates, **CASES[name](arguments.updates), "environment": here}
            with arguments.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
        verdict = "within" if row["ratio"] <= row["target"] else "ABOVE"
        console.print(
            f"{row['case']}: {row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}], most "
            f"{row['most']:.3f}, {verdict} {row['target']:g} ({row['seconds_update'] * 1e3:.0f} ms and "
            f"{row['seconds_unit'] * 1e3:.0f} ms, {row['updates']} updates, {here['threads']} thread(s))",
            highlight=False,
            soft_wrap=True,
        )


if __name__ == "__main__":
    main()

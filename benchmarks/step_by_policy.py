"""What each policy costs in a training step: the live network beside a copy that no grower knows.

    OMP_NUM_THREADS=1 python benchmarks/step_by_policy.py [--repeats 41] [--again] [--device cuda --results FILE]

An MLP at batch 32 and 512, a ResNet-20 and an LSTM are grown to half their parameters under each policy; then the
live network, a copy with an optimizer of its own, and a second copy (the control: what such a ratio is worth here)
train in turns, in changing order. `Random` has no gates and asks for nothing: a step may cost 1.01 of a plain one.
`Default` measures importance in every step, `Paper` folds its gates. Beside it the bytes of tensors that the grower
keeps for the live network besides parameters, their gradients and the optimizer's own slots. Every case is a line of
results/step-by-policy.jsonl. Exit status 1 above the limit.
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from step_overhead import interval, now
from torch import Tensor, nn

from torchgrow import Budget, Grower
from torchgrow.lab.environment import environment
from torchgrow.lab.models import ResNet
from torchgrow.policies import Default, Paper, Policy, Random

RESULTS = Path(__file__).parent.parent / "results" / "step-by-policy.jsonl"
LIMIT = 1.01
"""Of a step with `Random` over a plain one."""


class Sequence(nn.Module):
    """An LSTM that puts out one class for every sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.LSTM(32, 128, batch_first=True), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of [batch, steps, 32]."""
        scores: Tensor = self.head(self.inner(x)[0][:, -1])
        return scores


def mlp() -> nn.Module:
    """Four layers of 256."""
    wide = [layer for _ in range(3) for layer in (nn.Linear(256, 256), nn.ReLU())]
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), *wide, nn.Linear(256, 10))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "MLP, batch 32": (mlp, (32, 64), 40),
    "MLP, batch 512": (mlp, (512, 64), 10),
    "ResNet-20, batch 32": (lambda: ResNet(depth=20, shortcut="B"), (32, 3, 32, 32), 1),
    "LSTM, batch 32": (Sequence, (32, 20, 32), 4),
}
"""Model, shape of a batch, steps timed together."""


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)


def seconds(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor, steps: int) -> float:
    """Of one training step."""
    start = now(x)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    return (now(x) - start) / steps


def measured(case: str, policy: Policy, repeats: int) -> dict[str, Any]:
    """The row of a model and a policy."""
    build, shape, steps = CASES[case]
    torch.manual_seed(0)
    model, x, target = build(), torch.randn(shape), torch.randint(0, 10, shape[:1])
    optimizer = optimizer_of(model)
    grower = Grower(model, optimizer, example_inputs=x[:2], budget=Budget(params="50%"), updates=4, policy=policy)
    for _ in range(3):
        seconds(model, optimizer, x, target, 2)
        grower.update()
    copies = [copy.deepcopy(model) for _ in range(2)]
    ways = [(model, optimizer), *((plain, optimizer_of(plain)) for plain in copies)]
    for way in ways:
        seconds(*way, x, target, 2 * steps)
    ratios, control = [], []
    for repeat in range(repeats):
        order = [(repeat + k) % 3 for k in range(3)][:: 1 if repeat % 2 else -1]
        taken = {k: seconds(*ways[k], x, target, steps) for k in order}
        ratios.append(taken[0] / taken[1])
        control.append(taken[2] / taken[1])
    low, high = interval(ratios)
    kept = sum(raw.numel() * raw.element_size() for raw in grower.run.live.raw().values())
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "case": f"{case}: {type(policy).__name__}",
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "control": statistics.median(control),
        "repeats": repeats,
        "steps": steps,
        "bytes_beside": kept,
        "bytes_of_parameters": own,
        "limit": LIMIT if isinstance(policy, Random) else None,
        "environment": environment(x.device),
    }


def main() -> int:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--again", action="store_true", help="measure although there are rows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_default_device(arguments.device)
    results = arguments.results
    console = Console()
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    rows = [] if arguments.again else rows
    for case in CASES:
        for policy in (Random(), Default(), Paper()):
            if any(row["case"] == f"{case}: {type(policy).__name__}" for row in rows):
                continue
            rows.append(measured(case, policy, arguments.repeats))
            results.write_text("".join(json.dumps(row) + "\n" for row in rows))
            row = rows[-1]
            span = f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
            console.print(f"{row['case']}: {span}, control {row['control']:.3f}", highlight=False)
    above = [row["case"] for row in rows if row["limit"] is not None and row["ratio"] > row["limit"]]
    beside = [row["case"] for row in rows if row["limit"] is not None and row["bytes_beside"]]
    for case in (*above, *beside):
        console.print(f"above the limit: {case}")
    return int(bool(above or beside))


if __name__ == "__main__":
    sys.exit(main())

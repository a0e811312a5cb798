"""Layers and channels that grow, beside a hand-picked 3-3-3 and AutoGrow's periodic growth: CIFAR-10, Basic3ResNet.

    OMP_NUM_THREADS=1 python benchmarks/depth_growth.py --data FOLDER [--seeds 0 1] [--precision bfloat16]

All in a 9-9-9 frame (shortcut B), the same epochs, batches and calendar of learning rates:

- `grown`: recipe basic3resnet-cifar10, from one block of one channel a stage, to the parameters of `3-3-3`.
- `3-3-3`: ResNet-20 at full width from scratch, which somebody has picked.
- `autogrow`: our re-implementation of AutoGrow's periodic growth (Wen et al., 2020, arXiv 1906.02909): blocks of full
  width, from one a stage; after every epoch at the high learning rate one more in the next stage of those that still
  grow; a stage stops when the accuracy on images held out (a tenth of the training images) has not risen by 0.2 points
  since it last grew. New blocks begin as their modules do. No channels.

Every finished (method, seed) is a line of results/depth-growth.jsonl; what is there already is not run again.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from torchgrow import Bank, Budget, trace
from torchgrow.lab import data as lab_data
from torchgrow.lab import names, recipes
from torchgrow.lab.environment import environment
from torchgrow.lab.from_recipe import make_grower, make_optimizer
from torchgrow.lab.models import ResNet
from torchgrow.lab.train import Epoch, evaluate, fit
from torchgrow.structure.cost import Cost, CostModel

RESULTS = Path(__file__).parent.parent / "results" / "depth-growth.jsonl"
METHODS = ("grown", "3-3-3", "autogrow")
RISE = 0.2
"""Points of accuracy by which a stage must have paid since it last grew."""


class Periodic:
    """AutoGrow's periodic growth, in the place of a `Grower` in the training loop.

    Args:
        model: the frame, cut to one block a stage.
        optimizer: its optimizer.
        data: training images, and those held out in the place of the test images.
        growing: epochs after which nothing grows any more: those at the high learning rate.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, data: lab_data.ImageData, growing: int
    ) -> None:
        self.model, self.data, self.growing = model, data, growing
        self.space = trace(model, data.example(), depth=True)
        self.costs, self.bank = CostModel(self.space), Bank(model, self.space, optimizer)
        self.keep = self.space.everything()
        self.asleep: dict[str, list[int]] = {}
        for slot in self.space.slots:
            self.asleep.setdefault(slot.stage, []).append(slot.unit)
            self.keep[slot.unit] = False
        self.bank.resize_(self.keep)
        self.turns, self.best = list(self.asleep), dict.fromkeys(self.asleep, 0.0)
        self.epochs = 0

    def cost(self) -> Cost:
        """Of the live network."""
        return self.costs.cost(self.keep)

    def widths(self) -> dict[str, int]:
        """Channels do not grow."""
        return {}

    def depths(self) -> dict[str, int]:
        """Live blocks of every stage."""
        blocks = {stage: 1 + len(units) for stage, units in self.asleep.items()}
        grown = {slot.stage: 0 for slot in self.space.slots}
        for slot in self.space.slots:
            grown[slot.stage] += int(self.keep[slot.unit])
        return {stage: 1 + grown[stage] for stage in blocks}

    def update(self) -> "Periodic":
        """One block more in the stage whose turn it is, unless its last one has not paid."""
        self.epochs += 1
        born = 0
        if self.epochs <= self.growing and self.turns:
            accuracy, _ = evaluate(self.model, self.data)
            stage = self.turns.pop(0)
            if accuracy >= self.best[stage] + RISE and self.asleep[stage]:
                self.best[stage] = accuracy
                self.keep[self.asleep[stage].pop(0)] = True
                self.bank.resize_(self.keep)
                self.turns.append(stage)
                born = 1
        self.pressure, self.temperature = 0.0, dict[str, float]()
        self.born, self.regrown, self.detached = born, 0, 0
        return self


def training(method: str, data: lab_data.ImageData, recipe: recipes.Recipe) -> tuple[nn.Module, Iterator[Epoch]]:
    """The network and its epochs."""
    torch.manual_seed(recipe.seed)
    if method == "3-3-3":
        model: nn.Module = ResNet(depth=20, shortcut="B")
        optimizer = make_optimizer(model, recipe)
        return model, fit(method, model, optimizer, data, recipe)
    with torch.device("meta" if method == "grown" else "cpu"):
        model = recipe.build()
    optimizer = make_optimizer(model, recipe)
    if method == "grown":
        return model, fit(method, model, optimizer, data, recipe, grower=make_grower(model, optimizer, data, recipe))
    held = len(data.train) // 10
    inner = replace(data, train=data.train[held:], test=data.train[:held])
    periodic: Any = Periodic(model, optimizer, inner, recipe.milestones_in_epochs()[0])
    return model, fit(method, model, optimizer, data, replace(recipe, depth=True), grower=periodic)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--subset", type=int, default=10_000)
    parser.add_argument("--precision", choices=names.PRECISIONS, default="float32")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    data = lab_data.load_images("cifar10", folder=arguments.data, subset=arguments.subset)
    assert isinstance(data, lab_data.ImageData)
    hand_picked = sum(p.numel() for p in ResNet(depth=20, shortcut="B").parameters())
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.touch()
    done = [json.loads(line) for line in arguments.results.read_text().splitlines()]
    keys = {(row["method"], row["seed"], row["epochs"], row["subset"], row["precision"]) for row in done}
    console = Console(stderr=True)
    for seed in arguments.seeds:
        for method in arguments.methods:
            if (method, seed, arguments.epochs, arguments.subset, arguments.precision) in keys:
                continue
            recipe = replace(
                recipes.get("basic3resnet-cifar10"),
                seed=seed,
                epochs=arguments.epochs,
                subset=arguments.subset,
                precision=arguments.precision,
                budget=Budget(params=hand_picked),
                threads=1,
            )
            model, epochs = training(method, data, recipe)
            seen = list(track(epochs, f"{method}, seed {seed}", total=recipe.epochs, console=console))
            last = seen[-1]
            row = {
                "method": method,
                "seed": seed,
                "epochs": arguments.epochs,
                "subset": arguments.subset,
                "precision": arguments.precision,
                "accuracy": last.accuracy,
                "params": sum(p.numel() for p in model.parameters()),
                "flops": last.flops,
                "train_flops": last.training_flops,
                "seconds": last.seconds,
                "depths": last.depths or {f"layer{k}": 3 for k in (1, 2, 3)},
                "depths_by_epoch": [epoch.depths for epoch in seen],
                "widths": last.widths,
                "environment": environment(),
            }
            with arguments.results.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

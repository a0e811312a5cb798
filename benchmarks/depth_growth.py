"""Layers and channels that grow, beside a hand-picked 3-3-3 and AutoGrow's periodic growth: CIFAR-10, Basic3ResNet.

    OMP_NUM_THREADS=1 python benchmarks/depth_growth.py --data FOLDER [--seeds 0 1] [--precision bfloat16]

All in a 9-9-9 frame (shortcut B), the same epochs, batches and calendar of learning rates:

- `grown`: recipe basic3resnet-cifar10, from one block of one channel a stage, to the parameters of `3-3-3`.
- `3-3-3`: ResNet-20 at full width from scratch, which somebody has picked.
- `autogrow`: rows of an earlier re-implementation of AutoGrow's periodic growth (Wen et al., 2020, arXiv 1906.02909)
  that stood here: a block after every epoch at the high learning rate, in the next stage that had risen by 0.2 points.
  With the source's own numbers it is a system of the lab now:
  ``torchgrow compare basic3resnet-cifar10 --data FOLDER --methods autogrow``.

Every finished (method, seed) is a line of results/depth-growth.jsonl; what is there already is not run again.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from torchgrow import Budget
from torchgrow.lab import data as lab_data
from torchgrow.lab import names, recipes
from torchgrow.lab.environment import environment
from torchgrow.lab.from_recipe import make_grower, make_optimizer
from torchgrow.lab.models import ResNet
from torchgrow.lab.train import Epoch, fit

RESULTS = Path(__file__).parent.parent / "results" / "depth-growth.jsonl"
METHODS = ("grown", "3-3-3")


def training(method: str, data: lab_data.ImageData, recipe: recipes.Recipe) -> tuple[nn.Module, Iterator[Epoch]]:
    """The network and its epochs."""
    torch.manual_seed(recipe.seed)
    if method == "3-3-3":
        model: nn.Module = ResNet(depth=20, shortcut="B")
        optimizer = make_optimizer(model, recipe)
        return model, fit(method, model, optimizer, data, recipe)
    with torch.device("meta"):
        model = recipe.build()
    optimizer = make_optimizer(model, recipe)
    return model, fit(method, model, optimizer, data, recipe, grower=make_grower(model, optimizer, data, recipe))


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

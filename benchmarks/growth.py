"""Growing against its twins on CIFAR-10: default, paper, uniform twin and dense, side by side.

    python benchmarks/growth.py --data FOLDER [--seeds 0 1 2] [--epochs 20] [--subset 10000]

Every finished (method, seed) is a line of results/growth-resnet20-cifar10.jsonl; lines that are there already
(same recipe, same settings) are not run again, so a stopped run goes on where it was. Methods of one seed run one
after the other in one process on one thread, so that their seconds can be compared; the uniform twin has at most
the parameters that the default run of the same seed ended with.
"""

import argparse
import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from torchgrow import Grower, measure
from torchgrow.lab import data as lab_data
from torchgrow.lab import recipes
from torchgrow.lab.run import environment, uniform_width
from torchgrow.lab.train import Epoch, fit, make_optimizer

RESULTS = Path(__file__).parent.parent / "results" / "growth-resnet20-cifar10.jsonl"
METHODS = ("default", "uniform", "dense", "paper")


def train(recipe: recipes.Recipe, data: lab_data.ImageData, method: str, params: int | None) -> list[Epoch]:
    """All epochs of one method; `params` bounds the uniform twin."""
    torch.manual_seed(recipe.seed)
    width = uniform_width(recipe.build, params) if method == "uniform" and params else 1.0
    model = recipe.build(width)
    optimizer = make_optimizer(model, recipe)
    grower = None
    if method in recipes.PRESETS:
        grower = Grower(
            model,
            optimizer,
            example_inputs=data.normalise(data.train.pixels[:2]),
            budget=recipe.budget,
            updates=recipe.epochs,
            preset=method,
            seed=recipe.seed,
        )
    epochs = list(fit(method, model, optimizer, data, recipe, grower=grower))
    final = measure(model, data.normalise(data.train.pixels[:2]))
    if (final.params, final.flops) != (epochs[-1].params, epochs[-1].flops):
        raise SystemExit(f"{method}: the last epoch trained another network than the one delivered")
    return epochs


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--subset", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = recipes.with_shortcut(recipes.get("resnet20-cifar10"), "B")
    base = replace(recipe, epochs=arguments.epochs, subset=arguments.subset)
    data = lab_data.load(base.dataset, folder=arguments.data, subset=base.subset)
    dense = measure(base.build(1.0), data.normalise(data.train.pixels[:2]))
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.touch()
    for seed in arguments.seeds:
        recipe = replace(base, seed=seed)
        settings = hashlib.sha256(json.dumps(recipe.as_json(), sort_keys=True).encode()).hexdigest()[:16]
        rows = [json.loads(line) for line in arguments.results.read_text().splitlines()]
        done = {row["method"]: row for row in rows if row["settings"] == settings}
        for method in METHODS:
            if method in done:
                continue
            epochs = train(recipe, data, method, done["default"]["params"] if method == "uniform" else None)
            last = epochs[-1]
            row = {
                "recipe": recipe.name,
                "method": method,
                "seed": seed,
                "settings": settings,
                "config": recipe.as_json(),
                "budget": str(recipe.budget),
                "accuracy": last.accuracy,
                "params": last.params,
                "flops": last.flops,
                "train_flops": last.training_flops,
                "seconds": last.seconds,
                "dense_params": dense.params,
                "dense_flops": dense.flops,
                "environment": environment(),
                "epochs": [asdict(epoch) for epoch in epochs],
            }
            with arguments.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            done[method] = row


if __name__ == "__main__":
    main()

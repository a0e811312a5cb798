"""Growing against its twins on CIFAR-10: default, paper, uniform twin and dense, side by side.

    python benchmarks/growth.py --data FOLDER [--seeds 0 1 2] [--epochs 20] [--subset 10000] [--jobs 2]

Every finished (method, seed) is a line of results/growth-resnet20-cifar10.jsonl; lines that are there already
(same recipe, same settings) are not run again, so a stopped run goes on where it was. All methods of one seed
train in turns, epoch by epoch, in one process on one thread, so that their seconds can be compared on a machine
that is now faster, now slower; the uniform twin has at most the parameters that the budget allows. With `--jobs`,
that many seeds run at once, each in a process and on a core of its own.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from torchgrow import PRESETS, Grower, measure
from torchgrow.lab import data as lab_data
from torchgrow.lab import recipes
from torchgrow.lab.run import environment, uniform_width
from torchgrow.lab.train import Epoch, fit, make_optimizer

RESULTS = Path(__file__).parent.parent / "results" / "growth-resnet20-cifar10.jsonl"
METHODS = ("default", "uniform", "dense", "paper")


def training(recipe: recipes.Recipe, data: lab_data.ImageData, method: str, params: int) -> Iterator[Epoch]:
    """The epochs of one method; `params` bounds the uniform twin."""
    torch.manual_seed(recipe.seed)
    model = recipe.build(uniform_width(recipe.build, params) if method == "uniform" else 1.0)
    optimizer = make_optimizer(model, recipe)
    grower = None
    if method in PRESETS:
        grower = Grower(
            model,
            optimizer,
            example_inputs=data.normalise(data.train.pixels[:2]),
            budget=recipe.budget,
            updates=recipe.epochs,
            preset=method,
            seed=recipe.seed,
        )
    epoch = None
    for epoch in fit(method, model, optimizer, data, recipe, grower=grower):
        yield epoch
    final = measure(model, data.normalise(data.train.pixels[:2]))
    if epoch is None or (final.params, final.flops) != (epoch.params, epoch.flops):
        raise SystemExit(f"{method}: the last epoch trained another network than the one delivered")


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--subset", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.jobs > 1:
        workers = []
        for job in range(arguments.jobs):
            seeds = [str(seed) for seed in arguments.seeds[job :: arguments.jobs]]
            given = [f"--{key}={vars(arguments)[key]}" for key in ("data", "epochs", "subset", "threads", "results")]
            if seeds:
                workers.append(subprocess.Popen([sys.executable, __file__, *given, "--seeds", *seeds]))
        sys.exit(max(worker.wait() for worker in workers))
    torch.set_num_threads(arguments.threads)
    recipe = recipes.with_shortcut(recipes.get("resnet20-cifar10"), "B")
    base = replace(recipe, epochs=arguments.epochs, subset=arguments.subset)
    data = lab_data.load(base.dataset, folder=arguments.data, subset=base.subset)
    dense = measure(base.build(1.0), data.normalise(data.train.pixels[:2]))
    surroundings = environment()  # now: the commit that runs, whatever is committed meanwhile
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.touch()
    for seed in arguments.seeds:
        recipe = replace(base, seed=seed)
        settings = hashlib.sha256(json.dumps(recipe.as_json(), sort_keys=True).encode()).hexdigest()[:16]
        rows = [json.loads(line) for line in arguments.results.read_text().splitlines()]
        config = json.loads(json.dumps(recipe.as_json()))
        done = {row["method"] for row in rows if {**config, **row["config"]} == config}  # but for fields added since
        missing = [method for method in METHODS if method not in done]
        limit = recipe.budget.limits(dense).params
        if limit is None:
            raise SystemExit("the uniform twin needs a budget in parameters")
        runs = [training(recipe, data, method, limit) for method in missing]
        rounds = zip(*runs, strict=True)  # one epoch of each method, in turns
        described = track(rounds, f"seed {seed}", total=recipe.epochs, console=Console(stderr=True))
        for method, epochs in zip(missing, zip(*described, strict=True), strict=True):
            last = epochs[-1]
            row = {
                "recipe": recipe.name,
                "method": method,
                "seed": seed,
                "settings": settings,
                "config": recipe.as_json(),
                "budget": str(recipe.budget),
                "together": missing,
                "accuracy": last.accuracy,
                "params": last.params,
                "flops": last.flops,
                "train_flops": last.training_flops,
                "seconds": last.seconds,
                "dense_params": dense.params,
                "dense_flops": dense.flops,
                "environment": surroundings,
                "epochs": [asdict(epoch) for epoch in epochs],
            }
            with arguments.results.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

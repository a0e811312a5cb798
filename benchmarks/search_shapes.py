"""Shapes found by trying, beside the uniform network; and how early their training loss tells their order.

    OMP_NUM_THREADS=1 python benchmarks/search_shapes.py search --recipe resnet20-cifar10 --data FOLDER --budget 36%
    OMP_NUM_THREADS=1 python benchmarks/search_shapes.py order --recipe resnet20-cifar10 --data FOLDER --budget 36%
    python benchmarks/search_shapes.py show

`search`: for every seed `torchgrow search`, whose winner goes on from what it has, and the uniform network, with the
same epochs, batches and schedule. Training FLOPs are those of the whole search. `order`: every candidate of a search is
trained to the end. `show`: means and paired differences; rank correlation (Spearman) with the final score, of the mean
training loss of each epoch, and of the score of that epoch.

Judged by training images that are held out; `--test` takes the test images. The networks that `default` finds, and
their structures from scratch, come from the same setting of `torchgrow compare`:

    torchgrow compare resnet20-cifar10 --data FOLDER --budget 36% --schedule wsd --methods "uniform default direct"
        --validate

Every finished line of results/search-shapes.jsonl is not run again; a search that was stopped goes on.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from scipy.stats import spearmanr

import torchgrow
from torchgrow import Budget
from torchgrow.lab import names, recipes
from torchgrow.lab import search as lab_search
from torchgrow.lab.environment import environment
from torchgrow.lab.from_recipe import example, make_network, make_optimizer, with_data
from torchgrow.lab.metrics import metric_of
from torchgrow.lab.recipes import Recipe
from torchgrow.lab.results import interval
from torchgrow.lab.train import fit

say = partial(Console(width=160).print, highlight=False, soft_wrap=True, markup=False)
RESULTS = Path(__file__).parent.parent / "results" / "search-shapes.jsonl"


def searched(recipe: Recipe, arguments: argparse.Namespace, work: Path) -> Iterator[dict[str, Any]]:
    """Rows of a search and of the uniform network beside it."""
    console = Console(stderr=True)
    out = work / f"{recipe.name}-{recipe.seed}"
    if out.with_name(f"{out.name}.partial").exists():
        lab_search.resume(out, console=console, folder=arguments.data)
    elif not out.exists():
        lab_search.search(
            recipe,
            console=console,
            out=out,
            folder=arguments.data,
            candidates=arguments.candidates,
            beside=("uniform",),
            validate=not arguments.test,
        )
    found = json.loads((out / "search.json").read_text())
    for name, result in json.loads((out / "results.json").read_text()).items():
        dense = found["dense_training_flops"]
        yield {"method": name, **result, "dense_training_flops": dense, "search": found if name == "searched" else None}


def ordered(recipe: Recipe, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of all candidates, each trained to the end."""
    recipe, data = with_data(recipe, Console(stderr=True), arguments.data, held_out=not arguments.test)
    build = partial(make_network, recipe.build_grown or recipe.build, 1.0, data.device)
    inputs, carried = example(build(), data)
    found = torchgrow.search(
        build,
        recipe.budget,
        example_inputs=inputs,
        train=lambda trial, more: math.nan,
        length=recipe.epochs,
        candidates=arguments.candidates or 12,
        seed=recipe.seed,
        carried=carried,
        depth=recipe.depth,
    )
    for trial in found.trials:
        model = found.fresh(trial)
        torch.manual_seed(recipe.seed)
        training = fit(trial.name, model, make_optimizer(model, recipe), data, recipe)
        epochs = list(track(training, trial.name, total=recipe.epochs, console=Console(stderr=True)))
        metric = metric_of(vars(epochs[-1])).name
        yield {
            "method": f"shape {trial.number}",
            "shape": trial.name,
            "depths": trial.depths,
            "widths": trial.widths,
            **asdict(trial.cost),
            "losses": [epoch.loss for epoch in epochs],
            "scores": [getattr(epoch, metric) for epoch in epochs],
        }


def show(rows: list[dict[str, Any]]) -> None:
    """Print what the rows of each setting say."""
    for setting in dict.fromkeys(json.dumps(row["setting"]) for row in rows):
        mine = [row for row in rows if json.dumps(row["setting"]) == setting]
        say(setting)
        scores: dict[str, dict[int, float]] = {}
        for row in (row for row in mine if "losses" not in row):
            scores.setdefault(row["method"], {})[row["seed"]] = row[metric_of(row).name]
        for method, by_seed in scores.items():
            own = [row for row in mine if row["method"] == method]
            share = mean(row["training_flops"] / row["dense_training_flops"] for row in own)
            spread = f" ± {stdev(by_seed.values()):.2f}" if len(by_seed) > 1 else ""
            say(f"  {method}: {mean(by_seed.values()):.2f}{spread} ({len(by_seed)}), {share:.2f} of a dense training")
        both = scores.get("searched", {}).keys() & scores.get("uniform", {}).keys()
        if len(both) > 1:
            gaps = [scores["searched"][seed] - scores["uniform"][seed] for seed in sorted(both)]
            say(f"  searched - uniform: {mean(gaps):+.2f} ± {interval(gaps):.2f} (95 % interval from three seeds on)")
        for seed in sorted({row["seed"] for row in mine if "losses" in row}):
            order([row for row in mine if "losses" in row and row["seed"] == seed], seed)


def order(rows: list[dict[str, Any]], seed: int) -> None:
    """Print how well each epoch's loss, and its score, tell the order of the final scores."""
    final = [mean(row["scores"][-3:]) for row in rows]
    say(f"  seed {seed}: {len(rows)} shapes; rank correlation with the mean score of the last three epochs")
    for row, score in sorted(zip(rows, final, strict=True), key=lambda pair: -pair[1]):
        say(f"    {score:.2f}  {row['shape']}, {row['params']:,} parameters, {row['flops']:,} FLOPs")
    for epoch in range(len(rows[0]["losses"])):
        by_loss = spearmanr([-row["losses"][epoch] for row in rows], final).statistic
        by_score = spearmanr([row["scores"][epoch] for row in rows], final).statistic
        say(f"    epoch {epoch + 1}: by training loss {by_loss:+.2f}, by score {by_score:+.2f}")


def main() -> None:
    """Run what is missing, or show what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("search", "order", "show"))
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--budget", default="36%")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--subset", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--candidates", type=int, help="default: as many as cost less than a dense training; order: 12")
    parser.add_argument("--schedule", choices=names.SCHEDULES, default="wsd")
    parser.add_argument("--precision", choices=names.PRECISIONS, default="float32")
    parser.add_argument("--test", action="store_true", help="judge by the test images")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("runs/search-shapes"), help="run folders of searches")
    arguments = parser.parse_args()
    arguments.results.touch()
    done = [json.loads(line) for line in arguments.results.read_text().splitlines()]
    recipe = recipes.get(arguments.recipe)
    given = {"budget": Budget.read(arguments.budget), "schedule": arguments.schedule, "precision": arguments.precision}
    given |= {"epochs": arguments.epochs or recipe.epochs, "subset": arguments.subset or recipe.subset, "threads": 1}
    setting = {**given, "budget": str(given["budget"]), "recipe": recipe.name, "held out": not arguments.test}
    for seed in arguments.seeds if arguments.what != "show" else ():
        have = [r["method"] for r in done if (r["what"], r["setting"], r["seed"]) == (arguments.what, setting, seed)]
        chosen: Recipe = replace(
            recipe, **given, seed=seed, warmup=recipe.warmup if arguments.schedule != "milestones" else 0.0
        )
        made = searched(chosen, arguments, arguments.work) if arguments.what == "search" else ordered(chosen, arguments)
        for row in made if not have or arguments.what == "order" else ():
            if row["method"] not in have:
                line = {"what": arguments.what, "setting": setting, "seed": seed, **row, "environment": environment()}
                done.append(line)
                with arguments.results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    show(done)


if __name__ == "__main__":
    main()

"""Growing an LSTM against its twins on the Penn Treebank, at half and at a quarter of the FLOPs of LSTM and decoder.

    python benchmarks/growth_text.py --data FOLDER [--seeds 0 1] [--epochs 13] [--threads 1]

Dense, and for each budget grown and uniform, one after another; every finished run is a line of
results/growth-lstm-ptb.jsonl, and lines that are there already (same recipe, same text) are not run again, so a
stopped command goes on where it was. The uniform twin has at most the FLOPs that the budget allows and the same
embedding. Runs of a machine that has other work to do can be compared by their FLOPs, not by their seconds.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from torchgrow import PRESETS, Budget, measure
from torchgrow.lab import data as lab_data
from torchgrow.lab import recipes
from torchgrow.lab.run import environment, twin_width
from torchgrow.lab.text import TextData
from torchgrow.lab.train import Epoch, evaluate, fit, make_grower, make_optimizer

RESULTS = Path(__file__).parent.parent / "results" / "growth-lstm-ptb.jsonl"
BUDGETS = (Budget(flops="50%"), Budget(flops="25%"))


def wanted(recipe: recipes.Recipe, seeds: list[int]) -> Iterator[tuple[str, recipes.Recipe]]:
    """Method and recipe of every run, a whole seed before the next one."""
    for seed in seeds:
        yield "dense", replace(recipe, seed=seed, budget=BUDGETS[0])  # its budget does not matter
        for budget in BUDGETS:
            for method in ("default", "uniform"):
                yield method, replace(recipe, seed=seed, budget=budget)


def train(method: str, recipe: recipes.Recipe, data: TextData, progress: Progress) -> dict[str, Any]:
    """One run, from the initial weights to the test text."""
    dense = measure(recipe.build(1.0), data.example())
    limit = recipe.budget.limits(dense).flops
    if limit is None:
        raise SystemExit("the uniform twin needs a budget in FLOPs")
    width = twin_width(recipe, data, params=dense.params, flops=limit) if method == "uniform" else 1.0
    torch.manual_seed(recipe.seed)
    model = recipe.build(width)
    optimizer = make_optimizer(model, recipe)
    grower = make_grower(model, optimizer, data, recipe) if method in PRESETS else None
    label = f"seed {recipe.seed}, {method}" + ("" if method == "dense" else f", {recipe.budget}")
    bar, epochs = progress.add_task(label, total=recipe.epochs), list[Epoch]()

    def on_step(done: int, total: int) -> None:
        progress.update(bar, completed=len(epochs) + done / total)

    for epoch in fit(method, model, optimizer, data, recipe, grower=grower, on_step=on_step):
        epochs.append(epoch)
        progress.print(f"{label}: epoch {epoch.epoch}, validation perplexity {epoch.perplexity:.2f}")
    progress.remove_task(bar)
    final = measure(model, data.example())
    if (final.params, final.flops) != (epochs[-1].params, epochs[-1].flops):
        raise SystemExit(f"{method}: the last epoch trained another network than the one delivered")
    return {
        "perplexity": epochs[-1].perplexity,
        "test_perplexity": evaluate(model, data, "test")[0],
        "hidden": [layer.hidden_size for layer in model.layers],  # type: ignore[union-attr]
        "params": final.params,
        "flops": final.flops,
        "train_flops": epochs[-1].training_flops,
        "seconds": epochs[-1].seconds,
        "dense_params": dense.params,
        "dense_flops": dense.flops,
        "epochs": [asdict(epoch) for epoch in epochs],
    }


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the three texts; default: Python's manual")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--size", choices=recipes.SIZES, default="small")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--subset", type=int, help="words of the training text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base = recipes.lstm_ptb(arguments.size)
    base = replace(base, epochs=arguments.epochs or base.epochs, subset=arguments.subset)
    data = lab_data.load(base.dataset, folder=arguments.data, subset=base.subset, steps=base.steps)
    if not isinstance(data, TextData):
        raise SystemExit("this compares language models")
    base = base.with_words(len(data.vocabulary))
    text = {"words": [len(data.train), len(data.valid), len(data.test)], "vocabulary": len(data.vocabulary)}
    surroundings = environment()  # now: the commit that runs, whatever is committed meanwhile
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.touch()
    with Progress(console=Console(stderr=True)) as progress:
        for method, recipe in wanted(base, arguments.seeds):
            config = json.loads(json.dumps(recipe.as_json()))
            rows = [json.loads(line) for line in arguments.results.read_text().splitlines()]
            if any(
                row["method"] == method and row["text"] == text and {**config, **row["config"]} == config
                for row in rows  # but for fields that the recipe has gained since
            ):
                continue
            budget = None if method == "dense" else config["budget"]
            row = {"recipe": recipe.name, "method": method, "seed": recipe.seed, "budget": budget}
            row |= {"text": text, "config": config, **train(method, recipe, data, progress)}
            row["environment"] = {**surroundings, "threads": torch.get_num_threads()}
            with arguments.results.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

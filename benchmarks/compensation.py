"""Accuracy right after a cut, with and without biases that take over: python benchmarks/compensation.py [--seeds 5]

An MLP of 512-512 and a network of four convolutions without padding and without norms are trained on scikit-learn's
digits. Then each is cut at once to 50 % and to 25 % of its parameters by `torchgrow.prune_`, by L1 and by group norm,
and judged on training images that are held out, before any fine-tuning: as it was cut, and with `batches` (eight
batches of training images, not shifted), so that biases take over what the gone units gave on average. Both cuts
remove the same units. Every pair is a line of results/compensation.jsonl, and one that is there is not done again.
"""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from birth import BATCH, steps
from rich.console import Console
from torch import nn

from torchgrow import Budget, prune_
from torchgrow.lab.data import ImageData, load_images
from torchgrow.lab.environment import environment
from torchgrow.policies import Shrink

RESULTS = Path(__file__).parent.parent / "results" / "compensation.jsonl"
LEARNING_RATE, MEASURED = 0.05, 8
SHARES, IMPORTANCES = ("50%", "25%"), ("l1", "group_norm")


def mlp() -> nn.Module:
    """Two hidden layers of 512."""
    layers = (nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    return nn.Sequential(nn.Flatten(), *layers)


def plain_conv() -> nn.Module:
    """Convolutions of 32, 64, 64 and 64 channels without padding, a mean over the two by two that are left, linear."""
    sizes = ((1, 32, 3), (32, 64, 3), (64, 64, 3), (64, 64, 1))
    layers = [layer for n, m, k in sizes for layer in (nn.Conv2d(n, m, k), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "MLP 512-512": (mlp, 10),
    "4 convolutions without padding, no norm": (plain_conv, 30),
}
"""Network, epochs."""


def trained(name: str, data: ImageData, seed: int) -> nn.Module:
    """A network after its epochs of SGD with momentum, the rate falling to 0 in the last 30 % of the steps."""
    build, epochs = NETWORKS[name]
    torch.manual_seed(seed)
    model = build()
    for _ in steps(model, torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9), data, epochs, seed):
        pass
    return model.eval()


@torch.no_grad()
def judged(model: nn.Module, whole: nn.Module, data: ImageData) -> dict[str, float]:
    """Of the images that are held out: accuracy in percent, cross entropy, and distance to the whole network's scores.

    The distance is the root of the summed squares, over that of the whole network's scores.
    """
    found = [(model(x), whole(x), labels) for x, labels in data.test_batches()]
    scores, wanted, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    hits, distance = int((scores.argmax(1) == labels).sum()), float((scores - wanted).norm() / wanted.norm())
    return {"accuracy": 100 * hits / len(labels), "loss": float(F.cross_entropy(scores, labels)), "distance": distance}


def case(name: str, seed: int, data: ImageData) -> list[dict[str, Any]]:
    """All cuts of a network and a seed."""
    model, rows = trained(name, data, seed), []
    drawn = data.train_batches(batch_size=BATCH, shift=0, mirror=False, generator=torch.Generator().manual_seed(seed))
    batches = [x for x, _ in (next(drawn) for _ in range(MEASURED))]
    whole, size = judged(model, model, data), sum(p.numel() for p in model.parameters())
    for importance in IMPORTANCES:
        for share in SHARES:
            found: dict[str, Any] = {}
            for way, given in (("cut", None), ("compensated", batches)):
                small, policy = copy.deepcopy(model), Shrink(importance=importance)
                cost = prune_(small, data.example(), budget=Budget(params=share), policy=policy, batches=given)
                found[way] = judged(small.eval(), model, data)
            about = {"network": name, "seed": seed, "importance": importance, "share": share, "whole": whole}
            rows.append({**about, **found, "params": cost.params, "params_whole": size})
    return rows


def main() -> None:
    """Run what the file does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console, data = Console(), load_images("digits", held_out=True)
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    done = {(row["network"], row["seed"]) for row in map(json.loads, lines)}
    for name, (_, epochs) in NETWORKS.items():
        for seed in range(options.seeds):
            if (name, seed) in done:
                continue
            rows = case(name, seed, data)
            about = {"epochs": epochs, "batch": BATCH, "measured": MEASURED, "versions": environment()}
            with RESULTS.open("a") as file:
                file.writelines(json.dumps({**row, **about}) + "\n" for row in rows)
            for row in rows:
                ways = (f"{way} {row[way]['accuracy']:.1f} %" for way in ("whole", "cut", "compensated"))
                console.print(f"{name}, seed {seed}, {row['importance']}, {row['share']}: {', '.join(ways)}")


if __name__ == "__main__":
    main()

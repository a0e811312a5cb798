"""What initial weights at the scale of the planned widths are worth: python benchmarks/birth.py [--seeds 5] [--test]

    python benchmarks/birth.py --presets default:peak=1 default:peak=1,ramp=0.01  # ways to grow, beside these

Networks grow to 10 % of their parameters on scikit-learn's digits, by the default policy, from weights at the scale of
the frame ("frame") and of the widths planned ("planned"); beside them the network that was grown, initialised anew and
trained from scratch ("direct"). Same seed, batches, steps and learning rate for all three. Judged by training images
that are held out, or, with --test, by the test images. Every training is a line of results/birth.jsonl, and one that is
there is not done again.
"""

import argparse
import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from torchgrow import Budget, Grower
from torchgrow.lab.baselines import initialised
from torchgrow.lab.data import ImageData, load_images
from torchgrow.lab.environment import environment
from torchgrow.lab.models import ResNet

RESULTS = Path(__file__).parent.parent / "results" / "birth.jsonl"
SHARE, BATCH, UPDATES_AN_EPOCH = "10%", 64, 5
ARMS = ("frame", "planned", "direct")


def mlp() -> nn.Module:
    """Three hidden layers of 512."""
    hidden = [layer for _ in range(2) for layer in (nn.Linear(512, 512), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), *hidden, nn.Linear(512, 10))


def plain_conv() -> nn.Module:
    """Four convolutions of 96 channels without norms, a mean, and a linear layer."""
    layers = [layer for i in range(4) for layer in (nn.Conv2d(96 if i else 1, 96, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum, 0.05."""
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Adam, 0.001."""
    return torch.optim.Adam(model.parameters(), 1e-3)


TASKS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], torch.optim.Optimizer], int]] = {
    "MLP 512-512-512, SGD": (mlp, sgd, 5),
    "MLP 512-512-512, Adam": (mlp, adam, 5),
    "4 convolutions of 96, no norm, SGD": (plain_conv, sgd, 15),
    "4 convolutions of 96, no norm, Adam": (plain_conv, adam, 15),
    "ResNet-14 with batch norm, SGD": (lambda: ResNet(depth=14, widths=(32, 64, 128), in_channels=1), sgd, 5),
}
"""Network, optimizer, epochs."""


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, data: ImageData, epochs: int, seed: int) -> Iterator[int]:
    """Train, the rate falling to 0 in the last 30 % of the steps; yields after each, counted from 1."""
    generator, total, taken = torch.Generator().manual_seed(seed), epochs * (len(data.train) // BATCH), 0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (total - step) / (0.3 * total)))
    for _ in range(epochs):
        for x, labels in data.train_batches(batch_size=BATCH, shift=1, mirror=False, generator=generator):
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
            schedule.step()
            taken += 1
            yield taken


def train(
    model: nn.Module, task: str, data: ImageData, seed: int, rescale: bool | None, preset: str = "default"
) -> float:
    """Train a network, grown unless `rescale` is None, and return its accuracy in percent."""
    _, optimizer_of, epochs = TASKS[task]
    optimizer, an_epoch = optimizer_of(model), len(data.train) // BATCH
    every, grower = max(1, an_epoch // UPDATES_AN_EPOCH), None
    if rescale is not None:
        example, budget = data.example(), Budget(params=SHARE)
        updates = epochs * an_epoch // every
        grower = Grower(
            model,
            optimizer,
            example_inputs=example,
            budget=budget,
            updates=updates,
            seed=seed,
            rescale=rescale,
            preset=preset,
        )
    for taken in steps(model, optimizer, data, epochs, seed):
        if grower and taken % every == 0 and not grower.finished:
            grower.update()
    model.eval()
    with torch.no_grad():
        hits = sum(int((model(x).argmax(1) == labels).sum()) for x, labels in data.test_batches())
    model.train()
    return 100 * hits / len(data.test)


def case(task: str, seed: int, data: ImageData, arms: Sequence[str]) -> list[dict[str, Any]]:
    """All three arms of a task and a seed, or ways to grow."""
    build, rows = TASKS[task][0], []
    torch.manual_seed(seed)
    frame, found = build(), None
    for arm in arms:
        if arm == "direct":
            assert found is not None
            torch.manual_seed(seed)
            model = initialised(found)
            accuracy = train(model, task, data, seed, None)
        else:
            model = copy.deepcopy(frame)
            preset = arm if arm not in ARMS else "default"
            accuracy = train(model, task, data, seed, arm != "frame", preset)
            found = copy.deepcopy(model)
        params = sum(p.numel() for p in model.parameters())
        rows.append({"task": task, "arm": arm, "seed": seed, "accuracy": accuracy, "params": params})
    return rows


def main() -> None:
    """Run what the file does not hold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--presets", nargs="+", default=[], help="ways to grow, in place of the three")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console, judged = Console(), "test" if options.test else "held out"
    data = load_images("digits", held_out=not options.test)
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    done = {(row["task"], row["seed"], row["judged"], row["arm"]) for row in map(json.loads, lines)}
    for task in TASKS:
        for seed in range(options.seeds):
            arms = options.presets or ARMS
            missing = [arm for arm in arms if (task, seed, judged, arm) not in done]
            if not missing:
                continue
            rows = case(task, seed, data, missing if options.presets else ARMS)
            about = {"judged": judged, "share": SHARE, "epochs": TASKS[task][2], "versions": environment()}
            with RESULTS.open("a") as file:
                file.writelines(json.dumps({**row, **about}) + "\n" for row in rows)
            console.print(f"{task}, seed {seed}: " + ", ".join(f"{row['arm']} {row['accuracy']:.1f} %" for row in rows))


if __name__ == "__main__":
    main()

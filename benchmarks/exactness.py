"""Exactness on known networks: 200 random subsets each, compact network against the frame with the units zeroed.

    python benchmarks/exactness.py [--models resnet20-A ...] [--subsets 200]

Every finished model is a line of results/exactness.jsonl; models that are there already with the same settings are
not run again, so a stopped run goes on where it was. All in float64, weights and statistics randomised, batch 2; each
subset removes its own random share, between 5 % and 95 %, of the units of every group.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from rich.console import Console
from torch import nn

import torchgrow
from torchgrow.lab.environment import environment
from torchgrow.lab.models import VGG16, ResNet, WideResNet
from torchgrow.tracing.prover import TOLERANCE, Prover

RESULTS = Path(__file__).parent.parent / "results" / "exactness.jsonl"
# Side of the images, in pixels. The networks stride by 4 (CIFAR) or 32.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-20 A": (ResNet, 32),
    "ResNet-20 B": (lambda: ResNet(shortcut="B"), 32),
    "VGG-16-BN": (VGG16, 32),
    "WRN-16-2": (lambda: WideResNet(depth=16, widen=2), 32),
    "resnet18": (torchvision.models.resnet18, 64),
    "resnet50": (torchvision.models.resnet50, 64),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, 64),
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, 64),
    "mobilenet_v3_large": (torchvision.models.mobilenet_v3_large, 64),
}


def subset(space: torchgrow.Space, generator: torch.Generator) -> torch.Tensor:
    """A keep vector: a random share in (0.05, 0.95) of every group's units goes; one of each group stays."""
    share = 0.05 + 0.9 * float(torch.rand((), generator=generator))
    keep = space.everything()
    for group in range(space.n_groups):
        units = torch.nonzero((space.group_of == group) & space.removable).flatten()
        drop = min(round(share * units.numel()), int((space.group_of == group).sum()) - 1)
        keep[units[torch.randperm(units.numel(), generator=generator)[:drop]]] = False
    return keep


def measure(build: Callable[[], nn.Module], pixels: int, subsets: int, seed: int) -> dict[str, object]:
    """All subsets of one model."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    model, images = build(), torch.randn(2, 3, pixels, pixels)
    report = torchgrow.verify(model, images, trials=1, seed=seed)
    space = torchgrow.trace(model, images)
    prover = Prover(model, space, images, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    errors = [prover.error(subset(space, generator))[0] for _ in range(subsets)]
    return {
        "max_error": max(errors),
        "exact": sum(error <= TOLERANCE for error in errors),
        "units": report.units,
        "groups": len(report.groups),
        "removable_params": report.removable_params,
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--subsets", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.touch()
    console, machine = Console(), environment()  # of the code that was imported, whatever is committed meanwhile
    for name in arguments.models:
        build, pixels = MODELS[name]
        settings = {"model": name, "subsets": arguments.subsets, "seed": arguments.seed, "pixels": pixels}
        rows = [json.loads(line) for line in arguments.results.read_text().splitlines()]
        if any(settings.items() <= row.items() for row in rows):
            continue
        row = settings | measure(build, pixels, arguments.subsets, arguments.seed) | {"environment": machine}
        with arguments.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        console.print(f"{name}: {row['max_error']:.1e}, {row['exact']} of {arguments.subsets} exact")


if __name__ == "__main__":
    main()

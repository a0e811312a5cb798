"""Our frames beside the dense networks of the paper: parameters, MACs, and what another way of counting makes of them.

    OMP_NUM_THREADS=1 python benchmarks/frames.py

Frames are those of the recipes as published, built on the meta device, so no weights are made. Every network is a line
of results/frames.jsonl, which is written anew. The table is part of docs/results.md (python benchmarks/tables.py).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from torchgrow import measure
from torchgrow.lab.environment import environment
from torchgrow.lab.recipes import Recipe, get, with_scale, with_size

RESULTS = Path(__file__).parent.parent / "results" / "frames.jsonl"
BUILT = "as built"


def size(module: nn.Module) -> int:
    """Parameters of a module without shared ones."""
    return sum(p.numel() for p in module.parameters())


@dataclass(frozen=True)
class Dense:
    """A dense network of the paper.

    Attributes:
        name: as the paper has it.
        recipe: whose frame it is.
        paper: its parameters in millions, as printed.
        where: the table that prints them.
        counts: other ways to count, in words, and how many parameters more (or fewer, if negative) they make.
        classes: of the data, where the recipe leaves it to the data.
    """

    name: str
    recipe: Recipe
    paper: str
    where: str
    counts: dict[str, Callable[[nn.Module], int]]
    classes: int | None = None


def full(name: str) -> Recipe:
    """The recipe as published."""
    return with_scale(get(name), "full")


NETWORKS = (
    Dense(
        "VGG-16",
        full("vgg16-cifar10"),
        "14.99",
        "Table 1",
        {"with one more linear layer, of 512 to 512": lambda model: size(nn.Linear(512, 512, device="meta"))},
    ),
    Dense("ResNet-20", full("resnet20-cifar10"), "0.27", "Table 1", {}),
    Dense("WRN-28-10", full("wrn28-10-cifar10"), "36.5", "Table 1", {}),
    Dense(
        "ResNet-50",
        full("resnet50-imagenet"),
        "23.0",
        "Table 2",
        {
            "without the last layer": lambda model: -size(model.get_submodule("fc")),
            "convolutions alone": lambda model: -sum(size(m) for m in model.modules() if not_convolution(m)),
        },
        1000,
    ),
    Dense("MobileNetV1 1.0x", full("mobilenetv1-imagenet"), "4.2", "Howard et al. (2017)", {}, 1000),
    Dense("MobileNetV1 0.5x", full("mobilenetv1-half-imagenet"), "1.3", "Howard et al. (2017)", {}, 1000),
    Dense(
        "DeepLab-v3-ResNet-101",
        full("deeplabv3-voc"),
        "58.0",
        "Table 7",
        {"with torchvision's further 3x3 convolution": lambda model: 256 * 256 * 9 + 2 * 256},
    ),
    Dense("LSTM (1500, 1500)", with_size(get("lstm-ptb"), "large"), "66.0", "Table 8", {}),
)


MACS = {
    "VGG-16": "313 (Li et al., 2017)",
    "ResNet-50": "4,090 (torchvision)",
    "MobileNetV1 1.0x": "569 (Howard et al., 2017)",
    "MobileNetV1 0.5x": "49 (Howard et al., 2017)",
}
"""Of one sample in millions, as others printed them; the paper prints none."""


def not_convolution(module: nn.Module) -> bool:
    """Whether it has parameters of its own and is no convolution."""
    return isinstance(module, nn.BatchNorm2d | nn.Linear)


def counted(dense: Dense) -> dict[str, object]:
    """The row of one network."""
    recipe = dense.recipe if dense.classes is None else dense.recipe.with_classes(dense.classes)
    text = recipe.dataset == "text"
    side = 32 if recipe.dataset == "cifar10" else recipe.side
    with torch.device("meta"):
        model = recipe.build()
    x = torch.zeros(2, recipe.steps, dtype=torch.long) if text else torch.zeros(2, 3, side, side)
    cost = measure(model, x)
    counts = {BUILT: cost.params} | {words: cost.params + more(model) for words, more in dense.counts.items()}
    digits = len(dense.paper.partition(".")[2])
    return {
        "network": dense.name,
        "recipe": recipe.name,
        "params": cost.params,
        "macs": cost.flops // 2,
        "macs_published": MACS.get(dense.name, ""),
        "of": f"{recipe.steps} words" if text else f"{side} x {side} pixels",
        "paper_millions": dense.paper,
        "where": dense.where,
        "counts": counts,
        "equal": [words for words, count in counts.items() if f"{count / 1e6:.{digits}f}" == dense.paper],
    }


def main() -> None:
    """Count, print, write."""
    console, rows = Console(), []
    for dense in NETWORKS:
        row = {**counted(dense), "environment": environment(torch.device("cpu"))}
        rows.append(row)
        console.print({key: value for key, value in row.items() if key != "environment"}, soft_wrap=True)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()

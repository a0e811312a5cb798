"""Files as a version writes them, which later versions must read: `python tests/earlier.py FOLDER` writes them.

`tests/saved/0.1` was written by the version before the packages (commit 358b88a), with the preset "default". So was
`0.1-paper`, with the preset "paper", which meant what `PAPER` is now.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import torchgrow
from records import LAYERS, cut, example, network

PAPER = torchgrow.policies.Paper(lambda_base=1.0, penalised="all", start=1.0, paced=False)
FOLDER = Path(__file__).parent / "saved" / "0.1"
SAVED, PICKLED, CHECKPOINTS, OUTPUTS = "network", "pickled.pt", "checkpoints", "outputs.safetensors"


def growing(**how: Any) -> tuple[nn.Module, torch.optim.Optimizer, torchgrow.Grower]:
    """The small network of `records` in double precision at the start of its run; how: another policy."""
    model = network().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    grower = torchgrow.Grower(
        model,
        optimizer,
        example_inputs=example().double(),
        budget=torchgrow.Budget(params="60%"),
        updates=6,
        depth=list(LAYERS),
        seed=3,
        **how,
    )
    return model, optimizer, grower


def train(model: nn.Module, optimizer: torch.optim.Optimizer, grower: torchgrow.Grower, until: int) -> None:
    """Two steps on inputs of their own before every update, until the run has had that many."""
    for number in range(len(grower.history) - 1, until):
        for step in range(2):
            x = torch.randn(8, 5, 4, generator=torch.Generator().manual_seed(10 * number + step)).double()
            optimizer.zero_grad()
            (model(x) - x[:, ::2, :2].mean()).square().mean().backward()
            optimizer.step()
        grower.update()


def main() -> None:
    """Write the files."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    small = network()
    cut(small)
    torchgrow.save(small, folder / SAVED)
    torch.save(small, folder / PICKLED)
    outputs = {"network": small.eval()(example()).detach()}
    model, optimizer, grower = growing()
    train(model, optimizer, grower, 3)
    torchgrow.save_checkpoint(folder / CHECKPOINTS, grower)
    train(model, optimizer, grower, 6)
    outputs["run"] = model.eval()(example().double()).detach()
    save_file(outputs, folder / OUTPUTS)


if __name__ == "__main__":
    main()

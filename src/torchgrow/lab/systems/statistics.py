"""Statistics of batch norms estimated anew, as means over training batches."""

import time
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor, nn

import torchgrow
from torchgrow import measure
from torchgrow.lab.data import Data, ImageData
from torchgrow.lab.recipes import Recipe
from torchgrow.lab.rises import has_statistics
from torchgrow.lab.systems.system import Spent


def estimate_anew(model: nn.Module, data: Data, recipe: Recipe, batches: int = 20) -> Spent:
    """Replace running statistics by means over training batches, without augmentation.

    Nothing happens to a network without batch norms, or on a text.

    Args:
        model: the network.
        data: what it is trained on.
        recipe: says the batch size, and the seed by which batches are drawn.
        batches: how many.

    Returns:
        What it cost.
    """
    spent, seen, start = Spent(name="statistics"), 0, time.perf_counter()
    if not isinstance(data, ImageData) or not has_statistics(model):
        return spent
    generator = torch.Generator().manual_seed(recipe.seed)
    drawn = data.train_batches(batch_size=recipe.batch_size, shift=0, mirror=False, generator=generator)

    def inputs() -> Iterator[Tensor]:
        nonlocal seen
        for x, _ in islice(drawn, batches):
            seen += len(x)
            yield x

    torchgrow.recalibrate(model, inputs())
    spent.seconds = time.perf_counter() - start
    spent.flops = measure(model, data.example()).flops * seen
    return spent

"""Statistics of batch norms estimated anew, as means over training batches."""

import time
from itertools import islice

import torch
from torch import nn

from torchgrow import measure
from torchgrow.lab.data import Data, ImageData
from torchgrow.lab.recipes import Recipe
from torchgrow.lab.systems.system import Spent


@torch.no_grad()
def estimate_anew(model: nn.Module, data: Data, recipe: Recipe, batches: int = 20) -> Spent:
    """Replace running statistics by means over training batches, without augmentation.

    Nothing happens to a network without batch norms, or on a text.

    Args:
        model: left in evaluation mode, its batch norms in training mode.
        data: what it is trained on.
        recipe: says the batch size, and the seed by which batches are drawn.
        batches: how many.

    Returns:
        What it cost.
    """
    spent = Spent(name="statistics")
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms or not isinstance(data, ImageData):
        return spent
    momenta, seen, start = [norm.momentum for norm in norms], 0, time.perf_counter()
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
        norm.train()
    generator = torch.Generator().manual_seed(recipe.seed)
    drawn = data.train_batches(batch_size=recipe.batch_size, shift=0, mirror=False, generator=generator)
    for x, _ in islice(drawn, batches):
        model(x)
        seen += len(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    spent.seconds = time.perf_counter() - start
    spent.flops = measure(model, data.example()).flops * seen
    return spent

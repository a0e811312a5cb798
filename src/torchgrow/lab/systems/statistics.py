"""Statistics of batch norms estimated anew after a cut, as means over training batches."""

import time
from itertools import islice

import torch
from torch import nn

from torchgrow.lab.data import ImageData
from torchgrow.lab.systems.system import Task


@torch.no_grad()
def estimate_anew(model: nn.Module, task: Task, batches: int) -> None:
    """Replace running statistics by means over so many training batches, without augmentation; counted as spent.

    Nothing happens to a network without batch norms, or on a text.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms or not isinstance(task.data, ImageData):
        return
    momenta, seen, start = [norm.momentum for norm in norms], 0, time.perf_counter()
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
        norm.train()
    generator = torch.Generator().manual_seed(task.recipe.seed)
    drawn = task.data.train_batches(batch_size=task.recipe.batch_size, shift=0, mirror=False, generator=generator)
    for x, _ in islice(drawn, batches):
        model(x)
        seen += len(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    task.spend("statistics", task.cost(model).flops * seen, time.perf_counter() - start)

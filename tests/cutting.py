"""Optimizers by name, a few steps of training and half of all units: what tests of cutting and putting back share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchgrow import Space

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-4),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-3),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, example: Any, steps: int = 2) -> None:
    for seed in range(steps):
        optimizer.zero_grad()
        out = model(example)
        target = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
        ((out - target) ** 2).mean().backward()
        optimizer.step()


def half(space: Space, seed: int = 0) -> Tensor:
    """About half of every group goes."""
    generator = torch.Generator().manual_seed(seed)
    keep = space.everything()
    for group in range(space.n_groups):
        units = torch.nonzero(space.group_of == group).flatten()
        keep[units[torch.randperm(units.numel(), generator=generator)[: units.numel() // 2]]] = False
    return keep | ~space.removable

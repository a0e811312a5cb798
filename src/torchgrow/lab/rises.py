"""How much a trained network's loss rises without a tenth of each group, on a few batches of training data; counted."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from torchgrow import measure, measure_rises, policies
from torchgrow.lab import processes
from torchgrow.lab.data import Data
from torchgrow.lab.devices import random_state, set_random_state
from torchgrow.lab.from_recipe import example
from torchgrow.lab.recipes import Recipe
from torchgrow.lab.text import TextData
from torchgrow.lab.train import evaluate

FEW = 8
"""Batches of training that it is measured on."""


@dataclass(frozen=True, kw_only=True)
class Rises:
    """What was measured, and what that cost.

    Attributes:
        rises: as `torchgrow.measure_rises` gives them.
        flops: of all forward passes, 1 x forward FLOPs x samples.
        seconds: of it.
    """

    rises: dict[str, float]
    flops: int
    seconds: float


def rises_of(model: nn.Module, data: Data, recipe: Recipe, known: Mapping[str, Any]) -> Rises | None:
    """The rises that a recipe shrinks by; None where it goes by none.

    Measured on training images that the seed draws, as images are judged, or on the beginning of the training text;
    statistics of batch norms are re-estimated on the same. Random numbers are left as they were, so that a run which
    knows its rises already goes on alike.

    Args:
        model: the trained network; not changed.
        data: its training part is used, and nothing else of it.
        recipe: its preset decides.
        known: fields of what this run measured before, if it did.
    """
    policy = policies.named(recipe.preset, rises={})
    if not isinstance(policy, policies.Shrink) or policy.rises is None:
        return None
    if known:
        return Rises(**known)
    few, samples = _few(data, recipe)
    batches = [x for x, _ in few.test_batches()] if has_statistics(model) else []
    inputs, carried = example(model, data)
    before, start = random_state(), time.perf_counter()
    found = measure_rises(
        model,
        inputs,
        lambda copied: evaluate(copied, few)[1],
        batches=batches,
        importance="group_norm" if policy.sensitive else policy.importance,
        protect=recipe.freeze,
        depth=recipe.depth,
        carried=carried,
    )
    set_random_state(before)
    passes = (1 + len(found)) * (2 if batches else 1)
    flops = passes * samples * measure(model, data.example()).flops
    return processes.told(Rises(rises=found, flops=flops, seconds=time.perf_counter() - start))


def _few(data: Data, recipe: Recipe) -> tuple[Data, int]:
    """A few training samples in the place of those that networks are judged by, and how many they are."""
    samples = FEW * recipe.batch_size
    if isinstance(data, TextData):
        text = data.train[: samples * data.steps]
        return replace(data, valid=text), -(-len(text) // data.steps)
    index = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(recipe.seed))[:samples]
    return replace(data, test=data.train[index]), len(index)


def has_statistics(model: nn.Module) -> bool:
    """Whether there are batch norms whose running statistics can be estimated anew."""
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return any(norm.track_running_stats for norm in norms)

"""Pruning by the L1 norm with Torch-Pruning, an optional dependency, for comparison."""

import copy
from importlib.metadata import PackageNotFoundError, version

from torch import nn

from torchgrow import measure
from torchgrow.lab.data import Data
from torchgrow.lab.recipes import Recipe


class PruningError(Exception):
    """Torch-Pruning cannot serve this model; the message says how it failed."""


def installed() -> str | None:
    """The version of Torch-Pruning, if it is there."""
    try:
        return version("torch-pruning")
    except PackageNotFoundError:
        return None


def l1_pruned(model: nn.Module, recipe: Recipe, data: Data) -> nn.Module:
    """The dense model pruned by Torch-Pruning to the budget: filters of the smallest L1 norm, of all layers alike."""
    frame = measure(model, data.example())
    limits = recipe.budget.limits(frame)

    def at(ratio: float) -> nn.Module:
        import torch_pruning

        pruned = copy.deepcopy(model)
        last = [module for module in pruned.modules() if isinstance(module, nn.Linear)][-1:]
        importance = torch_pruning.importance.MagnitudeImportance(p=1)
        torch_pruning.pruner.BasePruner(
            pruned, data.example(), importance, pruning_ratio=ratio, ignored_layers=last
        ).step()
        return pruned

    def fits(pruned: nn.Module) -> bool:
        cost = measure(pruned, data.example())
        return cost.params <= (limits.params or cost.params) and cost.flops <= (limits.flops or cost.flops)

    low, high = 0.0, 1.0
    best: nn.Module | None = None
    try:
        for _ in range(8):  # finer than one channel of most layers
            middle = (low + high) / 2
            pruned = at(middle)
            if fits(pruned):
                best, high = pruned, middle
            else:
                low = middle
    except Exception as error:
        raise PruningError(f"{type(error).__name__}: {error}".splitlines()[0][:300]) from error
    if best is None:
        raise PruningError(f"no pruning ratio brings the network to {recipe.budget}")
    return best

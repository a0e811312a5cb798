"""Provable: Liebenwein, Baykal, Lang, Feldman, Rus: Provable Filter Pruning, ICLR 2020 (arXiv 1911.07412).

Steps: lucaslie/torchprune@14b392c. A channel's sensitivity is the largest share that it has in any sampled output of
the layers that read it; of a group, the largest in all of its readers. These are convolutions of one group (Conv2d) and
Linear: a network with units that others alone read cannot be served, and others that read them too have no say. Numbers
of draws are rounded up. Pruned and retrained in rounds; the cost falls by the same factor in each, and the last one
fills the budget up. Published rounds belong to 182 epochs: they are scaled like epochs. The sample is of training
images; the source takes validation data, of which a comparison here has none but what judges it.
Cost: the dense training (which the paper's rule leaves out), and one training for every round, smaller and smaller.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchgrow import Limits
from torchgrow.lab.systems.activations import Reader, judges, look
from torchgrow.lab.systems.structure import Structure
from torchgrow.lab.systems.system import Phase, Task, scaled


def sensitivity(weight: Tensor, patches: Tensor, columns: Tensor) -> Tensor:
    """Sensitivities, s_j = max over filters and patches of w a / sum w a, weights and activations split by sign: [C].

    Args:
        weight: [filters, K].
        patches: [P, K].
        columns: int64 [C, each], those of every channel.
    """
    found = patches.new_zeros(len(columns))
    at_once = max(1, 2**24 // (len(columns) * len(weight)))
    for part in patches.split(at_once):
        for a in (part.clamp(min=0), (-part).clamp(min=0)):
            for w in (weight.clamp(min=0), (-weight).clamp(min=0)):
                shares = torch.einsum("pce,fce->cpf", a[:, columns], w[:, columns])
                shares /= (a @ w.T).clamp(min=1e-30)  # where the sum is 0, its parts are
                found = torch.maximum(found, shares.flatten(1).amax(1))
    return found


def sample_size(c: float, delta: float, eta: int) -> int:
    """Images to sample, |S| = ceil(c log(8 eta / delta)), for a network of eta channels."""
    return math.ceil(c * math.log(8 * eta / delta))


def draws(eps: float, total: float, patches: int, filters: int, c: float, delta: float) -> float:
    """How many draws, m(eps) = 3 (6 + 2 eps) alpha sum(s) / eps^2, with alpha = 2 c log(8 (patches + 1) k / delta)."""
    alpha = 2 * c * math.log(8 * (patches + 1) * filters / delta)
    return 3 * (6 + 2 * eps) * alpha * total / eps**2


def distinct(s: Tensor, m: float) -> float:
    """Expected number of distinct channels among m draws with p = s / sum(s): sum of 1 - (1 - p_j)^m."""
    p = s.double() / s.double().sum().clamp(min=1e-30)
    return float((1 - torch.exp(m * torch.log1p(-p.clamp(max=1 - 1e-12)))).sum())


@dataclass(frozen=True)
class Layer:
    """What decides how many units a group keeps: sensitivities [C], places and filters of the layers that read it."""

    units: Tensor
    s: Tensor
    patches: int
    filters: int


@dataclass(frozen=True)
class PFP:
    """Rounds of pruning by sensitivity and retraining.

    Attributes:
        c: constant of the sample's size and of alpha.
        delta: probability of failure.
        rounds: of pruning, where the dense training has `dense` epochs.
        dense: see there.
    """

    c: float = 3.0
    delta: float = 1e-16
    rounds: int = 23
    dense: int = 182

    def phases(self, task: Task) -> Iterator[Phase]:
        """A retraining after every round."""
        task.images("PFP")
        model, limits, generator = task.trained(), task.limits(), torch.Generator().manual_seed(task.recipe.seed)
        first, rounds = task.cost(model), scaled(self.rounds, self.dense, task.recipe)
        for number in range(1, rounds + 1):
            left = 1 - number / rounds
            allowed = Limits(_between(first.params, limits.params, left), _between(first.flops, limits.flops, left))
            whole = Structure(model, task)
            layers = self._layers(whole, task, generator)
            score = torch.zeros(whole.space.n_units, dtype=torch.float64)
            for layer in layers:
                score[layer.units] = layer.s.double()
            whole.cut(whole.exact(self._kept(whole, layers, score, allowed), -whole.places(score), allowed))
            yield Phase(name=f"round {number}", model=model, recipe=task.recipe)

    def _layers(self, whole: Structure, task: Task, generator: torch.Generator) -> list[Layer]:
        """What is sampled of every group; of a group with several readers the largest."""
        space, model = whole.space, whole.model
        eta = sum(space.shapes[name][0] for name in space.parameters if len(space.shapes[name]) > 1)
        sample = task.sampled(sample_size(self.c, self.delta, eta), generator)
        found: dict[int, Layer] = {}
        start = time.perf_counter()
        all_readers = judges("PFP", model, space, sample[:2])
        for reader in all_readers:
            units = torch.nonzero(space.group_of == reader.group).flatten()
            layer = self._layer(model, reader, units, sample)
            before = found.get(reader.group)
            if before is not None:
                s = torch.maximum(before.s, layer.s)
                layer = Layer(units, s, max(before.patches, layer.patches), max(before.filters, layer.filters))
            found[reader.group] = layer
        looks = len(sample) * len(all_readers)
        task.spend("sampling", task.cost(model).flops * looks, time.perf_counter() - start)
        return list(found.values())

    def _layer(self, model: nn.Module, reader: Reader, units: Tensor, sample: Tensor) -> Layer:
        """Sensitivities with one layer that reads."""
        weight, places = reader.weight(), 0
        columns, found = reader.columns(units).to(weight.device), weight.new_zeros(len(units))

        def use(x: Tensor) -> None:
            nonlocal found, places
            for part in x.split(16):  # patches are nine times as large
                patches = reader.patches(part)
                places = patches.shape[1]
                found = torch.maximum(found, sensitivity(weight, patches.flatten(0, 1), columns))

        look(model, reader.module, sample, use)
        return Layer(units, found.cpu(), places, len(weight))

    def _kept(self, whole: Structure, layers: list[Layer], score: Tensor, limits: Limits) -> Tensor:
        """The top of every group, as many as the smallest eps within the limits gives; by bisection."""
        places = whole.places(score)
        sizes = torch.bincount(whole.space.group_of, minlength=whole.space.n_groups)

        def at(eps: float) -> Tensor:
            keep = whole.space.everything()
            for layer in layers:
                size = int(sizes[whole.space.group_of[layer.units[0]]])
                m = draws(eps, float(layer.s.sum()), layer.patches, layer.filters, self.c, self.delta)
                count = max(1, math.ceil(distinct(layer.s, m)))
                keep[layer.units] = places[layer.units] * size <= count + 0.5
            return keep | ~whole.space.removable

        low, high = -12.0, 24.0  # of log eps: everything is kept at the low end, one channel at the high end
        for _ in range(60):
            middle = (low + high) / 2
            fits = bool((whole.cost(at(math.exp(middle))) <= limits.tensor()).all())
            low, high = (low, middle) if fits else (middle, high)
        return at(math.exp(high))


def _between(first: int, budget: int | None, left: float) -> int | None:
    """A cost between the budget (left = 0) and the first (left = 1), by equal factors."""
    return None if budget is None else int(budget * (first / budget) ** left)

"""MorphNet: Gordon, Eban, Nachum, Chen, Wu, Yang, Choi, CVPR 2018 (arXiv 1711.06798).

Steps: google-research/morph-net@d9286a1, with the scales of batch norms. The penalty, and which search is nearest to
the budget, are on FLOPs, or on parameters where they are all that is budgeted; the widths are then brought to both.
Units that a skip connection ties share one scale, the largest. What has no batch norm counts as alive and is not
penalised. In a recurrent network, which has none, the scale of a unit is the norm of its weights (the group of ISS)
over the mean norm in the beginning. That is ours, after the source's group lasso for layers without batch norms, which
knows no LSTM. The source widens beyond the network it began with; here no group gets wider than in the frame, and what
is left of the budget is filled up.
Cost: a dense training for every strength of the penalty. The retraining from scratch is of a structure that is final,
so the paper's rule leaves it out.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from torchgrow import Space, policies
from torchgrow.lab.baselines import initialised
from torchgrow.lab.hooks import Hooks
from torchgrow.lab.systems.iss import Groups
from torchgrow.lab.systems.structure import Structure
from torchgrow.lab.systems.system import Phase, Task, UnfitError, as_dense

Term = tuple[float, tuple[Tensor, ...]]
"""What a product of counts is worth, and the unit ids (-1: always alive) whose living positions it counts."""


def terms(space: Space, *, flops: bool) -> list[Term]:
    """What the network costs as a sum of products: FLOPs of one sample, or parameters; of those that may change."""
    if flops:
        found = [(term.constant / space.batch, term.vectors) for term in space.flops]
    else:
        found = []
        for name in space.parameters:
            axes = space.cut_axes.get(name, ())
            whole = math.prod(size for axis, size in enumerate(space.shapes[name]) if axis not in axes)
            found.append((float(whole), tuple(space.unit_of[name, axis] for axis in axes)))
    return [(worth, vectors) for worth, vectors in found if any(bool((v >= 0).any()) for v in vectors)]


def penalty(products: list[Term], scale: Tensor, alive: Tensor, scaled: Tensor) -> Tensor:
    """The cost with the sum of scales in place of the count of one factor after the other.

    Of a convolution it is c (alive_in sum |gamma_out| + alive_out sum |gamma_in|), with c = 2 H W k^2 for FLOPs and k^2
    for parameters.

    Args:
        products: see `terms`.
        scale: |gamma| of every unit, float [n].
        alive: bool [n].
        scaled: bool [n], units that have a scale; others count as alive.
    """
    total = scale.new_zeros(())
    for worth, vectors in products:
        places = [vector.clamp(min=0) for vector in vectors]
        owned = [(vector >= 0) & scaled[place] for vector, place in zip(vectors, places, strict=True)]
        living = [int((~own | alive[place]).sum()) for own, place in zip(owned, places, strict=True)]
        for i, (own, place) in enumerate(zip(owned, places, strict=True)):
            others = math.prod(living[:i] + living[i + 1 :])
            total = total + worth * others * (scale[place] * own).sum()
    return total


class Shaping(Hooks):
    """Adds strength x penalty / cost of the whole network to the loss.

    Args:
        whole: the network.
        strength: lambda, as a multiple of 1 / the initial cost.
        threshold: |gamma| above it is alive.
        flops: whether FLOPs are what costs, or parameters.

    Raises:
        UnfitError: the network has no batch norm on what may go, and no recurrent unit.
    """

    def __init__(self, whole: Structure, strength: float, threshold: float, *, flops: bool) -> None:
        self.whole, self.strength, self.threshold = whole, strength, threshold
        self.terms = terms(whole.space, flops=flops)
        self.initial = float(whole.cost(whole.space.everything())[int(flops)])
        self.scales: list[tuple[nn.Parameter, Tensor]] = []
        space = whole.space
        self.scaled = torch.zeros(space.n_units, dtype=torch.bool)
        for path, module in whole.model.named_modules():
            place = (f"{path}.weight", 0)
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and place in space.unit_of:
                vector = space.unit_of[place]
                if bool((vector >= 0).all()):
                    self.scales.append((module.weight, vector))
                    self.scaled[vector] = True
        self.groups: Groups | None = None
        if not bool((self.scaled & space.removable).any()):
            if not any(isinstance(module, nn.RNNBase) for module in whole.model.modules()):
                raise UnfitError("MorphNet reads the scales of batch norms, and there is none on what may go here")
            self.groups = Groups(whole.model, space, 1.0, 0.0)
            self.scaled = self.groups.recurrent
            self.first = self.norms()[self.scaled].mean().item()

    def norms(self) -> Tensor:
        """Norm of every recurrent unit's weights, float [n]."""
        assert self.groups is not None
        return (self.groups.squares().clamp(min=0) + 1e-8).sqrt()

    def scale(self) -> Tensor:
        """|gamma| of every unit, the largest of those that it has, or its norm over the first ones' mean; float [n]."""
        if self.groups:
            return self.norms() / self.first
        found = torch.zeros(self.whole.space.n_units, device=self.scales[0][0].device)
        for weight, vector in self.scales:
            found = found.scatter_reduce(0, vector.to(found.device), weight.abs(), "amax")
        return found

    def alive(self) -> Tensor:
        """Units (bool [n]) whose scale is above the threshold, and those that have none."""
        return (self.scale().detach().cpu() > self.threshold) | ~self.scaled

    def penalty(self) -> Tensor:
        """Of the present scales."""
        scale = self.scale()
        total = penalty(self.terms, scale.cpu(), self.alive(), self.scaled)
        return self.strength / self.initial * total.to(scale.device)


@dataclass(frozen=True)
class MorphNet:
    """A dense training with the penalty for every strength; the structure nearest to the budget is widened to it.

    Attributes:
        strengths: lambda as multiples of 1 / initial cost, on a logarithmic grid.
        threshold: |gamma| above it is alive.
    """

    strengths: tuple[float, ...] = (0.3, 1.0, 3.0)
    threshold: float = 0.01

    def phases(self, task: Task) -> Iterator[Phase]:
        """The searches, at a constant learning rate, then training from scratch."""
        limits = task.limits()
        flops = limits.flops is not None
        budget = float((limits.flops if flops else limits.params) or 0)
        constant = replace(as_dense(task.recipe), schedule="milestones", lr_milestones=(), warmup=0.0)
        best: tuple[float, Tensor, Tensor] | None = None
        for strength in self.strengths:
            torch.manual_seed(task.recipe.seed)
            model = task.network()
            shaping = Shaping(Structure(model, task), strength, self.threshold, flops=flops)
            yield Phase(name=f"search {strength:g}", model=model, recipe=constant, hooks=shaping)
            alive = shaping.alive()
            least = policies.kit.one_per_group(shaping.whole.space, alive.clone(), shaping.scale().detach().cpu())
            gap = abs(math.log(float(shaping.whole.cost(least)[int(flops)]) / budget))
            if best is None or gap < best[0]:
                best = gap, alive, shaping.scale().detach().cpu()
        assert best is not None
        model = task.network()
        whole = Structure(model, task)
        whole.cut(whole.widened(best[1], best[2], limits))
        yield Phase(name="from scratch", model=initialised(model), recipe=task.recipe, counted=False)

"""BAR: Lemaire, Achkar, Jodoin: Budget-Aware Regularization, CVPR 2019 (arXiv 1811.09332).

Steps and settings: A-LinCui/Structured-Pruning-of-Neural-Networks-with-Budget-Aware-Regularization@b48d78b, which is
unofficial. Its budget is a volume of activations. Here it is the volume at which a network that keeps the same share of
every group meets the budget; what then differs from the budget, a cut by the gates settles. Units that a skip
connection ties share a gate, and a gate scales what torchgrow would cut: the last affine map of its channel. Such a
unit counts one area once, the largest of its convolutions', where the source sums over all of them. Adam moves a gate
by about its rate a step, and 2.4 of log alpha lie between the start and closed: in fewer steps than published the rate
of gates is larger in proportion. Weight decay is of weights, not of gates.
Cost: the dense training, which is the teacher's too (the paper's rule leaves it out); gates at dense size with a
forward pass of the teacher; fine-tuning.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torchgrow import Cost, Space
from torchgrow.lab.from_recipe import extent
from torchgrow.lab.hooks import Hooks
from torchgrow.lab.systems.structure import Structure, folded
from torchgrow.lab.systems.system import Phase, Task, UnfitError, scaled, tuned

BETA, GAMMA, ZETA = 0.667, -0.1, 1.1
"""Temperature and range of the hard concrete distribution (Louizos et al., 2018)."""
CAP = 1e10
"""Of the barrier."""


def alive(log_alpha: Tensor) -> Tensor:
    """The probability of an open gate, P(z > 0) = sigmoid(log alpha - beta log(-gamma / zeta))."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def expected(log_alpha: Tensor) -> Tensor:
    """The gate in evaluation mode, without noise: in [0, 1]."""
    return (torch.sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def drawn(log_alpha: Tensor) -> Tensor:
    """The gate in training, a draw of the hard concrete distribution: in [0, 1]."""
    uniform = torch.rand_like(log_alpha).clamp(1e-6, 1 - 1e-6)
    noise = torch.log(uniform) - torch.log1p(-uniform)
    return (torch.sigmoid((noise + log_alpha) / BETA) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def barrier(volume: float, a: float, b: float) -> float:
    """How the penalty rises, f = r^2 / (1 - r) with r = (V - a) / (b - a), 0 below a, at most `CAP`; that from b on."""
    r = max(0.0, (volume - a) / (b - a)) if b > a else (0.0 if volume <= a else 1.0)
    return min(CAP, r**2 / (1 - r)) if r < 1 else CAP


def allowed(progress: float, first: float, last: float, slope: float = 10.0) -> float:
    """The falling budget b: along a sigmoid from the first volume (progress 0) to the last (1)."""
    low = 1 / (1 + math.exp(slope / 2))
    p = (1 / (1 + math.exp(slope * (0.5 - progress))) - low) / (1 - 2 * low)
    return (1 - p) * first + p * last


class Gated(nn.Module):
    """A network whose units are scaled by gates.

    Args:
        model: the network.
        space: its units, n of them.
    """

    def __init__(self, model: nn.Module, space: Space) -> None:
        super().__init__()
        self.model, self.space = model, space
        self.log_alpha = nn.Parameter(torch.zeros(space.n_units, device=next(model.parameters()).device))

    def gates(self) -> Tensor:
        """Of every unit, float [n]; 1 of those that must stay."""
        z = drawn(self.log_alpha) if self.training else expected(self.log_alpha)
        return torch.where(self.space.removable.to(z.device), z, 1.0)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        scores: Tensor = functional_call(self.model, folded(self.model, self.space, self.gates()), (x,))
        return scores


class Barrier(Hooks):
    """The penalty on the volume of activations, under a budget that falls.

    Args:
        gated: the network.
        areas: of every unit, float [n]: places of its activation, per image.
        cost: of the network, which stays at dense size.
        target: the volume in the end.
        epochs: until then.
        strength: lambda, of a batch.
        margin: by which `a` lies below the target, as a share of the first volume.
    """

    def __init__(
        self, gated: Gated, areas: Tensor, cost: Cost, target: float, epochs: int, strength: float, margin: float
    ) -> None:
        self.gated, self.areas, self.whole, self.target = gated, areas, cost, target
        self.epochs, self.strength = epochs, strength
        self.first = float(areas.sum())
        self.a, self.done = target - margin * self.first, 0.0

    def volume(self) -> float:
        """Of what is open, V = sum of 1[E z > 0] x area."""
        z = torch.where(self.gated.space.removable, expected(self.gated.log_alpha.detach().cpu()), 1.0)
        return float((self.areas * (z > 0)).sum())

    def penalty(self) -> Tensor:
        """Strength x f(V, a, b) x sum of P(z > 0) x area."""
        b = allowed(min(1.0, self.done / self.epochs), 1.01 * self.first, self.target)
        areas = (self.areas * self.gated.space.removable).to(self.gated.log_alpha)
        return self.strength * barrier(self.volume(), self.a, b) * (alive(self.gated.log_alpha) * areas).sum()

    def stepped(self, done: float) -> None:
        """The budget falls with the epochs that are done."""
        self.done = done

    def cost(self) -> Cost:
        """Of the dense size, without the gates."""
        return self.whole

    def state_dict(self) -> dict[str, float]:
        """How far the budget has fallen."""
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from there."""
        self.done = state["done"]


def areas_of(model: nn.Module, space: Space, x: Tensor) -> Tensor:
    """Places of every unit's activations in one image, float64 [n]: of its gates' modules, the most."""
    found = torch.zeros(space.n_units, dtype=torch.float64)
    handles = []
    for (name, _), vector in space.fold.items():
        module = model.get_submodule(name.rpartition(".")[0])

        def note(_: nn.Module, inputs: tuple[Tensor, ...], out: object, vector: Tensor = vector) -> None:
            if isinstance(out, Tensor):
                units = vector[vector >= 0]
                found[units] = found[units].clamp(min=out.numel() / len(out) / vector.numel())

        handles.append(module.register_forward_hook(note))
    try:
        with torch.no_grad():
            model.eval()(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


@dataclass(frozen=True)
class BAR:
    """Gates under a barrier, with the dense network as teacher; cut; fine-tuning.

    Attributes:
        gates: epochs of training with gates, where the dense training has `dense`.
        last: epochs of fine-tuning.
        drop: share of these after which the rate is a tenth.
        dense: see there.
        strength: lambda, over a batch.
        margin: see `Barrier`.
        lr: of Adam; for gates in so many `steps`.
        steps: see there.
        decay: weight decay of Adam, of weights alone.
        clip: largest norm of all gradients.
        distil: share of the teacher in the loss, at temperature 4.
        smallest: gate that a unit begins with that was closed and still fits into the budget.
    """

    gates: int = 80
    last: int = 50
    drop: float = 0.8
    dense: int = 90
    strength: float = 1e-5
    margin: float = 1e-4
    lr: float = 1e-3
    steps: int = 62_560
    decay: float = 5e-4
    clip: float = 5.0
    distil: float = 0.9
    smallest: float = 0.01

    def phases(self, task: Task) -> Iterator[Phase]:
        """Training with gates, then fine-tuning."""
        task.images("BAR")
        model, limits = task.trained(), task.limits()
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
        whole = Structure(model, task)
        areas = areas_of(model, whole.space, task.data.example())
        if not bool((areas > 0)[whole.space.removable].any()):
            raise UnfitError("BAR limits the volume of activations, and no channel here has one")
        gated, first = Gated(model, whole.space), task.cost(model)
        alike = whole.within(torch.zeros(whole.space.n_units), limits)
        target = float((areas * alike).sum())
        epochs = scaled(self.gates, self.dense, task.recipe)
        barrier = Barrier(gated, areas, first, target, epochs, self.strength / task.recipe.batch_size, self.margin)
        recipe = replace(tuned(task.recipe, epochs, 1.0), clip=self.clip)
        # A recipe has a teacher only where it begins with weights; these are the dense network's.
        learning = replace(recipe, weights="dense", distil=self.distil)
        steps = epochs * extent(model, task.data, task.recipe)[0]
        groups: list[dict[str, Any]] = [
            {"params": model.parameters()},
            {"params": [gated.log_alpha], "lr": self.lr * max(1.0, self.steps / steps), "weight_decay": 0.0},
        ]
        adam = torch.optim.Adam(groups, lr=self.lr, weight_decay=self.decay)
        yield Phase(name="gates", model=gated, recipe=learning, hooks=barrier, teacher=teacher, optimizer=adam)
        log_alpha = gated.log_alpha.detach().cpu().double()
        z = torch.where(whole.space.removable, expected(log_alpha), 1.0)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            gates = z.clamp(min=self.smallest).to(gated.log_alpha)
            for name, weight in folded(model, whole.space, gates).items():
                parameters[name].copy_(weight)
        whole.cut(whole.exact(z > 0, log_alpha, limits))
        adam = torch.optim.Adam(model.parameters(), lr=self.lr, weight_decay=self.decay)
        last = replace(
            tuned(task.recipe, scaled(self.last, self.dense, task.recipe), 1.0, (self.drop,)), clip=self.clip
        )
        yield Phase(name="fine-tuning", model=model, recipe=last, optimizer=adam)

"""What is reported before a run: how the budget will be reached, and whether the model looks trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..renamed import frames_to_user
from ..structure.cost import Cost, CostModel
from ..structure.limits import Budget, Limits

OUTLIER = 1.25
"""Largest singular value over what independent random entries of that size and spread give. Fresh networks of
torchvision and our own have 0.86 to 1.02; small ones trained for ten epochs 1.3 to 2.1 in half of their matrices."""

SMALLEST_SIDE, LARGEST_MATRIX, MATRICES = 8, 2**22, 12
"""Sizes of the matrices that are tested: not too small to be informative, not too large to be fast."""


@dataclass(frozen=True)
class Course:
    """How the cost goes over a run, in parameters or FLOPs of one sample."""

    unit: str  # "parameters" or "FLOPs"
    frame: int  # the whole model
    seed: int  # what the run starts from
    peak: int | None  # the most that is planned on the way; None where nothing is planned (the paper's controller)
    end: int  # the budget
    full_size: int | None  # the update at which the network has reached its peak; None likewise
    settled: int  # the update from which on the structure is final
    updates: int  # in the run

    def __str__(self) -> str:
        share = [f"{100 * cost / max(1, self.frame):.3g} %" for cost in (self.seed, self.peak or 0, self.end)]
        way = f"from {share[0]} of the {self.unit} to {share[2]}"
        if self.peak is None:
            return f"{way}, on no planned way; the structure is final after update {self.settled} of {self.updates}"
        over = f" by way of {share[1]}" if self.peak > max(self.seed, self.end) else ""
        return (
            f"{way}{over}, at its largest after {self.full_size} of {self.updates} updates, final after {self.settled}"
        )


def course(
    seed: Tensor, planned: Callable[[int], Tensor | None], frame: Cost, limits: Limits, settled: int, updates: int
) -> Course:
    """The course of a run in what its budget limits first.

    `seed` and, by update, `planned` are parameters and FLOPs, int64 [2]; None where nothing is planned. With more than
    1,000 updates only some of them are looked at.
    """
    which = 0 if limits.params is not None else 1
    end = limits.params if limits.params is not None else limits.flops
    assert end is not None
    numbers = (*range(0, updates, 1 + updates // 1000), updates)
    costs = {number: int(cost[which]) for number in numbers if (cost := planned(number)) is not None}
    peak = max(costs.values(), default=None)
    return Course(
        unit=("parameters", "FLOPs")[which],
        frame=(frame.params, frame.flops)[which],
        seed=int(seed[which]),
        peak=peak,
        end=end,
        full_size=next((number for number, cost in costs.items() if cost == peak), None),
        settled=settled,
        updates=updates if costs else settled,
    )


def summary(name: str, budget: Budget, way: Course, costs: CostModel, keep: Tensor, done: int) -> str:
    """A run on one screen, after `done` updates: what it starts from and ends at, what grows, what stays and why."""
    space = costs.space
    now, frame = costs.cost(keep), costs.cost(space.everything())
    widths, full = space.widths(keep), space.widths(space.everything())
    lines = [
        f"{name}: {frame.params:,} parameters, {frame.flops:,} FLOPs a sample (2 x MACs; of {space.batch} in the "
        f"example); budget {budget}",
        f"  goes   {way}",
        f"  now    {now.params:,} parameters ({now.params / max(1, frame.params):.2%}), {now.flops:,} FLOPs "
        f"({now.flops / max(1, frame.flops):.2%}), after {done} updates",
        f"  grows  {sum(full.values()):,} units in {len(full)} groups, {sum(widths.values()):,} of them live",
    ]
    lines += [f"         {group}: {widths.get(group, 0)} of {count}" for group, count in list(full.items())[:_MOST]]
    lines += [f"         and {len(full) - _MOST} more groups: see widths()"] * (len(full) > _MOST)
    reasons = list(dict.fromkeys(map(str, space.frozen)))
    lines += [f"  stays  {reason}" for reason in reasons[:_MOST]]
    lines += [f"         and for {len(reasons) - _MOST} more reasons: see space.frozen"] * (len(reasons) > _MOST)
    return "\n".join(lines)


_MOST = 12


def warn_if_trained(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], keep: Tensor) -> bool:
    """Whether a model looks trained. Warns if it is about to be cut to a seed, `keep`, and says what else to do."""
    sign = trained(model, optimizers)
    if sign and not bool(keep.all()):
        warnings.warn(
            f"{type(model).__name__} looks trained ({sign}), and growing starts from a seed of it: what it computes "
            "now is lost at once, and its weights come back only as units return. To start from all of it and shrink "
            'it, use Grower(..., start="frame"); to grow from scratch, build the model anew. If it '
            "is meant so, silence this with warnings.filterwarnings('ignore', message='.*looks trained')",
            UserWarning,
            stacklevel=frames_to_user(),
        )
    return bool(sign)


def trained(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer] = ()) -> str:
    """Why a model looks trained, in words; "" if it does not, or lies on the meta device.

    The signs: an optimizer has stepped; a batch norm has seen batches; or a quarter of the weight matrices have a
    singular value far above those of random matrices (Marchenko and Pastur, 1967), since gradients have low rank.
    """
    if any(_stepped(parameter, state) for one in optimizers for parameter, state in one.state.items()):
        return "its optimizer has stepped"
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] == "num_batches_tracked" and not buffer.is_meta and bool(buffer.any()):
            return f"{name} is {int(buffer)}"
    matrices = [p.detach() for p in model.parameters() if p.dim() > 1 and not p.is_meta and p.is_floating_point()]
    matrices = [p.flatten(1) for p in matrices if p.numel() <= LARGEST_MATRIX]
    seen = [x for p in matrices[:: 1 + len(matrices) // MATRICES] if (x := outlier(p)) is not None]
    far = sum(x > OUTLIER for x in seen)
    return f"{far} of {len(seen)} weight matrices are far from random ones" if far * 4 >= len(seen) > 0 else ""


def _stepped(parameter: Any, state: dict[str, Any]) -> bool:
    """Whether the state of a parameter shows a step; some optimizers create it, copies too, before the first one."""
    if "step" in state:
        return float(state["step"]) > 0
    slots = [slot for slot in state.values() if isinstance(slot, Tensor) and bool(slot.any())]
    return any(slot.shape != parameter.shape or not torch.equal(slot.to(parameter), parameter) for slot in slots)


@torch.no_grad()
def outlier(matrix: Tensor) -> float | None:
    """Largest singular value over that of a random matrix of the same size and spread; None if the size is no use."""
    rows, columns = matrix.shape
    if min(rows, columns) < SMALLEST_SIDE:
        return None
    matrix = matrix.float() - matrix.float().mean()
    spread = float(matrix.std())
    if not spread > 0:
        return None
    vector = torch.linspace(-0.5, 0.5, columns, dtype=matrix.dtype, device=matrix.device)
    vector = torch.ones_like(vector) / columns**0.5 + vector
    largest = 0.0
    for _ in range(12):  # of power iteration: a lower bound of the largest, near enough here
        image = matrix.T @ (matrix @ (vector / vector.norm()))
        largest, vector = float(image.norm()) ** 0.5, image
    return largest / (spread * (rows**0.5 + columns**0.5))

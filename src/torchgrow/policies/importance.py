"""How much a unit matters: pure functions of one signature, named as in the papers they are from.

Each takes a run (`View`) and the running mean of (dL/dm)^2, float64 [n], and returns a number for every unit, float64
[n], not negative; for absent ones 0. Numbers of one group compare; between groups only where the docstring says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..errors import TorchgrowError
from ..structure.space import Space, has_units, live_positions
from .kit import pools
from .policy import View

Importance = Callable[[View, Tensor], Tensor]

ROWS = 0
"""The axis of a weight matrix on which the outputs lie: of convolutions, linear and recurrent layers."""


def taylor(view: View, squared: Tensor) -> Tensor:
    """(dL/dm)^2, by which the loss would rise without the unit, to first order (Molchanov et al., 2019, Eq 8).

    A running mean over the steps of training, so it costs nothing more. Between groups it compares as it is.
    """
    return torch.where(view.space.present(view.keep), squared, 0.0)


def l1(view: View, squared: Tensor) -> Tensor:
    """Sum of absolute weights that make the unit (Li et al., 2017)."""
    return _rows(view, 1)


def l2(view: View, squared: Tensor) -> Tensor:
    """Root of the sum of squared weights that make the unit (He et al., 2018)."""
    return _rows(view, 2).sqrt()


def group_norm(view: View, squared: Tensor) -> Tensor:
    """Root of the sum of squares of the unit's parameters (Fang et al., 2023, 3.3).

    Each tensor's sum is divided by its mean over units, so groups can be compared.
    """
    total = torch.zeros(view.space.n_units, dtype=torch.float64)
    for part in _sums(view, 2, lambda name, axis: True):
        seen = part > 0
        total += part / part[seen].mean() if bool(seen.any()) else 0.0
    return total.sqrt()


def bn_scale(view: View, squared: Tensor) -> Tensor:
    """Absolute scales of the batch norms on the unit's channels (Liu et al., 2017); `l1` of units that have none.

    Raises:
        TorchgrowError: the model has no batch norm on what may go.
    """
    shapes = view.space.shapes
    norms = [name for name in view.space.parameters if name.rpartition(".")[0] + ".running_var" in shapes]

    def scales(name: str, axis: int) -> bool:
        return name in norms and name.endswith("weight")

    normed = _added(view, _sums(view, 0, scales)) > 0
    if not bool(normed.any()):
        raise TorchgrowError(
            'importance "bn_scale" reads the scales of batch norms, and there is none on what may be removed here; '
            f"use one of {', '.join(name for name in IMPORTANCES if name != 'bn_scale')}"
        )
    return torch.where(normed, _added(view, _sums(view, 1, scales)), l1(view, squared))


def random(view: View, squared: Tensor) -> Tensor:
    """A uniform number in (0, 1): the baseline for all others."""
    drawn = torch.rand(view.space.n_units, generator=view.generator, dtype=torch.float64)
    return torch.where(view.space.present(view.keep), drawn, 0.0)


IMPORTANCES: dict[str, Importance] = {
    function.__name__: function for function in (taylor, l1, l2, group_norm, bn_scale, random)
}


def levelled(view: View, importance: Tensor) -> Tensor:
    """Importance as a multiple of its mean over what lives of each pool, so that all pools weigh the same."""
    found, present = importance.clone(), view.space.present(view.keep)
    for pool in pools(view.space):
        mean = importance[pool][present[pool]].mean() if bool(present[pool].any()) else importance.new_zeros(())
        if mean > 0:
            found[pool] = importance[pool] / mean
    return found


def steepness(view: View, rank: Tensor, rises: Mapping[str, float]) -> Tensor:
    """How much the loss rises with the next unit of every pool, float64 [n], from measured `rises`.

    A loss that rises by a (q / 0.1)^2 with the share q of a pool of n that went rises by 2 a q / (0.1^2 n) with one
    unit more: the least important go first, and further where a is small.

    Args:
        view: of the run.
        rank: as of `torchgrow.policies.Shrink`, the best lowest.
        rises: a by the name of a group or stage; below a thousandth of the largest, it is that.

    Raises:
        TorchgrowError: a group or stage has no rise.
    """
    named = dict(zip(names_of(view.space), pools(view.space), strict=True))
    named = {name: pool for name, pool in named.items() if bool(view.space.removable[pool].any())}
    if lost := sorted(named.keys() - rises.keys()):
        raise TorchgrowError(
            f"rises has no number for {', '.join(lost[:5])}; measure this model: "
            "rises = torchgrow.measure_rises(model, example_inputs, evaluate)"
        )
    least, found = 1e-3 * max(*rises.values(), 1e-12), torch.zeros_like(rank)
    for name, pool in named.items():
        found[pool] = max(rises[name], least) * (1 - rank[pool]) / pool.numel()
    return found


def names_of(space: Space) -> list[str]:
    """Of every one of `pools`: the name of its group, or of its stage."""
    groups = [space.group_names[int(space.group_of[pool[0]])] for pool in pools(space)]
    stages = list(dict.fromkeys(block.stage for block in space.blocks))
    return groups[: len(groups) - len(stages)] + stages


def _rows(view: View, power: int) -> Tensor:
    """Summed over what makes a unit: rows of matrices it lives on; of units without any, all their parameters."""
    shapes = view.space.shapes
    rows = _added(view, _sums(view, power, lambda name, axis: axis == ROWS and len(shapes[name]) > 1))
    return torch.where(rows > 0, rows, _added(view, _sums(view, power, lambda name, axis: True)))


def _added(view: View, parts: list[Tensor]) -> Tensor:
    return sum(parts, torch.zeros(view.space.n_units, dtype=torch.float64))


@torch.no_grad()
def _sums(view: View, power: int, wanted: Callable[[str, int], bool]) -> list[Tensor]:
    """For every wanted axis of a parameter the sum of |w|^power by unit, float64 [n]; a layer has the mean below it.

    Computed in parts, since a float64 copy of a large parameter would not fit into memory.

    Raises:
        TorchgrowError: a parameter is not finite.
    """
    space, n, found = view.space, view.space.n_units, []
    weights = view.weights()
    for name in space.cut_axes:
        if name not in space.parameters or space.absent(name, view.keep):
            continue
        own = weights[name].detach()
        if not bool(own.isfinite().all()):
            raise TorchgrowError(
                f"{name} holds NaN or infinite numbers, so nothing says which of its units matter; take weights from "
                "before the training diverged"
            )
        for axis in (axis for axis in space.cut_axes[name] if wanted(name, axis)):
            vector = space.unit_of[name, axis]
            if not has_units(vector):
                continue
            live = vector[live_positions(vector, view.keep)]
            total = torch.zeros(n + 1, dtype=torch.float64)  # the last entry is of positions that no unit owns
            found.append(total.index_add_(0, torch.where(live < 0, n, live), _along(own, axis, power))[:n])
        if name in space.block_of and own.numel():
            part = torch.zeros(n, dtype=torch.float64)
            part[space.block_of[name]] = float(_along(own.reshape(1, -1), 0, power)) / own.numel()
            found.append(part)
    return found


def _along(tensor: Tensor, axis: int, power: int) -> Tensor:
    """Sums of |x|^power over all axes but one, float64 on the host; of power 0 how many are summed."""
    if not power:
        return torch.full((tensor.shape[axis],), tensor.numel() / max(1, tensor.shape[axis]), dtype=torch.float64)
    rows = tensor.movedim(axis, 0)
    at_once = max(1, 2**20 // max(1, rows[0].numel() if len(rows) else 1))  # about a million entries are converted
    parts = [row.reshape(len(row), -1).double().abs().pow(power).sum(1) for row in rows.split(at_once)]
    return torch.cat(parts).cpu()

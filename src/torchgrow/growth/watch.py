"""Checks that the network is trained by the given optimizers, and by no other.

Steps of an unknown optimizer would not move the indicators, and its slots would not be cut. It is detected by its
effect: weights have changed although the optimizer that holds them took no step.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import OptimizerError, TrainingError
from ..exchange import Exchange
from ..structure.space import Space


class Watch:
    """Watches the weights from one change of structure to the next; those that no optimizer holds, if they can be cut.

    Raises:
        OptimizerError: no optimizer holds a trainable parameter that can be cut.
    """

    def __init__(
        self, space: Space, optimizers: Sequence[torch.optim.Optimizer], parameters: Mapping[str, nn.Parameter]
    ) -> None:
        self._optimizers, self._parameters = optimizers, parameters
        self._cut = {name for name in parameters if _can_change(space, name)}
        self._norms: dict[str, float] = {}
        loose = self._loose()
        if loose:
            raise OptimizerError(
                f"{_listed(loose)} can be cut and requires grad, but no optimizer given to Grower holds it. Pass all "
                "that train the model as a list: Grower(model, [first, second], ...); if none trains it, say so: "
                f"model.get_parameter({loose[0]!r}).requires_grad_(False)"
            )

    def begin(self, exchange: Exchange, contents: Mapping[str, Tensor]) -> None:
        """Have `exchange` remember the weights after the change; `contents`: of all parameters, raw where gated."""
        exchange.fields(self, _norms=_norms(contents))

    def check_trained(self, contents: Mapping[str, Tensor], taken: Sequence[int]) -> None:
        """Raise if another optimizer has trained the network since `begin`, since when each has taken so many steps.

        Raises:
            TrainingError: weights have changed though the optimizer that holds them took no step, or no given one does.
        """
        if all(taken) and not self._loose():
            return
        now, names = _norms(contents), {id(p): name for name, p in self._parameters.items()}
        # Compared as text, in which NaN is equal to itself.
        moved = {name for name, norm in now.items() if repr(norm) != repr(self._norms.get(name, norm))}
        for i, (optimizer, steps) in enumerate(zip(self._optimizers, taken, strict=True)):
            held = [names[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in names]
            strange = [] if steps else [name for name in held if name in moved]
            if strange:
                which = f" (number {i} of the list)" if len(taken) > 1 else ""
                raise TrainingError(
                    f"{_listed(strange)} changed since the last update, but the {type(optimizer).__name__}{which} that "
                    "Grower was given took no step: another optimizer trains the network, whose steps the grower does "
                    "not see and whose state it cannot cut. Go on with the one that was given (new settings go into "
                    "optimizer.param_groups), and take a step with it before update(). Weights that are to be others, "
                    "such as the best ones, come in by model.load_state_dict. Nothing was changed"
                )
        strange = [name for name in self._loose() if name in moved]
        if strange:
            raise TrainingError(
                f"{_listed(strange)} changed since the last update, but no optimizer given to Grower holds it: the "
                "state of the one that trains it cannot be cut along. Pass all optimizers as a list: "
                "Grower(model, [first, second], ...). Nothing was changed"
            )

    def _loose(self) -> list[str]:
        """Parameters that can be cut and are trainable, but that no given optimizer holds."""
        held = {id(p) for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]}
        return [n for n, p in self._parameters.items() if n in self._cut and p.requires_grad and id(p) not in held]


def warn_idle(optimizers: Sequence[torch.optim.Optimizer], taken: Sequence[int], moved: bool) -> None:
    """Warn if nothing was learned since the last update: no steps were taken, or the indicators have not moved."""
    if not any(taken):
        warnings.warn(
            "no optimizer that Grower was given took a step since the last update. Is a copy of the network trained "
            "(one made by deepcopy or by a wrapper), or was optimizer.step() forgotten? Where a GradScaler skipped "
            "every step because gradients overflowed, this is nothing to worry about",
            stacklevel=4,
        )
    elif not moved and not all(taken):
        still = [f"{type(o).__name__} (number {i})" for i, o in enumerate(optimizers) if not taken[i]]
        warnings.warn(
            f"the indicators did not move since the last update: they wait for a step of {', '.join(still)} of the "
            "list that Grower was given. Step all of them between two updates",
            stacklevel=4,
        )


def warn_spread(model: nn.Module, space: Space) -> None:
    """Warn that a full-size copy of the frame was averaged with the seed, so that one unit was broadcast over a layer.

    To be called once, before the first change of a seed: it looks at every object of the model's class in the process.
    """
    live = dict(model.named_parameters())
    spread = [
        (name, axis)
        for name, axes in space.cut_axes.items()
        for axis in axes
        if name in live and live[name].numel() and axis >= 0 and live[name].shape[axis] == 1 < space.shapes[name][axis]
    ]
    for other in gc.get_referrers(type(model)) if spread else ():
        if type(other) is not type(model) or other is model or "_parameters" not in vars(other):
            continue
        found = dict(other.named_parameters())
        for name, axis in spread:
            tensor = found.get(name)
            if tensor is None or tuple(tensor.shape) != space.shapes[name] or tensor.is_meta:
                continue
            values = tensor.detach()
            alike = bool((values == values.narrow(axis, 0, 1)).all())
            if alike and not bool((values == values.flatten()[0]).all()):  # nor initialised with one constant
                warnings.warn(
                    f"all {values.shape[axis]} units of {name} (axis {axis}) are alike in another "
                    f"{type(model).__name__} of the frame's size: PyTorch averages other sizes by broadcasting, "
                    "without an error. Call grower.follow(average) right after Grower(...), before its first update",
                    stacklevel=4,
                )
                return


def _can_change(space: Space, name: str) -> bool:
    """Whether a tensor has removable units."""
    places = [space.unit_of[name, axis] for axis in space.cut_axes.get(name, ()) if (name, axis) in space.unit_of]
    units = torch.cat([torch.tensor([space.block_of.get(name, -1)]), *(vector.flatten() for vector in places)])
    return bool(space.removable[units[units >= 0]].any())


def _norms(contents: Mapping[str, Tensor]) -> dict[str, float]:
    """One number per tensor, which shows whether the tensor has changed."""
    with torch.no_grad():
        real = [torch.view_as_real(x.detach()) if x.is_complex() else x.detach() for x in contents.values()]
    norms = [torch.linalg.vector_norm(x, dtype=torch.float64).cpu() for x in real]
    return dict(zip(contents, torch.stack(norms).tolist() if norms else [], strict=True))


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")

"""A run inside the training loop of another framework: the part that all callbacks share."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TorchgrowError
from ..growth.grower import Grower
from ..persistence.portable import ASIDE, KEY, portable_
from ..structure.limits import Budget

log = logging.getLogger("torchgrow")
SPANS = 10
"""Updates at least, where one an epoch would be too few and the steps allow for them."""


def put_aside_(model: nn.Module) -> None:
    """Have the next state dicts of another structure put aside, and the model keep what it has."""
    vars(portable_(model)).setdefault(ASIDE, {})


def aside(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that was put aside, by names of the module; further state dicts are loaded again."""
    return vars(model).pop(ASIDE, {})


class BorrowedLoop:
    """Begins, updates and ends the growth of one model, over any number of calls of `fit` or `train`.

    Args:
        budget: what the network may cost in the end.
        updates: planned updates; None for as many as the loop has epochs (or spans of `every_n_steps`).
        every_n_steps: optimizer steps between two updates; None for one update an epoch.
        settings: further arguments of `Grower`.

    Attributes:
        grower: of the run; None before it begins.
    """

    def __init__(
        self, budget: Budget, updates: int | None, every_n_steps: int | None, settings: dict[str, Any]
    ) -> None:
        if every_n_steps is not None and (type(every_n_steps) is not int or every_n_steps < 1):
            raise TorchgrowError(
                f"every_n_steps={every_n_steps!r} must be a whole number >= 1: optimizer steps between two updates"
            )
        self.budget, self.updates, self.every_n_steps, self.settings = budget, updates, every_n_steps, settings
        self.grower: Grower | None = None
        self.offset = 0  # updates that were made before the loop began to count

    def wait(self, *models: nn.Module) -> None:
        """Keep models at full size when the loop loads a checkpoint into them before the run begins."""
        if self.grower is None:
            for model in models:
                put_aside_(model)

    def plan(self, epochs: int | None, steps: int | None) -> int | None:
        """Updates that the loop has room for; where epochs give no room, they come every few steps from now on.

        The last update of a run comes when the loop ends, so that a plan of one trains nothing but the seed.

        Args:
            epochs: of the loop; None if it cannot say.
            steps: of the optimizer, in the whole loop; None if it cannot say.

        Returns:
            Epochs, or spans of `every_n_steps`; None if the loop cannot say.

        Warns:
            UserWarning: `every_n_steps` is too long for this loop.
        """
        every = self.every_n_steps
        room = epochs if every is None else None if steps is None else steps // every
        if room is None or room > 1 or not steps:
            return room
        enough = max(1, steps // SPANS)
        if every is not None:
            warnings.warn(
                f"this training of {steps} optimizer steps has room for {room} updates with every_n_steps={every}: the "
                f"structure changes only when it ends, and nothing trains it. Give every_n_steps={enough} or less",
                stacklevel=2,
            )
        elif steps > 1:
            self.every_n_steps, room = enough, steps // enough
            log.warning(
                "this training has one epoch, so updates come every %d of its %d optimizer steps; every_n_steps= of "
                "GrowCallback sets another distance",
                enough,
                steps,
            )
        return room

    def begin(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        example_inputs: Any,
        planned: int | None,
        followers: Sequence[nn.Module] = (),
    ) -> dict[str, Any]:
        """Begin a run, or resume that of the last call of the loop; a finished run stays finished.

        Args:
            model: what grows.
            optimizers: of it.
            example_inputs: as for `Grower`.
            planned: what `plan` returned; None also where `updates` was given or the run has begun.
            followers: averages of the model.

        Returns:
            The state dict that the loop has tried to load into the model meanwhile; empty if there was none.

        Raises:
            TorchgrowError: nothing says how many updates there will be.
        """
        found = aside(model)
        for follower in followers:
            aside(follower)
        before = self.grower
        state: dict[str, Any] | None = None
        if before is not None and before.model is model:
            if before.finished or all(a is b for a, b in zip(before.optimizers, optimizers, strict=False)):
                return found
            self.offset += len(before.history) - 1 - self.offset
            state = before.release()
        updates = self.updates if before is None else before.updates
        if updates is None and planned is None:
            raise TorchgrowError(
                "nothing says how many updates this training has room for: its data has no length, or only time ends "
                "it. Say how many you plan, GrowCallback(..., updates=20), and every_n_steps if there are no epochs"
            )
        self.grower = Grower(
            model,
            list(optimizers),
            example_inputs=example_inputs,
            budget=self.budget,
            updates=max(1, planned or 0) if updates is None else updates,
            **self.settings,
        )
        for follower in followers:
            self.grower.follow(follower)
        if state is not None:
            self.grower.load_state_dict(state)
        return found

    def update(self, due: int) -> bool:
        """Update if the loop has come to an update that was not made; whether the structure changed.

        Args:
            due: how many epochs, or spans of `every_n_steps`, the loop has behind it.
        """
        grower = self.grower
        if grower is None or grower.finished or len(grower.history) - 1 >= due + self.offset:
            return False
        before = grower.keep
        grower.update()
        return not torch.equal(before, grower.keep)

    def end(self) -> None:
        """Bring the network to its budget.

        Warns:
            UserWarning: the loop ended so early that units came only now.
        """
        grower = self.grower
        if grower is None or grower.finished:
            return
        made = len(grower.history) - 1
        born = grower.finish().born
        if born:
            fits = f"Plan as many as it makes, GrowCallback(..., updates={made + 1}) or fewer, and" if made else "Give"
            warnings.warn(
                f"training ended after {made} of {grower.updates} planned updates: {born:,} of "
                f"{int(grower.keep.sum()):,} units came only now and are untrained. {fits} every_n_steps= where epochs "
                "are few",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """The run as plain data; empty before it begins."""
        return {} if self.grower is None else {"grower": self.grower.state_dict(), **self.place()}

    def place(self) -> dict[str, Any]:
        """Where the loop stands, beside the state of the grower."""
        return {"offset": self.offset, "every_n_steps": self.every_n_steps}

    def go_on(self, place: dict[str, Any]) -> None:
        """Take over the `place` of a saved loop; `every_n_steps` of the user's, if given, stays."""
        self.offset = place["offset"]
        if self.every_n_steps is None:
            self.every_n_steps = place.get("every_n_steps")

    def check_same(self, found: dict[str, Any], where: str) -> None:
        """Refuse weights that are not those of the run that was loaded.

        Raises:
            TorchgrowError: the message names a tensor.
        """
        assert self.grower is not None
        own = self.grower.model.state_dict()
        other = [n for n, x in own.items() if n in found and not torch.equal(x.cpu(), found[n].to(x.dtype).cpu())]
        if other:
            raise TorchgrowError(
                f"the growth in {where} is not that of the checkpoint the weights are from: "
                f"{'the structure' if other[0].endswith(KEY) else other[0]} differs. Name the folder it was saved in: "
                "GrowCallback(..., resume_from=folder)"
            )


def one_process(size: int, loop: str) -> None:
    """Refuse several processes: the loop wraps the model once, and such a wrapper does not survive an update.

    Raises:
        TorchgrowError: there are several.
    """
    if size > 1:
        raise TorchgrowError(
            f"GrowCallback grows in one process, {loop} has {size}: it wraps the model once, and an update makes that "
            "wrapper invalid. Train on one device, or write the loop yourself with grower.wrap() (docs/distributed.md)"
        )

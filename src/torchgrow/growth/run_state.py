"""The state of a run beside weights, policy and optimizers: saved, checked and loaded as one."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import SavedModelError, StructureError, TorchgrowError
from ..persistence.plain_data import Field
from ..policies import Policy
from ..structure.cost import CostModel
from ..structure.space import Space
from .event import Event, read_event


@dataclass
class RunState:
    """What changes in a run, beside network, policy and optimizers."""

    generator: torch.Generator  # of all draws
    before: Tensor  # bool [n], the structure before the last change
    ever: Tensor  # bool [n], units that were present at some time
    initial_lr: float  # highest learning rate at the start of the run or since
    history: list[Event]  # an event for the seed and one for every update
    finished: bool = False  # whether the structure is final
    early: bool = False  # whether `finish()` ended the run, before `update()` could
    released: bool = False  # whether `release()` did, so that another run continues from its state; not saved

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain data, copied."""
        return {
            "generator": self.generator.get_state(),
            "before": self.before.clone(),
            "ever": self.ever.clone(),
            "initial_lr": self.initial_lr,
            "history": [asdict(event) for event in self.history],
            "finished": self.finished,
            "early": self.early,
        }

    def rate(self, optimizer: torch.optim.Optimizer) -> float:
        """Present over full learning rate of the weights.

        The full rate is the `max_lr` of the optimizer's group, as a one-cycle schedule notes it, else the highest rate
        so far. With the first rate alone, a schedule that starts low would scale the indicators' rate far above 1. It
        is above 1 only where a step goes beyond a `max_lr`, as one of a larger batch may.
        """
        first = optimizer.param_groups[0]
        rate = float(first.get("lr") or 0.0)
        self.initial_lr = max(self.initial_lr, rate)
        full = float(first.get("max_lr") or 0.0) or self.initial_lr
        return rate / full if full else 1.0

    def check_released(self) -> None:
        """Refuse (`TorchgrowError`) to go on with a run that was released."""
        if self.released:
            raise TorchgrowError(
                "this run was released: the whole frame is back, and the state that release() returned goes on in "
                "another Grower of the same model, by other.load_state_dict(state)"
            )

    @classmethod
    def read(cls, saved: dict[str, Field], costs: CostModel, keep: Tensor, updates: int) -> RunState:
        """The checked result of `state_dict`, whose last event must describe the structure `keep` (bool [n]).

        Raises:
            SavedModelError: a field is damaged; the message names it.
        """
        finished, units = saved["finished"].flag(), (costs.space.n_units,)
        before, ever = (saved[name].tensor(units, torch.bool).cpu().clone() for name in ("before", "ever"))
        history = [read_event(entry) for entry in saved["history"].items()]
        cost, widths = costs.cost(keep), costs.space.widths(keep)
        numbered = [event.update for event in history] == list(range(len(history)))
        last = history[-1] if history else None
        fits = last is not None and (last.params, last.flops, last.widths) == (cost.params, cost.flops, widths)
        if not fits or not numbered or len(history) > updates + finished:
            saved["history"].refuse(f"events 0 to at most {updates}, the last one of the structure {widths}")
        return cls(
            generator=torch.Generator().set_state(saved["generator"].generator()),
            before=before,
            ever=ever,
            initial_lr=saved["initial_lr"].number(low=0),
            history=history,
            finished=finished,
            early=saved["early"].flag() if saved["early"].value is not None else len(history) <= updates,
        )


def event_of(costs: CostModel, state: RunState, keep: Tensor, old: Tensor, policy: Policy, start: float) -> Event:
    """The event of a change of structure from `old` to `keep` (bool [n]); the policy began to decide it at `start`."""
    space, cost = costs.space, costs.cost(keep)
    here, before = space.present(keep), space.present(old)
    born, back = here & ~state.ever, here & ~before & state.ever
    temperature = {}
    if policy.temperature is not None:
        sums = torch.zeros(space.n_groups, dtype=torch.float64).index_add_(0, space.group_of, policy.temperature)
        temperature = dict(zip(space.group_names, (sums / costs.sizes).tolist(), strict=True))
    return Event(
        update=len(state.history),
        params=cost.params,
        flops=cost.flops,
        widths=space.widths(keep),
        pressure=float(policy.pressure),
        temperature=temperature,
        born=int((born & space.removable).sum()),
        regrown=int(back.sum()),
        detached=int((before & ~here).sum()),
        seconds=time.perf_counter() - start,
    )


def read_keep(field: Field, space: Space) -> Tensor:
    """The structure of a state, bool [n]; a `SavedModelError` if it is none of the space."""
    keep = field.tensor((space.n_units,), torch.bool).cpu().clone()
    try:
        return space.check_keep(keep)
    except StructureError as error:
        raise SavedModelError(f"the state's structure is damaged: {error}") from error

"""The read-only side of a grower: sizes, course and history of its run."""

from __future__ import annotations

from torch import Tensor, nn

from ..default_device import on_host
from ..structure.cost import Cost
from ..structure.limits import Budget
from ..structure.record import LEFT_OUT
from ..structure.space import Space
from .advice import Course, summary
from .event import Event
from .run import Run


class Shown:
    """Read-only properties of a run."""

    model: nn.Module
    budget: Budget
    updates: int
    space: Space
    frame_cost: Cost
    run: Run

    @property
    def history(self) -> list[Event]:
        """An event for the seed, and one for every update."""
        return self.run.state.history

    @property
    def finished(self) -> bool:
        """Whether the structure is final."""
        return self.run.state.finished

    @property
    def keep(self) -> Tensor:
        """The live units, bool [n], as a copy; `space` says where each of them lives."""
        return self.run.live.keep.clone()

    @on_host()
    def cost(self) -> Cost:
        """Cost of the live network."""
        return self.run.plan.costs.cost(self.run.live.keep)

    @on_host()
    def widths(self) -> dict[str, int]:
        """Live units per group."""
        return self.space.widths(self.run.live.keep)

    @on_host()
    def full_widths(self) -> dict[str, int]:
        """Units per group in the frame."""
        return self.space.widths(self.space.everything())

    @on_host()
    def depths(self) -> dict[str, int]:
        """Live blocks per stage, those that always stay included; layers named by the user count under ""."""
        return depths_of(self.model, self.space, self.run.live.keep)

    @on_host()
    def full_depths(self) -> dict[str, int]:
        """Blocks per stage in the frame."""
        return depths_of(self.model, self.space, self.space.everything())

    @on_host()
    def course(self) -> Course:
        """The planned course of the cost: seed, peak, end, and at which updates; logged at the start (INFO)."""
        return self.run.course()

    @on_host()
    def summary(self) -> str:
        """The run on one screen: how the budget is reached, what grows, what keeps its size and why."""
        name, costs, done = type(self.model).__name__, self.run.plan.costs, len(self.history) - 1
        return summary(name, self.budget, self.course(), costs, self.run.live.keep, done)

    @on_host()
    def __repr__(self) -> str:
        now, stage = self.cost(), "finished" if self.finished else f"update {len(self.history) - 1} of {self.updates}"
        share = now.params / max(1, self.frame_cost.params)
        return (
            f"<Grower of {type(self.model).__name__}: {self.budget}, {stage}, {now.params:,} parameters ({share:.2%})>"
        )


def depths_of(model: nn.Module, space: Space, keep: Tensor) -> dict[str, int]:
    """Blocks per stage of a structure (bool [n]), those that always stay included; layers named by the user under "".

    Blocks that an earlier run left out do not count.
    """
    found: dict[str, int] = {}
    own = {path for block in space.blocks for path in block.modules}
    for block in space.blocks:
        stage = model.get_submodule(block.stage).named_children() if block.stage else ()
        blocks = [name for name, child in stage if f"{block.stage}.{name}" in own or LEFT_OUT not in vars(child)]
        live = bool(keep[block.unit])
        found.setdefault(block.stage, len(blocks))
        found[block.stage] += int(live) if not block.stage else int(live) - 1
    return found

"""A system trained in the lab's loop: its phases one after the other, resumable, with what each of them costs."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

from torchgrow.lab.checkpoints import Checkpoints, write_whole
from torchgrow.lab.from_recipe import make_optimizer
from torchgrow.lab.systems.system import Phase, Spent, System, Task
from torchgrow.lab.train import Epoch, fit

PHASES = "phases.json"
"""What phases that were begun have cost, beside their checkpoints."""


def run(name: str, system: System, task: Task, on_step: Callable[[int, float, int], None]) -> Iterator[Epoch]:
    """Train a system; epochs that were done before the latest checkpoint are not trained again.

    Args:
        name: of the system, for records and errors.
        system: what to train.
        task: what it is given; has what was spent in `spent`, and checkpoints in `folder`.
        on_step: told of every step: epochs of phases before, epochs done of this phase, and how many it has.

    Yields:
        Epochs, numbered through all phases of this run, with the cost of everything that was spent up to them.

    Raises:
        UnfitError: the system cannot serve this network or data.
    """
    path = task.folder / PHASES
    known = [Spent(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []
    begun = len(task.spent)
    for number, phase in enumerate(system.phases(task)):
        before, entry = list(task.spent), Spent(name=phase.name, counted=phase.counted)
        if len(known) > len(before) and known[len(before)].name == phase.name:
            entry = known[len(before)]
        task.spent.append(entry)
        task.model = phase.model
        epochs, flops = sum(one.epochs for one in before[begun:]), sum(one.flops for one in before)
        seconds = sum(one.seconds for one in before)

        def stepped(epoch: int, step: int, steps: int, phase: Phase = phase, epochs: int = epochs) -> None:
            on_step(epochs, epoch - 1 + step / steps, phase.recipe.epochs + phase.recipe.then)

        optimizer = phase.optimizer or make_optimizer(phase.model, phase.recipe)
        for epoch in fit(
            f"{name}, {phase.name}",
            phase.model,
            optimizer,
            phase.data or task.data,
            phase.recipe,
            grower=phase.grower,
            teacher=phase.teacher,
            hooks=phase.hooks,
            on_step=stepped,
            checkpoints=Checkpoints(folder=task.folder / f"checkpoints-{number}"),
        ):
            entry.epochs, entry.seconds = epoch.epoch, epoch.seconds
            entry.flops = epoch.training_flops + phase.hooks.flops
            write_whole(path, json.dumps([asdict(one) for one in task.spent]))
            yield replace(
                epoch,
                epoch=epochs + epoch.epoch,
                training_flops=flops + entry.flops,
                seconds=seconds + epoch.seconds,
            )

"""torchgrow's own: the trained dense network shrinks to the budget while it is fine-tuned, by `policies.Shrink`.

No paper says how long, so it is fine-tuned by the lab's own rule, `fine_tuned`, as `l1` of the comparison is; the other
systems take length and rate from their sources.
Cost: the dense training (which the paper's rule leaves out), and half of its epochs, most of them at the budget; with
allocation=measured the forward passes that rises were measured with.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torchgrow import TorchgrowError, policies
from torchgrow.lab.checkpoints import write_whole
from torchgrow.lab.from_recipe import make_grower, make_optimizer
from torchgrow.lab.rises import FEW, rises_of
from torchgrow.lab.systems.structure import Structure
from torchgrow.lab.systems.system import Phase, Task, UnfitError, fine_tuned


@dataclass(frozen=True)
class Shrinking:
    """Train, then fine-tune while the least important units leave.

    Attributes:
        preset: how it shrinks, as `torchgrow.policies.named` reads it.
        settings: all of that, by name; of rises, on how many batches they are measured.

    Raises:
        TorchgrowError: there is no such setting.
    """

    preset: str = "shrink"
    settings: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        settings = policies.named(self.preset, rises={}).settings()
        measured = {"batches": FEW} if settings["rises"] is not None else None
        object.__setattr__(self, "settings", {**settings, "rises": measured})

    def phases(self, task: Task) -> Iterator[Phase]:
        """Fine-tuning, with a grower.

        Raises:
            UnfitError: the network lacks what the importance reads, or the budget is out of reach.
        """
        model = task.trained()
        # A recipe shrinks what it begins with only where it begins with weights; these are the dense network's.
        begun = replace(fine_tuned(task.recipe), weights="dense", preset=self.preset)
        recipe = replace(begun, updates_per_epoch=None, depth=False, meta=False)
        path = task.folder / "rises.json"
        optimizer = make_optimizer(model, recipe)
        try:
            Structure(model, task).scores(policies.importance.IMPORTANCES[self.settings["importance"]])
            rises = rises_of(
                model, task.data, recipe, json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            )
            grower = make_grower(model.train(), optimizer, task.data, recipe, rises.rises if rises else None)
        except TorchgrowError as error:
            raise UnfitError(f"{self.preset} does not suit this network: {error}") from None
        if rises:
            write_whole(path, json.dumps(asdict(rises)))
            task.spend("measuring", rises.flops, rises.seconds)
        yield Phase(name="fine-tuning", model=model, recipe=recipe, optimizer=optimizer, grower=grower)

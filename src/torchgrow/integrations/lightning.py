"""Growing inside Lightning's `Trainer.fit`: `Trainer(callbacks=[GrowCallback(...)])`."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn
from torch.optim import Optimizer

from ..errors import TorchgrowError
from ..persistence.portable import portable_
from ..structure.limits import Budget
from .borrowed_loop import BorrowedLoop, one_process


class GrowCallback(Callback):
    """Grows (a part of) a LightningModule to a budget while `Trainer.fit` trains it.

    Updates come at the start of an epoch, when the one before is validated and saved. When `fit` ends, also by
    EarlyStopping or `max_time`, the network is brought to its budget; after an exception it is not, and another
    `fit` resumes. A `fit` after the end trains on and grows nothing. Checkpoints hold the whole run, and
    `fit(ckpt_path=...)` resumes bit for bit. Averages of Lightning's WeightAveraging callbacks follow. To load a
    checkpoint into a fresh module, call `torchgrow.portable_` on the same part in its constructor.

    Args:
        budget: what the network may cost in the end.
        example_inputs: a small batch for tracing, as for `Grower`; it goes to the device of the module.
        updates: planned updates; None for as many as epochs, or spans of `every_n_steps`, until `max_epochs` or
            `max_steps`. To be given where only `max_time` ends `fit`, or the data has no length.
        net: name of the part that grows, as in `get_submodule`; "" for the whole module.
        every_n_steps: optimizer steps between two updates; None for one update an epoch, or, where `fit` has one
            epoch and `updates` is None, for ten updates or more. With manual optimization a batch counts as a step.
        **settings: further arguments of `Grower`, such as `depth` or `policy`.

    Attributes:
        grower: the Grower, once `fit` has begun.

    Raises:
        TorchgrowError: several processes; or StochasticWeightAveraging; or no optimizer trains `net`, or one that does
            trains other parts too; or nothing says how many updates there will be; or a checkpoint holds a grown
            network, but no run to go on with.

    Warns:
        UserWarning: `every_n_steps` is too long for this `fit`; or it ended so early that units are untrained.
    """

    def __init__(
        self,
        budget: Budget,
        example_inputs: Any,
        *,
        updates: int | None = None,
        net: str = "",
        every_n_steps: int | None = None,
        **settings: Any,
    ) -> None:
        self.loop = BorrowedLoop(budget, updates, every_n_steps, settings)
        self.example_inputs, self.net = example_inputs, net
        self._waiting: dict[str, Any] = {}

    @property
    def grower(self) -> Any:
        """The Grower, once `fit` has begun."""
        return self.loop.grower

    def _nets(self, trainer: Trainer, module: LightningModule) -> list[nn.Module]:
        """What grows, and what follows: the same part of every average."""
        averages = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
        return [module.get_submodule(self.net), *(a.module.get_submodule(self.net) for a in averages if a is not None)]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before a checkpoint is loaded."""
        nets = self._nets(trainer, pl_module)
        portable_(nets[0])
        if stage == "fit":
            self._waiting = {}  # what test(ckpt_path=...) has loaded is no run to go on with
            if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):
                raise TorchgrowError(
                    "StochasticWeightAveraging keeps a copy of the whole module that an update cannot follow; use "
                    "lightning.pytorch.callbacks.EMAWeightAveraging or WeightAveraging, whose averages follow"
                )
            one_process(trainer.world_size, "this Trainer")
            self.loop.wait(*nets)

    def _optimizers(self, trainer: Trainer, net: nn.Module) -> list[Optimizer]:
        """Those that train what grows; others, as of the other half of a GAN, are not its own."""
        own, found = {id(p) for p in net.parameters()}, list[Optimizer]()
        for optimizer in trainer.optimizers:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if held & own and held - own and self.net:
                raise TorchgrowError(
                    f"the {type(optimizer).__name__} of configure_optimizers trains net={self.net!r} and other "
                    "parameters too, and an update re-cuts all that an optimizer holds. Give each an optimizer, "
                    "with self.automatic_optimization = False; or grow the whole module but the rest, "
                    'GrowCallback(..., net="", protect=["head"]), with inputs of its forward'
                )
            if held & own:
                found.append(optimizer)
        if not found:
            raise TorchgrowError(
                "GrowCallback needs an optimizer that trains what grows, and configure_optimizers returns none that "
                f"holds parameters of net={self.net!r}: return torch.optim.AdamW(self.parameters()), say"
            )
        return found

    def _planned(self, trainer: Trainer) -> int | None:
        """Epochs, or spans of `every_n_steps`, until `max_epochs` or `max_steps`; None if neither says so."""
        steps = trainer.estimated_stepping_batches  # infinite or -1 where not known
        if trainer.max_steps > 0 and not trainer.lightning_module.automatic_optimization:
            steps = min(steps, math.ceil(trainer.max_steps / len(trainer.optimizers)))  # which counts those of each
        known = int(steps) if math.isfinite(steps) and steps >= 0 else None
        trainer.fit_loop.setup_data()  # so that the number of batches is known
        batches = trainer.num_training_batches
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        if trainer.max_steps > 0 and math.isfinite(batches):
            epochs = math.ceil(steps / max(1, math.ceil(batches / trainer.accumulate_grad_batches)))
        return self.loop.plan(epochs, known)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Optimizers exist, but are not restored yet."""
        saved = self._waiting.get("grower", {}).get("settings", {}).get("updates")
        planned = saved if type(saved) is int else None  # a resumed run that trains longer still grows as planned
        if planned is None and self.loop.updates is None and self.loop.grower is None:
            planned = self._planned(trainer)
        net, *averages = self._nets(trainer, pl_module)
        inputs = trainer.strategy.batch_to_device(self.example_inputs)
        found = self.loop.begin(net, self._optimizers(trainer, net), inputs, planned, averages)
        if found and not self._waiting:
            raise TorchgrowError(
                "the checkpoint holds a grown network, but no run of GrowCallback to go on with: it was saved without "
                "this callback or weights only. To train the network as it is, load it before fit, "
                "MyModule.load_from_checkpoint(path) with torchgrow.portable_ in its constructor, and fit without "
                "GrowCallback"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Optimizers and schedules are restored."""
        if self._waiting and self.loop.grower is not None:
            for optimizer in self.loop.grower.optimizers:
                optimizer.state.clear()  # of the saved structure; the run has it too
            self.loop.grower.load_state_dict(self._waiting["grower"])
            self.loop.go_on(self._waiting)
            self._waiting = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """If the checkpoint is at the last epoch nothing was trained, and its state is still to be loaded."""
        if self._waiting:
            self.on_train_start(trainer, pl_module)
            self.loop.end()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The epoch before is validated and saved."""
        if self.loop.every_n_steps is None:
            self.loop.update(trainer.current_epoch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch before is validated and saved."""
        if self.loop.every_n_steps is not None:
            by_itself = not pl_module.automatic_optimization  # global_step then counts the steps of every optimizer
            steps = trainer.fit_loop.epoch_loop.total_batch_idx if by_itself else trainer.global_step
            self.loop.update(steps // self.loop.every_n_steps)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called at every end of training except by an exception."""
        if not trainer.interrupted:
            self.loop.end()

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoint."""
        return self.loop.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoint; taken over once the optimizers are there."""
        self._waiting = state_dict

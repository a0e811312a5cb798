"""Growing inside the Trainer of Hugging Face's transformers: `Trainer(..., callbacks=[GrowCallback(...)])`."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..default_device import gpus_in_use
from ..errors import TorchgrowError
from ..persistence.checkpoint import load_checkpoint, save_checkpoint
from ..structure.limits import Budget
from ..tracing.nested import mapped
from .borrowed_loop import BorrowedLoop, one_process
from .pretrained import from_pretrained

__all__ = ["GrowCallback", "from_pretrained"]


class GrowCallback(TrainerCallback):
    """Grows the model of a Trainer to a budget while `train()` trains it; give it to the Trainer's constructor.

    Updates come at the start of an epoch, when the one before is evaluated and saved; with each that changes the
    structure the search for the best model restarts, so that `load_best_model_at_end` and early stopping compare
    networks of one structure. When `train()` ends, also early, the network is brought to its budget; a `train()` after
    that trains on and grows nothing. Every checkpoint has a folder `torchgrow` with the whole run, and
    `train(resume_from_checkpoint=True)` resumes bit for bit; not with the Trainer's `model_init`, which makes a model
    that the callback does not see before the checkpoint is loaded into it. `from_pretrained` of this module loads what
    the Trainer or `save_pretrained` saved.

    Args:
        budget: what the network may cost in the end.
        updates: planned updates; None for the number of epochs, or of spans of `every_n_steps`. To be given, or
            `every_n_steps`, where the data has no length.
        every_n_steps: optimizer steps between two updates; None for one update an epoch, or, where there is one epoch
            and `updates` is None, for ten updates or more.
        example_inputs: as for `Grower`; None for two samples of the training data, without labels; a decoder reads
            these as its inputs.
        resume_from: the checkpoint that a run resumes from, if it does not lie in the output folder.
        **settings: further arguments of `Grower`, such as `depth` or `policy`.

    Attributes:
        grower: the Grower, once `train()` has begun.

    Raises:
        TorchgrowError: several processes; or nothing says how many updates there will be; or the run of a checkpoint is
            not there, or another.

    Warns:
        UserWarning: `every_n_steps` is too long for this training; or it ended so early that units are untrained.
    """

    def __init__(
        self,
        budget: Budget,
        updates: int | None = None,
        *,
        every_n_steps: int | None = None,
        example_inputs: Any = None,
        resume_from: str | None = None,
        **settings: Any,
    ) -> None:
        self.loop = BorrowedLoop(budget, updates, every_n_steps, settings)
        self.example_inputs, self.resume_from = example_inputs, resume_from

    @property
    def grower(self) -> Any:
        """The Grower, once `train()` has begun."""
        return self.loop.grower

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Before a checkpoint is loaded."""
        self.loop.wait(given["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Model and optimizer exist, restored if there is a checkpoint."""
        one_process(args.world_size, "this Trainer")
        optimizer = given["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # in accelerate's wrapper, which takes no hooks
        resumed = state.global_step > 0 and self.loop.grower is None
        if resumed:
            optimizer.state.clear()  # of the saved structure; the run has it too
        epochs = math.ceil(state.num_train_epochs)
        planned = None
        if self.loop.updates is None and self.loop.grower is None:
            planned = self.loop.plan(epochs if epochs < sys.maxsize else None, state.max_steps)  # data of no length
        inputs = (
            self._example(given["train_dataloader"], given["model"])
            if self.example_inputs is None
            else self.example_inputs
        )
        device = next(given["model"].parameters()).device
        inputs = mapped(inputs, lambda x: x.to(device))
        found = self.loop.begin(given["model"], [optimizer], inputs, planned)
        if resumed:
            folder = Path(self.resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}") / "torchgrow"
            if not folder.is_dir():
                raise TorchgrowError(
                    f"training goes on from step {state.global_step}, but {folder} is not there with the run of "
                    "GrowCallback: name the checkpoint, GrowCallback(..., resume_from=folder), and save without "
                    "save_only_model"
                )
            self.loop.go_on(load_checkpoint(folder, self.loop.grower))
            self.loop.check_same(found, str(folder))

    @staticmethod
    def _example(loader: Any, model: Any) -> Any:
        """Two samples of the first batch, without labels; the loop's own random numbers stay as they are."""
        with torch.random.fork_rng(devices=gpus_in_use()):
            batch = next(iter(loader))
        found = {name: x[:2] for name, x in batch.items() if name not in ("labels", "label", "label_ids")}
        shifted = getattr(model, "prepare_decoder_input_ids_from_labels", None)  # of T5 and other encoder-decoders
        if shifted is not None and "labels" in batch and "decoder_input_ids" not in batch:
            found["decoder_input_ids"] = shifted(batch["labels"][:2].to(next(model.parameters()).device))
        return found

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The epoch before is evaluated and saved."""
        behind = math.floor((state.epoch or 0) + 1e-6)  # a resumed one may be begun, and a sum of parts rounds
        if self.loop.every_n_steps is None and self.loop.update(behind):
            self._search_anew(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The step before is evaluated and saved."""
        if self.loop.every_n_steps and self.loop.update(state.global_step // self.loop.every_n_steps):
            self._search_anew(state)

    @staticmethod
    def _search_anew(state: Any) -> None:
        state.best_metric, state.best_model_checkpoint, state.best_global_step = None, None, None

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Beside the Trainer's own checkpoint."""
        if self.loop.grower is not None and not args.save_only_model:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "torchgrow"
            save_checkpoint(folder, self.loop.grower, extra=self.loop.place(), keep=1)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Called at every end of training except by an exception; the best model is loaded."""
        self.loop.end()

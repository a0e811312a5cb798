"""Checkpoints of one network while it trains: where the training stands, and what its model and optimizer hold."""

import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchgrow import Grower, SavedModelError, TorchgrowError, load_checkpoint, save_checkpoint
from torchgrow.lab.devices import moved
from torchgrow.lab.hooks import Hooks
from torchgrow.lab.weights import versioned
from torchgrow.patience import rename


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where the training of one network stands.

    Attributes:
        epoch: the epoch under way, counted from 1; one more than there are when all are done.
        step: batches of it that are done.
        taken: optimizer steps that they took.
        sampler: state of the generator of batches when the epoch began; None before the first.
        state: what the model carries from the last of them to the next, if anything.
        taught: what its teacher does.
        changes: units born, regrown and detached in this epoch.
        updates: as in `torchgrow.lab.train.Epoch`, those of this epoch so far.
        lr: learning rate at the beginning of the epoch.
        loss: sum of the losses of these steps.
        void: batches among them without a label, which have no loss.
        seconds: of training and updating so far.
        training_flops: 3 x forward FLOPs x samples so far.
    """

    epoch: int = 1
    step: int = 0
    taken: int = 0
    sampler: Tensor | None = None
    state: Any = None
    taught: Any = None
    changes: tuple[int, int, int] = (0, 0, 0)
    updates: list[dict[str, Any]] = field(default_factory=list)
    lr: float = 0.0
    loss: float = 0.0
    void: int = 0
    seconds: float = 0.0
    training_flops: int = 0

    def __post_init__(self) -> None:
        """Name the bad field: it may come from a file."""
        kinds: dict[str, type] = {"epoch": int, "step": int, "taken": int, "void": int, "training_flops": int}
        kinds |= {"lr": float, "loss": float, "seconds": float}
        for name, kind in kinds.items():
            if type(getattr(self, name)) is not kind or not getattr(self, name) >= 0:
                raise TorchgrowError(f"a checkpoint's progress has {name}={getattr(self, name)!r}: it is damaged")


def write_whole(path: Path, text: str) -> None:
    """Write a file, which holds it whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}")
    with half.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # else a loss of power may leave an empty file
    rename(half, path)


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """The checkpoints of one network of a run.

    Attributes:
        folder: where they are.
        every: steps of an epoch after which to write one in its middle; None: at the end of each epoch only.
    """

    folder: Path
    every: int | None = None

    def save(
        self,
        progress: Progress,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        grower: Grower | None,
        schedule: Any,
        hooks: Hooks | None = None,
    ) -> None:
        """Write one; with several processes all of them call it, since each has random numbers of its own."""
        optimizer.zero_grad()  # the gradients are spent
        extra: dict[str, Any] = {one.name: getattr(progress, one.name) for one in fields(progress)}
        if hooks and (state := hooks.state_dict()):
            extra["hooks"] = state
        if grower is None:
            extra |= {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}
        save_checkpoint(self.folder, grower, scheduler=schedule, extra=extra, together=True)

    def load(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        grower: Grower | None,
        schedule: Any,
        hooks: Hooks | None = None,
    ) -> Progress:
        """Go on from the latest one, or from the start if there is none yet."""
        if not any(self.folder.glob("checkpoint-*")):
            return Progress()
        try:
            extra = load_checkpoint(self.folder, grower, scheduler=schedule)
        except SavedModelError as error:
            raise SavedModelError(
                f"{error}. To train this network anew, and keep the rest of the run, delete {self.folder} and go on "
                "as before"
            ) from error
        try:
            if hooks and "hooks" in extra:  # first, since they may decide which structure is loaded
                hooks.load_state_dict(extra.pop("hooks"))
            if grower is None:
                model.load_state_dict(versioned(extra.pop("model"), model))
                optimizer.load_state_dict(extra.pop("optimizer"))
            device = next(model.parameters()).device
            extra |= {name: moved(extra[name], device) for name in ("state", "taught") if name in extra}
            return replace(Progress(), **extra)
        except (TypeError, KeyError, AttributeError, RuntimeError, ValueError) as error:
            raise TorchgrowError(f"the checkpoint in {self.folder} is not one of this run: {error}") from error

"""Checkpoints of a run: network, bank, indicators, optimizer, scheduler and random states, to resume it.

A run that is stopped at any moment, also by SIGKILL, and resumed from its last checkpoint ends bit for bit as the
unbroken run does (same versions, same number of threads). Files are data, never code.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ..default_device import on_host
from ..distributed import Ranks, gathered, here
from ..errors import SavedModelError, TorchgrowError
from ..exchange import uninterrupted
from .folder import locked, made, pack, read_folder, unpack, write_folder
from .plain_data import Field
from .randomness import random_state, read_random, same_random

FORMAT = 2  # the first one for checkpoints; in numbers from 2 on, all folders carry checksums
RECORD, TENSORS = "checkpoint.json", "checkpoint.safetensors"
NAME = re.compile(r"checkpoint-(\d{6,})")


class Stateful(Protocol):
    """A learning rate scheduler, or any object with a state dict."""

    def state_dict(self) -> dict[str, Any]:
        """Its state."""

    def load_state_dict(self, state: dict[str, Any], /) -> object:
        """Take a state over."""


@runtime_checkable
class Resumable(Stateful, Protocol):
    """A run on all its ranks: a `torchgrow.Grower`."""

    ranks: Ranks


@on_host()
def save_checkpoint(
    folder: str | os.PathLike[str],
    grower: Resumable | None = None,
    *,
    scheduler: Stateful | None = None,
    extra: Any = None,
    keep: int = 3,
    together: bool = False,
) -> Path:
    """Add a checkpoint to a folder: it appears whole, flushed to the disk, or not at all.

    Several processes may write to one folder and read from it: they wait for each other, but on Windows, ten minutes.

    Stored are the grower's whole state (see `Grower.state_dict`), the scheduler's, and the random numbers of PyTorch
    (host and all CUDA devices), NumPy and Python. Everything else that changes while you train goes into `extra`:
    how many batches of the epoch are done, the state of the sampler's generator when the epoch began, a GradScaler's
    `state_dict()`, a step count.

    With several processes let rank 0 alone call it right after `grower.update()`, from where it knows the random states
    of the other ranks; or, at any other moment, all of them, with `together=True`.

    Args:
        folder: for the checkpoints of one run; made if needed.
        grower: of the run; None for a network that does not grow, whose state dicts can go into `extra`.
        scheduler: the learning rate schedule, or anything with `state_dict` and `load_state_dict`.
        extra: nested dicts, lists and tuples of tensors, numbers, text, True, False and None.
        keep: how many checkpoints to keep (3); older ones are deleted once the new one stands.
        together: whether every rank makes this call: rank 0 writes, with its own `scheduler` and `extra`, for all.

    Returns:
        The new checkpoint's own folder, `folder/checkpoint-000001` and so on.

    Raises:
        SavedModelError: something is not plain data, or could not be written; older checkpoints stay.
        TrainingError: the last optimizer step did not finish.
        TorchgrowError: `keep` is no number, or `grower` is none; together: rank 0 could not write, or a rank waited
            in vain.

    Warns:
        UserWarning: rank 0 alone saves, at a moment at which it does not know what the other ranks draw next.
    """
    if type(keep) is not int or keep < 1:
        raise TorchgrowError(f"keep={keep!r} must be a whole number >= 1: how many checkpoints to keep")
    _check_grower(grower)
    rank, size = here()
    own = random_state()
    if not together or size == 1:
        states = _known(own, grower, rank, size)
        return _write(Path(folder), grower, scheduler, states, extra, keep)
    gather = gathered if grower is None or grower.ranks.size != size else grower.ranks.gather
    states, path = gather(own), ""
    try:
        if rank == 0:
            path = str(_write(Path(folder), grower, scheduler, states, extra, keep))
    finally:  # so that no rank waits for a rank 0 that has failed
        path = gather(path)[0]
    if not path:
        raise TorchgrowError("rank 0 could not write the checkpoint, for the reason given there; the older ones stay")
    return Path(path)


def _check_grower(grower: Any) -> None:
    if grower is not None and not isinstance(grower, Resumable):
        raise TorchgrowError(
            f'a checkpoint is of a Grower, got a {type(grower).__name__}; call save_checkpoint("folder/", grower). '
            'Without one: save_checkpoint("folder/", extra={"model": model.state_dict()})'
        )


def _known(own: Any, grower: Resumable | None, rank: int, size: int) -> list[Any]:
    """Random states by rank, as far as one rank knows them by itself."""
    if size == 1:
        return [own]
    states = [] if grower is None else list(grower.ranks.random)
    if not states or not same_random(own, states[rank]):
        warnings.warn(
            f"rank {rank} saves alone and has drawn random numbers since the last update, so that it does not know "
            f"what the other {size - 1} would draw next: a run that goes on from here may see other dropout or "
            "shuffling there. Call save_checkpoint(..., together=True) on every rank, or save right after update()",
            stacklevel=3,
        )
    states = states or [None] * size
    states[rank] = own
    return states


def _write(
    target: Path, grower: Resumable | None, scheduler: Stateful | None, states: list[Any], extra: Any, keep: int
) -> Path:
    """Write a checkpoint; `states`: the random state of every rank, None where it is not known."""
    contents = {
        "grower": None if grower is None else grower.state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "random": states[0],
        "extra": extra,
    }
    if len(states) > 1:
        contents["ranks"] = states[1:]
    tensors: dict[str, Tensor] = {}
    record = {"format": FORMAT, "contents": pack(contents, tensors)}
    with locked(made(target)):  # so that no other writer takes the same number, or this one's half for a dead one's
        there = _numbered(target)
        for left in target.glob(".checkpoint-*"):  # left by a process that was killed while writing or deleting
            shutil.rmtree(left, ignore_errors=True)
        new = target / f"checkpoint-{max(there, default=0) + 1:06d}"
        write_folder(new, record, tensors, (RECORD, TENSORS), alone=True)
        for number in sorted(there)[: max(0, len(there) + 1 - keep)]:
            hidden = target / f".{there[number].name}.old"  # so that a half deleted one is not taken for a checkpoint
            with suppress(OSError):  # another writer was faster; or it is open, on Windows
                there[number].rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)
    return new


@on_host()
def load_checkpoint(
    folder: str | os.PathLike[str], grower: Resumable | None = None, *, scheduler: Stateful | None = None
) -> Any:
    """Resume from the latest undamaged checkpoint.

    Build model, optimizer, grower and scheduler just as in the run that saved it, then call this, with several
    processes on every rank: each takes its own random state. A damaged checkpoint is passed over for the one before,
    with a warning; one that does not fit what you built is an error.

    Args:
        folder: what was given to `save_checkpoint`, or one checkpoint in it.
        grower: takes the saved state over, with its model and optimizer.
        scheduler: likewise.

    Returns:
        What was saved as `extra`.

    Raises:
        SavedModelError: there is no checkpoint, none that is whole, or it does not fit; nothing was changed.

    Warns:
        UserWarning: the checkpoint has no random state of this rank, which keeps its present one.
    """
    _check_grower(grower)
    contents = Field(_latest(Path(folder)), "checkpoint").fields(("grower", "scheduler", "random", "extra"), ("ranks",))
    for name, thing in (("grower", grower), ("scheduler", scheduler)):
        if (contents[name].value is None) != (thing is None):
            has = "without" if thing is not None else "with"
            raise SavedModelError(
                f"the checkpoint in {folder} was saved {has} a {name}; load it {has} one. Nothing was changed"
            )
    restore_random = _own_random(contents["random"], contents["ranks"])
    before: dict[str, Any] | None = None
    with uninterrupted():  # a Ctrl-C comes through before or after, not in between
        try:
            if scheduler is not None:
                present = scheduler.state_dict()
                state = contents["scheduler"].like(present)
                before = present
                scheduler.load_state_dict(state)
            if grower is not None:
                grower.load_state_dict(contents["grower"].value)
        except BaseException as error:
            if scheduler is not None and before is not None:
                scheduler.load_state_dict(before)
            if isinstance(error, Exception) and not isinstance(error, (TorchgrowError, MemoryError)):
                raise SavedModelError(f"the checkpoint in {folder} does not fit: {error!r}") from error
            raise
        restore_random()
    return contents["extra"].value


def _own_random(first: Field, others: Field) -> Callable[[], None]:
    """Check the random state that this rank takes over; the function returned sets it."""
    rank, _ = here()
    known = [first] if others.value is None else [first, *others.items()]
    if rank >= len(known) or (known[rank].value is None and len(known) > 1):
        warnings.warn(
            f"the checkpoint has no random state of rank {rank}, which goes on with the numbers it has: dropout and "
            "shuffling there differ from the run that was saved. To have them next time, call "
            "save_checkpoint(..., together=True) on every rank, with as many processes as load it",
            stacklevel=3,
        )
        return lambda: None
    return read_random(known[rank])


def _numbered(folder: Path) -> dict[int, Path]:
    """Checkpoints in a folder by number."""
    found = {}
    if os.path.isdir(folder):  # noqa: PTH112  # Path raises where a name is too long
        for path in folder.iterdir():
            match = NAME.fullmatch(path.name)
            if match:
                found[int(match[1])] = path
    return found


def _latest(folder: Path) -> Any:
    """Contents of the latest whole checkpoint."""
    one = bool(NAME.fullmatch(folder.name)) or os.path.exists(folder / RECORD)  # noqa: PTH110
    what, reasons = "a checkpoint; save one with torchgrow.save_checkpoint", []
    with locked(folder.parent if one else folder, shared=True):  # no other process deletes it meanwhile
        there = _numbered(folder)
        for candidate in [folder] if one else [there[number] for number in sorted(there, reverse=True)]:
            try:
                record, tensors = read_folder(candidate, (RECORD, TENSORS), (FORMAT,), what)
                packed = Field(record, str(candidate / RECORD)).fields(("format", "contents"))["contents"].value
                contents = unpack(packed, tensors)
            except SavedModelError as error:
                reasons.append(str(error))
                continue
            if reasons:
                warnings.warn(f"going on from {candidate}, since {'; '.join(reasons)}", stacklevel=3)
            return contents
    if reasons:
        raise SavedModelError(f"no checkpoint in {folder} is whole: {'; '.join(reasons)}")
    raise SavedModelError(
        f"no checkpoint in {folder}; make one with torchgrow.save_checkpoint(folder, grower). What torchgrow.save "
        "wrote is a network, for torchgrow.load(folder, frame_factory)"
    )

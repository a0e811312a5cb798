"""The folder of a run: whole or not there at all, and one process at a time."""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import Any

from torchgrow import SavedModelError, TorchgrowError, TrainingError
from torchgrow.lab.checkpoints import write_whole
from torchgrow.lab.train import Epoch
from torchgrow.patience import rename

fcntl: Any
msvcrt: Any
try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None


LOCK = "lock"
FIRST = {LOCK, "environment.json", ".environment.json", ".config.json", "stopped.txt"}
"""All that a run may have written before it has a config.json to go on by."""


class RunFolder:
    """A folder that has its name only once it is whole; until then it is called ``<name>.partial``.

    As a context manager it renames the folder at the end, unless an exception passed through: then what was
    written so far stays in the partial folder, readable, with the reason in ``stopped.txt``.

    Args:
        out: the folder to end up with.
        resume: go on in the partial folder that is there, instead of making one.

    Raises:
        TorchgrowError: it exists already, finished or partial; or with ``resume``, there is nothing to go on with, or
            another process is at it.
    """

    def __init__(self, out: Path, resume: bool = False) -> None:
        self.out = out
        if not resume:
            check_new(out)
        elif out.exists():
            raise TorchgrowError(
                f"{out} is finished; there is nothing to go on with"
                if (out / "config.json").exists()
                else f"{out} is not a run: it has no config.json; name the --out of one that was stopped"
            )
        self.path = out.with_name(out.name + ".partial")
        if resume and not (self.path / "config.json").exists():
            raise TorchgrowError(
                f"{self.path} was stopped before it had begun, so nothing is lost; start it as the first time, "
                "without --resume"
                if _barren(self.path)
                else f"{self.path} is not a run that was stopped: it has no config.json; name the --out of one that "
                "was, without .partial"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=resume or _barren(self.path))
        except FileExistsError:  # since it was asked for
            raise _taken(out) from None
        except OSError as error:
            raise _not_made(self.path, error.strerror) from error
        self._lock: int | None = lock(self.path)
        if not resume and (out.exists() or not _barren(self.path)):  # another one was quicker
            self.let_go()
            raise _taken(out)
        (self.path / "stopped.txt").unlink(missing_ok=True)
        for left in self.path.glob(".*"):  # half of a file or folder that was being written
            shutil.rmtree(left) if left.is_dir() else left.unlink()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                if fcntl is None:
                    self.let_go()  # Windows renames no folder while a file in it is open
                rename(self.path, self.out)
                (self.out / LOCK).unlink(missing_ok=True)
                shutil.rmtree(self.out / "checkpoints", ignore_errors=True)  # the network has been saved
            elif self.path.is_dir():
                (self.path / "stopped.txt").write_text(f"{type(error).__name__}: {error}\n", encoding="utf-8")
        finally:
            self.let_go()

    def let_go(self) -> None:
        """Let other processes have the folder."""
        held, self._lock = self._lock, None
        if held is not None:
            os.close(held)

    def write_json(self, name: str, value: object) -> None:
        """Write ``value`` to the file ``name``, which holds it whole or not at all.

        Raises:
            TorchgrowError: the folder is no longer there.
        """
        self._write(name, json.dumps(value, indent=2) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """What `write_json` wrote to the file ``name``; empty if it is not there."""
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8")) if (self.path / name).exists() else {}
            if isinstance(value, dict):
                return value
        except (OSError, ValueError, RecursionError):
            pass
        raise TorchgrowError(f"{self.path / name} is damaged; the run cannot go on, start it anew")

    def epochs(self, network: str | None = None) -> list[Epoch]:
        """Whole lines of ``metrics.jsonl``: of all networks, or of one."""
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        try:
            records = [Epoch(**json.loads(line)) for line in lines if line.endswith(b"\n")]
        except (ValueError, TypeError) as error:
            raise TorchgrowError(f"{path} is damaged: {error}; the run cannot go on, start it anew") from error
        return [record for record in records if network in (None, record.network)]

    def append(self, record: Epoch) -> None:
        """Add a line to ``metrics.jsonl``; it is on disk when this returns.

        Lines of this or a later epoch of the same network go: a run that was stopped has written them after the
        checkpoint from which it goes on.

        Raises:
            TorchgrowError: the folder is no longer there.
        """
        kept = [r for r in self.epochs() if r.network != record.network or r.epoch < record.epoch]
        self._write("metrics.jsonl", "".join(json.dumps(asdict(r)) + "\n" for r in (*kept, record)))

    def _write(self, name: str, text: str) -> None:
        if not (self.path / LOCK).exists():  # a folder made anew would hold half of the run, and look whole
            raise TorchgrowError(
                f"{self.path} was moved or deleted while this run was writing to it; put it back and go on with it "
                f"(the same command, with --resume {quote(str(self.out))} alone), or start anew"
            )
        write_whole(self.path / name, text)


def check_new(out: Path) -> None:
    """Refuse the folder of a new run that could not be made, before anything is done for it.

    Raises:
        TorchgrowError: it is there already, finished or partial, or no folder can be made in that place.
    """
    if out.exists():  # so do those without a name of their own, such as "."
        raise TorchgrowError(
            f"{out} exists already and is not overwritten; choose another --out, or move it away first"
        )
    path = out.with_name(out.name + ".partial")
    if path.exists() and not _barren(path):
        raise _taken(out)
    within = next(folder for folder in path.absolute().parents if folder.exists())
    if not within.is_dir():
        raise _not_made(path, f"{within} is a file")
    if not os.access(within, os.W_OK | os.X_OK):
        raise _not_made(path, f"nothing may be written in {within}")


def _barren(path: Path) -> bool:
    """Whether a folder is that of a run which was stopped before it had begun; whatever else is in it is the user's."""
    return path.is_dir() and {inside.name for inside in path.iterdir()} <= FIRST


def where_it_stopped(error: BaseException, folder: "RunFolder", again: str) -> str:
    """What is told of a run that an error has stopped; "" of a fault of ours, whose traceback tells more.

    After a fault that would come again, in the training or in a file, there is nothing to go on with.
    """
    if not isinstance(error, (KeyboardInterrupt, TorchgrowError, OSError, MemoryError)):
        return ""
    kept = f"What was measured before the stop is in {folder.path}"
    return kept if isinstance(error, (TrainingError, SavedModelError)) else f"{kept}\n{again}"


def _taken(out: Path) -> TorchgrowError:
    try:
        config = json.loads(Path(f"{out}.partial", "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    if not Path(f"{out}.partial", "config.json").exists():
        return TorchgrowError(
            f"{out}.partial is there, and has no config.json to go on by: it is no run, or one that has just begun; "
            "look through it and delete it, or choose another --out"
        )
    return TorchgrowError(
        f"{out}.partial is what an earlier run left when it was stopped, or a run that still goes on; go on with it "
        f"({resuming(out, config)}), look through it and delete it, or choose another --out"
    )


def resuming(out: Path, config: Mapping[str, Any]) -> str:
    """The command that goes on with a run or a search, for a shell to read."""
    return f"torchgrow {'search' if 'search' in config else 'run'} --resume {quote(str(out))}"


def _not_made(path: Path, why: str | None) -> TorchgrowError:
    return TorchgrowError(f"{path} cannot be made: {why}; choose another --out")


def lock(path: Path) -> int:
    """Keep other processes off a folder until the handle is closed or this process ends, however it ends.

    The lock is on a file in it, not on the folder, which is locked for a moment whenever a network is saved there.
    """
    handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        os.close(handle)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            raise TorchgrowError(f"another process is running in {path}; wait for it, or stop it first") from None
        return os.open(path / LOCK, os.O_RDWR | os.O_CREAT)  # a file system without locks
    return handle


class Onlooker(RunFolder):
    """The run folder as processes other than the first have it: they write nothing."""

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out.with_name(out.name + ".partial")

    def __exit__(self, *_: object) -> None:
        """Nothing to put in order."""

    def write_json(self, name: str, value: object) -> None:
        """Process 0 does."""

    def append(self, record: Epoch) -> None:
        """Process 0 does."""


def default_out(name: str) -> Path:
    """``runs/<name>``, or the first of ``runs/<name>-2``, ``-3`` and so on that no run has taken."""
    for number in range(1, 10_000):
        out = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if not out.exists() and not out.with_name(out.name + ".partial").exists():
            return out
    raise TorchgrowError("runs/ is full; choose a folder with --out")

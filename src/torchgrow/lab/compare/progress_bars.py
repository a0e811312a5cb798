"""The progress of several trainings: bars in a terminal, one line per epoch anywhere else."""

import time
from collections.abc import Sequence

from rich.progress import Progress

from torchgrow.lab.compare.job import Job
from torchgrow.lab.display import epoch_line
from torchgrow.lab.train import Epoch


class Bars:
    """One bar a network in a terminal, a line an epoch anywhere else."""

    def __init__(self, progress: Progress, jobs: Sequence[Job]) -> None:
        self._names = {job.key(): f"seed {job.recipe.seed}, {job.recipe.budget}: {job.method}" for job in jobs}
        self._bars = {key: progress.add_task(name, total=None) for key, name in self._names.items()}
        self._progress, self._begun, self._start = progress, dict[str, float](), time.perf_counter()
        self._epochs = {job.key(): (0.0, float(job.recipe.epochs + job.recipe.then)) for job in jobs}

    def __call__(self, job: Job, done: float, total: int) -> None:
        """Note the progress of a network, in epochs."""
        self._begun.setdefault(job.key(), done)
        self._epochs[job.key()] = (done, total)
        self._progress.update(self._bars[job.key()], completed=done, total=total)

    def epoch(self, job: Job, record: Epoch) -> None:
        """Note a finished epoch."""
        if not self._progress.console.is_terminal:
            total = int(self._epochs[job.key()][1])
            left = 0.0 if record.epoch == total and len(self._names) == 1 else self.seconds_left()
            self._progress.console.print(f"{self._names[job.key()]}  {epoch_line(record, total, left)}", soft_wrap=True)

    def note(self, job: Job, line: str) -> None:
        """Print a line on one of the networks that stays; the time of what it tells of is no epoch's."""
        self._start, self._begun = time.perf_counter(), {key: self._epochs[key][0] for key in self._begun}
        self.say(f"{self._names[job.key()]}  {line}")

    def seconds_left(self) -> float:
        """Seconds until all of these networks are trained, if an epoch of one takes as long as that of another."""
        done = sum(max(0.0, self._epochs[key][0] - begun) for key, begun in self._begun.items())
        missing = sum(max(0.0, total - done) for done, total in self._epochs.values())
        return (time.perf_counter() - self._start) / done * missing if done else 0.0

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._progress.console.print(text, soft_wrap=True)

"""How long it will take, in words."""

import io
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from small_tasks import DIGITS, THREE_BLOCKS
from torchgrow.lab import train
from torchgrow.lab.compare import compare
from torchgrow.lab.compare.job import Job
from torchgrow.lab.compare.progress_bars import Bars
from torchgrow.lab.train import Epoch


def test_a_search_is_no_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One epoch a minute of ten, after a search of an hour."""
    now, said = [0.0], io.StringIO()
    monkeypatch.setattr("torchgrow.lab.compare.progress_bars.time.perf_counter", lambda: now[0])
    job = Job(method="netadapt", recipe=replace(DIGITS, epochs=10), data=(64, 16))
    record = Epoch(
        network="netadapt", epoch=1, loss=1.0, test_loss=1.0, accuracy=50.0, params=10, flops=10, training_flops=1,
        seconds=1.0, lr=0.1, widths={}, depths={},
    )  # fmt: skip
    bars = Bars(Progress(console=Console(file=said)), [job])
    bars(job, 0, 10)
    now[0] += 3600
    bars.note(job, "step 1 of 1 of the search")
    now[0] += 60
    bars(job, 1, 10)
    bars.epoch(job, record)
    assert said.getvalue().splitlines()[-1].endswith("about 9 min left")


def test_time_left_is_never_below_nothing() -> None:
    """An epoch that is trained again, after a kill: what is done falls behind what it began with."""
    said = io.StringIO()
    job = Job(method="netadapt", recipe=replace(DIGITS, epochs=10), data=(64, 16))
    bars = Bars(Progress(console=Console(file=said)), [job])
    for done in (3.5, 3.0):
        bars(job, done, 10)
    assert bars.seconds_left() == 0.0
    bars(job, 4.0, 10)
    assert bars.seconds_left() > 0.0
    bars(job, 11.0, 10)
    assert bars.seconds_left() == 0.0


@pytest.mark.parametrize(("method", "place"), [("sfp", "systems.running"), ("uniform", "compare.training")])
def test_an_epoch_that_is_trained_again_counts_once(
    method: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill after the second epoch's record and before its checkpoint: of three epochs of two steps the last two."""
    seen: list[tuple[float, int]] = []

    def fit(*arguments: Any, **keywords: Any) -> Iterator[Any]:
        yield from itertools.islice(train.fit(*arguments, **keywords), 2)
        raise KeyboardInterrupt

    def run() -> None:
        compare(replace(THREE_BLOCKS, epochs=3), methods=[method], seeds=[0], console=Console(quiet=True), out=tmp_path)

    with monkeypatch.context() as patched:
        patched.setattr(f"torchgrow.lab.{place}.fit", fit)
        with pytest.raises(KeyboardInterrupt):
            run()
    with monkeypatch.context() as patched:
        patched.setattr(Bars, "__call__", lambda _, job, done, total: seen.append((done, total)))
        run()
    assert seen == [(1.5, 3), (2.0, 3), (2.5, 3), (3.0, 3)]

"""How long it will take, in words."""

import io
from dataclasses import replace

import pytest
from rich.console import Console
from rich.progress import Progress

from small_tasks import DIGITS
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

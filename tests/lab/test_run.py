"""A run: what it writes, how it stops, and what it refuses."""

import io
import itertools
import json
import math
import shutil
import subprocess
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import torchgrow
from torchgrow import Budget, Event, TorchgrowError
from torchgrow.lab import data, from_recipe, run, search, train
from torchgrow.lab.display import Display, short
from torchgrow.lab.environment import environment
from torchgrow.lab.models import ResNet
from torchgrow.lab.recipes import get
from torchgrow.lab.run import table
from torchgrow.lab.run_folder import RunFolder, default_out
from torchgrow.lab.train import Epoch

BUILD = partial(ResNet, depth=8, widths=(4, 8, 16), in_channels=1)
TINY = replace(
    get("digits"),
    build=BUILD,
    epochs=4,
    subset=128,
    batch_size=32,
    updates_per_epoch=1,
    budget=Budget(params="20%"),
    depth=False,
    preset="default:ramp=0.1",
    schedule="milestones",
    warmup=0.0,
)


def quiet() -> Console:
    return Console(quiet=True)


def lines(folder: Path) -> Any:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One run with twins that several tests look at: (run folder, what the console showed)."""
    console = Console(record=True, width=80, file=io.StringIO())
    out = run.run(TINY, console=console, out=tmp_path_factory.mktemp("runs") / "tiny")
    return out, console.export_text()


def test_the_folder_is_whole(finished: Any) -> None:
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    pictures = {"size.png", "cost.png", "accuracy.png", "widths.png"}
    records = {"config.json", "environment.json", "frame.json", "metrics.jsonl", "results.json", "network"}
    assert names == pictures | records
    assert not folder.with_name("tiny.partial").exists()
    for picture in pictures:
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_metrics_have_one_line_per_epoch_and_network(finished: Any) -> None:
    records = lines(finished[0])
    assert [(r["network"], r["epoch"]) for r in records] == [
        (network, epoch) for network in ("grown", "dense", "uniform") for epoch in (1, 2, 3, 4)
    ]
    for record in records:
        assert math.isfinite(record["loss"])
        assert 0 <= record["accuracy"] <= 100
    assert [r["lr"] for r in records[:4]] == pytest.approx([0.1, 0.1, 0.01, 0.001])


def test_training_flops_are_three_forwards_of_every_image(finished: Any) -> None:
    so_far = {"grown": 0, "dense": 0, "uniform": 0}
    for record in lines(finished[0]):
        so_far[record["network"]] += 3 * record["flops"] * 128
        assert record["training_flops"] == so_far[record["network"]]


def test_the_grown_network_is_recorded_in_full(finished: Any) -> None:
    folder, _ = finished
    frame = json.loads((folder / "frame.json").read_text())
    grown = [r for r in lines(folder) if r["network"] == "grown"]
    for record in grown:
        assert record["widths"].keys() == frame["widths"].keys()
        assert all(0 <= record["widths"][group] <= full for group, full in frame["widths"].items())
        assert isinstance(record["pressure"], float)
        assert record["temperature"] == {}, "the default has none"
    assert grown[0]["params"] < grown[-1]["params"] <= frame["limits"]["params"]
    assert sum(r["born"] for r in grown) > 0


def test_results_are_of_the_networks_as_delivered(finished: Any) -> None:
    folder, _ = finished
    results = json.loads((folder / "results.json").read_text())
    frame = json.loads((folder / "frame.json").read_text())
    assert list(results) == ["dense", "uniform", "grown"]
    assert results["dense"]["params"] == frame["params"]
    assert results["grown"]["params"] <= frame["limits"]["params"]
    assert results["uniform"]["params"] <= results["grown"]["params"]
    assert results["grown"]["training_flops"] < results["dense"]["training_flops"]


def test_the_saved_network_loads_and_is_the_one_measured(finished: Any) -> None:
    folder, _ = finished
    model = torchgrow.load(folder / "network", BUILD)
    digits = data.load_images("digits")
    grown = json.loads((folder / "results.json").read_text())["grown"]
    assert train.evaluate(model, digits)[0] == grown["accuracy"]
    assert sum(p.numel() for p in model.parameters()) == grown["params"]


def test_config_and_environment(finished: Any) -> None:
    folder, _ = finished
    config = json.loads((folder / "config.json").read_text())
    assert (config["epochs"], config["subset"], config["model"]) == (4, 128, "ResNet")
    found = json.loads((folder / "environment.json").read_text())
    assert found["torch"] == torch.__version__.partition("+")[0]
    assert found["threads"] == torch.get_num_threads()
    assert {"python", "cpu", "cores", "commit", "torchgrow"} <= found.keys()


def test_what_a_plain_console_shows(finished: Any) -> None:
    folder, shown = finished
    assert "grown       epoch   1/4" in shown
    assert "uniform: every width narrowed by one factor" in shown
    assert "(100%)" in shown
    assert str(folder / "widths.png") in shown.replace("\n", "")
    assert max(len(line) for line in shown.splitlines() if "(100%)" in line) <= 80


def test_without_twins(tmp_path: Path) -> None:
    out = run.run(replace(TINY, epochs=2), console=quiet(), out=tmp_path / "alone", beside=())
    assert list(json.loads((out / "results.json").read_text())) == ["grown"]
    assert (out / "accuracy.png").exists()


def test_other_networks_beside_the_grown_one(tmp_path: Path) -> None:
    """Narrowed to a share of the dense network's parameters, and the grown structure from scratch, at equal cost."""
    beside = ["direct", "uniform=25%", "dense", "uniform=25%"]
    out = run.run(
        replace(TINY, epochs=2, build=partial(BUILD, depth=14), depth=True),
        console=quiet(),
        out=tmp_path / "run",
        beside=beside,
    )
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["dense", "uniform=25%", "direct", "grown"]
    assert 0.15 * results["dense"]["params"] < results["uniform=25%"]["params"] <= 0.25 * results["dense"]["params"]
    for field in ("params", "flops"):
        assert results["direct"][field] == results["grown"][field]
    assert results["direct"]["training_flops"] == 3 * results["direct"]["flops"] * 2 * 4 * 32


def test_a_structure_from_scratch_for_as_many_flops(tmp_path: Path) -> None:
    """A run that is small for half of its epochs costs fewer of them at full size; whole epochs, never fewer FLOPs."""
    out = run.run(
        replace(TINY, epochs=8, preset="late:until=0.6"),
        console=quiet(),
        out=tmp_path / "run",
        beside=["direct=flops", "direct"],
    )
    results = json.loads((out / "results.json").read_text())
    each = 3 * results["direct"]["flops"] * 4 * 32
    assert results["direct"]["training_flops"] == 8 * each
    grown, as_dear = results["grown"]["training_flops"], results["direct=flops"]["training_flops"]
    assert grown <= as_dear < grown + each
    assert as_dear % each == 0
    assert 2 * each <= as_dear < 7 * each
    records = [row for row in lines(out) if row["network"] == "direct=flops"]
    assert len(records) == as_dear // each
    assert records[-1]["lr"] < records[0]["lr"], "with a schedule of its own length"


@pytest.mark.parametrize(
    "name", ["twin", "uniform=", "uniform=half", "direct=50%", "dense=flops", "uniform=0%", "uniform=101%"]
)
def test_networks_that_cannot_stand_beside(tmp_path: Path, name: str) -> None:
    with pytest.raises(TorchgrowError, match=r"uniform=50% \(of the dense one's|must lie above 0%"):
        run.run(TINY, console=quiet(), out=tmp_path / "out", beside=[name])
    assert not list(tmp_path.iterdir())


def test_every_update_is_on_record(finished: Any) -> None:
    """The last update of an epoch is the structure that the next epoch trains."""
    rows = [r for r in lines(finished[0]) if r["network"] == "grown"]
    assert [[update["epochs"] for update in row["updates"]] for row in rows] == [[1.0], [2.0], [3.0], [4.0]]
    for row, later in itertools.pairwise(rows):
        assert {name: row["updates"][-1][name] for name in ("params", "flops", "widths", "depths")} == {
            name: later[name] for name in ("params", "flops", "widths", "depths")
        }
    assert all(row["updates"] == [] for row in lines(finished[0]) if row["network"] != "grown")


def test_updates_within_an_epoch_say_when_they_came(tmp_path: Path) -> None:
    recipe = replace(TINY, epochs=2, updates_per_epoch=4, build=partial(BUILD, depth=14), depth=True)
    out = run.run(recipe, console=quiet(), out=tmp_path / "run", beside=())
    rows = lines(out)
    assert [u["epochs"] for row in rows for u in row["updates"]] == [0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]
    assert rows[0]["updates"][0]["depths"].keys() == {"layer1", "layer2", "layer3"}


def test_where_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Model, data and what a grower brings to life are where the device says; the bank sleeps on the CPU."""
    device = torch.device("meta")
    recipe, images = from_recipe.with_data(TINY, quiet(), None, device=device)
    assert isinstance(images, data.ImageData)
    model = from_recipe.make_network(recipe.build, 1.0, device)
    assert {p.device for p in model.parameters()} == {images.example().device} == {device} == {images.device}
    here = from_recipe.make_network(recipe.build, 1.0, torch.device("cpu"), meta=True)
    assert {p.device for p in here.parameters()} == {device}
    batch, labels = next(images.train_batches(batch_size=4, shift=1, mirror=True, generator=torch.Generator()))
    assert batch.device == labels.device == device


def test_the_paper_preset_runs(tmp_path: Path) -> None:
    out = run.run(replace(TINY, preset="paper"), console=quiet(), out=tmp_path / "paper", beside=())
    frame = json.loads((out / "frame.json").read_text())
    assert json.loads((out / "results.json").read_text())["grown"]["params"] <= frame["limits"]["params"]


def test_the_papers_preset_on_a_short_schedule_is_warned_of() -> None:
    paper = replace(TINY, preset="paper:paced=False")
    assert from_recipe.far_from_paper(TINY, 4) == ""
    assert from_recipe.far_from_paper(replace(TINY, preset="paper"), 4) == "", "at the paper's pace"
    assert "belong to 62,400 steps. With the 16 of this run" in from_recipe.far_from_paper(paper, 4)
    assert from_recipe.far_from_paper(replace(paper, epochs=160), 390) == ""


# --- folders


def test_an_existing_run_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("kept")
    with pytest.raises(TorchgrowError, match="exists already and is not overwritten; choose another --out"):
        run.run(TINY, console=quiet(), out=tmp_path / "out")
    assert (tmp_path / "out" / "results.json").read_text() == "kept"


@pytest.mark.parametrize("taken", ["out", "out.partial", "file"])
@pytest.mark.parametrize("command", [run.run, search.search])
def test_a_folder_that_is_taken_is_refused_before_it_costs_anything(
    command: Any, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No data is read, no network traced, and nothing else is written."""
    out = tmp_path / "out"
    if taken == "file":
        (tmp_path / "file").touch()
        out = tmp_path / "file" / "deep" / "out"
    else:
        (tmp_path / taken).mkdir()
        (tmp_path / taken / "mine.txt").touch()
    for module in (run, search):
        monkeypatch.setattr(module, "with_data", lambda *_, **__: pytest.fail("data was read"))
    before = list(tmp_path.iterdir())
    with pytest.raises(TorchgrowError, match="choose another --out"):
        command(TINY, console=quiet(), out=out)
    assert list(tmp_path.iterdir()) == before


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TorchgrowError, match=r"cannot be made: .*; choose another --out"):
        RunFolder(tmp_path / "file" / "out")


def test_default_out_takes_the_first_free_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(2):
        names.append(default_out("digits").name)
        default_out("digits").mkdir(parents=True)
    (tmp_path / "runs" / "digits-3.partial").mkdir()
    assert [*names, default_out("digits").name] == ["digits", "digits-2", "digits-4"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), TorchgrowError("the reason")])
def test_a_stopped_run_stays_readable_and_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    whole = RunFolder.append

    def stop_after_two(folder: RunFolder, record: Epoch) -> None:
        whole(folder, record)
        if record.epoch == 2:
            raise error

    monkeypatch.setattr(RunFolder, "append", stop_after_two)
    with pytest.raises(type(error)):
        run.run(TINY, console=quiet(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    left = tmp_path / "out.partial"
    assert [record["epoch"] for record in lines(left)] == [1, 2]
    assert (left / "stopped.txt").read_text().startswith(type(error).__name__)
    assert json.loads((left / "config.json").read_text())["name"] == "digits"


def test_a_folder_that_is_moved_away_while_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not made anew with what comes later in it, which would look like a whole run; put back, it goes on."""
    whole, left, moved = RunFolder.append, tmp_path / "out.partial", tmp_path / "moved"

    def moving(folder: RunFolder, record: Epoch) -> None:
        whole(folder, record)
        if record.epoch == 2:
            left.rename(moved)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", moving)
        with pytest.raises(TorchgrowError, match=r"out\.partial was moved or deleted while this run was writing"):
            run.run(TINY, console=quiet(), out=tmp_path / "out")
    assert [record["epoch"] for record in lines(moved)] == [1, 2]
    assert not (left / "metrics.jsonl").exists()
    shutil.rmtree(left, ignore_errors=True)
    moved.rename(left)
    run.resume(tmp_path / "out", console=quiet())
    assert [record["epoch"] for record in lines(tmp_path / "out")] == 3 * [*range(1, TINY.epochs + 1)]


def test_bad_data_leaves_no_folder(tmp_path: Path) -> None:
    recipe = replace(get("resnet20-cifar10"), epochs=2)
    with pytest.raises(TorchgrowError, match="no CIFAR-10 in"):
        run.run(recipe, console=quiet(), out=tmp_path / "out", folder=tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_cifar_from_files(tmp_path: Path, cifar_folder: Path) -> None:
    build = partial(ResNet, depth=8, widths=(4, 8, 16))  # one block a stage: no layer can go
    recipe = replace(get("resnet20-cifar10"), build=build, depth=False, epochs=2, batch_size=16, subset=None)
    out = run.run(recipe, console=quiet(), out=tmp_path / "out", folder=cifar_folder)
    assert len(lines(out)) == 6


# --- training


def test_nan_loss_stops_with_where_and_why(tmp_path: Path) -> None:
    with pytest.raises(TorchgrowError, match=r"grown, epoch \d+, step \d+ of 4: the loss is (nan|inf)"):
        run.run(replace(TINY, lr=1e30), console=quiet(), out=tmp_path / "out")
    assert (tmp_path / "out.partial" / "stopped.txt").exists()


class Spy(nn.Module):
    """A linear network that notes in which mode it is called."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)
        self.notes = notes

    def forward(self, x: Tensor) -> Tensor:
        self.notes.append("train" if self.training else "evaluate")
        return self.fc(x.flatten(1))


def test_evaluation_comes_before_the_update() -> None:
    notes: list[str] = []
    model = Spy(notes)

    class Grower:
        history = ("the seed",)

        def cost(self) -> Any:
            return torchgrow.measure(nn.Linear(64, 10), torch.zeros(2, 64))

        def widths(self) -> Any:
            return {}

        def depths(self) -> Any:
            return {}

        def update(self) -> Any:
            notes.append("update")
            return Event(**dict.fromkeys(Event.__dataclass_fields__, cast("Any", 0)))

    digits = data.load_images("digits", subset=64)
    recipe = replace(TINY, epochs=2, batch_size=64)
    epochs = train.fit(
        "x", model, from_recipe.make_optimizer(model, recipe), digits, recipe, grower=cast("Any", Grower())
    )
    assert len(list(epochs)) == 2
    assert notes == ["train", "evaluate", "update"] * 2


def test_seconds_leave_evaluation_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    real = train.evaluate

    def slow(model: Any, images: Any) -> Any:
        clock[0] += 1000
        return real(model, images)

    monkeypatch.setattr(train, "evaluate", slow)
    digits = data.load_images("digits", subset=64)
    model = Spy([])
    epochs = list(train.fit("x", model, from_recipe.make_optimizer(model, TINY), digits, TINY))
    assert [epoch.seconds for epoch in epochs] == [0.0] * 4


def test_dense_runs_repeat_exactly() -> None:
    digits = data.load_images("digits", subset=64)

    def losses() -> Any:
        torch.manual_seed(0)
        model = BUILD()
        return [epoch.loss for epoch in train.fit("x", model, from_recipe.make_optimizer(model, TINY), digits, TINY)]

    assert losses() == losses()


# --- the environment and the display


def test_environment_outside_git(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_git(*arguments: Any, **keywords: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    assert environment()["commit"] is None


def test_commit_of_a_foreign_repository_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        stdout = "/somewhere/else\n"

    monkeypatch.setattr(subprocess, "run", lambda *arguments, **keywords: Done())
    assert environment()["commit"] is None


SHORT = {0: "0", 987: "987", 37_912: "37.9k", 999_499: "999k", 999_987: "1M", 999.9: "1k", 1.5e6: "1.5M", 2e15: "2P"}


@pytest.mark.parametrize(("number", "text"), SHORT.items())
def test_short_numbers(number: float, text: str) -> None:
    assert short(number) == text


def shown(display: Display, width: int = 100) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(display.render())
    return console.export_text()


def epoch_of(**fields: Any) -> Epoch:
    plain = {"network": "grown", "epoch": 4, "loss": 0.3, "test_loss": 0.2, "accuracy": 97.5, "params": 30_000}
    plain |= {"flops": 900_000, "training_flops": 10**9, "seconds": 3.0, "lr": 0.1}
    return Epoch(**{**plain, **fields})


def test_the_live_panel_shows_progress_size_and_widths(finished: Any) -> None:
    display = Display(Console(force_terminal=True, file=io.StringIO()))
    assert shown(display).strip() == ""
    cost = torchgrow.measure(BUILD(), torch.randn(2, 1, 8, 8))
    full = {"conv1": 4, "layer3.0.conv1": 16}
    limits = {"params": 60_000, "flops": None}
    display.start("grown", epochs=30, frame=replace(cost, params=100_000), limits=limits, full=full)
    assert "epoch 1/30" in shown(display)
    display.epoch(epoch_of(widths={"conv1": 3, "layer3.0.conv1": 7}))
    display.step(5, 2, 4)
    text = shown(display)
    assert "epoch 5/30" in text
    assert "accuracy 97.50 %" in text
    assert "30k of 60k budget" in text
    assert "30.0 % of dense" in text
    assert "3/4" in text
    assert "7/16" in text


def test_the_live_panel_stays_short(finished: Any) -> None:
    display = Display(Console(force_terminal=True, file=io.StringIO()))
    full = {f"layer{i}": 8 for i in range(50)}
    cost = torchgrow.measure(BUILD(), torch.randn(2, 1, 8, 8))
    display.start("grown", epochs=30, frame=cost, limits={}, full=full)
    display.epoch(epoch_of(widths=full))
    assert "and 26 more groups" in shown(display)
    assert len(shown(display).splitlines()) < 30


def test_the_table_without_a_dense_twin_has_no_shares() -> None:
    result = run.Result(accuracy=98.0, params=1000, flops=2000, training_flops=10**6, seconds=1.5)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table({"grown": result}))
    text = console.export_text()
    assert "98.00 %" in text
    assert "(" not in text

"""Searches in a run folder: all that was spent is counted, and a search that is stopped ends as the unbroken one."""

import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from safetensors.torch import load_file
from torch.nn import functional as F
from typer.testing import CliRunner

import torchgrow
import torchgrow.lab.train
from stopping import Stop, stopping
from torchgrow import Budget, TorchgrowError
from torchgrow.cli import app
from torchgrow.lab import checkpoints, report, run, search
from torchgrow.lab.evidence import rows
from torchgrow.lab.from_recipe import extent, make_network, make_optimizer, with_data
from torchgrow.lab.models import ResNet
from torchgrow.lab.recipes import get
from torchgrow.lab.run_folder import RunFolder
from torchgrow.lab.train import fit

TINY = replace(
    get("digits"),
    build=partial(ResNet, depth=14, widths=(4, 8, 16), in_channels=1),
    epochs=4,
    subset=128,
    batch_size=32,
    budget=Budget(params="50%"),
    schedule="wsd",
    shift=1,
)


def quiet() -> Any:
    return Console(quiet=True)


def start(out: Path, beside: Sequence[str] = ("uniform",), **settings: Any) -> Path:
    given: dict[str, Any] = {"candidates": 4, "rungs": (0.25, 0.5), **settings}
    return search.search(TINY, console=quiet(), out=out, beside=beside, **given)


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def end(folder: Path) -> Any:
    """All that a search leaves but for the seconds it took."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    results = read(folder, "results.json")
    for record in [*records, *results.values()]:
        del record["seconds"]
    weights = {name: tensor.tolist() for name, tensor in load_file(folder / "network" / "model.safetensors").items()}
    return records, results, weights, read(folder, "search.json"), read(folder, "frame.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start(tmp_path_factory.mktemp("unbroken") / "out")


def test_the_cost_of_the_search_is_in_the_result(folder: Path) -> None:
    """Trials that were left behind, and the winner from its first epoch to its last, each epoch once."""
    found, results = read(folder, "search.json"), read(folder, "results.json")
    _, data = with_data(TINY, quiet(), None)
    steps, samples = extent(torch.nn.Module(), data, TINY)
    spent = [3 * trial["flops"] * steps * samples * trial["epochs"] for trial in found["trials"]]
    assert spent == [trial["training_flops"] for trial in found["trials"]]
    assert sum(spent) == found["training_flops"]
    assert sorted(trial["epochs"] for trial in found["trials"]) == [1, 1, 2, 2]
    winner = found["trials"][found["winner"]]
    left = 3 * winner["flops"] * steps * samples * (TINY.epochs - winner["epochs"])
    assert results["searched"]["training_flops"] == sum(spent) + left
    assert (results["searched"]["params"], results["searched"]["flops"]) == (winner["params"], winner["flops"])
    assert winner["losses"][-1] == min(t["losses"][-1] for t in found["trials"] if t["epochs"] == 2)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    own = [record for record in records if record["network"] == "searched"]
    assert [record["epoch"] for record in own] == [1, 2, 3, 4]
    assert results["searched"]["seconds"] == own[-1]["seconds"]
    for number, trial in enumerate(found["trials"]):
        mine = [record for record in records if record["network"] == f"trial={number}"]
        assert [record["epoch"] for record in mine] == list(range(1, trial["epochs"] + 1))
        assert trial["losses"] == [record["loss"] for record in mine], "rungs of one epoch"
    assert results.keys() == {"uniform", "searched"}
    assert {"size.png", "cost.png", "accuracy.png"} <= {path.name for path in folder.iterdir()}
    assert not (folder / "checkpoints").exists()


class Dropping(ResNet):
    """Draws random numbers while it trains."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(x), 0.1, self.training)


def test_the_winner_is_what_its_shape_alone_would_come_to(tmp_path: Path) -> None:
    """Bit for bit: other trials in between take no random numbers from it."""
    recipe = replace(TINY, build=partial(Dropping, depth=14, widths=(4, 8, 16), in_channels=1))
    how: Any = {"candidates": 2, "rungs": (0.25, 0.5)}
    out = search.search(recipe, console=quiet(), out=tmp_path / "out", beside=(), **how)
    found = read(out, "search.json")
    _, data = with_data(recipe, quiet(), None)
    factory = partial(make_network, recipe.build, 1.0, data.device)
    again = torchgrow.search(
        factory, recipe.budget, example_inputs=data.example(), train=lambda *_: 0.0, length=4, depth=True, **how
    )
    model = again.fresh(again.trials[found["winner"]])
    torch.manual_seed(recipe.seed)
    for _ in fit("alone", model, make_optimizer(model, recipe), data, recipe):
        pass
    saved = torchgrow.load(out / "network", factory)
    for (name, one), other in zip(model.state_dict().items(), saved.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


# 4 steps an epoch; 4 trials of 1 epoch, 2 of one more, 2 epochs of the winner, 4 of the uniform network
MOMENTS = [
    # in the first trial; before the second rung; in the winner's last epoch
    ((F, "cross_entropy", 2), (RunFolder, "append", 4), (F, "cross_entropy", 14)),
    # recorded, no checkpoint; at the winner's result; its network is not saved
    ((checkpoints, "save_checkpoint", 1), (search, "result_of", 1), (torchgrow, "save", 1)),
    # between winner and uniform; at the very end
    ((search, "train_network", 1), (report, "draw", 1)),
]


@pytest.mark.parametrize("moments", MOMENTS, ids=lambda moments: " and ".join(name for _, name, _ in moments))
def test_a_stopped_search_goes_on_as_if_it_had_not_been(
    moments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    out = tmp_path / "out"
    for moment in moments:
        with monkeypatch.context() as patch:
            stopping(patch, *moment)
            with pytest.raises(Stop):
                search.resume(out, console=quiet()) if out.with_name("out.partial").exists() else start(out)
    search.resume(out, console=quiet())
    assert end(out) == end(folder)


def test_what_was_trained_before_a_stop_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, steps = tmp_path / "out", 0
    original = F.cross_entropy

    def counting(*arguments: Any, **keywords: Any) -> Any:
        nonlocal steps
        steps += not torch.is_inference_mode_enabled()
        return original(*arguments, **keywords)

    with monkeypatch.context() as patch:
        stopping(patch, RunFolder, "append", 4)
        with pytest.raises(Stop):
            start(out)
    monkeypatch.setattr(F, "cross_entropy", counting)
    search.resume(out, console=quiet())
    # Three trials had an epoch on record and no checkpoint, which is written when the next epoch begins.
    again = sum(trial["epochs"] for trial in read(out, "search.json")["trials"][:3] if trial["epochs"] > 1)
    last = read(out, "search.json")["trials"][3]["epochs"]
    assert steps == 4 * (again + last + 2 + 4)


@pytest.mark.parametrize("stop", [False, True])
def test_anew_the_winner_begins_with_other_weights(stop: bool, tmp_path: Path, folder: Path, monkeypatch: Any) -> None:
    out = tmp_path / "out"
    if stop:
        with monkeypatch.context() as patch:
            stopping(patch, RunFolder, "append", 9)
            with pytest.raises(Stop):
                start(out, beside=(), anew=True)
        search.resume(out, console=quiet())
    else:
        start(out, beside=(), anew=True)
    found, before = read(out, "search.json"), read(folder, "search.json")
    assert found["trials"] == before["trials"]
    assert found["winner"] == before["winner"]
    winner = found["trials"][found["winner"]]
    whole = winner["training_flops"] // winner["epochs"] * TINY.epochs
    assert read(out, "results.json")["searched"]["training_flops"] == found["training_flops"] + whole
    assert end(out)[2] != end(folder)[2]


def test_rungs_to_the_very_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The winner is trained when the search is over, also where it was stopped just then."""
    whole = start(tmp_path / "whole", beside=(), candidates=2, rungs=(1.0,))
    with monkeypatch.context() as patch:
        stopping(patch, search, "result_of", 1)
        with pytest.raises(Stop):
            start(tmp_path / "out", beside=(), candidates=2, rungs=(1.0,))
    search.resume(tmp_path / "out", console=quiet())
    assert end(tmp_path / "out") == end(whole)


def test_held_out_images_judge_where_that_is_asked_for(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report and the run's own pictures say so."""
    out = start(tmp_path / "out", beside=(), validate=True)
    assert read(out, "config.json")["search"]["validate"] is True
    assert read(out, "results.json")["searched"] != read(folder, "results.json")["searched"]
    said = [(task.judged_on, task.setting().rpartition(", ")[2]) for one in (out, folder) for task in rows.read([one])]
    assert said == [("held-out", "judged by training images held out"), ("test", "judged by test data")]
    drawn: list[Figure] = []
    monkeypatch.setattr(report, "say_of", lambda figure, *_: drawn.append(figure))
    for one, word in ((out, "Held-out accuracy"), (folder, "Test accuracy")):
        drawn.clear()
        report.draw(one)
        titles = [axes.get_title("left") + axes.get_title() for figure in drawn for axes in figure.axes]
        assert sum(word in title for title in titles) == 2 + (one is folder), titles


def test_the_tables_tell_trials_and_costs(tmp_path: Path) -> None:
    console = Console(record=True, width=160, file=io.StringIO())
    search.search(TINY, console=console, out=tmp_path / "out", beside=("dense",), candidates=2, rungs=(0.25,))
    said = re.sub(r"\s+", " ", console.export_text())
    assert "2 shapes of params <= 50%, compared after 1 of 4 epochs; with a whole training at most" in said
    shares = [float(x) for x in re.findall(r"(\d\.\d\d) and (\d\.\d\d) of one dense .*?(\d\.\d\d) in all", said)[0]]
    assert shares[2] == pytest.approx(shares[0] + shares[1], abs=0.02)
    results = read(tmp_path / "out", "results.json")
    share = results["searched"]["training_flops"] / results["dense"]["training_flops"]
    assert shares[2] == pytest.approx(share, abs=0.01)


def test_a_shape_that_diverges_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it comes along to the next rung for want of others; its whole rung counts as spent."""
    original = torchgrow.lab.train.train_step

    def step(where: str, loss: Any, *arguments: Any) -> float:
        return original(where, loss * (torch.nan if re.match("trial=[012]", where) else 1), *arguments)

    monkeypatch.setattr(torchgrow.lab.train, "train_step", step)
    out = start(tmp_path / "out", beside=())
    found, results = read(out, "search.json"), read(out, "results.json")
    assert found["winner"] == 3
    assert [trial["losses"][0] for trial in found["trials"][:3]] == [None] * 3
    assert sorted(len(trial["losses"]) for trial in found["trials"]) == [1, 1, 2, 2]
    winner = found["trials"][3]
    left = winner["training_flops"] // winner["epochs"] * (TINY.epochs - winner["epochs"])
    assert results["searched"]["training_flops"] == found["training_flops"] + left


def test_runs_and_searches_are_not_mixed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stopping(patch, RunFolder, "append", 1)
        with pytest.raises(Stop):
            start(tmp_path / "searched")
        stopping(patch, RunFolder, "append", 1)
        with pytest.raises(Stop):
            run.run(TINY, console=quiet(), out=tmp_path / "grown", beside=())
    with pytest.raises(TorchgrowError, match="is a search that was stopped; go on with it by: torchgrow search --res"):
        run.resume(tmp_path / "searched", console=quiet())
    with pytest.raises(TorchgrowError, match="is a run without a search; go on with it by: torchgrow run --resume"):
        search.resume(tmp_path / "grown", console=quiet())


def test_what_is_not_searched_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TorchgrowError, match="begins with a frame on the meta device, and a search cuts its trials"):
        search.search(replace(TINY, meta=True), console=quiet(), out=tmp_path / "out")
    with pytest.raises(TorchgrowError, match="begins with weights, and a search cuts"):
        search.search(replace(TINY, weights="weights.pt"), console=quiet(), out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Any:
    found: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(search, "search", lambda recipe, **keywords: found.append((recipe, keywords)))
    monkeypatch.setattr(search, "resume", lambda path, **keywords: found.append((path, keywords)))
    return found


def test_options_reach_the_search(calls: Any) -> None:
    words = "search resnet20-cifar10 --epochs 30 --budget flops=50% --schedule wsd --rungs '0.1 0.4' --anew --seed 2"
    done = CliRunner().invoke(app, [*words.replace("'0.1 0.4'", "X").split(), "--candidates", "8", "--validate"])
    assert "cannot read the rungs 'X'; write shares of the epochs, like '0.2 0.3 0.5'" in " ".join(done.output.split())
    rest = [word if word != "X" else "0.1 0.4" for word in words.replace("'0.1 0.4'", "X").split()]
    assert CliRunner().invoke(app, [*rest, "--candidates", "8", "--validate"]).exit_code == 0
    recipe, keywords = calls[0]
    assert (recipe.epochs, recipe.schedule, recipe.seed, str(recipe.budget)) == (30, "wsd", 2, "flops <= 50%")
    assert (keywords["rungs"], keywords["candidates"], keywords["anew"]) == ([0.1, 0.4], 8, True)
    assert keywords["validate"]
    assert keywords["beside"] == ["uniform"]


def test_resume_takes_nothing_else(calls: Any) -> None:
    assert CliRunner().invoke(app, ["search", "--resume", "runs/x"]).exit_code == 0
    assert calls[0][0] == Path("runs/x")
    for more in (["--anew"], ["--rungs", "0.5"], ["--beside", "dense"], ["--seed", "1"]):
        done = CliRunner().invoke(app, ["search", "--resume", "runs/x", *more])
        assert done.exit_code == 1
        assert "everything from its folder: torchgrow search --resume runs/x" in " ".join(done.output.split())


def test_a_search_is_resumed_by_the_name_of_the_folder_one_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one.partial").mkdir()
    (tmp_path / "one.partial" / "mine.txt").touch()
    monkeypatch.chdir(tmp_path / "one.partial")
    with pytest.raises(TorchgrowError, match=r"one\.partial is not a run that was stopped: it has no config\.json"):
        search.resume(Path(), console=quiet())


def test_the_seed_after_the_last_one_is_the_first(tmp_path: Path) -> None:
    recipe = replace(TINY, seed=2**63 - 1, epochs=2, subset=64)
    search.search(recipe, console=quiet(), out=tmp_path / "out", beside=(), candidates=2, rungs=(0.5,), anew=True)
    assert read(tmp_path / "out", "config.json")["seed"] == 2**63 - 1

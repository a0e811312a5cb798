"""Law 4 for whole runs: stopped or killed anywhere, a run ends as the unbroken one."""

import json
import os
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file
from torch.nn import functional as F

import torchgrow.exchange
import torchgrow.persistence.folder
import torchgrow.policies.default
from stopping import Stop, stopping
from torchgrow import Budget, TorchgrowError
from torchgrow.lab import checkpoints, report, run
from torchgrow.lab.models import ResNet
from torchgrow.lab.recipes import RECIPES, from_json, get, with_shortcut
from torchgrow.lab.run_folder import RunFolder, check_new

BUILD = partial(ResNet, depth=8, widths=(4, 8, 16), in_channels=1)
TINY = replace(
    get("digits"),
    build=BUILD,
    epochs=2,
    subset=128,
    batch_size=32,
    budget=Budget(params="20%"),
    depth=False,
    preset="default:ramp=0.1",
    schedule="milestones",
    warmup=0.0,
    lr_milestones=(0.5,),
)


def quiet() -> Any:
    return Console(quiet=True)


def start(out: Path, beside: Sequence[str] = run.TWINS) -> Path:
    return run.run(TINY, console=quiet(), out=out, beside=beside, every=3)


def start_or_resume(out: Path) -> Path:
    return run.resume(out, console=quiet()) if out.with_name(out.name + ".partial").exists() else start(out)


def end(folder: Path) -> Any:
    """All that a run leaves but for the seconds it took."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((folder / "results.json").read_text())
    for record in [*records, *results.values()]:
        del record["seconds"]
    structure = json.loads((folder / "network" / "structure.json").read_text())
    weights = {name: tensor.tolist() for name, tensor in load_file(folder / "network" / "model.safetensors").items()}
    return records, results, structure, weights, json.loads((folder / "frame.json").read_text())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return end(start(tmp_path_factory.mktemp("unbroken") / "out"))


# 4 steps an epoch, 2 epochs: a checkpoint after 3 steps and after each epoch.
MOMENTS = [
    # before there is any checkpoint; the grown network is done, its result is not
    ((F, "cross_entropy", 2), (run, "judged", 1)),
    # in mid-epoch; its result is there, the network is not saved
    ((F, "cross_entropy", 7), (torchgrow, "save", 1)),
    # trained and updated, not recorded; recorded in the dense twin, no checkpoint
    ((RunFolder, "append", 2), (checkpoints, "save_checkpoint", 4)),
    # recorded, no checkpoint; at the very end
    ((checkpoints, "save_checkpoint", 2), (report, "draw", 1)),
]


@pytest.mark.parametrize("moments", MOMENTS, ids=lambda moments: " and ".join(name for _, name, _ in moments))
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    moments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: Any
) -> None:
    for moment in moments:
        with monkeypatch.context() as patch:
            stopping(patch, *moment)
            with pytest.raises(Stop):
                start_or_resume(tmp_path / "out")
    run.resume(tmp_path / "out.partial", console=quiet())
    assert end(tmp_path / "out") == unbroken
    assert not (tmp_path / "out.partial").exists()
    assert not (tmp_path / "out" / "checkpoints").exists()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(TorchgrowError, match="is finished; there is nothing to go on with"):
        run.resume(Path(), console=quiet())
    assert not (tmp_path / "out" / "stopped.txt").exists()


def forked(work: Callable[[], object], kill_at: tuple[Any, str, int, str]) -> int:
    """Run in a process of its own, which kills itself (SIGKILL) at a call of a function; returns its exit status."""
    owner, name, call, where = kill_at
    original, count, updating, update = getattr(owner, name), 0, False, torchgrow.Grower.update

    def watched(grower: torchgrow.Grower) -> torchgrow.Event:
        nonlocal updating
        updating = True
        event = update(grower)
        updating = False
        return event

    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        nonlocal count
        count += updating or where == "anywhere"
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, from Python 3.12 on
        process = os.fork()
    if process == 0:
        try:
            torchgrow.Grower.update = watched  # type: ignore[method-assign, assignment]
            setattr(owner, name, wrapper)
            work()
        finally:
            os._exit(0)
    return os.waitpid(process, 0)[1]


KILLS = [
    (torchgrow.exchange, "writes", 9, "in an update"),  # a change is prepared, not made
    (os, "fsync", 9, "anywhere"),  # while a checkpoint is written
    (torchgrow.persistence.folder, "rename", 1, "anywhere"),  # a checkpoint is whole, but not in its place
    (torchgrow.policies.default.Default, "step", 3, "anywhere"),  # in an optimizer step
]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path, unbroken: Any) -> None:
    """Killed four times over, in the worst of moments."""
    killed = Counter[int]()
    for kill_at in KILLS:
        killed[forked(partial(start_or_resume, tmp_path / "out"), kill_at)] += 1
    assert killed == {signal.SIGKILL: len(KILLS)}
    run.resume(tmp_path / "out", console=quiet())
    assert end(tmp_path / "out") == unbroken


# --- what cannot go on


def stopped(out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch:
        stopping(patch, RunFolder, "append", 2)
        with pytest.raises(Stop):
            start(out, beside=())
    return out.with_name(out.name + ".partial")


def test_a_finished_run_and_no_run_at_all(tmp_path: Path) -> None:
    (tmp_path / "done").mkdir()
    with pytest.raises(TorchgrowError, match=r"done is not a run: it has no config\.json; name the --out of one"):
        run.resume(tmp_path / "done", console=quiet())
    (tmp_path / "done" / "config.json").write_text("{}")
    with pytest.raises(TorchgrowError, match=r"done is finished; there is nothing to go on with"):
        run.resume(tmp_path / "done", console=quiet())
    with pytest.raises(TorchgrowError, match=r"out\.partial is not a run that was stopped: it has no config\.json"):
        run.resume(tmp_path / "out", console=quiet())
    with pytest.raises(TorchgrowError, match=r"every 1 or more steps, not every 0"):
        run.run(TINY, console=quiet(), out=tmp_path / "out", every=0)
    assert [path.name for path in tmp_path.iterdir()] == ["done"]


def test_two_processes_at_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial_folder = stopped(tmp_path / "out", monkeypatch)
    first = RunFolder(tmp_path / "out", resume=True)
    with pytest.raises(TorchgrowError, match=r"another process is running in .*out\.partial; wait for it, or stop"):
        run.resume(partial_folder, console=quiet())
    first.let_go()
    run.resume(partial_folder, console=quiet())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{", r"config\.json is damaged; the run cannot go on"),
        ("config.json", "[]", r"config\.json is damaged"),
        ("config.json", "{}", r"this is not the record of a recipe: KeyError\('name'\)"),
        ("metrics.jsonl", "{}\n", r"metrics\.jsonl is damaged: .* the run cannot go on, start it anew"),
        ("metrics.jsonl", "x\n", r"metrics\.jsonl is damaged"),
        ("results.json", "null", r"results\.json is damaged"),
    ],
)
def test_damaged_records_say_so(
    name: str, text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial_folder = stopped(tmp_path / "out", monkeypatch)
    (partial_folder / name).write_text(text)
    with pytest.raises(TorchgrowError, match=message):
        run.resume(tmp_path / "out", console=quiet())


def test_a_damaged_checkpoint_says_what_works_and_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: Any
) -> None:
    with monkeypatch.context() as patch:
        stopping(patch, RunFolder, "append", 2)
        with pytest.raises(Stop):
            start(tmp_path / "out")
    folder = tmp_path / "out.partial" / "checkpoints" / "grown"
    for path in folder.rglob("*.json"):
        path.write_text(path.read_text()[:-9])
    console = Console(record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    with pytest.raises(TorchgrowError, match=r"To train this network anew, .*, delete .*checkpoints.grown and go on"):
        run.resume(tmp_path / "out", console=console)
    said = console.export_text()
    console.file.close()
    assert "What was measured before the stop is in" in said
    assert "Go on from" not in said
    shutil.rmtree(folder)
    run.resume(tmp_path / "out", console=quiet())
    assert end(tmp_path / "out") == unbroken


def test_a_run_stopped_before_it_had_begun_can_start_again(tmp_path: Path) -> None:
    partial_folder = tmp_path / "out.partial"
    partial_folder.mkdir()
    (partial_folder / "lock").touch()
    (partial_folder / ".config.json").write_text('{"half')
    (partial_folder / ".mine").touch()
    with pytest.raises(TorchgrowError, match=r"look through it and delete it, or choose another --out"):
        check_new(tmp_path / "out")  # nothing of the user's is deleted
    (partial_folder / ".mine").unlink()
    (partial_folder / "environment.json").write_text("{}")
    with pytest.raises(TorchgrowError, match=r"out\.partial was stopped before it had begun, .* without --resume"):
        run.resume(tmp_path / "out", console=quiet())
    check_new(tmp_path / "out")
    with RunFolder(tmp_path / "out"):
        assert {path.name for path in partial_folder.iterdir()} == {"lock", "environment.json"}
        with pytest.raises(TorchgrowError, match="another process is running in"):
            RunFolder(tmp_path / "out")


def test_a_checkpoint_of_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial_folder = stopped(tmp_path / "out", monkeypatch)
    torchgrow.save_checkpoint(partial_folder / "checkpoints" / "grown", extra={"epoch": 1})
    with pytest.raises(TorchgrowError, match=r"was saved without a grower; load it without one"):
        run.resume(tmp_path / "out", console=quiet())
    with pytest.raises(TorchgrowError, match=r"a checkpoint's progress has epoch='2': it is damaged"):
        checkpoints.Progress(epoch="2")  # type: ignore[arg-type]


def test_another_machine_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial_folder = stopped(tmp_path / "out", monkeypatch)
    environment = json.loads((partial_folder / "environment.json").read_text())
    (partial_folder / "environment.json").write_text(json.dumps({**environment, "torch": "1.0"}))
    console = Console(record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    run.resume(tmp_path / "out", console=console)
    assert "and was 1.0; results may differ in the last bits" in console.export_text()
    console.file.close()


# --- recipes as records


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_its_record(name: str) -> None:
    recipe = get(name)
    for variant in (recipe, replace(recipe, budget=Budget(params=100_000, flops="41.5%"), threads=2, subset=64)):
        again = from_json(json.loads(json.dumps(variant.as_json())))
        assert again.as_json() == variant.as_json()
        assert again.budget.limits(torchgrow.Cost(10**7, 10**9)) == variant.budget.limits(torchgrow.Cost(10**7, 10**9))
    assert sum(p.numel() for p in again.build(0.5).parameters()) == sum(
        p.numel() for p in recipe.build(0.5).parameters()
    )


def test_variants_of_the_network_survive() -> None:
    recipe = from_json(json.loads(json.dumps(TINY.as_json())))
    assert str(recipe.build()) == str(BUILD())
    shortcut = with_shortcut(get("resnet20-cifar10"), "B")
    assert str(from_json(shortcut.as_json()).build()) == str(shortcut.build())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "digit", r"there is no recipe 'digit'"),
        ("model", "Evil", r"the network of recipe 'digits' is ResNet, not Evil"),
        ("budget", "params", r"not the record of a recipe"),
        ("epochs", "3", r"not the record of a recipe: TypeError"),
        ("epochs", 0, r"epochs must be at least 1"),
        ("model_arguments", [1], r"not the record of a recipe"),
    ],
)
def test_what_is_not_the_record_of_a_recipe(field: str, value: Any, message: str) -> None:
    with pytest.raises(TorchgrowError, match=message):
        from_json({**get("digits").as_json(), field: value})


def test_what_a_stopped_run_left_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").touch()
    with pytest.raises(TorchgrowError, match=r"out\.partial is there, and has no config\.json .* choose another --out"):
        RunFolder(tmp_path / "out")
    for config, command in ("", "run"), ("{}", "run"), ('{"search": {}}', "search"):
        (tmp_path / "out.partial" / "config.json").write_text(config)
        text = rf"out\.partial is what an earlier run left .*torchgrow {command} --resume .* choose another --out"
        with pytest.raises(TorchgrowError, match=text):
            RunFolder(tmp_path / "out")

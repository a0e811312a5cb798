"""The command line: budgets as typed, options that reach the recipe, errors without tracebacks."""

import json
import re

import pytest
from typer.testing import CliRunner

from torchgrow import TorchgrowError, cli
from torchgrow.cli import app, parse_budget


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments))


def plain(text):
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


@pytest.fixture
def ran(monkeypatch):
    """What the command hands to the run, instead of running it: (recipe, keywords)."""
    calls = []
    monkeypatch.setattr(cli, "run_recipe", lambda recipe, **keywords: calls.append((recipe, keywords)))
    return calls


@pytest.mark.parametrize(
    ("text", "params", "flops"),
    [
        ("36%", "36%", None),
        ("params=36%", "36%", None),
        ("flops=50%", None, "50%"),
        ("params=36%,flops=40.5%", "36%", "40.5%"),
        (" params=36% , FLOPS=40% ", "36%", "40%"),
        ("100000", 100_000, None),
        ("100k", 100_000, None),
        ("params=1.5M,flops=2G", 1_500_000, 2_000_000_000),
    ],
)
def test_budgets_as_typed(text, params, flops):
    budget = parse_budget(text)
    assert (budget.params, budget.flops) == (params, flops)


@pytest.mark.parametrize(
    "text", ["", "half", "36 percent", "macs=36%", "-5%", "36%,params=30%", "params=", "1T", "36%%"]
)
def test_budgets_that_cannot_be_read(text):
    with pytest.raises(TorchgrowError, match=re.escape(f"cannot read the budget {text!r}; write it like 36%")):
        parse_budget(text)


def test_list_names_every_recipe():
    done = invoke("list")
    assert done.exit_code == 0
    assert "digits" in done.output
    assert "resnet20-cifar10" in done.output


def test_digits_is_the_default(ran):
    assert invoke("run").exit_code == 0
    recipe, keywords = ran[0]
    assert recipe.name == "digits"
    assert (keywords["out"], keywords["folder"], keywords["download"], keywords["twins"]) == (None, None, False, True)


def test_options_reach_the_recipe(ran, tmp_path):
    options = f"--out {tmp_path}/o --data {tmp_path} --download --subset 100 --epochs 7 --budget flops=50% --seed 3"
    done = invoke("run", "resnet20-cifar10", *options.split(), "--preset", "paper", "--no-twins", "--shortcut", "B")
    assert done.exit_code == 0, done.output
    recipe, keywords = ran[0]
    assert (recipe.subset, recipe.epochs, recipe.seed, recipe.preset) == (100, 7, 3, "paper")
    assert (recipe.budget.params, recipe.budget.flops) == (None, "50%")
    assert recipe.build.keywords["shortcut"] == "B"
    assert not recipe.channels_last
    assert (keywords["out"], keywords["folder"]) == (tmp_path / "o", tmp_path)
    assert (keywords["download"], keywords["twins"]) == (True, False)


def test_layout_of_images(ran):
    assert invoke("run", "--channels-last").exit_code == 0
    assert ran[0][0].channels_last


def test_size_comes_before_what_is_edited(ran):
    assert invoke("run", "lstm-ptb", "--size", "medium", "--epochs", "5").exit_code == 0
    assert (ran[0][0].build.keywords["hidden"], ran[0][0].epochs) == ((650, 650), 5)


def test_threads(ran):
    assert invoke("run", "--threads", "3").exit_code == 0
    assert ran[0][0].threads == 3


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["resnet"], "error: there is no recipe 'resnet'; there are digits, resnet20-cifar10"),
        (["--budget", "half"], "error: cannot read the budget 'half'"),
        (["--budget", "0%"], "error:"),
        (["--budget", "101%"], "error:"),
        (["--epochs", "0"], "error: recipe 'digits': epochs must be at least 2"),
        (
            ["--preset", "fast"],
            "error: recipe 'digits': preset 'fast' is unknown; use one of ['default', 'global',",
        ),
        (["--shortcut", "C"], "error: shortcut is"),
        (["--size", "large"], "error: recipe 'digits' has no choice of sizes; leave --size out"),
        (["lstm-ptb", "--data", "nowhere"], "error: no text in nowhere: the folder does not exist"),
        (["lstm-ptb", "--download"], "error: a text cannot be downloaded"),
        (["--subset", "99999"], "error: a subset has 1 to 1437 of the training images"),
        (["--budget", "params=5"], "error:"),
        (["resnet20-cifar10", "--data", "nowhere"], "error: no CIFAR-10 in nowhere: the folder does not exist"),
    ],
)
def test_errors_are_one_clean_message(arguments, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke("run", *arguments)
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert text in plain(done.output)
    assert "Traceback" not in done.output


def test_ctrl_c_says_where_to_look(monkeypatch, tmp_path):
    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("torchgrow.lab.run.fit", interrupted)
    monkeypatch.chdir(tmp_path)
    done = invoke("run")
    assert done.exit_code == 130
    assert plain(done.output).endswith(
        "What was measured before the stop is in runs/digits.partial "
        "Go on from the last checkpoint with: torchgrow run --resume runs/digits stopped"
    )
    assert (tmp_path / "runs" / "digits.partial" / "config.json").exists()


def test_a_whole_run(tmp_path):
    out = tmp_path / "run"
    done = invoke("run", "digits", "--out", str(out), "--epochs", "2", "--subset", "64", "--no-twins")
    assert done.exit_code == 0, done.output
    assert str(out) in done.output.replace("\n", "")
    assert list(json.loads((out / "results.json").read_text())) == ["grown"]


# --- failures that are not the user's


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(28, "No space left on device", "runs/x"), "error: [Errno 28] No space left on device: 'runs/x'"),
        (MemoryError(), "error: out of memory; a smaller batch or network may fit"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "error: out of memory; a",
        ),
    ],
)
def test_no_room_is_told_without_a_traceback(monkeypatch, tmp_path, error, text):
    def failing(*arguments, **keywords):
        raise error

    monkeypatch.setattr("torchgrow.lab.run.fit", failing)
    done = invoke("run", "--out", str(tmp_path / "out"))
    assert done.exit_code == 1
    assert text in plain(done.output)
    assert "Traceback" not in done.output


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, tmp_path):
    def failing(*arguments, **keywords):
        raise RuntimeError("shapes")

    monkeypatch.setattr("torchgrow.lab.run.fit", failing)
    assert isinstance(invoke("run", "--out", str(tmp_path / "out")).exception, RuntimeError)


# --- going on


def test_resume_reaches_the_run(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(cli, "resume_run", lambda run, **keywords: calls.append((run, keywords["folder"])))
    assert invoke("run", "--resume", "runs/x").exit_code == 0
    assert invoke("run", "--resume", "runs/x", "--data", "there").exit_code == 0
    assert [(str(run), folder and str(folder)) for run, folder in calls] == [("runs/x", None), ("runs/x", "there")]


@pytest.mark.parametrize(
    "more", [["--epochs", "3"], ["--contiguous"], ["--seed", "0"], ["--no-twins"], ["resnet20-cifar10"]], ids=str
)
def test_resume_takes_nothing_else(more):
    done = invoke("run", "--resume", "runs/x", *more)
    assert done.exit_code == 1
    assert "a resumed run takes everything from its folder: torchgrow run --resume runs/x" in plain(done.output)

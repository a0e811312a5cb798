"""The command line: budgets as typed, options that reach the recipe, errors without tracebacks."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import torchgrow
from torchgrow import Budget, TorchgrowError, cli
from torchgrow.cli import app
from torchgrow.lab import devices, names, recipes
from torchgrow.terminal import clean_exit


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, list(arguments))


def plain(text: str) -> Any:
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the command hands to the run, instead of running it: (recipe, keywords)."""
    calls = []
    monkeypatch.setattr("torchgrow.lab.run.run", lambda recipe, **keywords: calls.append((recipe, keywords)))
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
def test_budgets_as_typed(text: str, params: Any, flops: Any) -> None:
    budget = Budget.read(text)
    assert (budget.params, budget.flops) == (params, flops)


@pytest.mark.parametrize("command", [["run", "digits"], ["search", "digits"], ["inspect", "torchvision:resnet18"]])
def test_a_second_budget_is_not_dropped(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [*command, "--budget", "36%", "--budget", "flops=50%"])
    assert done.exit_code == 1
    assert "write --budget params=36%,flops=50%" in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())


def test_a_batch_that_cannot_be_put_together_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["run", "lstm-ptb", "--scale", "smoke", "--largest-batch", "64"])
    assert done.exit_code == 1
    assert "leave largest_batch (--largest-batch) out" in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["", "half", "36 percent", "macs=36%", "-5%", "36%,params=30%", "params=", "1Q", "36%%", "1.5", "1.0"]
)
def test_budgets_that_cannot_be_read(text: str) -> None:
    with pytest.raises(TorchgrowError, match=re.escape(f"cannot read the budget {text!r}")) as caught:
        Budget.read(text)
    assert "36%" in str(caught.value)


@pytest.mark.parametrize(
    ("python", "typed", "form"),
    [
        ("36%", "36%", "36%"),
        (0.36, "0.36", "36%"),
        ("0.36", " 36.0 % ", "36%"),
        (0.005, "0.5%", "0.5%"),
        (100_000, "100k", 100_000),
        ("1.5M", "1_500_000", 1_500_000),
        (1e6, "1e6", 1_000_000),
        ("2g", "2G", 2_000_000_000),
    ],
)
def test_python_and_the_command_line_read_amounts_alike(python: Any, typed: Any, form: str) -> None:
    assert Budget(params=python) == Budget.read(typed) == Budget.read(f"params={typed}")
    assert Budget(flops=python).flops == form


def test_list_names_every_recipe() -> None:
    done = invoke("list")
    assert done.exit_code == 0
    assert "digits" in done.output
    assert "resnet20-cifar10" in done.output


def test_digits_is_the_default(ran: Any) -> None:
    assert invoke("run").exit_code == 0
    recipe, keywords = ran[0]
    assert recipe.name == "digits"
    assert (keywords["out"], keywords["folder"], keywords["download"]) == (None, None, False)
    assert (keywords["beside"], keywords["device"]) == (["dense", "uniform"], "auto")


def test_options_reach_the_recipe(ran: Any, tmp_path: Path) -> None:
    options = f"--out {tmp_path}/o --data {tmp_path} --download --subset 100 --epochs 7 --budget flops=50% --seed 3"
    done = invoke("run", "resnet20-cifar10", *options.split(), "--preset", "paper", "--no-twins", "--shortcut", "B")
    assert done.exit_code == 0, done.output
    recipe, keywords = ran[0]
    assert (recipe.subset, recipe.epochs, recipe.seed, recipe.preset) == (100, 7, 3, "paper")
    assert (recipe.budget.params, recipe.budget.flops) == (None, "50%")
    assert recipe.build.keywords["shortcut"] == "B"
    assert not recipe.channels_last
    assert (keywords["out"], keywords["folder"]) == (tmp_path / "o", tmp_path)
    assert (keywords["download"], keywords["beside"]) == (True, ())


def test_rate_and_schedule(ran: Any) -> None:
    assert invoke("run", "--lr", "0.3", "--schedule", "wsd").exit_code == 0
    assert invoke("run", "--schedule", "milestones").exit_code == 0
    assert [(r.lr, r.schedule, r.warmup) for r, _ in ran] == [(0.3, "wsd", 0.1), (0.1, "milestones", 0.0)]


def test_layout_of_images(ran: Any) -> None:
    assert invoke("run", "--channels-last").exit_code == 0
    assert ran[0][0].channels_last


def test_size_comes_before_what_is_edited(ran: Any) -> None:
    assert invoke("run", "lstm-ptb", "--size", "medium", "--epochs", "5").exit_code == 0
    assert (ran[0][0].build.keywords["hidden"], ran[0][0].epochs) == ((650, 650), 5)


def test_threads(ran: Any) -> None:
    assert invoke("run", "--threads", "3").exit_code == 0
    assert ran[0][0].threads == 3


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["resnet"], "error: there is no recipe 'resnet'; there are digits, resnet20-cifar10"),
        (["--budget", "half"], "error: cannot read the budget 'half'"),
        (["--budget", "0%"], "error:"),
        (["--budget", "101%"], "error:"),
        (["--epochs", "0"], "error: recipe 'digits': epochs must be at least 1"),
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
def test_errors_are_one_clean_message(
    arguments: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("run", *arguments)
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert text in plain(done.output)
    assert "Traceback" not in done.output


def test_ctrl_c_says_where_to_look(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*arguments: Any, **keywords: Any) -> None:
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


def test_sigterm_ends_a_run_as_ctrl_c_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As schedulers of clusters send it; it said nothing, and left no stopped.txt."""

    def terminated(*arguments: Any, **keywords: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("torchgrow.lab.run.fit", terminated)
    monkeypatch.chdir(tmp_path)
    done = invoke("run")
    assert done.exit_code == 143
    assert plain(done.output).endswith("torchgrow run --resume runs/digits stopped")
    assert (tmp_path / "runs" / "digits.partial" / "stopped.txt").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_ends_a_rank_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may wait for the others in code that runs no handlers of Python."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with clean_exit(Console()):
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.setenv("WORLD_SIZE", "1")
    with clean_exit(Console()):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL


def test_a_whole_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = invoke("run", "digits", "--out", str(out), "--epochs", "2", "--subset", "64", "--no-twins")
    assert done.exit_code == 0, done.output
    assert str(out) in done.output.replace("\n", "")
    assert list(json.loads((out / "results.json").read_text())) == ["grown"]


def test_paths_are_printed_as_they_are(tmp_path: Path) -> None:
    """Brackets are no style, and a word between colons no picture."""
    out = tmp_path / "sh [b=1] :dog:"
    done = invoke("run", "digits", "--out", out, "--epochs", "2", "--subset", "64", "--no-twins")
    assert done.exit_code == 0, done.output
    said = done.output.replace("\n", "")
    assert f"Everything about this run: {out}As one page: torchgrow report '{out}'" in said
    assert f"  {out / 'cost.png'}" in said
    again = invoke("run", "--resume", out, "--seed", "1")
    assert f"takes everything from its folder: torchgrow run --resume '{out}'" in again.output.replace("\n", "")


@pytest.mark.parametrize("command", ["run", "shrink", "search", "compare", "list", "inspect", "report", "table"])
def test_help_is_whole_in_80_columns(command: str) -> None:
    said = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"}).output
    assert "…" not in said
    assert max(map(len, said.splitlines())) <= 80


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
def test_no_room_is_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Any, text: str
) -> None:
    def failing(*arguments: Any, **keywords: Any) -> None:
        raise error

    monkeypatch.setattr("torchgrow.lab.run.fit", failing)
    done = invoke("run", "--out", str(tmp_path / "out"))
    assert done.exit_code == 1
    assert text in plain(done.output)
    assert "Traceback" not in done.output


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def failing(*arguments: Any, **keywords: Any) -> None:
        raise RuntimeError("shapes")

    monkeypatch.setattr("torchgrow.lab.run.fit", failing)
    assert isinstance(invoke("run", "--out", str(tmp_path / "out")).exception, RuntimeError)


# --- going on


def test_resume_reaches_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []
    monkeypatch.setattr("torchgrow.lab.run.resume", lambda run, **keywords: calls.append((run, keywords["folder"])))
    assert invoke("run", "--resume", "runs/x").exit_code == 0
    assert invoke("run", "--resume", "runs/x", "--data", "there").exit_code == 0
    assert [(str(run), folder and str(folder)) for run, folder in calls] == [("runs/x", None), ("runs/x", "there")]


@pytest.mark.parametrize(
    "more", [["--epochs", "3"], ["--contiguous"], ["--seed", "0"], ["--no-twins"], ["resnet20-cifar10"]], ids=str
)
def test_resume_takes_nothing_else(more: Any) -> None:
    done = invoke("run", "--resume", "runs/x", *more)
    assert done.exit_code == 1
    assert "a resumed run takes everything from its folder: torchgrow run --resume runs/x" in plain(done.output)


# --- names, help and devices


def test_names_that_need_no_pytorch_are_those_there_are() -> None:
    assert tuple(recipes.RECIPES) == names.RECIPES
    assert tuple(torchgrow.PRESETS) == cli.PRESETS


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["run", "resnet"], ["run", "--budget", "half"]])
def test_help_and_errors_do_without_pytorch(arguments: Any) -> None:
    code = "import sys; from torchgrow.__main__ import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("False\n"), done.stderr


def test_version() -> None:
    done = invoke("--version")
    assert done.output == f"torchgrow {torchgrow.__version__}\n"


def test_names_in_a_list_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    shown = invoke("list").output
    assert [name for name in names.RECIPES if name not in shown] == []


def test_a_device_that_is_not_there() -> None:
    for arguments in (
        ["run", "--device", "tpu"],
        ["compare", "--device", "tpu"],
        ["inspect", "digits", "--device", "tpu"],
    ):
        done = invoke(*arguments)
        assert done.exit_code == 1
        assert "there is no device 'tpu'; --device takes auto, cpu, cuda" in plain(done.output)
    if not torch.cuda.is_available():
        with pytest.raises(TorchgrowError, match=r"no device 'cuda' here; .* and PyTorch finds .*cpu"):
            devices.chosen("cuda")
    assert devices.chosen("cpu") == torch.device("cpu")
    with pytest.raises(TorchgrowError, match=r"MPS has no float64, in which a network is proven .* --device cpu"):
        devices.chosen("mps")


def test_every_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for mine in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", mine)
        assert devices.chosen("auto") == torch.device("cuda", int(mine))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(TorchgrowError, match=r"process 3 of this node, which has 2 GPUs.* --nproc-per-node=2, or take"):
        devices.chosen("auto")


# --- recipes of one's own

OWN = """
from dataclasses import replace
from torch import nn
from torchgrow.lab.recipes import get

class Net(nn.Sequential):
    def __init__(self, width=1.0):
        n = max(1, round(24 * width))
        super().__init__(nn.Flatten(), nn.Linear(64, n), nn.ReLU(), nn.Linear(n, 10))

def mine():
    return replace(get("digits"), name="mine", build=Net, depth=False, epochs=2, subset=128, batch_size=32)

def taken():
    return get("digits")

def nothing():
    return 3

def broken():
    return 1 / 0
"""


def test_a_recipe_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs, is compared, and a run of it that was stopped is resumed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    done = invoke("run", "own.py:mine", "--no-twins", "--budget", "0.5")
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "runs" / "mine" / "config.json").read_text())
    assert (config["source"], config["model"], config["budget"]) == ("own.py:mine", "Net", "params <= 50%")
    assert recipes.from_json(config).as_json()["model"] == "Net"
    done = invoke("compare", "own.py:mine", "--methods", "uniform", "--seeds", "1")
    assert done.exit_code == 0, done.output
    assert len((tmp_path / "results" / "compare" / "mine.jsonl").read_text().splitlines()) == 1
    assert "epoch 1/2 loss" in plain(done.output)  # no terminal: a line an epoch


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("own.py", "own.py needs the name of a function that returns a torchgrow.lab.recipes.Recipe"),
        ("own.py:min", "own.py defines no 'min'; did you mean own.py:mine?"),
        ("own.py:nothing", "own.py:nothing returned int; return a torchgrow.lab.recipes.Recipe, such as"),
        ("own.py:broken", "own.py:broken failed (line 21): ZeroDivisionError"),
        ("own.py:taken", "the recipe of own.py:taken is called 'digits'; results are filed by that name"),
        ("other.py:mine", "there is no file other.py; check the path, which begins in "),
    ],
)
def test_recipes_in_files_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    done = invoke("run", function)
    assert done.exit_code == 1
    assert text in plain(done.output)

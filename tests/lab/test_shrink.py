"""`torchgrow shrink`: a trained network goes down to a budget, whatever it is and wherever its weights are."""

import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import torchgrow
from torchgrow import TorchgrowError, measure
from torchgrow.cli import app
from torchgrow.lab import data, frames, names, recipes, run, train
from torchgrow.lab.compare import compare
from torchgrow.lab.recipes.foreign import of_model
from torchgrow.lab.run_folder import RunFolder
from torchgrow.lab.train import evaluate
from torchgrow.lab.trained import loading
from torchgrow.lab.user_files import is_library

MINE = """
from dataclasses import replace
from functools import partial
from threading import Lock
from torch import nn
from torchgrow.lab.models import ResNet
from torchgrow.lab.recipes import get

def recipe():
    build = partial(ResNet, depth=8, widths=(4, 8, 16), in_channels=1)
    return replace(get("digits"), name="mine", build=build, depth=False, subset=256, batch_size=32)

def net():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(8, 2))
    model.lock = Lock()  # which deepcopy cannot copy
    return model

def pixels():
    return nn.Conv2d(3, 2, 3)

class Aided(nn.Sequential):
    def forward(self, x):
        return (super().forward(x),) * 2 if self.training else super().forward(x)

def aided():
    return Aided(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
"""


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["shrink", *map(str, arguments)])


def plain(text: str) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


def fitted(model: nn.Module, found: data.ImageData, epochs: int, lr: float) -> nn.Module:
    """The model, trained for a while."""
    generator, optimizer = torch.Generator().manual_seed(0), torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(epochs):
        for x, labels in found.train_batches(batch_size=32, shift=0, mirror=False, generator=generator):
            loss = F.cross_entropy(model.train()(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a recipe in mine.py and weights of its network in mine.pt; and what that network scores, in %."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "mine.py").write_text(MINE)
    found = data.load_images("digits")
    torch.manual_seed(0)
    model = fitted(recipes.get(f"{folder / 'mine.py'}:recipe").build(), found, 3, 0.05)
    torch.save(model.state_dict(), folder / "mine.pt")
    return folder, evaluate(model, found)[0]


def shrunk(base: Any, out: Path, *more: Any, model: str = "", path: Any = None) -> Any:
    """The command on the base, for two epochs."""
    options = ["--budget", "flops=50%", "--epochs", 2, "--out", out, "--checkpoint-every", 5]
    return invoke(model or f"{base[0] / 'mine.py'}:recipe", "--from", path or base[0] / "mine.pt", *options, *more)


def end(folder: Path) -> Any:
    """All that a run leaves but for the seconds it took."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((folder / "results.json").read_text())
    for record in [*records, *results.values()]:
        del record["seconds"]
    tensors = {name: tensor.tolist() for name, tensor in load_file(folder / "network" / "model.safetensors").items()}
    return records, results, tensors, json.loads((folder / "frame.json").read_text())


@pytest.fixture(scope="module")
def finished(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One run that several tests look at: (run folder, what was printed)."""
    out = tmp_path_factory.mktemp("runs") / "out"
    done = shrunk(base, out)
    assert done.exit_code == 0, done.output
    return out, done.output


def pictures(folder: Path, classes: tuple[str, ...] = ("red", "green")) -> Path:
    """12 training and 4 validation images a class, each a shade of its colour."""
    random = np.random.default_rng(0)
    for split, each in (("train", 12), ("val", 4)):
        for colour, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i in range(each):
                array = random.integers(0, 120, (20, 20, 3), dtype=np.uint8)
                array[..., colour] += 100
                Image.fromarray(array).save(folder / split / name / f"{i}.png")
    return folder


# --- what comes out


def test_before_is_the_base_and_the_budget_is_kept(base: Any, finished: Any) -> None:
    results = json.loads((finished[0] / "results.json").read_text())
    assert list(results) == ["before", "shrunk"]
    whole = measure(recipes.get(f"{base[0] / 'mine.py'}:recipe").build(), torch.zeros(2, 1, 8, 8))
    before, after = results["before"], results["shrunk"]
    assert before["accuracy"] == base[1]
    assert (before["params"], before["flops"], before["training_flops"]) == (whole.params, whole.flops, None)
    assert after["flops"] <= whole.flops // 2 < 1.05 * after["flops"]
    assert after["accuracy"] > base[1] - 10
    records = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    assert [(r["network"], r["epoch"]) for r in records] == [("shrunk", 1), ("shrunk", 2)]
    assert records[0]["updates"][0]["flops"] <= whole.flops


def test_what_is_shown(finished: Any) -> None:
    out, text = finished
    for words in (
        "as it came",
        "not counted not counted",
        "the first training, of before, is not in them.",
        "To load it: import torchgrow from torchgrow.lab import recipes model = torchgrow.load(",
    ):
        assert words in plain(text)
    assert {path.name for path in out.glob("*.png")} == {"size.png", "cost.png", "accuracy.png", "widths.png"}


def test_the_line_that_is_printed_loads_it(finished: Any) -> None:
    lines = finished[1].splitlines()
    start = lines.index("import torchgrow")
    found: dict[str, Any] = {}
    exec("\n".join(lines[start : start + 3]), found)
    results = json.loads((finished[0] / "results.json").read_text())
    assert evaluate(found["model"], data.load_images("digits"))[0] == results["shrunk"]["accuracy"]


def test_whatever_is_in_a_path_the_line_that_loads_holds_it() -> None:
    assert r'torchgrow.load("a \"b\" [c]/network", lambda: ' in loading(recipes.get("digits"), Path('a "b" [c]'))


def test_it_is_filed_apart(base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("torchgrow.lab.run.run", lambda recipe, **more: calls.append((recipe, more)))
    done = shrunk(base, tmp_path / "out", "--distil", "--depth", "--lr", 0.5, "--batch-size", 7, "--std", "0.5")
    assert done.exit_code == 0, done.output
    recipe, more = calls[0]
    assert (recipe.lr, recipe.batch_size, recipe.distil, recipe.depth) == (0.5, 7, 0.9, True)
    assert (recipe.schedule, recipe.preset, recipe.std, more["beside"]) == ("linear", "shrink", (0.5,), ())
    assert shrunk(base, tmp_path / "out").exit_code == 0
    assert calls[1][0].lr == pytest.approx(recipes.get("digits").lr / 10)
    assert run.filed_as(calls[1][0]) == "shrunk-mine"
    assert recipes.from_json(json.loads(json.dumps(recipe.as_json()))).as_json() == recipe.as_json()
    with pytest.raises(TorchgrowError, match="recipe 'mine' begins with weights, and networks are compared from"):
        compare(recipe, methods=["dense"], seeds=[0], console=Console(quiet=True), out=tmp_path)


def test_distilling_differs_and_its_teacher_is_counted(base: Any, finished: Any, tmp_path: Path) -> None:
    done = shrunk(base, tmp_path / "out", "--distil", "--no-depth")
    assert done.exit_code == 0, done.output
    (_, plainly, one, _), (_, taught, other, _) = end(finished[0]), end(tmp_path / "out")
    assert plainly["before"] == taught["before"]
    assert one != other
    assert taught["shrunk"]["training_flops"] > 1.2 * plainly["shrunk"]["training_flops"]
    assert "and of its teacher's forward passes" in plain(done.output)


def test_a_saved_network_is_its_own_frame(base: Any, finished: Any, tmp_path: Path) -> None:
    done = shrunk(base, tmp_path / "out", "--preset", "shrink:importance=l1", path=finished[0] / "network")
    assert done.exit_code == 0, done.output
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (finished[0], tmp_path / "out"))
    assert {**first["shrunk"], "training_flops": None, "seconds": None} == second["before"]
    assert second["shrunk"]["flops"] <= first["shrunk"]["flops"] // 2
    torchgrow.load(tmp_path / "out" / "network", recipes.get(f"{base[0] / 'mine.py'}:recipe").build)


def test_one_epoch_is_a_rough_cut(base: Any, tmp_path: Path) -> None:
    done = shrunk(base, tmp_path / "out", "--epochs", 1)
    assert "epoch 1/1" in plain(done.output)
    records, results, _, _ = end(tmp_path / "out")
    assert results["before"]["flops"] // 2 >= results["shrunk"]["flops"] == records[0]["flops"]
    done = CliRunner().invoke(app, ["report", str(tmp_path / "out"), "--out", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done.output
    done = shrunk(base, tmp_path / "other", "--epochs", 1, "--batch-size", 256)
    assert "recipe 'mine': one epoch has 1 step here, too few for two updates of the" in plain(done.output)


# --- stopped and resumed


def killed(work: Callable[[], object], owner: Any, name: str, call: int) -> int:
    """Run in a process of its own, which kills itself at a call of a function; returns its exit status."""
    original, count = getattr(owner, name), 0

    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, from Python 3.12 on
        process = os.fork()
    if process == 0:
        try:
            setattr(owner, name, wrapper)
            work()
        finally:
            os._exit(0)
    return os.waitpid(process, 0)[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("more", [(), ("--epochs", 1)], ids=["two epochs", "one epoch"])
def test_a_killed_run_goes_on_bit_for_bit(base: Any, tmp_path: Path, more: tuple[Any, ...]) -> None:
    """In the first epoch, half shrunk, then at its end: the teacher is of the weights, not of what is left."""
    assert shrunk(base, tmp_path / "whole", "--distil", *more).exit_code == 0
    assert (
        killed(partial(shrunk, base, tmp_path / "out", "--distil", *more), train, "distillation_loss", 7)
        == signal.SIGKILL
    )
    again = partial(invoke, "--resume", tmp_path / "out")
    assert killed(again, RunFolder, "append", 1) == signal.SIGKILL
    done = again()
    assert done.exit_code == 0, done.output
    assert end(tmp_path / "out") == end(tmp_path / "whole")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_the_loss_rises_by_is_measured_once_and_counted(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at its first step, before any checkpoint, and at the end of an epoch."""
    measured = "--preset", "shrink:allocation=measured,until=0.8"
    done = shrunk(base, tmp_path / "whole", *measured)
    assert done.exit_code == 0, done.output
    assert "and of measuring what the loss rises by; the first training" in plain(done.output)
    found, frame = (json.loads((tmp_path / "whole" / f"{name}.json").read_text()) for name in ("rises", "frame"))
    assert found["rises"].keys() == frame["widths"].keys()
    assert found["flops"] == (1 + len(found["rises"])) * 2 * 256 * frame["flops"]  # 8 batches of 32, twice
    first = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[0])
    steps = [256 // 32 // 8] * 8  # an update after each, and the structure of it is the next step's
    passed = zip(steps, [frame["flops"], *(one["flops"] for one in first["updates"])], strict=False)
    assert first["training_flops"] == found["flops"] + sum(3 * 32 * many * flops for many, flops in passed)
    assert killed(partial(shrunk, base, tmp_path / "out", *measured), train, "train_step", 1) == signal.SIGKILL

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("measured once more")

    monkeypatch.setattr("torchgrow.lab.rises.measure_rises", again)
    resumed = partial(invoke, "--resume", tmp_path / "out")
    assert killed(resumed, RunFolder, "append", 1) == signal.SIGKILL
    done = resumed()
    assert done.exit_code == 0, done.output
    assert end(tmp_path / "out") == end(tmp_path / "whole")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_goes_on_with_its_own_weights_only(base: Any, tmp_path: Path) -> None:
    state = torch.load(base[0] / "mine.pt")
    torch.save(state, tmp_path / "mine.pt")
    start = partial(shrunk, base, tmp_path / "out", path=tmp_path / "mine.pt")
    assert killed(start, RunFolder, "append", 1) == signal.SIGKILL
    torch.save({name: tensor + 1 for name, tensor in state.items()}, tmp_path / "mine.pt")
    done = invoke("--resume", tmp_path / "out.partial")
    assert "error: the weights that this run began with have changed since, so it cannot go" in plain(done.output)
    done = invoke("--resume", tmp_path / "out", "--lr", 1)
    assert "error: a resumed run takes everything from its folder" in plain(done.output)


# --- networks that have no recipe


def test_a_network_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoint is one of DataParallel, of two classes; none of it is said on the command line."""
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "pictures")
    torch.manual_seed(0)
    model = torchvision.models.squeezenet1_1(num_classes=2)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, "weights.pth")
    options = ["--budget", "50%", "--data", "pictures", "--side", 32, "--epochs", 2]
    done = invoke("torchvision:squeezenet1_1", "--from", "weights.pth", *options)
    assert done.exit_code == 0, done.output
    assert 'lambda: torchvision.models.get_model("squeezenet1_1", num_classes=2)' in done.output
    out = tmp_path / "runs" / "shrunk-squeezenet1_1"
    found = torchgrow.load(out / "network", lambda: torchvision.models.squeezenet1_1(num_classes=2))
    config, results = (json.loads((out / f"{name}.json").read_text()) for name in ("config", "results"))
    assert sum(p.numel() for p in found.parameters()) == results["shrunk"]["params"]
    assert recipes.from_json(config).build(1.0).num_classes == 2
    assert (
        results["before"]["accuracy"]
        == evaluate(model, data.load_images("imagefolder", folder=Path("pictures"), side=32))[0]
    )
    if results["before"]["accuracy"] <= 60:
        assert "Warning: the network scores" in plain(done.output)
    for more, message in (
        (["--side", 8], "torchvision:squeezenet1_1 cannot read images of 3 x 8 x 8: "),
        (["--mean", "0.5"], "images of imagefolder have 3 colours; give as many to mean and std"),
        (
            ["--data", pictures(tmp_path / "three", ("r", "g", "b"))],
            "the network tells 2 classes and the images have 3",
        ),
        (["--data", tmp_path / "runs"], "holds no images to train on: found shrunk-squeezenet1_1/"),
    ):
        done = invoke("torchvision:squeezenet1_1", "--from", "weights.pth", *options, *more)
        assert f"error: {message}" in plain(done.output).replace(f"{tmp_path}/runs ", "")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["shrunk-squeezenet1_1"]


def test_a_network_in_a_file(base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    torch.manual_seed(0)
    model = frames.file_network(model="mine.py:net")
    found = data.load_images("imagefolder", folder=pictures(tmp_path / "pictures"), side=16)
    fitted(model, found, 20, 0.05)
    save_file(model.state_dict(), "net.safetensors")
    options = ["--budget", "60%", "--data", "pictures", "--side", 16, "--epochs", 2]
    done = invoke("mine.py:net", "--from", "net.safetensors", *options, "--distil")
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "runs" / "shrunk-mine-net" / "results.json").read_text())
    assert results["before"]["accuracy"] == evaluate(model, found)[0] > 80
    assert results["shrunk"]["params"] <= 0.6 * results["before"]["params"]
    torch.save(nn.Conv2d(3, 2, 3).state_dict(), "pixels.pt")
    done = invoke("mine.py:pixels", "--from", "pixels.pt", *options)
    assert "error: mine.py:pixels is no image classifier: its output is [2, 2, 14, 14], not scores" in plain(
        done.output
    )
    torch.save(nn.Sequential(nn.Identity(), nn.Identity(), nn.Linear(3, 2)).state_dict(), "aided.pt")
    done = invoke("mine.py:aided", "--from", "aided.pt", *options)
    assert "error: mine.py:aided is no image classifier: its output is tuple in training, not scores" in plain(
        done.output
    )
    done = invoke("mine.py:net", "--from", "net.safetensors", *options, "--out", ".")
    assert "error: . exists already and is not overwritten" in plain(done.output)
    done = invoke("mine.py:net", "--from", "net.safetensors", "--budget", "60%")
    assert "error: mine.py:net is no recipe, so nothing says which images it is for; name them with" in plain(
        done.output
    )


def test_pictures_are_as_the_network_was_trained_on_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(name: str, allow_unregistered: bool) -> Any:
        if name != "vit.half":
            raise RuntimeError("no such tag")
        return SimpleNamespace(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), input_size=(3, 240, 240))

    monkeypatch.setitem(sys.modules, "timm.models", SimpleNamespace(get_pretrained_cfg=said))
    seen = {name: of_model(name) for name in ("timm:vit.half", "timm:vit.none", "torchvision:inception_v3")}
    assert [(one.side, one.mean, one.std) for one in seen.values()] == [
        (240, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        (64, None, None),
        (299, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    assert of_model("torchvision:efficientnet_v2_l").mean == (0.5, 0.5, 0.5)
    monkeypatch.chdir(tmp_path)
    assert of_model("hf:.").name == tmp_path.name
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1], "size": {"shortest_edge": 256}, "crop_size": 192}'
    )
    assert (of_model(f"hf:{tmp_path}").side, of_model(f"hf:{tmp_path}").mean) == (192, (0.1, 0.2, 0.3))


def test_cifar_is_known_by_its_files(cifar_folder: Path) -> None:
    recipe = recipes.trainable("torchvision:resnet18", cifar_folder)
    assert (recipe.dataset, recipe.name, recipe.source) == ("cifar10", "resnet18", "torchvision:resnet18")


def test_a_folder_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pictures(tmp_path / "pictures")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2
    )
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "net")
    (tmp_path / "net" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1]}'
    )
    options = ["--budget", "60%", "--data", tmp_path / "pictures", "--side", 32, "--epochs", 2, "--distil"]
    done = invoke(f"hf:{tmp_path / 'net'}", *options, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mean"] == [0.5, 0.5, 0.5]
    with pytest.raises(TorchgrowError, match=r"has no config\.json; hf: names a folder on this machine"):
        frames.from_folder(str(tmp_path))


# --- what does not fit


def rest(path: Path) -> list[str]:
    return sorted(one.name for one in path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "error: name the network to shrink: torchvision:NAME, timm:NAME, hf:FOLDER"),
        (["digits"], "as in torchgrow shrink digits --from weights.pt --budget flops=50%"),
        (["digits", "--from", "mine.pt"], "as in torchgrow shrink digits --from mine.pt --budget flops=50%"),
        (["resnet", "--from", "mine.pt", "--budget", "50%"], "error: there is no model 'resnet'; what works: torchv"),
        (["MINE", "--from", "none.pt"], "there are no weights in TMP/none.pt; write them with torch.save(model.state"),
        (["MINE", "--from", "mine.py"], "error: TMP/mine.py cannot be read as weights: "),
        (["MINE", "--from", "."], "error: TMP is a folder without weights: --from takes a .pt, .pth or .safetensors"),
        (["MINE", "--from", "run"], "did you mean TMP/run/network?"),
        (["MINE", "--from", "list.pt"], "error: TMP/list.pt holds no state dict, of names and tensors: there is list"),
        (["MINE", "--from", "code.pt"], "files that would run code are not opened"),
        (
            ["MINE", "--from", "other.pt"],
            "TMP/other.pt are not those of this ResNet: missing stem.weight; foreign head; fc.weight has [10, 3] and "
            "must have [10, 16]. Name the model they were saved from: torchgrow shrink MODEL --from TMP/other.pt",
        ),
        (["MINE", "--from", "seven.pt"], "error: the network tells 7 classes and the images have 10"),
        (["MINE", "--from", "mine.pt", "--budget", "params=5"], "but what cannot be removed costs"),
        (["MINE", "--from", "mine.pt", "--preset", "fast"], "error: recipe 'mine': preset 'fast' is unknown"),
        (["MINE", "--from", "mine.pt", "--side", "8"], "only images in folders are resized, and this is digits; leave"),
        (["MINE", "--from", "mine.pt", "--mean", "red"], "error: cannot read the colours 'red'; write a number for"),
        (["MINE", "--from", "mine.pt", "--device", "tpu"], "error: there is no device 'tpu'"),
    ],
)
def test_bad_input_is_told_and_leaves_nothing(
    arguments: list[str], text: str, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    state = torch.load(base[0] / "mine.pt")
    stem = next(iter(state))
    other = {name: tensor for name, tensor in state.items() if name != stem}
    seven = {"fc.weight": state["fc.weight"][:7], "fc.bias": state["fc.bias"][:7]}
    for name, content in {
        "mine": state,
        "list": [1],
        "code": nn.Linear(1, 1),
        "other": other | {"head": torch.zeros(1), "fc.weight": torch.zeros(10, 3)},
        "seven": state | seven,
    }.items():
        torch.save(content, tmp_path / f"{name}.pt")
    (tmp_path / "run" / "network").mkdir(parents=True)
    (tmp_path / "run" / "network" / "structure.json").touch()
    before = rest(tmp_path)
    if "--budget" not in arguments and "MINE" in arguments:
        arguments = [*arguments, "--budget", "50%"]
    done = invoke(*("mine.py:recipe" if one == "MINE" else one for one in arguments))
    assert done.exit_code == 1, done.output
    assert text.replace("stem.weight", stem) in plain(done.output).replace(str(tmp_path), "TMP")
    assert "Traceback" not in done.output
    assert {*rest(tmp_path)} - {"__pycache__"} == {*before}


def test_a_recipe_without_weights_has_no_teacher() -> None:
    with pytest.raises(TorchgrowError, match="distil must be 0 without weights, which the teacher has"):
        replace(recipes.trainable("digits", None), distil=0.5)


def test_names_that_need_no_pytorch_are_those_there_are() -> None:
    assert tuple(frames.LIBRARIES) == names.LIBRARIES
    assert [is_library(name) for name in ("timm:x", "timm:", "digits", "other:x", "timm:x.py:f")] == [
        True,
        *[False] * 4,
    ]

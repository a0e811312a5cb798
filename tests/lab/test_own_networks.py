"""Networks of users' files: what tells one from another where their recipes say the same of both."""

import io
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from torchgrow import TorchgrowError
from torchgrow.lab.compare import Job, compare
from torchgrow.lab.environment import environment
from torchgrow.lab.own_networks import told_apart
from torchgrow.lab.recipes import get
from torchgrow.lab.recipes.foreign import of_model
from torchgrow.lab.recipes.registry import made
from torchgrow.lab.run import as_before
from torchgrow.lab.run_folder import RunFolder

OWN = """
from dataclasses import replace
from torch import nn
from torch.nn import functional as F
from torchgrow.lab.recipes import get

SCALE = 1.0

def head(x):  # a comment
    return x * SCALE

class Net(nn.Sequential):
    def __init__(self, width=1.0, hidden=8):
        n = max(1, round(hidden * width))
        super().__init__(nn.Flatten(), nn.Linear(64, n), nn.ReLU(), nn.Linear(n, 10))

    def forward(self, x):
        return head(F.relu(super().forward(x)))

def recipe():
    return replace(get("digits"), name="own", build=lambda width=1.0: Net(width), depth=False, epochs=2, subset=64)
"""


def test_another_network_in_the_same_file_reuses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by sizes, modules, or the code of a class and of what it names; a comment makes no other network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    edits = (
        ("8", "8"),
        ("hidden=8", "hidden=16"),
        ("nn.ReLU", "nn.Tanh"),
        ("F.relu", "F.gelu"),
        ("x * SCALE", "x / SCALE"),
        ("SCALE = 1.0", "SCALE = 2.0"),
        ("# a comment", "# another comment"),
    )
    keys, sizes = list[str](), list[int]()
    for second, (old, new) in enumerate(edits):
        Path("own.py").write_text(OWN.replace(old, new))
        os.utime("own.py", (second, second))  # Python takes a file of the same size and time for the same
        recipe = get("own.py:recipe")
        before = torch.get_rng_state()
        keys.append(Job(method="dense", recipe=recipe, data=(64, 360)).key())
        assert torch.equal(torch.get_rng_state(), before)
        sizes.append(
            compare(recipe, methods=["dense"], seeds=[0], console=Console(quiet=True), out=tmp_path / "out")[0][
                "params"
            ]
        )
    assert len(set(keys)) == 6
    assert keys[0] == keys[-1]
    assert sizes == [610, 1210, 610, 610, 610, 610, 610]
    assert len((tmp_path / "out" / "own.jsonl").read_text().splitlines()) == 6
    assert "network" not in Job(method="dense", recipe=get("digits"), data=(1437, 360)).config()


def sized(hidden: int) -> Any:
    return lambda width=1.0: nn.Linear(4, hidden)


def test_what_is_told_apart() -> None:
    """Networks of the same name by what they are, each time alike; ours, and trained ones of libraries, by record."""
    mine = replace(get("digits"), name="mine", source="own.py:mine")
    first, same, other = (told_apart(replace(mine, build=sized(hidden))) for hidden in (3, 3, 5))
    assert first == same != other
    lazy = replace(mine, build=lambda width=1.0: nn.Sequential(nn.LazyLinear(3)))
    assert told_apart(lazy) == told_apart(replace(lazy, meta=True))
    trained = replace(mine, build=sized(3), weights="w.pt")  # they do not say what is computed with them
    assert told_apart(trained) == first
    assert told_apart(get("digits")) == told_apart(replace(trained, source="torchvision:resnet18")) == {}
    with pytest.raises(TorchgrowError, match=r"recipe 'mine': build\(1\.0\) failed: ZeroDivisionError"):
        told_apart(replace(mine, build=lambda width=1.0: 1 // 0))  # type: ignore[arg-type,return-value]


def test_a_resumed_run_tells_that_its_network_changed(tmp_path: Path) -> None:
    began = replace(get("digits"), source="own.py:mine", build=sized(3))
    run_folder = RunFolder(tmp_path / "out")
    run_folder.write_json("environment.json", environment(torch.device("cpu")))
    run_folder.write_json("config.json", {**began.as_json(), **told_apart(began)})
    for hidden, changed in ((3, False), (5, True)):
        console = Console(record=True, file=io.StringIO())
        as_before(run_folder, replace(began, build=sized(hidden)), "cpu", console)
        told = "Note: the code of the network in own.py:mine is not what the run began with; what is left is trained"
        assert (told in console.export_text()) == changed


def test_a_network_that_stands_ready_made_in_a_file(tmp_path: Path) -> None:
    """It was called, without arguments; the file is executed for every build, so each is a network of its own."""
    (tmp_path / "mine.py").write_text("from torch import nn\n\nready = nn.Linear(4, 3)\n")
    name = f"{tmp_path / 'mine.py'}:ready"
    assert isinstance(made(name), nn.Linear)
    one, other = (of_model(name).build(1.0) for _ in range(2))
    assert isinstance(one, nn.Linear)
    assert isinstance(other, nn.Linear)
    assert one.weight is not other.weight


def test_a_folder_of_transformers_says_the_size_of_its_pictures(tmp_path: Path) -> None:
    """Most have no preprocessor_config.json: save_pretrained of a network writes none."""
    (tmp_path / "config.json").write_text('{"image_size": 32}')
    assert (of_model(f"hf:{tmp_path}").side, of_model(f"hf:{tmp_path}").mean) == (32, None)
    (tmp_path / "config.json").write_text('{"image_size": [48, 48]}')
    assert of_model(f"hf:{tmp_path}").side == 48
    (tmp_path / "preprocessor_config.json").write_text('{"crop_size": 24, "image_mean": [0.5, 0.5, 0.5]}')
    assert (of_model(f"hf:{tmp_path}").side, of_model(f"hf:{tmp_path}").mean) == (24, (0.5, 0.5, 0.5))

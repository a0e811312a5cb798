"""Files of earlier versions are read: networks, whole pickled models, and runs that go on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import earlier
import torchgrow
from earlier import CHECKPOINTS, FOLDER, OUTPUTS, PAPER, PICKLED, SAVED
from records import example, network
from torchgrow.moved import MOVED


def test_a_saved_network_still_loads() -> None:
    model = torchgrow.load(FOLDER / SAVED, network)
    torch.testing.assert_close(model.eval()(example()), load_file(FOLDER / OUTPUTS)["network"])


def test_a_pickled_model_still_loads_and_can_be_saved(tmp_path: Path) -> None:
    """Its adapters, records and left-out layers are classes of modules that have moved since."""
    model = torch.load(FOLDER / PICKLED, weights_only=False)
    torch.testing.assert_close(model.eval()(example()), load_file(FOLDER / OUTPUTS)["network"])
    torchgrow.save(model, tmp_path / "net")
    torch.testing.assert_close(torchgrow.load(tmp_path / "net", network).eval()(example()), model(example()))


@pytest.mark.parametrize(("folder", "how"), [("0.1", {}), ("0.1-paper", {"policy": PAPER})])
def test_a_run_still_goes_on(folder: str, how: dict[str, Any]) -> None:
    saved = FOLDER.with_name(folder)
    model, optimizer, grower = earlier.growing(**how)
    torchgrow.load_checkpoint(saved / CHECKPOINTS, grower)
    events = [event.update for event in grower.history]
    assert events == list(range(len(events)))
    assert 1 < len(events) < 7
    earlier.train(model, optimizer, grower, 6)
    torch.testing.assert_close(model.eval()(example().double()), load_file(saved / OUTPUTS)["run"])


def test_a_run_of_another_reading_does_not_go_on() -> None:
    """The paper's run of an earlier version was none of today's preset."""
    _, _, grower = earlier.growing(preset="paper")
    with pytest.raises(torchgrow.TorchgrowError, match=r"policy\.penalised=all, this Grower has present"):
        torchgrow.load_checkpoint(FOLDER.with_name("0.1-paper") / CHECKPOINTS, grower)


@pytest.mark.parametrize("name", MOVED)
def test_old_names_are_the_same_modules(name: str) -> None:
    library = name.partition("adapters_")[2]
    if library:
        pytest.importorskip(library)
    old, new = (__import__(path, fromlist=["x"]) for path in (name, MOVED[name]))
    assert old is new

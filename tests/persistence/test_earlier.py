"""Files of earlier versions are read: networks, whole pickled models, and runs that go on."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import earlier
import torchgrow
from earlier import CHECKPOINTS, FOLDER, OUTPUTS, PICKLED, SAVED
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


def test_a_run_still_goes_on() -> None:
    model, optimizer, grower = earlier.growing()
    torchgrow.load_checkpoint(FOLDER / CHECKPOINTS, grower)
    assert [event.update for event in grower.history] == [0, 1, 2, 3]
    earlier.train(model, optimizer, grower, 6)
    torch.testing.assert_close(model.eval()(example().double()), load_file(FOLDER / OUTPUTS)["run"])


@pytest.mark.parametrize("name", MOVED)
def test_old_names_are_the_same_modules(name: str) -> None:
    library = name.partition("adapters_")[2]
    if library:
        pytest.importorskip(library)
    old, new = (__import__(path, fromlist=["x"]) for path in (name, MOVED[name]))
    assert old is new

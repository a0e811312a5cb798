"""Whatever device is the default, a run on the CPU is the same run."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchgrow
from torchgrow import Budget, Grower
from torchgrow.default_device import on_default, on_host

HALF = Budget(params="50%")


@pytest.fixture(autouse=True)
def elsewhere() -> Iterator[None]:
    """The meta device as the default: what is made there by mistake has no values."""
    with torch.device("meta"):
        yield


def network() -> nn.Module:
    with torch.device("cpu"):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))


def images() -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator("cpu").manual_seed(0), device="cpu")


def grown(preset: str, folder: Path | None = None) -> nn.Module:
    model, x = network(), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    start = "frame" if preset == "shrink" else "seed"
    grower = Grower(model, optimizer, example_inputs=x, budget=HALF, updates=4, preset=preset, start=start)
    for step in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if folder is not None and step == 2:
            torchgrow.save_checkpoint(folder, grower)
            with torch.device("cpu"):
                again = network()
                other = torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9)
            second = Grower(again, other, example_inputs=x, budget=HALF, updates=4, preset=preset, start=start)
            torchgrow.load_checkpoint(folder, second)
            model, optimizer, grower = again, other, second
        grower.update()
        assert grower.cost() == torchgrow.measure(model, x)
        assert all((str(grower), grower.summary(), str(grower.course()), grower.widths()))
    return model


@pytest.mark.parametrize("preset", ["default", "paper", "random", "late", "shrink"])
def test_a_run_does_not_depend_on_it(preset: str, tmp_path: Path) -> None:
    with torch.device("cpu"):
        expected = grown(preset).state_dict()
    found = grown(preset, tmp_path / "checkpoints").state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], x) for name, x in expected.items() if isinstance(x, Tensor))


def test_nor_do_proof_cost_and_files(tmp_path: Path) -> None:
    assert torchgrow.verify(network(), images()).ok
    model = network()
    cost = torchgrow.prune_(model, images(), budget=HALF)
    assert torchgrow.measure(model, images()) == cost
    torchgrow.save(model, tmp_path / "network")
    loaded = torchgrow.load(tmp_path / "network", network)
    assert torch.equal(loaded.eval()(images()), model.eval()(images()))
    space = torchgrow.trace(network(), images())
    assert space.everything().device.type == "cpu"
    torchgrow.shrink_(network(), space, space.everything())


def test_what_the_user_makes_is_made_where_the_user_wants_it() -> None:
    with on_host():
        assert torch.zeros(1).device.type == "cpu"
        with on_default():
            assert torch.zeros(1).device.type == "meta"
            with on_host():
                assert torch.zeros(1).device.type == "cpu"
        assert torch.zeros(1).device.type == "cpu"
    assert torch.zeros(1).device.type == "meta"
    with on_default():
        assert torch.zeros(1).device.type == "meta"

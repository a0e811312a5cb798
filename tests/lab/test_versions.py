"""Networks whose modules ask a state dict for its version load from plain files too."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import mnasnet0_5

from torchgrow.lab.checkpoints import Checkpoints, Progress
from torchgrow.lab.weights import network


def small(width: float = 1.0) -> nn.Module:
    assert width == 1.0
    return mnasnet0_5(num_classes=3)


def test_a_checkpoint_goes_on(tmp_path: Path) -> None:
    checkpoints, progress = Checkpoints(folder=tmp_path), Progress(epoch=2)
    first, other = small(), small()
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (first, other)]
    checkpoints.save(progress, first, optimizers[0], None, None)
    assert checkpoints.load(other, optimizers[1], None, None).epoch == 2
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), other.state_dict().values(), strict=True))


def test_weights_are_loaded_from_a_file_with_and_without_versions(tmp_path: Path) -> None:
    model = small()
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    for name in ("plain.safetensors", "weights.pt"):
        loaded = network(tmp_path / name, small)
        assert torch.equal(loaded.state_dict()["layers.0.weight"], model.state_dict()["layers.0.weight"]), name

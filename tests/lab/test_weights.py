"""Weights from files: of whatever program wrote them, and nothing that would be wrong."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_model
from torch import nn

import torchgrow
from torchgrow import Budget, TorchgrowError
from torchgrow.lab import weights


def two_layers(width: float = 1.0) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))


def tied_layers(width: float = 1.0) -> nn.Module:
    model = two_layers()
    model[2].weight = model[0].weight  # type: ignore[index]
    return model


def test_checkpoints_of_usual_programs_are_read(tmp_path: Path) -> None:
    """Wherever the state dict stands, whatever wrapped the network, and with arguments and scores beside it."""
    model, path = two_layers(), tmp_path / "weights.pt"
    state = model.state_dict()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1).state_dict()
    for found in (
        {"model": state, "optimizer": optimizer, "args": argparse.Namespace(lr=0.1)},
        {"net": state, "optimizer": optimizer, "acc": np.float64(91.2)},
        {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()} | {"loss.weight": torch.ones(2)}},
        {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()},
        torch.optim.swa_utils.AveragedModel(model).state_dict(),
    ):
        torch.save(found, path)
        assert weights.digest(weights.network(path, two_layers)) == weights.digest(model)
    tied = tied_layers()
    save_model(tied, str(tmp_path / "tied.safetensors"))
    assert weights.digest(weights.network(tmp_path / "tied.safetensors", tied_layers)) == weights.digest(tied)
    wrong: list[tuple[dict[str, Any], str]] = [
        (
            {f"{who}.{name}": tensor for who in "ab" for name, tensor in state.items()},
            r"holds 2 networks of this kind, with 'a\.' and 'b\.' before their names; write the one to begin with",
        ),
        ({f"module.{name}": state[name] for name in list(state)[1:]}, r"Sequential: missing 0.weight. Name"),
        (state | {"1.bias": torch.full((4,), torch.nan)}, "are no numbers: 1.bias hold NaN or infinity, as after"),
        (state | {"1.bias": torch.full((4,), torch.inf)}, "are no numbers: 1.bias hold NaN or infinity, as after"),
        (
            {"big": state, "small": state},
            r"holds 2 state dicts, big, small; .*torch\.load\(\".*weights\.pt\"\)\['small'\], \"weights\.pt\"\)",
        ),
        (state | {"epoch": 3}, "holds no state dict, of names and tensors: there is epoch; in the program that"),
    ]
    for given, message in wrong:
        torch.save(given, path)
        with pytest.raises(TorchgrowError, match=message):
            weights.network(path, two_layers)
    path.write_bytes(b"")
    with pytest.raises(TorchgrowError, match=r"cannot be read as weights: it is damaged, or holds more than tensors"):
        weights.network(path, two_layers)


def test_a_network_that_was_cut_comes_from_its_state_dict_too(tmp_path: Path) -> None:
    model = two_layers()
    torchgrow.prune_(model, torch.randn(2, 4), budget=Budget(params="60%"))
    torchgrow.save(model, tmp_path / "saved")
    torch.save(model.state_dict(), tmp_path / "cut.pt")
    for path in (tmp_path / "saved", tmp_path / "saved" / "model.safetensors", tmp_path / "cut.pt"):
        assert weights.digest(weights.network(path, two_layers)) == weights.digest(model)


def test_a_file_beside_a_saved_network_is_the_file(tmp_path: Path) -> None:
    """Whatever was named there, the saved network was taken, also for a name that was mistyped."""
    saved, other = two_layers(), two_layers()
    torchgrow.save(saved, tmp_path / "saved")
    torch.save(other.state_dict(), tmp_path / "saved" / "best.pt")
    assert weights.digest(weights.network(tmp_path / "saved" / "best.pt", two_layers)) == weights.digest(other)
    for name in ("typo.pt", "structure.jsn"):
        with pytest.raises(TorchgrowError, match=name):
            weights.network(tmp_path / "saved" / name, two_layers)
        with pytest.raises(TorchgrowError, match=name):
            weights.classes_in(tmp_path / "saved" / name, two_layers)


def test_weights_have_a_digest() -> None:
    one, other = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    assert weights.digest(one) == weights.digest(other)
    other.load_state_dict({**one.state_dict(), "num_batches_tracked": torch.tensor(1)})
    assert weights.digest(one) != weights.digest(other)

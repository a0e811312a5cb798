"""The oracle of the conformance run finds out what any library cut, and whether that is exact."""

import copy
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import drawn
from oracle import SmallResNet
from torchgrow import shrink_, trace

PATH = Path(__file__).parents[2] / "benchmarks" / "peers.py"


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peers", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cut(model: nn.Module, x: torch.Tensor) -> nn.Module:
    space = trace(model, x)
    shrink_(model, space, drawn.without(space, 0.3, 0))
    return model


def test_positions_are_read_off_and_a_right_cut_is_exact(peers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = SmallResNet(), torch.randn(2, 3, 8, 8)
    monkeypatch.setitem(peers.PEERS, "mine", cut)
    row = peers.peer("mine", copy.deepcopy(model), x)
    assert row["runs"]
    assert row["exact"], row
    assert 0.2 < row["params_left"] < 0.9
    assert row["training"] < 1e-9


def test_a_norm_over_fewer_features_is_not_exact(peers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def thinner(model: Any, x: torch.Tensor) -> nn.Module:
        first, norm, last = model
        rows = torch.arange(5)
        first.weight.data, first.bias.data = first.weight.data[rows], first.bias.data[rows]
        norm.weight.data, norm.bias.data, norm.normalized_shape = norm.weight.data[rows], norm.bias.data[rows], (5,)
        last.weight.data = last.weight.data[:, rows]
        return model

    monkeypatch.setitem(peers.PEERS, "thinner", thinner)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    row = peers.peer("thinner", model, torch.randn(2, 4))
    assert row["runs"]
    assert not row["exact"]
    assert row["evaluation"] > 1e-3


def test_what_crashes_and_what_mixes_entries_is_said(peers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed(model: Any, x: torch.Tensor) -> nn.Module:
        model.weight.data = model.weight.data[:2] + 0.5
        return model

    monkeypatch.setitem(peers.PEERS, "mixed", mixed)
    monkeypatch.setitem(peers.PEERS, "broken", lambda model, x: 1 / 0)
    model, x = nn.Linear(4, 3, bias=False), torch.randn(2, 4)
    assert peers.peer("broken", copy.deepcopy(model), x)["error"].startswith("ZeroDivisionError")
    assert "does not hold entries of the frame's" in peers.peer("mixed", model, x)["error"]

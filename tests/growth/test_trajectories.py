"""Growth as recorded: a refactor changes no structure and no weight."""

import json

import pytest
import torch
from torch import Tensor

from torchgrow.growth.plan import Plan
from torchgrow.policies import Policy
from trajectories import CASES, GOLDEN, differences, run

RECORDED = json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_growth_is_as_recorded(name: str) -> None:
    """If the change is meant: `python benchmarks/trajectories.py record`, and say why in the commit and docs/log.md."""
    assert differences(RECORDED[name], run(name)) == []


@pytest.mark.parametrize("name", ["default", "paper"])
def test_other_units_are_noticed(name: str) -> None:
    assert differences(RECORDED[name], run(name, spoil=True)) != []


@pytest.mark.parametrize("name", ["default", "paper", "layers", "lstm, carried"])
@pytest.mark.filterwarnings("ignore")
def test_one_unit_more_in_an_update_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    legal = Plan.legal

    def one_more(self: Plan, keep: Tensor, policy: Policy, asked: str) -> Tensor:
        structure = legal(self, keep, policy, asked)
        if asked == "update" and not bool(structure.all()):
            structure[torch.nonzero(~structure).flatten()[0]] = True
        return structure

    monkeypatch.setattr(Plan, "legal", one_more)
    assert "structures" in differences(RECORDED[name], run(name))


def test_one_unit_is_noticed() -> None:
    found = json.loads(json.dumps(RECORDED["default"]))
    size, _, digits = found["structures"][-1].partition(":")
    found["structures"][-1] = f"{size}:{int(digits, 16) ^ 1:x}"
    assert differences(RECORDED["default"], found) == ["structures"]


def test_one_weight_is_noticed() -> None:
    found = json.loads(json.dumps(RECORDED["default"]))
    found["weights"]["head.bias"][1] += 1e-6
    assert differences(RECORDED["default"], found) == ["head.bias"]

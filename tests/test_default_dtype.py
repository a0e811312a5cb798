"""Another default dtype may be in force (`torch.set_default_dtype`): it decides nothing here."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import torchgrow
from torchgrow import Budget, Grower


@pytest.fixture
def default(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def frame(dtype: torch.dtype | None = None) -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 40, dtype=dtype),
        nn.ReLU(),
        nn.Linear(40, 24, dtype=dtype),
        nn.ReLU(),
        nn.Linear(24, 3, dtype=dtype),
    )


def trained(preset: str) -> list[Tensor]:
    """What a run of a float32 network goes through, whatever dtype is the default."""
    draws = torch.Generator().manual_seed(1)
    model, inputs = frame(torch.float32), torch.randn(8, 8, generator=draws, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws, dtype=torch.float32) / 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    start = "frame" if preset.startswith("shrink") else "seed"
    grower = Grower(
        model, optimizer, example_inputs=inputs, budget=Budget(params="40%"), updates=5, preset=preset, start=start
    )
    found: list[Tensor] = []
    for _ in range(5):
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        grower.update()
        found.append(grower.keep.clone())
    return [*found, *(parameter.detach() for parameter in model.parameters())]


PRESETS = ("default:prune=worth", "paper:relaxation=gumbel")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], indirect=True, ids=str)
def test_a_run_is_the_same_bit_for_bit(default: torch.dtype, preset: str) -> None:
    found = trained(preset)
    torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, trained(preset)))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], indirect=True, ids=str)
def test_networks_of_that_dtype_are_searched_grown_and_cut(default: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs, budget = torch.randn(8, 8), Budget(params="40%")
    search = torchgrow.search(
        frame,
        budget,
        example_inputs=inputs,
        train=lambda trial, more: trial.model(inputs).square().mean().item(),  # type: ignore[misc]
        length=10,
        candidates=2,
    )
    assert search.run().cost.params <= (most := budget.limits(search.frame_cost).params or 0)
    model = frame()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    grower = Grower(model, optimizer, example_inputs=inputs, budget=budget, updates=2)
    for _ in range(2):
        grower.update()
    assert {p.dtype for p in model.parameters()} == {default}
    assert grower.cost().params <= most
    assert torchgrow.prune_(frame(), inputs, budget=budget).params <= most

"""What stays in memory of a frame: one copy in the bank, on the host, and what lives."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchgrow
from torchgrow import Bank, trace


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters())


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def _storages(tensors: dict[str, Tensor]) -> dict[str, "weakref.ref[torch.UntypedStorage]"]:
    return {name: weakref.ref(tensor.untyped_storage()) for name, tensor in tensors.items()}


def _alive(storages: dict[str, "weakref.ref[torch.UntypedStorage]"]) -> list[str]:
    gc.collect()
    return [name for name, storage in storages.items() if storage() is not None]


def test_the_bank_lets_go_of_what_it_has_copied() -> None:
    model, example = _network(), torch.randn(16, 8)
    space = trace(model, example)
    storages = _storages({name: model.get_parameter(name) for name in space.parameters if name in space.cut_axes})
    assert storages
    bank = Bank(model, space)
    keep = space.everything()
    keep[torch.nonzero(space.removable).flatten()[::2]] = False
    bank.resize_(keep)
    assert _alive(storages) == []


@pytest.mark.parametrize("make", [_sgd, _adam])
def test_a_seed_holds_nothing_of_the_frame_but_what_is_not_cut(make: Callable[..., torch.optim.Optimizer]) -> None:
    model, example = _network(), torch.randn(16, 8)
    storages = _storages({**dict(model.named_parameters()), "1.running_mean": model.get_buffer("1.running_mean")})
    optimizer = make(model)
    grower = torchgrow.Grower(
        model, optimizer, example_inputs=example, budget=torchgrow.Budget(params="50%"), updates=4
    )
    assert _alive(storages) == ["5.bias"]  # as many as there are classes
    for _ in range(4):
        before = _storages({name: p for name, p in model.named_parameters() if name != "5.bias"})
        shapes = {name: p.shape for name, p in model.named_parameters()}
        optimizer.zero_grad()
        model(example).square().mean().backward()
        optimizer.step()
        grower.update()
        changed = {name for name, p in model.named_parameters() if p.shape != shapes[name]}
        assert not changed & set(_alive(before))
